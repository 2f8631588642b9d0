"""Backends written as text, for command lines: `ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(8)))`.

The text is read as a tree of calls of known classes with literal arguments; nothing else in it is ever run.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ppl.backend import Backend, registered
from ppl.errors import OptionError

__all__ = ["backend_from_text", "split_option", "value_from_text"]

Modules = Mapping[str, ModuleType]


def backend_from_text(text: str, modules: Modules, options: Sequence[str] = ()) -> Backend:
    """The backend that a text describes.

    Args:
        text: a class, `inverse.TwistedSMC` or `TwistedSMC`, or a call of it with options.
        modules: names that the text may use, and whose public names it may use without a prefix.
        options: further ones as "name=value"; "engine.steps=100" reaches an option of an option.

    Raises:
        OptionError: the backend or an option does not exist, or a value is refused.

    Example:
        >>> import ppl
        >>> backend_from_text("NUTS(warmup=10)", {"ppl": ppl}, ["max_depth=5"]).warmup
        10
    """
    made = value_from_text(text, modules)
    if isinstance(made, type):
        made = _call(made, (), {}, text)
    if not isinstance(made, Backend):
        raise OptionError(f"{text!r} is no backend; backends are {', '.join(sorted(registered()))}")
    for option in options:
        name, value = split_option(option)
        made = _with(made, name.split("."), value_from_text(value, modules, plain=True), name)
    return made


def split_option(text: str) -> tuple[str, str]:
    """The two sides of "name=value".

    Example:
        >>> split_option("steps=50")
        ('steps', '50')
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise OptionError(f"an option is written name=value, such as steps=50, got {text!r}")
    return name.strip(), value.strip()


def value_from_text(text: str, modules: Modules, plain: bool = False) -> Any:
    """A literal, a class, or a call of a class with such arguments.

    Args:
        text: what was typed.
        modules: names that it may use.
        plain: take words that mean nothing else as strings.

    Example:
        >>> value_from_text("(1, -2.5)", {}), value_from_text("published", {}, plain=True)
        ((1, -2.5), 'published')
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        if plain:
            return text
        raise OptionError(f"cannot read {text!r}: {error.msg}; write it like inverse.DPS(steps=200)") from None
    if plain and isinstance(tree, ast.Name) and not _known(tree.id, modules):
        return text
    return _value(tree, modules, text)


def _known(name: str, modules: Modules) -> bool:
    return name in modules or any(name in getattr(m, "__all__", ()) for m in modules.values())


def _value(node: ast.expr, modules: Modules, text: str) -> Any:
    """The value of one node of the tree."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, modules, text)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        values = [_value(e, modules, text) for e in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(k, modules, text) for k in node.keys if k is not None]
        return dict(zip(keys, (_value(v, modules, text) for v in node.values), strict=True))
    if isinstance(node, ast.Name | ast.Attribute):
        return _public(node, modules, text)
    if isinstance(node, ast.Call) and not any(k.arg is None for k in node.keywords):
        function = _value(node.func, modules, text)
        if not isinstance(function, type):
            raise OptionError(
                f"{ast.unparse(node.func)} in {text!r} is no class; options are objects such as LowRank(8)"
            )
        named = {k.arg: _value(k.value, modules, text) for k in node.keywords if k.arg is not None}
        return _call(function, [_value(a, modules, text) for a in node.args], named, text)
    raise OptionError(f"cannot use {ast.unparse(node)!r} in {text!r}; only classes with plain values are read")


def _public(node: ast.Name | ast.Attribute, modules: Modules, text: str) -> Any:
    """A public name of one of the modules, with or without its prefix."""
    spelled = ast.unparse(node)
    prefix, dot, name = spelled.rpartition(".")
    places = [modules[prefix]] if dot and prefix in modules else [] if dot else list(modules.values())
    for module in places:
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
    known = sorted({f"{m}.{n}" for m, module in modules.items() for n in _classes(module)} & _names(modules))
    near = difflib.get_close_matches(name, [k.rpartition(".")[2] for k in known], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"there is no {spelled!r}; {hint}backends are {', '.join(known)}")


def _classes(module: ModuleType) -> list[str]:
    return [n for n in getattr(module, "__all__", ()) if isinstance(getattr(module, n), type)]


def _names(modules: Modules) -> set[str]:
    """Backends by their full names."""
    backends = set(registered().values())
    return {f"{m}.{n}" for m, module in modules.items() for n in _classes(module) if getattr(module, n) in backends}


def _call(kind: type, args: Sequence[Any], named: Mapping[str, Any], text: str) -> Any:
    """Build an object, saying which options there are when one is unknown."""
    if dataclasses.is_dataclass(kind):
        unknown = [n for n in named if n not in _fields(kind)]
        if unknown:
            raise _no_option(kind, unknown[0])
    try:
        return kind(*args, **named)
    except TypeError as error:
        options = f"; its options are {', '.join(_fields(kind))}" if dataclasses.is_dataclass(kind) else ""
        raise OptionError(f"cannot build {kind.__name__} from {text!r}: {error}{options}") from None


def _fields(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _no_option(kind: type, name: str) -> OptionError:
    known = _fields(kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return OptionError(f"{kind.__name__} has no option {name!r}; {hint}its options are {', '.join(known) or 'none'}")


def _with(owner: Any, path: Sequence[str], value: Any, name: str) -> Any:
    """A copy of an object with one option changed, however deep."""
    head, *rest = path
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        raise OptionError(
            f"option {name!r}: {owner!r} has no options of its own; give it as a whole, such as guide=LowRank(8)"
        )
    if head not in _fields(type(owner)):
        raise _no_option(type(owner), head)
    new = _with(getattr(owner, head), rest, value, name) if rest else value
    try:
        return dataclasses.replace(owner, **{head: new})
    except TypeError as error:
        raise OptionError(f"option {name!r} of {type(owner).__name__} cannot be {value!r}: {error}") from None

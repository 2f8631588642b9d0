"""Faults of a model that no single draw shows: branches on draws with path gradients, parameters out of their range.

A path gradient d f(v(noise; eta)) / d eta is blind to jumps of f. So the values that descend from a continuous draw are
followed through one run, and comparisons, roundings and look-ups made with them are reported.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ppl.sites import is_data, unwrap
from ppl.trace import Run

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["Descent", "branches", "out_of_range", "path_gradient"]

COMPARED = {
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal"), "compared"),
    **dict.fromkeys(("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "equal", "not_equal"), "compared"),
    **dict.fromkeys(("argmax", "argmin", "argsort", "bucketize", "searchsorted"), "turned into a place"),
    **dict.fromkeys(("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"), "rounded"),
    **dict.fromkeys(("__floordiv__", "floor_divide", "__index__", "__int__", "int", "long", "short"), "rounded"),
    **dict.fromkeys(("__bool__", "bool", "logical_not", "nonzero"), "used as a truth value"),
}
OURS = ("torch", "pyro", "numpy", "functorch")  # comparisons made in there are those of libraries
THROUGH = ("torch.overrides", "torch._tensor", "torch.functional", "torch._jit_internal")
SCORED = ("reinforce", "score", "rloo", "decaying_average", "enum", "mvd")
PRIOR_DRAWS, SHARE = 16, 0.1  # a prior of heavy tails may fail now and then


class Descent(TorchFunctionMode):
    """Follows values that descend from draws through torch functions; keeps where a jump was made of them.

    Example:
        >>> with Descent() as descent:
        ...     x = torch.tensor(0.3)
        ...     descent.mark(x, "x")
        ...     jumped = (2 * x).round()
        >>> list(descent.jumps)
        [('x', 'rounded')]
    """

    def __init__(self) -> None:
        super().__init__()
        # The tensors are kept: an id that is free would be given to the next one.
        self._from: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self.jumps: dict[tuple[str, str], str] = {}

    def mark(self, value: Tensor, site: str) -> None:
        """From here on, what is computed from `value` descends from this site."""
        self._from[id(value)] = (value, self.sites(value) | {site})

    def sites(self, value: Any) -> frozenset[str]:
        """Sites that a value, or a nest of values, descends from."""
        if isinstance(value, Tensor):
            found = self._from.get(id(value))
            return found[1] if found is not None else frozenset()
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self.sites(leaf) for leaf in leaves)) if leaves else frozenset()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sites = self.sites((args, dict(kwargs or {})))
        if not sites:
            return out
        what = COMPARED.get(getattr(func, "__name__", ""))
        if what is None and _to_whole(args, out):
            what = "rounded"
        if what is not None:
            place = _place()
            for site in sorted(sites) if place else ():
                self.jumps.setdefault((site, what), place)
            return out  # reported once: what follows from the jump is not
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self._from[id(leaf)] = (leaf, self.sites(leaf) | sites)
        return out


def _to_whole(args: tuple[Any, ...], out: Any) -> bool:
    """Whether a conversion turned a real tensor into whole numbers."""
    one = len(args) > 0 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
    return bool(
        one
        and args[0].is_floating_point()
        and not (out.is_floating_point() or out.is_complex() or out.dtype == torch.bool)
        and out.shape == args[0].shape
    )


def _place() -> str:
    """File and line of the model that called torch; empty where a library did."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "") in THROUGH:
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def path_gradient(msg: Any) -> bool:
    """Whether a gradient flows through the draws of a site: it is continuous and no other estimator was asked for."""
    if msg["type"] != "sample" or is_data(msg) or site_is_subsample(msg) or msg["is_observed"]:
        return False
    asked = msg["infer"].get("estimator")
    name = asked if isinstance(asked, str) else getattr(asked, "__name__", type(asked).__name__)
    if name in SCORED or name in ("Reinforce", "Enumerate", "MeasureValued"):
        return False
    with suppress(NotImplementedError):
        return not msg["fn"].support.is_discrete
    return False


class _Marker(Messenger):
    """Marks the draws of sites with path gradients."""

    def __init__(self, descent: Descent) -> None:
        super().__init__()
        self.descent = weakref.proxy(descent)

    def _pyro_post_sample(self, msg: Any) -> None:
        if path_gradient(msg) and isinstance(msg["value"], Tensor):
            self.descent.mark(msg["value"], msg["name"])


def branches(run: Callable[[], Any], whose: str) -> dict[str, list[str]]:
    """Sites of a model or guide whose draws meet a jump: what, where and the cure, by site.

    Args:
        run: runs it once.
        whose: `"model"` or `"guide"`.
    """
    descent = Descent()
    with descent, _Marker(descent):
        run()
    found: dict[str, list[str]] = {}
    for (site, what), place in descent.jumps.items():
        found.setdefault(site, []).append(
            f"site {site!r} of the {whose} has a path gradient, but a value that descends from it is {what} at "
            f"{place}: the gradient does not see the jump. Write it smoothly (torch.sigmoid of a difference, a relaxed "
            f'distribution), make the choice a discrete site, or give {site!r} infer={{"estimator": "reinforce"}}'
        )
    return found


def out_of_range(program: Program) -> list[str]:
    """Parameters of distributions that leave their range at draws of the prior: a support is too wide somewhere."""
    from ppl.trace import seeded

    bad: dict[tuple[str, str, str, str], list[float]] = {}
    done = 0
    generator = torch.Generator(program.device).manual_seed(0)
    given = {n: v for n, v in program.first_values.items() if "denoiser" in program.sites[n].capabilities}
    with seeded(generator), torch.no_grad():
        for _ in range(PRIOR_DRAWS):
            try:
                trace, _ = program.trace_one({}, program.shared_inputs(), Run(values=given, predict=True))
            except (ValueError, RuntimeError, IndexError):  # a draw that the model itself cannot take
                continue
            done += 1
            for name, node in trace.nodes.items():
                if node["type"] != "sample" or site_is_subsample(node):
                    continue
                for parameter, value, range_ in _outside(node["fn"]):
                    key = (name, type(unwrap(node["fn"])).__name__, parameter, range_)
                    bad.setdefault(key, []).append(value)
    return [
        f"site {name!r}: {parameter} of {family} leaves its range ({range_}) at {len(values)} of {done} prior draws, "
        f"such as {values[0]:.4g}: a site it is computed from has too wide a support. Give that site one that fits "
        "(LogNormal, HalfNormal, Beta, ...), or map it there with exp, softplus or sigmoid"
        for (name, family, parameter, range_), values in bad.items()
        if len(values) > SHARE * done
    ]


def _outside(fn: Any) -> list[tuple[str, float, str]]:
    """Parameters of a distribution outside their constraint: name, a value, the constraint."""
    base = unwrap(fn)
    found = []
    for name, constraint in getattr(base, "arg_constraints", {}).items():
        value = base.__dict__.get(name)
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        with suppress(Exception):  # a constraint that cannot be checked is none
            good = constraint.check(value)
            if not bool(good.all()):
                first = value[~good] if good.shape == value.shape else value
                found.append((name, float(first.flatten()[0]), str(constraint)))
    return found

"""Simplify a captured graph: drop what is not used, compute once what depends on no input, share what is equal.

Small densities spend their time between operations, not in them, so each node that goes is time saved; the compiler
has less to do as well. Every rule keeps values up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ppl.arithmetic import shorten

__all__ = ["functional", "no_raise", "out_of_place", "pin_types", "simplify"]

FOLD_NUMEL = 200_000  # larger constants stay computed: storing them would cost more than it saves
ROUNDS = 4

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SHAPED = (*_RESHAPES, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
_COPIES = (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default, aten.detach.default)
_FILLED: dict[Any, Callable[[fx.Node], Any]] = {
    aten.zeros_like.default: lambda node: 0,
    aten.ones_like.default: lambda node: 1,
    aten.full_like.default: lambda node: node.args[1],
    aten.new_zeros.default: lambda node: 0,
    aten.new_ones.default: lambda node: 1,
    aten.new_full.default: lambda node: node.args[2],
}


def simplify(module: fx.GraphModule, keep_detach: bool = False) -> fx.GraphModule:
    """The same function with fewer nodes; in place. Graphs that write in place are left as they are.

    Args:
        module: the graph.
        keep_detach: whether the graph will be differentiated, so that `detach` has a meaning.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x: x * torch.ones(2).exp() + x * torch.ones(2).exp() + torch.zeros_like(x))
        >>> simple = simplify(graph(torch.zeros(2)))
        >>> [n.op for n in simple.graph.nodes], simple(torch.ones(2))
        (['get_attr', 'placeholder', 'call_function', 'call_function', 'output'], tensor([5.4366, 5.4366]))
    """
    from torch._functorch.compile_utils import fx_graph_cse

    module.graph.eliminate_dead_code()
    if not any(_mutates(node) for node in module.graph.nodes):
        size = -1
        for _ in range(ROUNDS):
            if len(module.graph.nodes) == size:
                break
            size = len(module.graph.nodes)
            _fold(module)
            _peephole(module, keep_detach)
            shorten(module)
            _share_attributes(module)
            module.graph = fx_graph_cse(module.graph)
            module.graph.eliminate_dead_code()
        _drop_unused_buffers(module)
    module.recompile()
    return module


def pin_types(module: fx.GraphModule) -> fx.GraphModule:
    """Write out the types that tracing took from torch's default, so that the graph means the same later; in place.

    `torch.zeros(3)` and the quotient of two integers have the default type of the moment in which they run.
    """
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not isinstance(value, Tensor):
            continue
        if not (value.is_floating_point() or value.is_complex()):
            continue
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not inputs:
            if any(a.name == "dtype" for a in schema.arguments) and node.kwargs.get("dtype") is None:
                node.kwargs = {**node.kwargs, "dtype": value.dtype}
        elif node.target is aten.where.Scalar:
            with module.graph.inserting_before(node):
                for i in (1, 2):
                    full = module.graph.call_function(aten.full.default, ([], node.args[i]), {"dtype": value.dtype})
                    full.meta["val"] = value.new_empty(())
                    node.update_arg(i, full)
            node.target = aten.where.self
        elif node.kwargs.get("dtype") is None and not any(_floats(n.meta["val"]) for n in inputs):
            for source in inputs:
                with module.graph.inserting_before(node):
                    cast = module.graph.call_function(aten._to_copy.default, (source,), {"dtype": value.dtype})
                cast.meta["val"] = source.meta["val"].to(value.dtype)
                node.replace_input_with(source, cast)
    module.recompile()
    return module


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def out_of_place(module: fx.GraphModule) -> bool:
    """Turn writes into fresh tensors, such as `masked_fill_` in a log density, into new ones; says if none is left."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not _mutates(node):
            continue
        target: Any = node.args[0] if node.args else None
        name = node.target._schema.name.split("::")[1]
        plain = getattr(getattr(aten, name.removesuffix("_"), None), node.target._overloadname, None)
        alone = (
            name.endswith("_")
            and plain is not None
            and isinstance(target, fx.Node)
            and target.op == "call_function"
            and not _aliases(target)
            and not any(_aliases(user) or _mutates(user) for user in target.users if order[user] < order[node])
        )
        if not alone:
            continue
        node.target = plain
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    module.recompile()
    return not any(_mutates(node) for node in module.graph.nodes)


def no_raise(module: fx.GraphModule) -> fx.GraphModule:
    """A failed factorisation becomes NaN instead of an exception: one bad draw must not stop all others; in place."""
    for check in list(module.graph.nodes):
        if check.target is not aten._linalg_check_errors.default:
            continue
        info: Any = check.args[0]
        source = info.args[0] if info.target is operator.getitem else None
        for result in list(source.users) if source is not None else []:
            value = result.meta.get("val")
            if result is info or not isinstance(value, Tensor) or not _floats(value):
                continue
            with module.graph.inserting_after(check):
                good: Any = module.graph.call_function(aten.eq.Scalar, (info, 0))
            spread = [*info.meta["val"].shape] + [1] * (value.ndim - info.meta["val"].ndim)
            with module.graph.inserting_after(good):
                good = module.graph.call_function(aten.view.default, (good, spread))
            with module.graph.inserting_after(good):
                nan = module.graph.call_function(
                    aten.full.default, ([], float("nan")), {"dtype": value.dtype, "device": value.device}
                )
            nan.meta["val"] = value.new_empty(())
            with module.graph.inserting_after(nan):
                safe = module.graph.call_function(aten.where.self, (good, result, nan))
            safe.meta["val"] = value
            result.replace_all_uses_with(safe, delete_user_cb=lambda user, safe=safe: user is not safe)
        if source is not None:
            module.graph.erase_node(check)
    module.recompile()
    return module


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its input."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns) or "reshape" in schema.name


def functional(module: fx.GraphModule) -> fx.GraphModule:
    """Write what is left of writes in place with operations whose gradients are right under vmap; in place.

    `aten.copy` has no gradient, and those of `select_scatter` and `slice_scatter` under vmap are wrong in torch 2.13.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        rewrite = _REWRITES.get(node.target)
        with module.graph.inserting_before(node):
            new = rewrite(module, node) if rewrite is not None else None
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _copy(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    graph, value = module.graph, node.meta["val"]
    wide = graph.call_function(aten.expand.default, (node.args[1], list(value.shape)))
    wide.meta["val"] = value
    return graph.call_function(aten._to_copy.default, (wide,), {"dtype": value.dtype})


def _select_scatter(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    graph = module.graph
    base, source, axis, index = _arguments(node)
    size = node.meta["val"].shape[axis]
    index = index % size
    row = graph.call_function(aten.unsqueeze.default, (source, axis % node.meta["val"].ndim))
    return _joined(graph, base, row, axis, index, index + 1, size)


def _slice_scatter(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    graph, value = module.graph, node.meta["val"]
    given = _arguments(node)
    base, source, axis, start, end, step = given + (0, None, None, 1)[len(given) - 2 :]
    size = value.shape[axis]
    start, end, _ = slice(start, end).indices(size)
    if step == 1:
        return _joined(graph, base, source, axis, start, max(start, end), size)
    # Rows of the base, with those of the source behind them, in the order of the result.
    index = torch.arange(size, device=value.device)
    index[start:end:step] = size + torch.arange(len(index[start:end:step]), device=value.device)
    name = _new_name(module)
    module.register_buffer(name, index)
    both = graph.call_function(aten.cat.default, ([base, source], axis))
    return graph.call_function(aten.index_select.default, (both, axis, graph.get_attr(name)))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _joined(graph: fx.Graph, base: Any, middle: Any, axis: int, start: int, end: int, size: int) -> fx.Node:
    """`base` with [start, end) along an axis replaced."""
    before = [graph.call_function(aten.slice.Tensor, (base, axis, 0, start))] if start > 0 else []
    after = [graph.call_function(aten.slice.Tensor, (base, axis, end, size))] if end < size else []
    return graph.call_function(aten.cat.default, ([*before, middle, *after], axis))


_REWRITES: dict[Any, Callable[[fx.GraphModule, fx.Node], fx.Node]] = {
    aten.copy.default: _copy,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
}


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _kind(value: Any) -> Any:
    """Shape, type and device of what a node computes; None where it is not known to be one tensor."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return value.shape, value.dtype, value.device


def _peephole(module: fx.GraphModule, keep_detach: bool) -> None:
    """Replace single nodes by their input where they do nothing, and chains of reshapes by the last."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if keep_detach and node.target is aten.detach.default:
            continue
        kind = _kind(node)
        same = _unchanged(module, node, kind)
        if same is not None:
            node.replace_all_uses_with(same)
        elif kind is not None and node.target in _FILLED and kind[0].numel() <= FOLD_NUMEL:
            shape, dtype, device = kind
            name = _new_name(module)
            module.register_buffer(name, torch.full(shape, _FILLED[node.target](node), dtype=dtype, device=device))
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
        elif kind is not None and _sums_nothing(node):
            with module.graph.inserting_before(node):
                view = module.graph.call_function(aten.reshape.default, (node.args[0], list(kind[0])))
            view.meta = dict(node.meta)
            node.replace_all_uses_with(view)
        elif node.target in (*_RESHAPES, aten.unsqueeze.default, aten.squeeze.dim) and kind is not None:
            before = node.args[0]
            if isinstance(before, fx.Node) and before.target in (*_RESHAPES, aten.unsqueeze.default, aten.squeeze.dim):
                with module.graph.inserting_before(node):
                    view = module.graph.call_function(aten.reshape.default, (before.args[0], list(kind[0])))
                view.meta = dict(node.meta)
                node.replace_all_uses_with(view)
    module.graph.eliminate_dead_code()


def _unchanged(module: fx.GraphModule, node: fx.Node, kind: Any) -> fx.Node | None:
    """The input that a node returns as it is."""
    target: Any = node.target
    args: Any = node.args
    if target in _COPIES:
        # A copy into another memory format is there for a view behind it.
        return args[0] if isinstance(args[0], fx.Node) and not node.kwargs else None
    if kind is None:
        return None

    def keeps(x: Any) -> bool:
        return isinstance(x, fx.Node) and _kind(x) == kind

    if target in (*_SHAPED, aten._to_copy.default):
        return args[0] if keeps(args[0]) else None
    if target is aten.pow.Tensor_Scalar:
        return args[0] if args[1] == 1 and keeps(args[0]) else None
    if node.kwargs or len(args) < 2:
        return None
    first, second = args[:2]
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        for one, other in ((second, first), (first, second)):
            if keeps(other) and _is_constant(module, one, 1):
                return other
    elif target in (aten.add.Tensor, aten.add.Scalar) and len(args) == 2:
        for zero, other in ((second, first), (first, second)):
            if keeps(other) and _is_constant(module, zero, 0):
                return other
    elif target is aten.sub.Tensor and len(args) == 2:
        return first if keeps(first) and _is_constant(module, second, 0) else None
    elif target in (aten.div.Tensor, aten.div.Scalar):
        return first if keeps(first) and _is_constant(module, second, 1) else None
    return None


def _is_constant(module: fx.GraphModule, value: Any, number: float) -> bool:
    if isinstance(value, int | float):
        return value == number
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = getattr(module, str(value.target), None)
        return isinstance(tensor, Tensor) and not tensor.is_complex() and bool((tensor == number).all())
    return False


def _sums_nothing(node: fx.Node) -> bool:
    """Whether a sum runs over axes of length one only."""
    if node.target not in (aten.sum.default, aten.sum.dim_IntList) or node.kwargs:
        return False
    kind = _kind(node.args[0])
    if kind is None or kind[1] != _kind(node)[1]:
        return False
    shape = kind[0]
    args: Any = node.args
    axes = range(len(shape)) if len(args) < 2 or not args[1] else args[1]
    return all(shape[axis] == 1 for axis in axes)


def _share_attributes(module: fx.GraphModule) -> None:
    """One node for each constant, at the top, so that equal expressions of it are seen to be equal."""
    seen: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target, None)
        key = node.target
        if isinstance(value, Tensor) and 0 < value.numel() <= FOLD_NUMEL:
            number = value.flatten()[0].item()
            if number == number and bool((value == number).all()):
                key = (value.dtype, tuple(value.shape), str(value.device), number)
        if key in seen:
            node.replace_all_uses_with(seen[key])
            module.graph.erase_node(node)
        else:
            seen[key] = node
    first = next(iter(module.graph.nodes))
    for node in seen.values():
        if node is not first:
            first.prepend(node)


def _fold(module: fx.GraphModule) -> None:
    """Replace tensors that depend on no input by constants."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if isinstance(value, Tensor):
                known[node] = value
                node.meta.setdefault("val", value)
            continue
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random or not all(n in known for n in node.all_input_nodes):
            continue
        if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
            continue
        if "empty" in str(node.target):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
        try:
            with torch.no_grad():
                value = node.target(*args, **kwargs)
        except Exception:  # an operator with no eager form; it stays in the graph
            continue
        tensors = [v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Tensor)]
        if all(t.numel() <= FOLD_NUMEL for t in tensors):
            known[node] = value
    for node, value in known.items():
        inside = node.op == "get_attr" or all(user in known for user in node.users)
        if inside or not isinstance(value, Tensor):
            continue
        name = _new_name(module)
        module.register_buffer(name, value.clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()


def _new_name(module: fx.GraphModule) -> str:
    number = len(module._buffers)
    while hasattr(module, f"_constant_{number}"):
        number += 1
    return f"_constant_{number}"


def _drop_unused_buffers(module: fx.GraphModule) -> None:
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n in module._buffers if n not in used]:
        delattr(module, name)

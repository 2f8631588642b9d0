"""Make a captured graph mean the same later and for many draws: types written out, no writes in place, no exceptions.

Each rule leaves the values as they are; what follows, `ppl.passes`, is there for speed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["functional", "mutates", "new_name", "no_raise", "out_of_place", "pin_types"]

aten = torch.ops.aten


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
        if not mutates(node):
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
            and not any(_aliases(user) or mutates(user) for user in target.users if order[user] < order[node])
        )
        if not alone:
            continue
        node.target = plain
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    module.recompile()
    return not any(mutates(node) for node in module.graph.nodes)


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
    name = new_name(module)
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


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into its input."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def new_name(module: fx.GraphModule) -> str:
    """A name that no constant of the module has yet."""
    number = len(module._buffers)
    while hasattr(module, f"_constant_{number}"):
        number += 1
    return f"_constant_{number}"

"""Shortcuts by arithmetic in a captured graph: chains of scalings and shifts become one, gradients of slices one `cat`.

    -(2 (x - a)) / b  ->  (-2/b) x + 2a/b,   written as one operation

Values change by rounding only. Factors whose product would leave the range of the type are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["shorten"]

aten = torch.ops.aten
LARGEST = {torch.float64: 1e100, torch.float32: 1e15}


@dataclass(frozen=True)
class _Affine:
    """scale * source + shift."""

    source: fx.Node
    scale: float
    shift: float
    depth: int


def shorten(module: fx.GraphModule) -> None:
    """Apply all shortcuts once; in place."""
    _join_slices(module)
    _drop_impossible(module)
    _merge_chains(module)
    module.graph.eliminate_dead_code()


def _kind(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def _number(module: fx.GraphModule, value: Any) -> float | None:
    """The number that a constant operand holds everywhere."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = getattr(module, str(value.target))
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 0:
            first = tensor.flatten()[0]
            return float(first) if tensor.numel() == 1 or bool((tensor == first).all()) else None
    return None


def _step(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """(x, a, b) where a node computes a x + b with numbers a and b and x of its own shape."""
    target: Any = node.target
    args: Any = node.args
    if target is aten.neg.default and isinstance(args[0], fx.Node):
        return args[0], -1.0, 0.0
    if node.kwargs or len(args) != 2:
        return None
    first, second = args
    left, right = _number(module, first), _number(module, second)
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        if right is not None:
            return first, right, 0.0
        return (second, left, 0.0) if left is not None else None
    if target in (aten.add.Tensor, aten.add.Scalar):
        if right is not None:
            return first, 1.0, right
        return (second, 1.0, left) if left is not None else None
    if target in (aten.sub.Tensor, aten.sub.Scalar):
        if right is not None:
            return first, 1.0, -right
        return (second, -1.0, left) if left is not None else None
    if target is aten.rsub.Scalar and right is not None:
        return first, -1.0, right
    if target in (aten.div.Tensor, aten.div.Scalar) and right:
        return first, 1 / right, 0.0
    return None


def _fits(scale: float, shift: float, dtype: torch.dtype) -> bool:
    limit = LARGEST.get(dtype)
    if limit is None or not (math.isfinite(scale) and math.isfinite(shift)):
        return False
    return 1 / limit < abs(scale) < limit and abs(shift) < limit


def _merge_chains(module: fx.GraphModule) -> None:
    """Compose chains of scalings and shifts; sums, products and reductions pass them on to what follows."""
    known: dict[fx.Node, _Affine] = {}
    for node in list(module.graph.nodes):
        kind = _kind(node)
        if node.op != "call_function" or kind is None or kind[1] not in LARGEST:
            continue
        step = _step(module, node)
        found: _Affine | None = None
        if step is not None and isinstance(step[0], fx.Node) and _kind(step[0]) == kind:
            source, scale, shift = step
            inner = known.get(source, _Affine(source, 1.0, 0.0, 0))
            found = _Affine(inner.source, scale * inner.scale, scale * inner.shift + shift, inner.depth + 1)
        elif node.target in (aten.mul.Tensor, aten.div.Tensor) and not node.kwargs:
            found = _product(module, node, known)
        elif node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            found = _sum_of_two(module, node, known)
        elif node.target in (aten.sum.default, aten.sum.dim_IntList) and not node.kwargs:
            found = _reduction(module, node, known)
        if found is not None and _fits(found.scale, found.shift, kind[1]):
            known[node] = found
    for node, affine in known.items():
        if affine.depth > 1 and node.users:
            _write(module, node, affine)


def _inside(node: Any, known: dict[fx.Node, _Affine]) -> _Affine | None:
    """What an operand computes, where nothing else uses it."""
    return known.get(node) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _emit(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> fx.Node:
    with module.graph.inserting_before(node):
        new = module.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def _product(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, _Affine]) -> _Affine | None:
    """(a x) y = a (x y): one scaling is only moved, and pays when it merges with what follows; two become one."""
    args: list[Any] = list(node.args)
    factor, depth = 1.0, 0
    for i, operand in enumerate(args):
        inner = _inside(operand, known)
        # Not onto a larger tensor: the scaling would cost more there.
        if inner is None or inner.shift != 0 or _kind(operand) != _kind(node):
            continue
        factor = factor * inner.scale if i == 0 or node.target is aten.mul.Tensor else factor / inner.scale
        args[i], depth = inner.source, depth + inner.depth
    return _Affine(_emit(module, node, tuple(args), {}, node.target), factor, 0.0, depth) if depth else None


def _sum_of_two(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, _Affine]) -> _Affine | None:
    """(a x + b) + (c y + d) = a (x + c/a y) + (b + d), the bracket in one operation."""
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    left, right = _inside(first, known), _inside(second, known)
    if left is None and right is None:
        return None
    left = left or _Affine(first, 1.0, 0.0, 0)
    right = right or _Affine(second, 1.0, 0.0, 0)
    if left.depth and not right.depth and node.target is aten.add.Tensor:
        left, right = right, left  # so that nothing is left to scale outside
    sign = 1.0 if node.target is aten.add.Tensor else -1.0
    weight = sign * right.scale / left.scale
    if not _fits(weight, 0.0, _kind(node)[1]):
        return None
    options = {} if weight == 1 else {"alpha": weight}
    new = _emit(module, node, (left.source, right.source), options, aten.add.Tensor)
    return _Affine(new, left.scale, left.shift + sign * right.shift, 2)


def _reduction(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, _Affine]) -> _Affine | None:
    """sum(a x + b) = a sum(x) + b n."""
    inner = _inside(node.args[0], known)
    if inner is None:
        return None
    count = _kind(node.args[0])[0].numel() / max(_kind(node)[0].numel(), 1)
    new = _emit(module, node, (inner.source, *node.args[1:]), {}, node.target)
    return _Affine(new, inner.scale, inner.shift * count, max(inner.depth, 1))


def _write(module: fx.GraphModule, node: fx.Node, affine: _Affine) -> None:
    source, scale, shift = affine.source, affine.scale, affine.shift
    graph = module.graph
    with graph.inserting_before(node):
        if scale == 1 and shift == 0:
            new = source
        elif shift == 0:
            new = (
                graph.call_function(aten.neg.default, (source,))
                if scale == -1
                else graph.call_function(aten.mul.Tensor, (source, _constant(module, scale, node)))
            )
        elif scale == 1:
            new = graph.call_function(aten.add.Tensor, (source, _constant(module, shift, node)))
        else:
            new = graph.call_function(aten.add.Tensor, (_constant(module, shift, node), source), {"alpha": scale})
    if new is not source:
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _constant(module: fx.GraphModule, number: float, like: fx.Node) -> fx.Node:
    """A number as a tensor without axes: quicker to dispatch than a Python number."""
    value = like.meta["val"]
    tensor = torch.tensor(number, dtype=value.dtype, device=value.device)
    name = f"_number_{len(module._buffers)}"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, tensor)
    node = module.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def _join_slices(module: fx.GraphModule) -> None:
    """A sum of `slice_backward` over disjoint parts of one axis is a `cat` of the parts."""
    sums = (aten.add.Tensor,)
    for node in list(module.graph.nodes):
        if node.target not in sums or node.kwargs or any(u.target in sums and not u.kwargs for u in node.users):
            continue
        parts = _parts(node)
        if parts is None or len(parts) < 2:
            continue
        axis, sizes = parts[0].args[2], list(parts[0].args[1])
        placed = sorted(
            ((*slice(p.args[3], p.args[4]).indices(sizes[axis])[:2], p.args[0]) for p in parts), key=lambda x: x[0]
        )
        if any(a[1] > b[0] for a, b in pairwise(placed)):
            continue
        pieces, end = [], 0
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        with module.graph.inserting_before(node):
            for start, stop, part in [*placed, (sizes[axis], sizes[axis], None)]:
                if start > end:
                    gap = [*sizes[:axis], start - end, *sizes[axis + 1 :]]
                    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
                    zeros = module.graph.call_function(aten.zeros.default, (gap,), options)
                    zeros.meta["val"] = value.new_zeros(gap)
                    pieces.append(zeros)
                if part is not None:
                    pieces.append(part)
                end = stop
            joined = module.graph.call_function(aten.cat.default, (pieces, axis))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
    module.graph.eliminate_dead_code()


def _parts(node: Any) -> list[Any] | None:
    """The `slice_backward` leaves of a tree of sums, all along one axis; None if there is anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.slice_backward.default:
        return [node] if node.args[5] == 1 else None
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    leaves: list[Any] = []
    for operand in node.args:
        found = _parts(operand)
        if found is None:
            return None
        leaves += found
    same = {(leaf.args[2], tuple(leaf.args[1])) for leaf in leaves}
    return leaves if len(same) == 1 else None


def _drop_impossible(module: fx.GraphModule) -> None:
    """exp(x) < 0 is never true, so what it masks stays; supports of half distributions ask it at every call."""
    for node in list(module.graph.nodes):
        if node.target is not aten.masked_fill.Scalar or not node.users:
            continue
        value, mask = node.args[:2]
        if not isinstance(mask, fx.Node) or mask.target is not aten.lt.Scalar or mask.args[1] != 0:
            continue
        source: Any = mask.args[0]
        while isinstance(source, fx.Node) and source.target in (
            aten.expand.default,
            aten.view.default,
            aten.reshape.default,
        ):
            source = source.args[0]
        if isinstance(source, fx.Node) and source.target is aten.exp.default and _kind(value) == _kind(node):
            node.replace_all_uses_with(value)

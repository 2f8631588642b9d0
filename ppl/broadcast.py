"""Operations on expanded tensors, done on what was expanded: the logarithm of a scale is taken once, not per pixel.

    log(expand(s))  ->  expand(log(s)),      x / expand(s)  ->  x / s

Distributions expand their parameters to the shape of the data. Operands that repeat in memory are also slow to read:
torch has no vector code for them, and has for numbers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["shrink"]

aten = torch.ops.aten
_ALONE = (
    aten.log.default, aten.exp.default, aten.neg.default, aten.sqrt.default, aten.rsqrt.default,
    aten.reciprocal.default, aten.log1p.default, aten.expm1.default, aten.abs.default, aten.sigmoid.default,
    aten.tanh.default, aten.square.default, aten.pow.Tensor_Scalar, aten.clamp_min.default, aten.clamp_max.default,
    aten.clamp.default, aten.mul.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.div.Scalar,
)  # fmt: skip
_PAIRED = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
POINTWISE = frozenset((*_ALONE, *_PAIRED))


def shrink(module: fx.GraphModule) -> None:
    """Apply both rules wherever they hold; in place.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x, s: x - s.expand(3).log())(torch.ones(3), torch.ones(()))
        >>> shrink(graph)
        >>> [(str(n.target), tuple(n.meta["val"].shape)) for n in graph.graph.nodes if n.op == "call_function"]
        [('aten.log.default', ()), ('aten.sub.Tensor', (3,))]
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in POINTWISE and node.users:
            _shrink(module, node)
    module.graph.eliminate_dead_code()


def _shrink(module: fx.GraphModule, node: fx.Node) -> None:
    value, target = node.meta.get("val"), cast(Any, node.target)
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    before = [_source(a) for a in operands]
    if not isinstance(value, Tensor) or all(a is b for a, b in zip(operands, before, strict=True)):
        return
    values = [a.meta.get("val") for a in before]
    # Tensors without axes yield to the type of others, and a number in their place may live on another device.
    if any(not isinstance(v, Tensor) or v.dtype != value.dtype or v.device != value.device for v in values):
        return
    shape = torch.broadcast_shapes(*(v.shape for v in values))
    found = dict(zip(operands, before, strict=True))
    args = tuple(found.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
    if shape == value.shape:
        node.args = args
        return
    if not all(user.target in POINTWISE for user in node.users):
        return  # a view of the result may need it to be written out
    with module.graph.inserting_before(node):
        small = module.graph.call_function(target, args, dict(node.kwargs))
        small.meta = {**node.meta, "val": value.new_empty(shape)}
        wide = module.graph.call_function(aten.expand.default, (small, list(value.shape)))
    wide.meta = dict(node.meta)
    node.replace_all_uses_with(wide)


def _source(node: fx.Node) -> Any:
    """What a node expands, where that has fewer elements; else the node."""
    if node.target is not aten.expand.default or node.kwargs:
        return node
    inner: Any = node.args[0]
    small, wide = inner.meta.get("val"), node.meta["val"]
    return inner if isinstance(small, Tensor) and small.numel() < wide.numel() else node

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
from ppl.broadcast import shrink
from ppl.repeats import join
from ppl.rewrites import mutates, new_name

__all__ = ["simplify"]

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


def simplify(module: fx.GraphModule, keep_detach: bool = False, repeats: bool = False) -> fx.GraphModule:
    """The same function with fewer nodes; the module given is changed. Graphs that write in place are left alone.

    Args:
        module: the graph.
        keep_detach: whether the graph will be differentiated, so that `detach` has a meaning.
        repeats: whether operations that loops repeat are joined.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x: x * torch.ones(2).exp() + x * torch.ones(2).exp() + torch.zeros_like(x))
        >>> simple = simplify(graph(torch.zeros(2)))
        >>> [n.op for n in simple.graph.nodes], simple(torch.ones(2))
        (['get_attr', 'placeholder', 'call_function', 'call_function', 'output'], tensor([5.4366, 5.4366]))
    """
    from torch._functorch.compile_utils import fx_graph_cse

    module.graph.eliminate_dead_code()
    if not any(mutates(node) for node in module.graph.nodes):
        size = -1
        for i in range(ROUNDS):
            if len(module.graph.nodes) == size:
                break
            size = len(module.graph.nodes)
            _fold(module)
            _peephole(module, keep_detach)
            shrink(module)
            if i > 0 or not repeats:  # before the steps of a loop are joined they should look alike
                shorten(module)
            _share_attributes(module)
            module.graph = fx_graph_cse(module.graph)
            module.graph.eliminate_dead_code()
            if i == 0 and repeats:
                module, size = join(module) or module, -1
        _drop_unused_buffers(module)
    module.recompile()
    return module


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
            name = new_name(module)
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
    if target is aten.permute.default:
        return args[0] if list(args[1]) == list(range(len(args[1]))) else None
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
        name = new_name(module)
        module.register_buffer(name, value.clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()


def _drop_unused_buffers(module: fx.GraphModule) -> None:
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n in module._buffers if n not in used]:
        delattr(module, name)

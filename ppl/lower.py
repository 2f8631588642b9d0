"""Make a captured graph quick to run as it is: shared parts computed once, operations called by their short path.

What depends only on inputs that all draws share (data, parameters) is split off and computed again only when one of
those tensors is another one or was written to. PyTorch's own bound functions are called in place of operator overloads:
the same kernels, a third less time between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Split", "native", "split_shared"]

HOIST_NUMEL = 4_000_000  # larger shared results are computed again: they would fill the memory
aten = torch.ops.aten

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{
        getattr(getattr(aten, name), overload): getattr(torch, name)
        for name, overloads in {
            **dict.fromkeys(("mul", "add", "sub", "div"), ("Tensor", "Scalar")),
            **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), ("Tensor", "Scalar")),
            **dict.fromkeys(
                (
                    *("neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "abs", "sin", "cos", "tan", "tanh"),
                    *("sigmoid", "reciprocal", "square", "lgamma", "digamma", "erf", "erfc", "sign", "atan"),
                    *("mm", "bmm", "mv", "dot", "addmm", "cat", "stack", "logsumexp", "unsqueeze", "permute", "t"),
                    *("gather", "index_select", "sum", "isnan", "logical_and", "logical_not", "clamp", "cumsum"),
                ),
                ("default",),
            ),
            "where": ("self",),
            "masked_fill": ("Scalar", "Tensor"),
            "pow": ("Tensor_Scalar", "Tensor_Tensor"),
            "squeeze": ("dim",),
            "select": ("int",),
            "transpose": ("int",),
        }.items()
        for overload in overloads
    },
    aten.sum.dim_IntList: torch.sum,
}
_METHODS = {aten.view.default: "view", aten.expand.default: "expand", aten.reshape.default: "reshape"}


def native(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with PyTorch's bound functions; a copy, since the compiler wants the original.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = native(make_fx(lambda x: (x * x).sum())(torch.ones(3)))
        >>> graph(torch.ones(3)), [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"]
        (tensor(3.), ['mul', 'sum'])
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        target: Any = node.target
        args: Any = node.args
        if target is aten.pow.Tensor_Scalar and args[1] == 2:
            node.target, node.args = torch.mul, (args[0], args[0])
        elif target is aten.sum.dim_IntList and len(args) > 1 and not args[1]:
            continue  # no axes means all of them for one and none for the other
        elif target is aten.slice.Tensor and len(args) == 4 and isinstance(node.meta.get("val"), Tensor):
            axis, size = args[1], args[0].meta["val"].shape[args[1]]
            start = slice(args[2], args[3]).indices(size)[0]
            node.op, node.target = "call_method", "narrow"
            node.args = (args[0], axis, start, node.meta["val"].shape[axis])
        elif target in _METHODS:
            node.op, node.target = "call_method", _METHODS[target]
        elif target in _FUNCTIONS:
            node.target = _FUNCTIONS[target]
    return fx.GraphModule(module, graph)


class Split:
    """A graph in two parts: `once` of the shared inputs, whose results are kept, and `main` of all inputs.

    Args:
        once: shared inputs -> intermediate results.
        main: lane inputs, shared inputs and the intermediate results -> outputs.
        lanes: number of lane inputs.
    """

    def __init__(self, once: Callable[..., Any], main: Callable[..., Any], lanes: int) -> None:
        self.once, self.main, self.lanes = once, main, lanes
        self._shared: list[Tensor] = []
        self._versions: list[int] = []
        self._results: list[Tensor] = []

    def __call__(self, *args: Tensor) -> Sequence[Tensor]:
        """The outputs of the whole graph."""
        return self.main(*args, *self.results(args[self.lanes :]))

    def results(self, shared: Sequence[Tensor]) -> list[Tensor]:
        """Intermediate results for these shared inputs; computed anew when one is another tensor or was written to."""
        kept = self._shared
        same = len(kept) == len(shared) and all(a is b for a, b in zip(kept, shared, strict=True))
        if same and [t._version for t in kept] == self._versions:
            return self._results
        self._shared, self._versions = list(shared), [t._version for t in shared]
        self._results = list(self.once(*shared))
        return self._results


def split_shared(module: fx.GraphModule, lanes: int) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Split a graph into what depends on its inputs from number `lanes` on, and the rest; None if nothing does."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    shared = set(inputs[lanes:])
    hoisted: dict[fx.Node, None] = {}
    constants: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            from_shared = all(n in shared or n in constants or n in hoisted for n in node.all_input_nodes)
            if from_shared and any(n in shared or n in hoisted for n in node.all_input_nodes):
                hoisted[node] = None
    wanted = [
        n
        for n in hoisted
        if any(u not in hoisted for u in n.users)
        and isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].numel() <= HOIST_NUMEL
    ]
    if not wanted:
        return None
    once = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in shared or node in hoisted or node in constants:
            mapping[node] = once.node_copy(node, lambda n: mapping[n])
    once.output([mapping[n] for n in wanted])
    main = fx.Graph()
    again: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        again[node] = main.node_copy(node, lambda n: again[n])
    for i, node in enumerate(wanted):
        again[node] = main.placeholder(f"shared_{i}")
        again[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node not in again and node.op != "output":
            again[node] = main.node_copy(node, lambda n: again[n])
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    main.output(fx.map_arg(output.args[0], lambda n: again[n]))
    parts = fx.GraphModule(module, once), fx.GraphModule(module, main)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts

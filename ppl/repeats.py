"""Join what a captured graph repeats, as loops over time do: one operation on a stack in place of one for each step.

    x_t = f(u_t), t = 1..T  ->  X = f(U)

Nodes of one form are run together as soon as all of them are ready; chains, which never are, go first, the longest way
to the end before all others. Stacks are not built where they exist: pieces of one tensor in a row are a slice of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ppl.capture import capture
from ppl.rewrites import new_name
from ppl.steps import NUMBERED, inline, kind_of, piece, recurrences, signatures, sums

__all__ = ["join"]

LEAST = 8  # nodes of one form that are worth a stack
FEWER = 0.7  # the new graph is used where it has at most this share of the nodes
LARGEST = 10_000  # numbers in a result; between larger ones there is time enough
ROWS_BY_INDEX = 3  # pieces of this many runs, or more, are gathered by index

aten = torch.ops.aten
_LEFT_ALONE = ("linalg", "cholesky", "empty", "stack")


def join(module: fx.GraphModule) -> fx.GraphModule | None:
    """The same function with repeated operations joined; None where that gains little. Values change by rounding.

    Example:
        >>> def walk(z):
        ...     total = z[0]
        ...     for t in range(1, 100):
        ...         total = total - (z[t] - z[t - 1]) ** 2
        ...     return total
        >>> graph = capture(walk, torch.zeros(100))
        >>> joined = join(graph)
        >>> len(graph.graph.nodes) > 300, len(joined.graph.nodes) < 15, joined(torch.arange(100.0))
        (True, True, tensor(-99.))
    """
    before = len(module.graph.nodes)
    counts: dict[Hashable, int] = {}
    for form in signatures(module).values():
        counts[form] = counts.get(form, 0) + 1
    if max(counts.values()) < LEAST:
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = fx.GraphModule(module, graph)
    sums(copy)
    recurrences(copy)
    new = _Rebuild(copy).run()
    return new if len(new.graph.nodes) <= FEWER * before else None


@dataclass(frozen=True)
class _Piece:
    """Numbers [start, start + width) along the first axis of a node of the new graph, reshaped."""

    base: fx.Node
    start: int
    width: int


class _Rebuild:
    """Copies a graph in an order in which nodes of one form meet."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.old = module
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node | _Piece] = {}
        self.forms = signatures(module)
        self.pieces = {n: found for n in module.graph.nodes if (found := piece(n)) is not None}
        self._whole: dict[tuple[_Piece, torch.Size], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        nodes = list(self.old.graph.nodes)
        height = dict.fromkeys(nodes, 0)
        for node in reversed(nodes):
            for source in node.all_input_nodes:
                height[source] = max(height[source], height[node] + 1)
        order = {n: i for i, n in enumerate(nodes)}
        missing = {n: len(set(n.all_input_nodes)) for n in nodes}
        left: dict[Hashable, int] = {}
        for node in nodes:
            left[self.forms[node]] = left.get(self.forms[node], 0) + 1
        ready: dict[Hashable, list[fx.Node]] = {}
        heap: list[tuple[int, int, fx.Node]] = []
        full: list[Hashable] = []
        output: fx.Node | None = None

        def arrive(node: fx.Node) -> None:
            """A node whose inputs are known: leaves and pieces cost nothing, the others wait for their like."""
            nonlocal output
            if node.op == "output":
                output = node
            elif node.op == "placeholder":
                done([node])
            elif node.op == "get_attr" or node in self.pieces:
                self._leaf(node)
                done([node])
            else:
                form = self.forms[node]
                ready.setdefault(form, []).append(node)
                heapq.heappush(heap, (-height[node], order[node], node))
                if len(ready[form]) == left[form]:
                    full.append(form)

        def done(members: list[fx.Node]) -> None:
            for node in members:
                left[self.forms[node]] -= 1
            for node in members:
                for user in node.users:
                    missing[user] -= 1
                    if missing[user] == 0:
                        arrive(user)

        for node in nodes:
            if node.op == "placeholder":  # all inputs in their order, before anything else
                self._leaf(node)
        roots = [n for n in nodes if missing[n] == 0]
        for node in roots:
            arrive(node)
        while heap or full:
            form = full.pop() if full else self.forms[heapq.heappop(heap)[2]]
            members = ready.pop(form, [])
            if members:
                members.sort(key=order.__getitem__)
                self._emit(members)
                done(members)
        assert output is not None
        self.graph.output(fx.map_arg(output.args[0], self._node))
        new = fx.GraphModule(self.old, self.graph)
        new.meta["joined"] = True
        new.graph.eliminate_dead_code()
        return new

    # Nodes of the new graph ------------------------------------------------------------------------------------------

    def _leaf(self, node: fx.Node) -> None:
        found = self.pieces.get(node)
        if found is None:
            self.env[node] = self.graph.node_copy(node)
            return
        base, start, width = found
        self.env[node] = _Piece(self._node(base), start, width)

    def _node(self, old: fx.Node) -> fx.Node:
        """The node that computes what an old one did."""
        found = self.env[old]
        if isinstance(found, fx.Node):
            return found
        shape = old.meta["val"].shape
        key = (found, shape)
        if key not in self._whole:
            self._whole[key] = self._cut(found.base, found.start, found.start + found.width, 1, shape)
        return self._whole[key]

    def _call(self, target: Any, args: tuple[Any, ...], like: Tensor, shape: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = like.new_empty(shape)
        return node

    def _cut(self, base: fx.Node, start: int, end: int, step: int, shape: Any) -> fx.Node:
        """base[start:end:step] in another shape."""
        value: Tensor = base.meta["val"]
        if end - start == 1 and tuple(shape) == tuple(value.shape[1:]):
            return self._call(aten.select.int, (base, 0, start), value, shape)
        count = len(range(start, end, step))
        rows = base
        if count != value.shape[0]:
            rows = self._call(aten.slice.Tensor, (base, 0, start, end, step), value, (count, *value.shape[1:]))
        return self._shaped(rows, shape)

    def _shaped(self, node: fx.Node, shape: Any) -> fx.Node:
        value: Tensor = node.meta["val"]
        if tuple(shape) == tuple(value.shape):
            return node
        return self._call(aten.reshape.default, (node, list(shape)), value, shape)

    def _stack(self, olds: list[fx.Node]) -> fx.Node:
        """A node (n, *shape) of what n old nodes of one shape computed."""
        value: Tensor = olds[0].meta["val"]
        shape = tuple(value.shape)
        found = [self.env[n] for n in olds]
        if all(x is found[0] for x in found) and isinstance(found[0], fx.Node):
            row = self._call(aten.unsqueeze.default, (found[0], 0), value, (1, *shape))
            return self._call(aten.expand.default, (row, [len(found), *shape]), value, (len(found), *shape))
        runs = _runs(found)
        pieces = [x for x in found if isinstance(x, _Piece)]
        one_base = len(pieces) == len(found) and len({(x.base, x.width) for x in pieces}) == 1
        if len(runs) >= ROWS_BY_INDEX and one_base:
            base, width = pieces[0].base, pieces[0].width
            rows = torch.tensor([x.start + i for x in pieces for i in range(width)], device=value.device)
            like: Tensor = base.meta["val"]
            index = self._constant(rows)
            taken = self._call(aten.index_select.default, (base, 0, index), like, (len(rows), *like.shape[1:]))
            return self._shaped(taken, (len(found), *shape))
        parts = [self._part(run, value) for run in runs]
        if len(parts) == 1:
            return parts[0]
        return self._call(aten.cat.default, (parts, 0), value, (len(found), *shape))

    def _part(self, run: list[fx.Node | _Piece], value: Tensor) -> fx.Node:
        """One run as a node (n, *shape)."""
        first, wide = run[0], (len(run), *value.shape)
        if isinstance(first, fx.Node):
            return self._call(aten.stack.default, (list(run),), value, wide)
        if len(run) == 1 or run[1] == first:
            one = self._cut(first.base, first.start, first.start + first.width, 1, (1, *value.shape))
            return one if len(run) == 1 else self._call(aten.expand.default, (one, list(wide)), value, wide)
        assert isinstance(run[1], _Piece)
        jump = run[1].start - first.start if first.width == 1 else 1
        if jump < 0:
            last = run[-1]
            assert isinstance(last, _Piece)
            rising = self._cut(first.base, last.start, first.start + 1, -jump, wide)
            return self._call(aten.flip.default, (rising, [0]), value, wide)
        return self._cut(first.base, first.start, first.start + jump * (len(run) * first.width - 1) + 1, jump, wide)

    def _sum(self, olds: list[fx.Node]) -> fx.Node:
        """The sum of what old nodes of one shape computed: stacks that exist are summed where they are."""
        value: Tensor = olds[0].meta["val"]
        found = [self.env[n] for n in olds]
        names: dict[Any, int] = {}
        for x in found:
            names.setdefault(x.base if isinstance(x, _Piece) else None, len(names))
        found.sort(key=lambda x: (names[x.base], x.start, x.width) if isinstance(x, _Piece) else (names[None], 0, 0))
        terms: list[fx.Node] = []
        for run in _runs(found):
            if len(run) == 1 and isinstance(run[0], fx.Node):
                terms.append(run[0])
            else:
                terms.append(self._call(aten.sum.dim_IntList, (self._part(run, value), [0]), value, value.shape))
        total = terms[0]
        for term in terms[1:]:
            total = self._call(aten.add.Tensor, (total, term), value, value.shape)
        return total

    def _constant(self, value: Tensor) -> fx.Node:
        name = new_name(self.old)
        self.old.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    # Operations ------------------------------------------------------------------------------------------------------

    def _emit(self, members: list[fx.Node]) -> None:
        if len(members) >= LEAST and self._can_join(members[0]) and self._joined(members):
            return
        for node in members:
            terms = _stacked(node)
            if terms is not None and node.meta.get("summed"):
                continue  # built where it is summed
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if source is not None and source.meta.get("summed"):
                self.env[node] = self._sum(_stacked(source) or [])
            elif terms is not None and len(terms) >= LEAST:
                self.env[node] = self._stack(terms)
            else:
                self.env[node] = self.graph.node_copy(node, self._node)

    def _can_join(self, node: fx.Node) -> bool:
        target: Any = node.target
        kind = kind_of(node)
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or kind is None:
            return False
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        if any(name in str(target) for name in _LEFT_ALONE):
            return False
        inputs = node.all_input_nodes
        return kind[0].numel() <= LARGEST and all(kind_of(n) and not n.meta.get("summed") for n in inputs)

    def _joined(self, members: list[fx.Node]) -> bool:
        """One operation on stacks in place of all members; False where the operation has no such form."""
        first = members[0]
        columns_, spec = pytree.tree_flatten((first.args, dict(first.kwargs)))
        columns: list[list[Any]] = [[x] for x in columns_]
        for node in members[1:]:
            flat, other = pytree.tree_flatten((node.args, dict(node.kwargs)))
            if other != spec:
                return False
            for column, x in zip(columns, flat, strict=True):
                column.append(x)
        value: Tensor = first.meta["val"]
        fixed: list[Any] = []
        inputs: list[fx.Node] = []
        dims: list[int | None] = []
        for column in columns:
            same = all(x is column[0] or (not isinstance(x, fx.Node) and x == column[0]) for x in column)
            if isinstance(column[0], fx.Node):
                if len({kind_of(x) for x in column}) != 1:
                    return False
                inputs.append(self._node(column[0]) if same else self._stack(column))
            elif same:
                fixed.append(column[0])
                continue
            elif (
                all(type(x) in (int, float) for x in column) and first.target in NUMBERED and value.is_floating_point()
            ):
                inputs.append(self._constant(torch.tensor(column, dtype=value.dtype, device=value.device)))
            else:
                return False
            dims.append(None if same else 0)
            fixed.append(_Input(len(inputs) - 1))
        if all(d is None for d in dims):
            only = self.graph.node_copy(first, self._node)
            self.env |= dict.fromkeys(members, only)
            return True
        target: Any = first.target

        def once(*given: Tensor) -> Tensor:
            flat = [given[x.number] if isinstance(x, _Input) else x for x in fixed]
            args, kwargs = pytree.tree_unflatten(flat, spec)
            return target(*args, **kwargs)

        examples = [torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype, device=value.device) for n in inputs]
        try:
            part = capture(torch.vmap(once, in_dims=tuple(dims)), *examples)
        except Exception:  # an operation that vmap cannot run
            return False
        result = inline(self.graph, self.old, part, inputs)
        for i, node in enumerate(members):
            self.env[node] = _Piece(result, i, 1)
        return True


@dataclass(frozen=True)
class _Input:
    number: int


def _stacked(node: fx.Node) -> list[fx.Node] | None:
    """The parts of a stack along the first axis."""
    first: Any = node.args[0] if node.target is aten.stack.default and node.args[1:] in ((), (0,)) else None
    return None if first is None else list(first)


def _runs(found: list[fx.Node | _Piece]) -> list[list[fx.Node | _Piece]]:
    """Cut a row of parts into those in equal steps along one tensor, the same again and again, and whole nodes."""
    runs: list[list[fx.Node | _Piece]] = []
    for x in found:
        if runs and _follows(runs[-1], x):
            runs[-1].append(x)
        else:
            runs.append([x])
    return runs


def _follows(run: list[fx.Node | _Piece], x: fx.Node | _Piece) -> bool:
    last = run[-1]
    if not isinstance(x, _Piece) or not isinstance(last, _Piece):
        return isinstance(x, fx.Node) and isinstance(last, fx.Node)
    if (x.base, x.width) != (last.base, last.width):
        return False
    step = x.start - last.start
    if len(run) > 1:
        before = run[-2]
        assert isinstance(before, _Piece)
        return step == last.start - before.start
    return step == 0 or step == x.width or x.width == 1

"""What a loop over time leaves behind in a captured graph: long sums, and states that each follow from the last.

    ((p + q_1) + q_2) + ... + q_T  ->  one sum of a stack
    v_t = a_t v_{t-1} + b_t        ->  one linear recurrence, where no a_t or b_t depends on a state

Nodes may be added behind those that use them; `in_order` sorts the graph again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ppl.capture import capture
from ppl.recurrence import linear_recurrence
from ppl.rewrites import new_name

__all__ = ["NUMBERED", "in_order", "inline", "kind_of", "recurrences", "signatures", "sums"]

LEAST_TERMS = 8
LEAST_STEPS = 16
SHARED = 8  # a node with more users than this is told apart from others of its form
DEPTH = 3  # how far above a node its form is compared
BETWEEN = 64  # operations from one state to the next at most

aten = torch.ops.aten
# Where a number may differ from step to step, and becomes a tensor of all of them.
NUMBERED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def kind_of(node: Any) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    """Shape, type and device of the one tensor that a node computes."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def in_order(module: fx.GraphModule) -> None:
    """Sort the nodes so that each comes behind what it uses, otherwise in the order they have; in place."""
    nodes = list(module.graph.nodes)
    done: set[fx.Node] = set()
    sorted_: list[fx.Node] = []
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            open_ = [n for n in node.all_input_nodes if n not in done] if node not in done else []
            if open_:
                stack.extend(reversed(open_))
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                sorted_.append(node)
    for node in reversed(sorted_):
        first = next(iter(module.graph.nodes))
        if node is not first:
            first.prepend(node)


def inline(graph: fx.Graph, module: fx.GraphModule, part: fx.GraphModule, inputs: Iterable[Any]) -> fx.Node:
    """Copy the nodes of `part` behind the last of a graph of `module`; returns its one result."""
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in part.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            (result,) = node.all_input_nodes
        elif node.op == "get_attr":
            name = new_name(module)
            module.register_buffer(name, getattr(part, str(node.target)))
            known[node] = graph.get_attr(name)
            known[node].meta = dict(node.meta)
        else:
            known[node] = graph.node_copy(node, lambda n: known[n])
    return known[result]


def signatures(module: fx.GraphModule) -> dict[fx.Node, Hashable]:
    """The form of each node: its operation and how its inputs came about; equal for the same line of each step."""
    numbers: dict[Hashable, int] = {}

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    level: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output" or len(node.users) > SHARED:
            level[node] = number(("one", node.name))
        elif node.op in ("placeholder", "get_attr"):
            level[node] = number((node.op, kind_of(node)))
        else:
            level[node] = number((str(node.target), kind_of(node)))
    for _ in range(DEPTH):
        level = {node: number((level[node], _form(node, level))) for node in module.graph.nodes}
    return level


def _form(node: fx.Node, level: dict[fx.Node, Any]) -> Hashable:
    """Arguments of a node with inputs by their form; where a piece is taken out does not count."""
    if node.op != "call_function":
        return None
    if piece(node) is not None:
        return ("piece", level[node.all_input_nodes[0]])

    def frozen(x: Any) -> Hashable:
        if isinstance(x, fx.Node):
            return ("node", level[x])
        if isinstance(x, list | tuple):
            return ("list", *(frozen(y) for y in x))
        if isinstance(x, float) or (type(x) is int and node.target in NUMBERED):
            return "number"
        return repr(x)

    return (*(frozen(a) for a in node.args), *((k, frozen(v)) for k, v in node.kwargs.items()))


def piece(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(base, start, width) of a node that is a reshaped part of the first axis of another; None for others."""
    args: Any = node.args
    target: Any = node.target
    if node.op != "call_function":
        return None
    if target in (aten.view.default, aten.reshape.default) and isinstance(args[0], fx.Node):
        inner = piece(args[0]) if args[0].target is aten.slice.Tensor else None
        return inner
    if target is aten.select.int and args[1] == 0:
        base, start, width = args[0], args[2], 1
    elif target is aten.slice.Tensor and len(args) >= 4 and args[1] == 0 and (len(args) < 5 or args[4] == 1):
        kind = kind_of(args[0])
        if kind is None:
            return None
        start, end, _ = slice(args[2], args[3]).indices(kind[0][0])
        base, width = args[0], end - start
    elif getattr(target, "__name__", "") == "getitem" and args[0].target is aten.unbind.int:
        if len(args[0].args) > 1 and args[0].args[1] != 0:
            return None
        base, start, width = args[0].args[0], args[1], 1
    else:
        return None
    kind = kind_of(base)
    if kind is None or width < 1:
        return None
    return base, start % kind[0][0], width


# Sums ----------------------------------------------------------------------------------------------------------------


def sums(module: fx.GraphModule) -> None:
    """Write trees of additions with many terms of one shape as one sum of a stack; in place."""
    graph = module.graph
    forms = signatures(module)
    roots = [n for n in graph.nodes if _adds(n) and not (len(n.users) == 1 and _adds(next(iter(n.users))))]
    counts = Counter(forms[n] for n in roots)
    for root in reversed(roots):
        if counts[forms[root]] >= LEAST_TERMS:  # a sum in each step: joined with those of the other steps instead
            continue
        terms = _terms(root)
        if len(terms) < LEAST_TERMS:
            continue
        kind = kind_of(root)
        assert kind is not None
        with graph.inserting_before(root):
            leaves = []
            for node, weight in terms.items():
                leaf = node
                if weight == -1:
                    leaf = graph.call_function(aten.neg.default, (node,))
                elif weight != 1:
                    leaf = graph.call_function(aten.mul.Tensor, (node, float(weight)))
                if leaf is not node:
                    leaf.meta = dict(node.meta)
                leaves.append(leaf)
            stack = graph.call_function(aten.stack.default, (leaves,))
            stack.meta = {"val": root.meta["val"].new_empty((len(leaves), *kind[0])), "summed": True}
            total = graph.call_function(aten.sum.dim_IntList, (stack, [0]))
            total.meta = dict(root.meta)
        root.replace_all_uses_with(total)
    graph.eliminate_dead_code()


def _adds(node: Any) -> bool:
    """Whether a node adds or subtracts two tensors of its own shape and type."""
    if not isinstance(node, fx.Node) or node.target not in (aten.add.Tensor, aten.sub.Tensor):
        return False
    kind = kind_of(node)
    if kind is None or not kind[1].is_floating_point or not isinstance(node.kwargs.get("alpha", 1), int | float):
        return False
    return all(kind_of(x) == kind for x in node.args)


def _terms(root: fx.Node) -> dict[fx.Node, float]:
    """The terms of a tree of additions with their weights; intermediate sums that are used elsewhere are terms."""
    terms: dict[fx.Node, float] = {}
    open_: list[tuple[fx.Node, float]] = [(root, 1.0)]
    while open_:
        node, weight = open_.pop()
        if node is not root and not (_adds(node) and len(node.users) == 1):
            terms[node] = terms.get(node, 0.0) + weight
            continue
        first, second = (x for x in node.args if isinstance(x, fx.Node))
        sign: Any = node.kwargs.get("alpha", 1)
        open_ += [(second, weight * (sign if node.target is aten.add.Tensor else -sign)), (first, weight)]
    return terms


# Recurrences ---------------------------------------------------------------------------------------------------------

# An expression is a node, a number, or (operation, expression, expression).
Expression = Any


def recurrences(module: fx.GraphModule) -> None:
    """Write long chains v_t = a_t v_{t-1} + b_t as one linear recurrence; in place."""
    tried: set[str] = set()
    while _one_recurrence(module, tried):
        in_order(module)
        module.graph.eliminate_dead_code()


def _one_recurrence(module: fx.GraphModule, tried: set[str]) -> bool:
    classes: dict[Hashable, list[fx.Node]] = {}
    for node, form in signatures(module).items():
        kind = kind_of(node)
        if node.op == "call_function" and node.target in _AFFINE and kind is not None and kind[1].is_floating_point:
            classes.setdefault(form, []).append(node)
    nodes = list(module.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    # What is used most outside the chain is the state.
    for members in sorted(classes.values(), key=lambda m: -sum(len(n.users) for n in m)):
        if len(members) < LEAST_STEPS or members[0].name in tried:
            continue
        tried.add(members[0].name)
        run = [members[0]]
        steps: list[tuple[Expression, Expression]] = []
        for node in members[1:]:
            step = _between(run[-1], node, nodes, place)
            if step is None:
                if len(steps) >= LEAST_STEPS:
                    break
                run, steps = [node], []
            else:
                run.append(node)
                steps.append(step)
        if len(steps) >= LEAST_STEPS and _independent(run[0], steps, nodes, place):
            _write(module, run, steps)
            return True
    return False


_AFFINE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.rsub.Scalar}


def _between(
    state: fx.Node, following: fx.Node, nodes: list[fx.Node], place: dict[fx.Node, int]
) -> tuple[Expression, Expression] | None:
    """(a, b) with following = a state + b; None where it is not of this form."""
    kind = kind_of(state)
    if kind_of(following) != kind:
        return None
    path = {state}
    found: dict[fx.Node, tuple[Expression, Expression] | None] = {state: (1.0, 0.0)}
    for node in nodes[place[state] + 1 : place[following] + 1]:
        if not any(n in path for n in node.all_input_nodes):
            continue
        path.add(node)
        if len(path) > BETWEEN:
            return None
        found[node] = _affine(node, found, path) if kind_of(node) == kind else None
    return found.get(following)


def _affine(
    node: fx.Node, found: dict[fx.Node, tuple[Expression, Expression] | None], path: set[fx.Node]
) -> tuple[Expression, Expression] | None:
    parts: list[tuple[Expression, Expression]] = []
    for x in node.args:
        if isinstance(x, fx.Node) and x in path:
            inner = found[x]
            if inner is None:
                return None
            parts.append(inner)
        elif isinstance(x, fx.Node | int | float):
            parts.append((0.0, x))
        else:
            return None
    target = node.target
    alpha = node.kwargs.get("alpha", 1)
    if target is aten.neg.default:
        return _times(-1.0, parts[0][0]), _times(-1.0, parts[0][1])
    if target not in _AFFINE or len(parts) != 2:
        return None
    (a, b), (c, d) = parts
    if target is aten.rsub.Scalar:
        a, b, c, d, target = c, d, a, b, aten.sub.Tensor
    if target is aten.mul.Tensor:
        if a == 0.0:
            return _times(b, c), _times(b, d)
        return (_times(a, d), _times(b, d)) if c == 0.0 else None
    if target is aten.div.Tensor:
        return (_over(a, d), _over(b, d)) if c == 0.0 else None
    weight: Any = alpha if target is aten.add.Tensor else -alpha  # type: ignore[operator]
    return _plus(a, _times(weight, c)), _plus(b, _times(weight, d))


def _times(x: Expression, y: Expression) -> Expression:
    if isinstance(x, int | float) and isinstance(y, int | float):
        return float(x * y)
    for one, other in ((x, y), (y, x)):
        if isinstance(one, int | float) and one in (0, 1):
            return 0.0 if one == 0 else other
    return (aten.mul.Tensor, y, x) if isinstance(x, int | float) else (aten.mul.Tensor, x, y)


def _over(x: Expression, y: Expression) -> Expression:
    if isinstance(x, int | float) and x == 0:
        return 0.0
    if isinstance(y, int | float):
        return _times(x, 1 / y)
    return (aten.mul.Tensor, (aten.reciprocal.default, y), x) if isinstance(x, int | float) else (aten.div.Tensor, x, y)


def _plus(x: Expression, y: Expression) -> Expression:
    if isinstance(x, int | float) and isinstance(y, int | float):
        return float(x + y)
    for one, other in ((x, y), (y, x)):
        if isinstance(one, int | float) and one == 0:
            return other
    return (aten.add.Tensor, y, x) if isinstance(x, int | float) else (aten.add.Tensor, x, y)


def _leaves(x: Expression) -> list[fx.Node]:
    if isinstance(x, fx.Node):
        return [x]
    return [n for y in x[1:] for n in _leaves(y)] if isinstance(x, tuple) else []


def _independent(
    first: fx.Node, steps: list[tuple[Expression, Expression]], nodes: list[fx.Node], place: dict[fx.Node, int]
) -> bool:
    """Whether no coefficient depends on a state."""
    depends = {first}
    for node in nodes[place[first] + 1 :]:
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    return not any(n in depends for step in steps for x in step for n in _leaves(x))


def _write(module: fx.GraphModule, run: list[fx.Node], steps: list[tuple[Expression, Expression]]) -> None:
    graph = module.graph
    example: Tensor = run[0].meta["val"]
    (output,) = (n for n in graph.nodes if n.op == "output")

    def emit(x: Expression, wide: bool) -> fx.Node:
        if isinstance(x, tuple):
            args = [y if isinstance(y, int | float) else emit(y, False) for y in x[1:]]
            node = graph.call_function(x[0], tuple(args))
            shape = torch.broadcast_shapes(*(a.meta["val"].shape for a in args if isinstance(a, fx.Node)))
            node.meta["val"] = example.new_empty(shape)
        elif isinstance(x, fx.Node):
            node = x
        else:
            options: dict[str, Any] = {"dtype": example.dtype, "device": example.device}
            node = graph.call_function(aten.full.default, (list(example.shape), float(x)), options)
            node.meta["val"] = example.new_empty(example.shape)
        if wide and node.meta["val"].shape != example.shape:
            node = graph.call_function(aten.expand.default, (node, list(example.shape)))
            node.meta["val"] = example.new_empty(example.shape)
        return node

    with graph.inserting_before(output):
        shape = (len(steps), *example.shape)
        stacks = []
        for column in zip(*steps, strict=True):
            if all(x is column[0] or x == column[0] for x in column):
                one = emit(column[0], True)
                stack = graph.call_function(aten.expand.default, (one, list(shape)))
            else:
                stack = graph.call_function(aten.stack.default, ([emit(x, True) for x in column],))
            stack.meta["val"] = example.new_empty(shape)
            stacks.append(stack)
        # One tensor given twice would be one input of the captured graph.
        a, b = torch.ones(2, *shape, dtype=example.dtype, device=example.device).unbind()
        part = capture(linear_recurrence, a, b, b[0].clone())
        states = inline(graph, module, part, [*stacks, run[0]])
        for t, node in enumerate(run[1:]):
            new = graph.call_function(aten.select.int, (states, 0, t))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)

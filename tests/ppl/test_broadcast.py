"""Operations on expanded tensors: fewer numbers, the same values, and left alone where shapes or types would change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ppl.broadcast import shrink

ROW, MATRIX = torch.linspace(0.5, 2, 3), torch.arange(1.0, 7.0).reshape(2, 3)
NUMBER, COLUMN = torch.tensor(1.7), torch.tensor([[0.3], [4.0]])

# name -> (function, inputs, elements computed before, elements computed after)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int, int]] = {
    "a function of what is expanded": (lambda x, s: x - s.expand(2, 3).log(), (MATRIX, NUMBER), 12, 7),
    "a chain": (lambda x, s: x / (2 * s.expand(2, 3) ** 2).exp(), (MATRIX, NUMBER), 24, 9),
    "a side of a quotient": (lambda x, s: s.expand(2, 3) / x, (MATRIX, ROW), 6, 6),
    "both sides, one row and one column": (lambda r, c: r.expand(2, 3) * c.expand(2, 3) + 1, (ROW, COLUMN), 12, 12),
    "both sides alike": (lambda r, s: (r.expand(2, 3) + r.expand(2, 3)).neg() * s, (ROW, NUMBER), 18, 12),
    "a view keeps its memory": (lambda s: s.expand(2, 3).log().view(6), (NUMBER,), 6, 6),
    "a number of another type": (lambda x, s: x * s.expand(2, 3), (MATRIX, NUMBER.double()), 6, 6),
}


def computed(graph: Any) -> int:
    skip = ("expand", "view", "_to_copy")
    nodes = (n for n in graph.graph.nodes if n.op == "call_function" and not any(s in str(n.target) for s in skip))
    return sum(n.meta["val"].numel() for n in nodes)


@pytest.mark.parametrize("name", CASES)
def test_values_stay_and_fewer_are_computed(name: str) -> None:
    function, inputs, before, after = CASES[name]
    graph = make_fx(function)(*inputs)
    assert computed(graph) == before
    shrink(graph)
    graph.recompile()
    found, expected = graph(*inputs), function(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    assert computed(graph) == after


def test_gradients_stay() -> None:
    """Graphs of densities are differentiated after they were simplified: an expansion adds up what comes back."""

    def function(x: Tensor, s: Tensor) -> Tensor:
        wide = s.expand(2, 3)
        return (-0.5 * ((x - wide) / wide.exp()) ** 2 - wide.log()).sum()

    graph = make_fx(function)(MATRIX, NUMBER)
    shrink(graph)
    graph.recompile()
    torch.testing.assert_close(torch.func.grad(graph, 1)(MATRIX, NUMBER), torch.func.grad(function, 1)(MATRIX, NUMBER))

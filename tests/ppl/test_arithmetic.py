"""Shortcuts and splits keep values and gradients, and do what they are for."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl.lower import Split, native, split_shared
from ppl.passes import simplify

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1


def operations(graph):
    return sum(n.op in ("call_function", "call_method") for n in graph.graph.nodes)


C = torch.full((3,), 4.0, dtype=F64)
CASES = {
    "chain": (lambda x, y: -(2 * (x - 1) / 3) + 0.5, 1),
    "reversed": (lambda x, y: 5 - (3 - x), 1),
    "cancelling": (lambda x, y: x.neg().neg(), 0),
    "product": (lambda x, y: -(2 * x) * (y * 3) * 0.5, 2),
    "quotient": (lambda x, y: (2 * x) / (4 * y) * 2, 1),
    "sum": (lambda x, y: (2 * x + 1) + (6 * y - 1), 2),
    "difference": (lambda x, y: 2 * x - 3 * y, 2),
    "reduction": (lambda x, y: (2 * x + 1).sum() - (y * 0.5).sum(), 4),
    "constant tensors": (lambda x, y: (x * C) / C + C - C, 0),
    "vector constants": (lambda x, y: x * torch.arange(3, dtype=F64) * 2, 2),
    "masks": (lambda x, y: torch.where(x > 0.5, 2 * x * 3, y.neg().neg()), 3),
    "broadcast": (lambda x, y: (2 * x[:, None]) * (y[None] * 3) + 1, 6),  # scalings stay on the small tensors
    "integers": (lambda x, y: x + (torch.arange(3) * 2 + 1).to(F64), 1),
    "small and large": (lambda x, y: x * 1e-80 * 1e80 * 1e90 * 1e-90, 3),
    "zero": (lambda x, y: x * 0.0 + y, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_chains_become_short(name):
    fn, most = CASES[name]
    x, y = rand(3), rand(3, seed=1)
    graph = simplify(make_fx(fn)(x, y))
    assert operations(graph) <= most
    for g in (graph, native(graph)):
        for seed in (2, 4):
            a, b = rand(3, seed=seed) - 0.6, rand(3, seed=seed + 1)
            torch.testing.assert_close(g(a, b), fn(a, b), rtol=1e-13, atol=1e-13)


def test_not_a_number_and_infinity_stay():
    graph = simplify(make_fx(lambda x: -(2 * x) * 3 + x * 0.0)(rand(3)))
    x = torch.tensor([float("nan"), float("inf"), 1.0], dtype=F64)
    torch.testing.assert_close(graph(x), -(2 * x) * 3 + x * 0.0, equal_nan=True)


def test_gradients_of_slices_are_joined():
    """Parts with a gap and in another order: one cat, zeros where nothing flows."""
    fn = torch.func.grad(lambda x: (x[6:8] ** 2).sum() + x[0:2].exp().sum() + (x[2:5] ** 3).sum())
    x = rand(9)
    graph = simplify(make_fx(fn)(x))
    targets = [str(n.target) for n in graph.graph.nodes]
    assert not any("slice_backward" in t for t in targets)
    assert sum("cat" in t for t in targets) == 1
    expected = torch.cat([x[:2].exp(), 3 * x[2:5] ** 2, x.new_zeros(1), 2 * x[6:8], x.new_zeros(1)])
    torch.testing.assert_close(graph(x), expected)


def test_overlapping_slices_are_left_alone():
    fn = torch.func.grad(lambda x: (x[0:4] ** 2).sum() + (x[2:6] ** 3).sum())
    x = rand(6)
    torch.testing.assert_close(simplify(make_fx(fn)(x))(x), fn(x))


def test_shared_part_is_computed_once_and_again_when_data_change():
    calls = []

    def fn(z, y, s):
        return ((z - y.log()) / s.exp()).sum(1)

    args = rand(4, 3), rand(3, seed=1), rand(3, seed=2)
    once, main = split_shared(simplify(make_fx(fn)(*args)), 1)
    assert operations(once) == 2

    def counted(*shared):
        calls.append(1)
        return once(*shared)

    split = Split(counted, main, 1)
    for _ in range(3):
        torch.testing.assert_close(split(*args), fn(*args))
    assert len(calls) == 1
    args[1].mul_(2.0)
    torch.testing.assert_close(split(*args), fn(*args))
    other = (args[0], rand(3, seed=5), args[2])
    torch.testing.assert_close(split(*other), fn(*other))
    assert len(calls) == 3
    assert split_shared(make_fx(lambda z, y: z + y)(rand(3), rand(3)), 1) is None

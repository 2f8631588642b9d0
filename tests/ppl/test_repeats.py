"""Joined graphs against the loops they come from: values, gradients, and how many operations are left."""

from __future__ import annotations

import random

import pytest
import torch

from ppl.capture import capture
from ppl.passes import simplify
from ppl.repeats import join
from ppl.rewrites import pin_types

F64 = torch.float64
SIZE = 60


def autoregression_of_two(z):
    """A state that depends on the last two is no recurrence of the first order."""
    h, total = [z[0], z[1]], z[0] * 0
    for t in range(2, SIZE):
        h.append(0.5 * h[-1] - 0.2 * h[-2] + z[t])
        total = total + torch.exp(-(h[-1] ** 2))
    return total


def not_linear(z):
    h, total = z[0], z[0] * 0
    for t in range(1, SIZE):
        h = torch.tanh(h) + z[t]
        total = total + h.exp() * z[t]
    return total


def vectors(z):
    z = z.reshape(SIZE // 3, 3)
    h, out = z[0], []
    step = torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.3, 0.2], [0.1, 0.0, 0.6]], dtype=F64)
    for t in range(1, SIZE // 3):
        h = step @ h + z[t]
        out.append(torch.logsumexp(h, 0) + t * 0.1 * h.sum())
    return torch.stack(out).sum()


def every_other(z):
    return sum((z[t + 1] - z[t]) ** 2 * z[0] for t in range(0, SIZE - 2, 2))


def backwards(z):
    return sum(-(z[SIZE - 1 - t] - z[SIZE - t]).abs() * t for t in range(1, SIZE))


def products(z):
    state = z[0].sigmoid() * 0 + 1
    for t in range(1, SIZE):
        state = state * torch.sigmoid(z[t])
    return state.log()


def mean_reverting(z):
    mean = z[:3].sum()
    states = [mean]
    for t in range(3, SIZE):
        states.append(mean + z[1].tanh() * (states[-1] - mean) + z[2] * z[t])
    x = torch.stack(states[1:])
    return (x[1:] - x[:-1]).square().sum() + states[7] * states[3]


def divided(z):
    state, states = z[0], []
    for t in range(1, SIZE):
        state = 1 - (state / (2 + z[1] ** 2) - z[t]) * 0.5
        states.append(state)
    return (torch.stack(states) ** 3).sum()


def branches(z):
    total = z[0] * 0
    for t in range(1, SIZE):
        total = total + torch.where(z[t] > 0, z[t], z[t] * 0.1) / (1 + z[t - 1] ** 2)
    return total


def weighted_rows(z):
    """Pieces in no order at all."""
    order = random.Random(3).sample(range(SIZE), SIZE)
    return sum(torch.sin(z[i]) * z[(5 * i) % SIZE] for i in order)


# Most operations that may be left.
CASES = {
    autoregression_of_two: 200,
    not_linear: 200,
    vectors: 100,
    every_other: 25,
    backwards: 25,
    products: 100,
    mean_reverting: 130,
    divided: 130,
    branches: 25,
    weighted_rows: 25,
}


@pytest.mark.parametrize("function", list(CASES), ids=lambda f: f.__name__)
def test_value_and_gradient_stay(function):
    generator = torch.Generator().manual_seed(0)
    example, other, third = 0.7 * torch.randn(3, SIZE, generator=generator, dtype=F64)
    graph = simplify(pin_types(capture(function, example)), keep_detach=True, repeats=True)
    assert graph.meta["joined"]
    assert len(graph.graph.nodes) <= CASES[function]
    graph.graph.lint()
    torch.testing.assert_close(graph(other), function(other), rtol=1e-11, atol=1e-11)
    gradient = torch.func.grad(function)(other)
    torch.testing.assert_close(torch.func.grad(graph)(other), gradient, rtol=1e-10, atol=1e-10)
    lanes = torch.vmap(torch.func.grad(graph))(torch.stack([third, other]))
    torch.testing.assert_close(lanes[1], gradient, rtol=1e-10, atol=1e-10)


def test_nothing_repeated_is_nothing_joined():
    graph = capture(lambda x: (x.exp() * 2).sum() + x[0], torch.ones(4))
    before = [n.name for n in graph.graph.nodes]
    assert join(graph) is None
    assert [n.name for n in graph.graph.nodes] == before


def test_random_operations_are_not_joined():
    def noisy(x):
        return sum(torch.randn(()) * x[t] for t in range(20))

    graph = join(capture(noisy, torch.ones(20))) or capture(noisy, torch.ones(20))
    assert sum("randn" in str(n.target) for n in graph.graph.nodes) == 20


def test_several_outputs_and_inputs_used_as_they_are():
    def pair(x, y):
        rows = [x[t] * y for t in range(20)]
        return torch.stack(rows), rows[3], y, rows[0] + rows[19]

    x, y = torch.randn(20, 2, dtype=F64), torch.randn(2, dtype=F64)
    graph = join(capture(pair, x, y))
    for one, two in zip(graph(x + 1, y), pair(x + 1, y), strict=True):
        torch.testing.assert_close(one, two)

"""The blocked linear recurrence against the loop it stands for."""

from __future__ import annotations

import pytest
import torch

from ppl.recurrence import SHORT, linear_recurrence

F64 = torch.float64


def loop(a, b, first):
    states = []
    for gain, shift in zip(a, b, strict=True):
        first = gain * first + shift
        states.append(first)
    return torch.stack(states)


@pytest.mark.parametrize("steps", [1, SHORT, SHORT + 1, 27, 100, 257])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_states_and_gradients_are_those_of_the_loop(steps, shape):
    generator = torch.Generator().manual_seed(steps)
    a, b = torch.randn(2, steps, *shape, generator=generator, dtype=F64)
    a = 1.5 * torch.tanh(a)  # of both signs, some above one
    first = torch.randn(shape, generator=generator, dtype=F64)
    states = linear_recurrence(a, b, first)
    expected = loop(a, b, first)
    torch.testing.assert_close(states, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(expected.shape, generator=generator, dtype=F64)

    def gradients(f):
        inputs = [x.clone().requires_grad_() for x in (a, b, first)]
        return torch.autograd.grad((weights * f(*inputs)).sum(), inputs)

    for one, two in zip(gradients(linear_recurrence), gradients(loop), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_a_coefficient_of_zero_forgets_what_was_before():
    """No division by products of coefficients: zeros in a, and states that are huge before them, do no harm."""
    a = torch.full((50,), 1e3, dtype=F64)
    a[20::7] = 0.0
    b = torch.ones(50, dtype=F64)
    states = linear_recurrence(a, b, torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(states, loop(a, b, torch.tensor(1.0, dtype=F64)), rtol=1e-11, atol=0)


def test_many_draws_at_once():
    a, b = torch.rand(2, 5, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    first = torch.arange(5, dtype=F64)
    expected = torch.stack([loop(*x) for x in zip(a, b, first, strict=True)])
    torch.testing.assert_close(torch.vmap(linear_recurrence)(a, b, first), expected)

"""Loops of hundreds of steps: traced in bounded time, compiled and captured only where that pays, and said so."""

from __future__ import annotations

import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.program import Program

F64 = torch.float64
STEPS = 500


def garch(y):
    base = pyro.sample("base", dist.LogNormal(y.new_zeros(()), 1.0))
    shock = pyro.sample("shock", dist.Beta(y.new_tensor(2.0), 5.0))
    variance = [torch.ones_like(base)]
    for value in y[:-1]:
        variance.append(base + shock * value**2 + 0.5 * variance[-1])
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, torch.stack(variance).sqrt()), obs=y)


def hidden_markov(y):
    stay = pyro.sample("stay", dist.Beta(y.new_tensor(2.0), 2.0).expand([2]).to_event(1))
    transition = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])]).log()
    emission = dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).log_prob(y[:, None])
    forward = emission[0]
    for row in emission[1:]:
        forward = torch.logsumexp(forward[:, None] + transition, 0) + row
    pyro.factor("likelihood", torch.logsumexp(forward, 0))


@pytest.mark.parametrize("model", [garch, pytest.param(hidden_markov, marks=pytest.mark.slow)])
def test_few_calls_of_a_long_loop_are_neither_captured_nor_compiled(model):
    """500 steps: construction and trace take under 60 s of processor time (5 to 10 measured), also for the run."""
    y = torch.randn(STEPS, generator=torch.Generator().manual_seed(0), dtype=F64)
    start = time.process_time()
    program = Program(model, y)
    posterior = ppl.infer(program, ppl.HMC(warmup=20, max_steps=1), draws=2, chains=2)
    assert time.process_time() - start < 60
    (note,) = [n for n in posterior.attrs["notes"] if "operations" in n]
    assert "under vmap, not captured" in note
    assert "220 calls" in note
    kinds = {runner.kind for function in program._functions.values() for runner in function._runners.values()}
    assert "inductor" not in kinds
    z = torch.tensor([[0.1, -0.3]], dtype=F64)
    value, gradient = program.flat().log_density_and_grad(z)
    h = 1e-6
    for i in range(2):
        step = torch.zeros_like(z)
        step[0, i] = h
        slope = (program.flat().log_density(z + step) - program.flat().log_density(z - step)) / (2 * h)
        assert abs(float(slope - gradient[0, i])) < 1e-4 * (1 + abs(float(gradient[0, i])))
    assert bool(torch.isfinite(value).all())


def test_short_models_are_captured_without_a_word():
    y = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    program = Program(garch, y)
    assert program.flat().prepare(torch.zeros(2, 2, dtype=F64), 10) == "graph"
    assert not program.notes

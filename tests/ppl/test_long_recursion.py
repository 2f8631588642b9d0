"""Loops of hundreds of steps: joined where possible, else captured and compiled only where that pays, with a note."""

from __future__ import annotations

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.program import Program

F64 = torch.float64
STEPS = 500


def arch(y):
    """A recursion that is not linear in its state, so that its steps cannot be joined."""
    base = pyro.sample("base", dist.LogNormal(y.new_zeros(()), 1.0))
    shock = pyro.sample("shock", dist.Beta(y.new_tensor(2.0), 5.0))
    variance = [torch.ones_like(base)]
    for value in y[:-1]:
        variance.append(base + shock * value**2 + 0.5 * torch.tanh(variance[-1]) + 0.1 * variance[-1].sin())
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, torch.stack(variance).sqrt()), obs=y)


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


@pytest.mark.parametrize("model", [arch, pytest.param(hidden_markov, marks=pytest.mark.slow)])
def test_few_calls_of_a_long_loop_are_neither_captured_nor_compiled(model):
    """500 steps: construction and trace take under 60 s of processor time (5 to 10 measured), also for the run."""
    y = torch.randn(STEPS, generator=torch.Generator().manual_seed(0), dtype=F64)
    start = time.process_time()
    program = Program(model, y)
    posterior = ppl.infer(program, ppl.HMC(warmup=20, max_steps=1), draws=2, chains=2)
    assert time.process_time() - start < 60
    (note,) = [n for n in posterior.attrs["notes"] if "one draw takes" in n]
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


def volatility(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    phi = pyro.sample("phi", dist.Uniform(y.new_tensor(-1.0), 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(y.new_tensor(1.0)))
    h = mu
    for t, value in enumerate(y):
        h = pyro.sample(f"h_{t}", dist.Normal(mu + phi * (h - mu), scale))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=value)


def operations(model, steps):
    """Nodes of the graph of one draw without its inputs, and of the captured gradient."""
    y = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=F64)
    program = Program(model, y, compile="never")
    flat = program.flat()
    z = torch.full((1, flat.dim), 0.1, dtype=F64)
    assert flat.prepare(z, 10**6) == "graph"
    (function,) = program._functions.values()
    (runner,) = function._runners.values()
    graphs = (function._one.graph, runner.graph.graph)
    return [sum(n.op not in ("placeholder", "get_attr") for n in graph.nodes) for graph in graphs], program


def test_sites_of_each_step_become_operations_on_all_steps():
    """Two sites a step: as many operations for 120 steps as for 60, and the density of the model itself."""
    short, _ = operations(volatility, 60)
    long, program = operations(volatility, 120)
    assert short == long
    assert long[0] < 100
    flat = program.flat()
    z = 0.3 * torch.randn(1, flat.dim, generator=torch.Generator().manual_seed(1), dtype=F64)
    values = {n: v[0] for n, v in flat.constrain(z).items()}
    trace = pyro.poutine.trace(pyro.condition(program.model, values)).get_trace(*program.arguments.call({})[0])
    jacobian = -torch.nn.functional.softplus(z[0, 1]) - torch.nn.functional.softplus(-z[0, 1]) + math.log(2) + z[0, 2]
    value, gradient = flat.log_density_and_grad(z)
    torch.testing.assert_close(value[0], trace.log_prob_sum() + jacobian, rtol=1e-10, atol=1e-10)
    x = z.clone().requires_grad_()
    eager = Program(volatility, *program.arguments.call({})[0], batching="loop").flat()
    torch.testing.assert_close(gradient, eager.log_density_and_grad(x.detach())[1], rtol=1e-9, atol=1e-9)


def test_a_linear_recursion_grows_with_the_cube_root():
    """Twice the steps: a quarter more operations (2^(1/3)), not twice as many."""
    short, _ = operations(garch, 100)
    long, _ = operations(garch, 200)
    assert long[0] <= 1.3 * short[0]
    assert long[1] <= 1.3 * short[1]
    assert long[0] < 200


def test_a_join_that_changes_the_result_is_not_used(monkeypatch):
    """The joined graph is compared with the model; the plain one takes its place, with a note."""
    import ppl.passes

    true_join = ppl.passes.join

    def wrong(module):
        joined = true_join(module)
        if joined is not None:
            for node in joined.graph.nodes:
                if node.target is torch.ops.aten.exp.default:
                    node.target = torch.ops.aten.sin.default
        return joined

    y = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=F64)
    right = Program(garch, y, batching="loop").flat()
    z = torch.tensor([[0.1, -0.3]], dtype=F64)
    monkeypatch.setattr(ppl.passes, "join", wrong)
    program = Program(garch, y)
    torch.testing.assert_close(program.flat().log_density(z), right.log_density(z))
    assert any("joining the steps of a loop changed the result" in n for n in program.notes)


def test_short_models_are_captured_without_a_word():
    y = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    program = Program(garch, y)
    assert program.flat().prepare(torch.zeros(2, 2, dtype=F64), 10) == "graph"
    assert not program.notes

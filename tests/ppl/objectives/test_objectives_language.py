"""What users write: nonlinear functions of expectations, own objectives, programs that do not broadcast."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import (
    agrees,
    differs,
    measure,
    normal_guide,
    normal_program,
    one_draw_guide,
    one_draw_program,
    real,
    switch_guide,
    switch_program,
)
from torch import Tensor

import ppl
from ppl.errors import OptionError
from ppl.objectives import ELBO, IWELBO, Engine, Sleep

D = torch.float64
THETA = 0.6


def shifted() -> None:
    pyro.sample("v", dist.Normal(pyro.param("theta", real(THETA)), real(1.0)))


def expectation(ctx: Any, guide: Any, samples: int) -> Any:
    return ctx.expectation(lambda: ctx.sim(guide)["v"], samples)


# T9


@pytest.mark.parametrize("estimator", ["reparam", "reinforce", "mvd"])
def test_square_of_an_expectation(estimator: str) -> None:
    """theta^2 and 2 theta; the square of the sample mean has the mean theta^2 + 1 / n."""
    right = Engine(lambda ctx, _, g: expectation(ctx, g, 3).power(2), None, shifted, policy={"v": estimator}, dtype=D)
    agrees(measure(right, "value", 5000), THETA**2, 0.1)
    agrees(measure(right, "theta", 5000), 2 * THETA, 0.1)
    plug_in = Engine(lambda ctx, _, g: expectation(ctx, g, 3).mean().square(), None, shifted, dtype=D)
    differs(measure(plug_in, "value", 5000), THETA**2)


@pytest.mark.parametrize("estimator", ["reparam", "reinforce"])
def test_exponential_of_an_expectation(estimator: str) -> None:
    """e^theta in value and gradient, where exp of one draw has e^(theta + 1/2)."""
    right = Engine(lambda ctx, _, g: expectation(ctx, g, 1).exp(2.0), None, shifted, policy={"v": estimator}, dtype=D)
    agrees(measure(right, "value", 20000), math.exp(THETA), 0.05)
    agrees(measure(right, "theta", 20000), math.exp(THETA), 0.3)
    plug_in = Engine(lambda ctx, _, g: expectation(ctx, g, 1).mean().exp(), None, shifted, dtype=D)
    found = measure(plug_in, "theta", 20000)
    differs(found, math.exp(THETA))
    agrees(found, math.exp(THETA + 0.5), 0.1)


def test_product_power_and_logarithm_of_expectations() -> None:
    def product(ctx: Any, model: Any, guide: Any) -> Tensor:
        return expectation(ctx, guide, 2) * expectation(ctx, guide, 2)

    agrees(measure(Engine(product, None, shifted, dtype=D), "theta", 5000), 2 * THETA, 0.1)
    cube = Engine(lambda ctx, _, g: expectation(ctx, g, 4).power(3), None, shifted, dtype=D)
    agrees(measure(cube, "value", 20000), THETA**3, 0.1)

    def evidence(ctx: Any, model: Any, guide: Any) -> Tensor:
        def weight() -> Tensor:
            z = ctx.sim(guide)
            return (ctx.density(model, z) - z.density).exp()

        return ctx.expectation(weight, 2).log_bound()

    agrees(measure(Engine(evidence, normal_program(), normal_guide), "value"), -2.13499169, 0.02)


def test_an_expectation_needs_samples() -> None:
    for samples in (0, None, 2.5):
        with pytest.raises(OptionError, match="needs samples"):
            Engine(lambda ctx, _, g, n=samples: expectation(ctx, g, n).mean(), None, shifted, dtype=D)  # type: ignore[misc]
    with pytest.raises(OptionError, match="needs 3 independent samples"):
        Engine(lambda ctx, _, g: expectation(ctx, g, 2).power(3), None, shifted, dtype=D)


def test_an_own_objective_in_six_lines() -> None:
    """chi-square upper bound E w^2, written by hand, against its closed form."""

    def chi(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return -(2 * (ctx.density(model, z) - z.density)).exp()

    grid = torch.linspace(-10, 10, 200001, dtype=D)
    m = real(0.3).requires_grad_()
    log_p = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(real(1.7))
    value = -((2 * log_p - dist.Normal(m, 0.8).log_prob(grid)).exp()).sum() * (grid[1] - grid[0])
    (truth,) = torch.autograd.grad(value, m)
    engine = Engine(chi, normal_program(), normal_guide)
    agrees(measure(engine, "value", 4000), float(value.detach()), 0.2)
    agrees(measure(engine, "m", 20000), float(truth), 0.6)


# Batches and loops


@pytest.mark.parametrize("estimator", ["enum", "mvd"])
def test_lane_by_lane_is_the_same_estimator(estimator: str) -> None:
    engine = Engine(IWELBO(2), switch_program(), switch_guide, policy={"z": estimator}, batching="loop")
    whole = Engine(IWELBO(2), switch_program(), switch_guide, policy={"z": "enum"}).gradient()
    if estimator == "enum":
        torch.testing.assert_close(engine.gradient().gradient, whole.gradient, rtol=0, atol=1e-12)
    else:
        found = measure(engine, "a", 20, 20)
        assert abs(float(found.mean - whole.gradient["a"])) < 4 * float(found.stderr)


def test_a_model_for_one_draw_falls_back_to_a_loop() -> None:
    """`z[0] + z.sum()` is right for one draw only: found out, noted, and run draw by draw with exact answers."""
    engine = Engine(ELBO(), one_draw_program(), one_draw_guide)
    assert engine.loop
    assert any("broadcast" in note for note in engine.notes)
    found = measure(engine, "m", 40, 20)
    residual = 1.0 - (2 * 0.2 - 0.1)
    truth = torch.tensor([2 * residual - 0.2, residual + 0.1], dtype=D)
    assert bool(((found.mean - truth).abs() < 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.15


def test_sleep_with_a_guide_for_one_datum_falls_back_too() -> None:
    """A guide that indexes its data is right for one lane only; in the loop its gradient is that of the batch form."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(z[..., None], torch.ones(2, dtype=D)).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        b = pyro.param("b", real(0.2))
        pyro.sample("z", dist.Normal(b * (y[0] + y[1]), 1.0))

    engine = Engine(Sleep(), ppl.Program(model, torch.tensor([0.5, 1.0], dtype=D)), guide)
    assert engine.loop
    # E[(z - b s) s], s = 2 z + noise of variance 2: E[z s] = 2, E s^2 = 6
    agrees(measure(engine, "b", 30, 30), 2 - 0.2 * 6, 1.0)


def test_control_flow_that_changes_sites_by_value() -> None:
    """A branch with a site of its own, drawn particle by particle: d/dp of E[b ? v : 0] = E v = 0.5."""

    def guide() -> None:
        b = pyro.sample("b", dist.Bernoulli(pyro.param("p", real(0.6))))
        if b == 1:
            pyro.sample("v", dist.Normal(pyro.param("m", real(0.5)), real(0.1)))

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        draw = ctx.sim(guide)
        return torch.where(draw["b"] == 1, draw["v"], 0.0) if "v" in draw.values else 0.0 * draw["b"]

    engine = Engine(objective, None, guide, policy={"b": "reinforce", "v": "reparam"}, batching="loop", dtype=D)
    agrees(measure(engine, "p", 100, 15), 0.5, 0.6)
    agrees(measure(engine, "m", 100, 15), 0.6, 0.4)


def test_seeds_and_global_state() -> None:
    """Same seed, same gradient; another seed, another; the global generator and the parameter store are untouched."""
    engine = Engine(IWELBO(3), normal_program(), normal_guide, policy={"z": "reinforce"})
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    a, b, c = (engine.gradient(samples=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.gradient["m"], b.gradient["m"])
    assert not torch.equal(a.value, c.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store().items()) == store


def test_minibatch_gradient_is_averaged_over_batches() -> None:
    """Global latent, subsampled data: the mean over both halves is the full gradient, scaled before anything else."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(real(0.0), 1.0))
        with pyro.plate("data", 4, subsample_size=2) as i:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", real(0.3)), real(0.5)))

    x = torch.tensor([0.2, 1.7, 0.9, -0.5], dtype=D)
    engine = Engine(ELBO(), ppl.Program(model, x), guide)
    assert engine.plan.sizes == ()
    halves = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    parts = [measure(engine, "m", 500, 20, subsample={"data": half}) for half in halves]
    for part, half in zip(parts, halves, strict=True):
        agrees(part, float(2 * x[half].sum() - 5 * 0.3), 0.5)
    assert abs(float(parts[0].mean + parts[1].mean) / 2 - float(x.sum() - 5 * 0.3)) < 0.2

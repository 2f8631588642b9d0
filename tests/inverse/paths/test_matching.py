"""SDE matching: marginals with the right drift, a bound on the evidence that linear paths reach, learned parameters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse.paths import MatchedGuide, SDEMatching, linear_control, matching_bound
from inverse.paths.marginals import Marginals, half_divergence
from ppl.errors import CapabilityError, NotFiniteError, OptionError
from sde import MarkovNoise, Path, Process

DOUBLE = torch.float64
TIMES = torch.linspace(0.4, 2, 5, dtype=DOUBLE)
RECORD = torch.tensor([0.8, -0.2, 0.3, 1.0, 0.4], dtype=DOUBLE)


def ou(theta: Tensor | float, scale: Tensor | float = 0.8, dt: float = 0.02) -> Path:
    return Path(Process(lambda x, t: -theta * x, scale), TIMES, torch.ones(1, dtype=DOUBLE), dt=dt)


def program_of(path: Callable[[], Path], data: Tensor = RECORD) -> ppl.Program:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", path())
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    return ppl.Program(model, data)


def evidence(theta: float, dt: float) -> float:
    return float(linear_control(ou(theta, dt=dt), torch.eye(5, dtype=DOUBLE), RECORD, 0.09).log_evidence)


def continuous(theta: float) -> float:
    """The evidence in continuous time, to second order in a small step."""
    return 2 * evidence(theta, 0.005) - evidence(theta, 0.01)


# The family.


@pytest.mark.parametrize("diagonal", [False, True])
def test_rates_are_derivatives_in_time(diagonal: bool) -> None:
    family = Marginals(np.array([0.5, 1.0, 2.0, 2.5]), 3, 2, np.array([1.0, 2.0, 0.5]), diagonal)
    generator = torch.Generator().manual_seed(0)
    params = family.init(torch.zeros(4, 3, dtype=DOUBLE))
    params = {n: v + 0.5 * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for n, v in params.items()}
    others = torch.randn(5, 2, generator=generator, dtype=DOUBLE)
    t, h = torch.tensor([0.6, 0.9, 1.2, 1.9, 2.4], dtype=DOUBLE), 1e-5
    here, before, after = (family.at(params, t + s, others) for s in (0.0, -h, h))
    torch.testing.assert_close(here.offset_rate, (after.offset - before.offset) / (2 * h), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here.spread_rate, (after.spread - before.spread) / (2 * h), rtol=1e-6, atol=1e-6)
    eps = torch.randn(5, 3, generator=generator, dtype=DOUBLE)
    move, _, white = family.times(here, eps)
    torch.testing.assert_close(family.inverse(here, move), eps)
    full = torch.diag_embed(here.spread) if diagonal else here.spread
    torch.testing.assert_close((full.mT @ white[..., None])[..., 0], eps)
    assert float(family.at(params, torch.tensor([0.5], dtype=DOUBLE), others[:1]).offset.abs().max()) == 0.0


def test_curves_are_continuous_and_may_bend_at_knots() -> None:
    family = Marginals(np.array([0.0, 1.0, 2.0]), 1, 0, np.ones(1), True)
    params = {"node": torch.tensor([[0.0, 0.1], [1.0, 0.2], [0.5, 0.3]], dtype=DOUBLE)}
    params["bend"] = torch.arange(8, dtype=DOUBLE).reshape(2, 2, 2) / 4
    left, right = family.at(params, torch.tensor([1 - 1e-12, 1 + 1e-12], dtype=DOUBLE), None).offset
    torch.testing.assert_close(left, right, atol=1e-9, rtol=0)
    rates = family.at(params, torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=DOUBLE), None).offset_rate
    assert float((rates[0] - rates[1]).abs()) > 0.5


def test_divergence_of_the_squared_diffusion() -> None:
    """(d/dx_j) of g g' / 2, against hand-written derivatives, for own and for shared noises."""
    x, t = torch.tensor([0.7, -0.4], dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE)
    own = Process(0.0, lambda x, t: 1 + x**2)
    torch.testing.assert_close(half_divergence(own, x, t), 2 * x * (1 + x**2))

    def matrix(x: Tensor, t: Tensor) -> Tensor:
        zero = torch.zeros_like(x[..., 0])
        rows = [torch.stack([x[..., 1], zero], -1), torch.stack([x[..., 0], 1 + zero], -1)]
        return torch.stack(rows, -2)

    # g g' = [[b^2, a b], [a b, a^2 + 1]], so half its divergence is (a / 2, b / 2).
    general = Process(0.0, matrix, general=True, noises=2)
    torch.testing.assert_close(half_divergence(general, x, t), x / 2)


# The fit.


def test_bound_of_a_linear_path_is_reached() -> None:
    """Below the evidence of continuous time, and within 0.06 nat after a short fit (4.5 standard errors apart)."""
    fitted = SDEMatching(steps=500, particles=32, lr=0.05, knots=5).fit(program_of(lambda: ou(1.0)), seed=0)
    bound = matching_bound(fitted, 20_000)
    gap = continuous(1.0) - float(bound.value)
    assert -4.5 * float(bound.stderr) < gap < 0.06 + 4.5 * float(bound.stderr)
    simulated = fitted.elbo(2000)  # of the path in steps, with the variance of one step of the prior
    assert float(simulated.value) < evidence(1.0, 0.02) + 4.5 * float(simulated.stderr)
    assert float(simulated.value) > evidence(1.0, 0.02) - 0.3


@pytest.mark.slow
def test_posterior_has_the_exact_moments() -> None:
    """Means within 0.1 and standard deviations within 10 % of the exact ones, which steps of 0.02 allow."""
    program = program_of(lambda: ou(1.0))
    posterior = ppl.infer(program, SDEMatching(steps=500, particles=32, lr=0.05, knots=5), draws=2000, progress=False)
    law = ou(1.0).gaussian().condition_linear(torch.eye(5, dtype=DOUBLE), RECORD, 0.09 * torch.eye(5, dtype=DOUBLE))
    x = posterior.draws["x"][0, ..., 0]
    sd = law.variance.reshape(5).sqrt()
    assert float((x.mean(0) - law.mean.reshape(5)).abs().max()) < 0.1
    assert float((x.std(0) / sd - 1).abs().max()) < 0.1
    assert float(posterior.info["pareto_k"].max()) < 0.7


def test_learned_drift_is_that_of_greatest_evidence() -> None:
    """theta within 0.15 of the maximum of the exact evidence, a tenth of what one record leaves open (about 0.7)."""

    def model(y: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(0.3, dtype=DOUBLE), constraint=dist.constraints.positive)
        x = pyro.sample("x", ou(theta))
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    program = ppl.Program(model, RECORD)
    fitted = SDEMatching(steps=600, particles=32, lr=0.05, knots=5).fit(program, seed=0)
    grid = torch.linspace(0.5, 3, 51).tolist()
    best = max(grid, key=lambda theta: evidence(theta, 0.01))
    assert abs(float(fitted.parameters["theta"]) - best) < 0.15


def test_learned_network_and_diffusion_fit_by_the_same_bound() -> None:
    """A drift network and a diffusion scale climb; the bound of the guide they leave holds for the program."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    def model(y: Tensor) -> None:
        drift = pyro.module("drift", net)
        scale = pyro.param("scale", torch.tensor(1.5, dtype=DOUBLE), constraint=dist.constraints.positive)
        path = Path(Process(lambda x, t: drift(x), scale), TIMES, torch.ones(1, dtype=DOUBLE), dt=0.1)
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    program = ppl.Program(model, RECORD)
    fitted = SDEMatching(steps=300, particles=16, lr=0.03, knots=5).fit(program, seed=0)
    assert set(fitted.parameters) == {"scale", *(f"drift$$${n}" for n, _ in net.named_parameters())}
    assert float(fitted.history[-50:].mean()) > float(fitted.history[:10].mean()) + 2.0
    posterior = fitted.posterior(200)
    assert bool(posterior.info["lp"].isfinite().all())
    # The guide keeps count on the path of the learned drift: its log density is that of its draws.
    z, log_q = fitted.sample(5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(fitted.log_prob(z), log_q)


@pytest.mark.slow
def test_other_latents_have_a_posterior() -> None:
    """log theta: mean and sd against a grid of exact evidences; within a third of an sd for a short fit."""

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 0.5))
        x = pyro.sample("x", ou(theta))
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    posterior = ppl.infer(
        ppl.Program(model, RECORD), SDEMatching(steps=600, particles=32, lr=0.05, knots=5), draws=2000, progress=False
    )
    u = torch.linspace(-2, 2, 41, dtype=DOUBLE)
    log = torch.tensor([evidence(float(v.exp()), 0.02) for v in u]) + dist.Normal(0.0, 0.5).log_prob(u)
    weight = log.softmax(0)
    mean = (weight * u).sum()
    sd = ((weight * u.square()).sum() - mean.square()).sqrt()
    found = posterior.draws["theta"].log()
    assert abs(float(found.mean() - mean)) < float(sd) / 3
    assert abs(float(found.std() / sd) - 1) < 1 / 3


@pytest.mark.slow
def test_coordinates_with_shared_noises() -> None:
    """Two coordinates, three noises, a full covariance: the bound is below the exact evidence and within 0.4 nat."""
    g = torch.tensor([[1.0, 0.3, 0.2], [-0.4, 0.8, 0.5]], dtype=DOUBLE)
    f = torch.tensor([[-1.0, 0.6], [-0.6, -0.5]], dtype=DOUBLE)

    def path(dt: float) -> Path:
        process = Process(lambda x, t: x @ f.mT, g, general=True, noises=3)
        return Path(process, torch.tensor([0.5, 1.0], dtype=DOUBLE), torch.ones(2, dtype=DOUBLE), dt=dt)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path(0.02))
        pyro.sample("y", dist.Normal(x, 0.3).to_event(2), obs=y)

    data = torch.tensor([[0.5, -0.3], [1.0, 0.2]], dtype=DOUBLE)
    fitted = SDEMatching(steps=500, particles=32, lr=0.05, knots=2).fit(ppl.Program(model, data), seed=0)
    rows = torch.eye(4, dtype=DOUBLE)
    exact = [float(linear_control(path(dt), rows, data.reshape(-1), 0.09).log_evidence) for dt in (0.005, 0.01)]
    bound = matching_bound(fitted, 10_000)
    gap = 2 * exact[0] - exact[1] - float(bound.value)
    assert -4.5 * float(bound.stderr) < gap < 0.4
    assert fitted.posterior(50).draws["x"].shape == (1, 50, 2, 2)


@pytest.mark.slow
def test_diffusion_of_the_state_has_a_true_bound() -> None:
    """g(x) = 0.5 + 0.2 x^2: the bound of the marginals is below the evidence, found by weighing draws of the guide."""

    def path() -> Path:
        process = Process(lambda x, t: -x, lambda x, t: 0.5 + 0.2 * x**2)
        return Path(process, TIMES, torch.ones(1, dtype=DOUBLE), dt=0.02)

    fitted = SDEMatching(steps=500, particles=32, lr=0.05, knots=5).fit(program_of(path), seed=0)
    bound, corrected = matching_bound(fitted, 20_000), fitted.corrected(4000)
    assert corrected.log_evidence is not None
    gap = float(corrected.log_evidence.value - bound.value)
    error = float((corrected.log_evidence.stderr.square() + bound.stderr.square()).sqrt())
    assert -4.5 * error - 0.02 < gap < 0.5  # 0.02: steps of the path


# Refused.


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="times must be an integer of at least 1"):
        SDEMatching(times=0)
    with pytest.raises(OptionError, match="lr must be positive"):
        SDEMatching(lr=0.0)
    with pytest.raises(OptionError, match='covariance must be "full" or "diagonal"'):
        SDEMatching(covariance="low")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a MatchedGuide is made by"):
        MatchedGuide().init(1, DOUBLE, torch.device("cpu"), torch.Generator())
    engine = SDEMatching(steps=2)
    zero = torch.zeros(1, dtype=DOUBLE)
    with pytest.raises(CapabilityError, match="fractional noise: its factors share one Brownian motion"):
        engine.fit(program_of(lambda: Path(Process(noise=MarkovNoise(0.7, 2.0)), TIMES, zero)))
    with pytest.raises(CapabilityError, match="in the sense of Stratonovich"):
        engine.fit(program_of(lambda: Path(Process(0.0, lambda x, t: 1 + x**2, sense="stratonovich"), TIMES, zero)))
    process = Process(0.0, torch.ones(2, 1, dtype=DOUBLE), general=True, noises=1)
    with pytest.raises(CapabilityError, match="1 noises for 2 coordinates"):
        engine.fit(program_of(lambda: Path(process, TIMES, torch.zeros(2, dtype=DOUBLE))))


def test_diffusion_that_vanishes_is_named_with_time_and_state() -> None:
    path = Path(Process(0.0, lambda x, t: x), TIMES, torch.zeros(1, dtype=DOUBLE))
    with pytest.raises(NotFiniteError, match=r"vanishes at time 0 and state \[0.0\]"):
        SDEMatching(steps=2).fit(program_of(lambda: path))
    late = Path(
        Process(0.0, lambda x, t: torch.where(t > 1, 0.0, 1.0) * torch.ones_like(x)), TIMES, torch.zeros(1).double()
    )
    with pytest.raises(NotFiniteError, match=r"vanishes at time 1\.\d+ and state"):
        SDEMatching(steps=2).fit(program_of(lambda: late))


def test_data_of_several_times_are_refused() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", ou(1.0))
        pyro.sample("y", dist.Normal(x[-1, 0] - x[0, 0], 0.3), obs=y)

    with pytest.raises(CapabilityError, match="sees several times of 'x' at once"):
        SDEMatching(steps=2).fit(ppl.Program(model, RECORD[0]))

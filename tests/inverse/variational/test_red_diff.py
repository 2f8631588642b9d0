"""RED-diff against the published loop, and its likelihood form against the optimum that was derived."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import REDDiff
from inverse.operators import GaussianBlur
from inverse.problem import DiffusionProblem
from inverse.variational.red_diff import WEIGHTINGS, _Published
from inverse.variational.red_diff_gaussian import Diagonal
from ppl import Program
from ppl.cost import Cost
from ppl.errors import CapabilityError, OptionError
from sde import GaussianMixture, VariancePreserving

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Flat:
    """The same noise level at every step."""

    level: float

    def grid(self, steps: int) -> Tensor:
        return torch.cat([torch.full((steps,), self.level, dtype=F64), torch.zeros(1, dtype=F64)])


def normal(tau: float = 1.0, d: int = 3) -> GaussianMixture:
    one = torch.ones(1, dtype=F64)
    return GaussianMixture(one, torch.zeros(1, d, dtype=F64), tau**2 * one)


MATRIX = torch.randn(2, 3, generator=seeded(3), dtype=F64)
Y = torch.tensor([1.0, -0.5], dtype=F64)


def program_of(prior: Any, sigma: float = 0.4, identity: bool = False) -> Program:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        mean = x if identity else x @ MATRIX.T
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)

    return Program(model, torch.tensor([1.0, -0.5, 0.3], dtype=F64) if identity else Y)


class Recorded:
    """Noise that remembers what it gave."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.generator, self.given = lanes, seeded(11), []

    def normal(self, shape: Any) -> Tensor:
        self.given.append(torch.randn(self.lanes, *shape, generator=self.generator, dtype=F64))
        return self.given[-1]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_published_loop(weighting: str) -> None:
    """algos/reddiff.py in variance-preserving coordinates, with torch's own Adam, one image at a time."""
    prior = GaussianMixture(
        torch.ones(2, dtype=F64), torch.randn(2, 3, generator=seeded(1), dtype=F64), torch.ones(2, dtype=F64)
    )
    problem = DiffusionProblem.of(program_of(prior))
    schedule = VariancePreserving()
    options = REDDiff(steps=30, weighting=weighting, schedule=schedule, lam=0.3)
    method, noise = _Published(options, problem, Cost()), Recorded(2)
    state = method.begin(2, noise)
    start = state["x"].clone()
    torch.testing.assert_close(start[0], torch.linalg.pinv(MATRIX) @ Y)
    for step in range(method.steps):
        state = method.advance(step, state, noise)
    times = torch.linspace(1.0, schedule.t_min, 30, dtype=F64)
    for lane in range(2):
        mu = start[lane : lane + 1].clone().requires_grad_()
        optimizer = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
        for t, eps in zip(times, noise.given, strict=True):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x_t = alpha * mu + sigma * eps[lane : lane + 1]
            with torch.no_grad():
                clean = prior.denoise(x_t / alpha, sigma / alpha)
                predicted = (x_t - alpha * clean) / sigma
            s = float(sigma / alpha)
            loss = 0.5 * (Y - mu @ MATRIX.T).square().mean()
            loss = loss + 0.3 * WEIGHTINGS[weighting](s) * ((predicted - eps[lane : lane + 1]).detach() * mu).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(state["x"][lane], mu[0].detach(), rtol=1e-7, atol=1e-9)


def test_it_starts_without_directions_that_the_data_hardly_see() -> None:
    """A blurred image and data with an error of 0.1: A^+ y alone would be 0.1 / s off, some fifty units.

    64 seen coordinates at 6 standard errors: a false alarm in 1e-7 of runs.
    """
    one = torch.ones(1, dtype=F64)
    prior = GaussianMixture(one, torch.zeros(1, 8, 8, dtype=F64), one)
    blur = GaussianBlur(2.0, (8, 8))

    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(blur(pyro.sample("x", prior)), 0.1).to_event(2), obs=y)

    truth = torch.randn(8, 8, generator=seeded(1), dtype=F64)
    program = Program(model, blur(truth) + 0.1 * torch.randn(8, 8, generator=seeded(2), dtype=F64))
    start = _Published(REDDiff(), DiffusionProblem.of(program), Cost()).begin(1, Recorded(1))["x"][0]
    svd = blur.svd()
    s, found, true = svd.s.double(), svd.to_spectral(start), svd.to_spectral(truth)
    assert s.min() < 0.003
    kept = s >= 0.03 * s.max()
    assert ((found - true)[kept] * s[kept]).abs().max() < 6 * 0.1
    torch.testing.assert_close(found[~kept], torch.zeros_like(found[~kept]), rtol=0, atol=1e-9)


def test_data_that_do_not_use_the_site_are_one_error() -> None:
    """A measurement of nothing has no singular value to start from, and no gradient."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.ones(1, dtype=F64))

    def model(y: Tensor) -> None:
        pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="does not depend on the diffusion site"):
        ppl.infer(Program(model, torch.ones(2, dtype=F64)), REDDiff(steps=20), draws=8)


def test_weightings_are_the_published_ones() -> None:
    s = 1.7
    expected = {
        "linear": s,
        "sqrt": s**0.5,
        "square": s**2,
        "log": math.log(1 + s),
        "trunc_linear": 1.0,
        "power2over3": s ** (2 / 3),
        "const": 1.0,
    }
    assert {name: w(s) for name, w in WEIGHTINGS.items()} == pytest.approx(expected)
    assert WEIGHTINGS["trunc_linear"](0.3) == 0.3


def test_the_published_form_does_not_see_the_noise_level() -> None:
    backend = REDDiff(steps=20, schedule=VariancePreserving())
    a, b = (ppl.infer(program_of(normal(), sigma=s), backend, draws=4)["x"] for s in (0.1, 3.0))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_published_form_is_a_point_estimate() -> None:
    """At one level its mean is the ridge estimate (mu - y)/m + lambda w s mu / (d (tau^2 + s^2)) = 0; no spread."""
    s, lam, tau = 0.5, 2.0, 1.0
    backend = REDDiff(steps=1500, lr=0.01, lam=lam, weighting="const", schedule=Flat(s))
    posterior = ppl.infer(program_of(normal(tau), identity=True), backend, draws=200)
    y = torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    expected = y / (1 + lam * s / (tau**2 + s**2))
    # What is left is the noise of Adam at lr 0.01; its mean over 200 draws is far below this bound.
    assert (posterior.mean("x") - expected).abs().max() < 0.01
    exact_sd = 1 / math.sqrt(1 + 1 / 0.4**2)
    assert posterior.sd("x").max() < 0.2 * exact_sd


@pytest.mark.parametrize("s", [0.01, 0.4])
def test_gradients_vanish_at_the_derived_optimum_and_only_there(s: float) -> None:
    """1/(sd^2 + s^2) = 1/(tau^2 + s^2) + 1/sigma^2,  mu (1/(tau^2 + s^2) + 1/sigma^2) = y / sigma^2.

    200 000 lanes; 12 gradients within 6 standard errors: a false alarm in 2e-8 of runs. Moving mu or sd by a fifth of
    the posterior sd must show at more than 6.
    """
    tau, sigma = 1.3, 0.8
    problem = DiffusionProblem.of(program_of(normal(tau), sigma=sigma, identity=True))
    method = Diagonal(REDDiff(scale="likelihood"), problem, Cost())
    y = torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    precision = 1 / (tau**2 + s**2) + 1 / sigma**2
    sd = math.sqrt(1 / precision - s**2)
    n = 200_000
    eps = [torch.randn(n, 3, generator=seeded(k), dtype=F64) for k in (1, 2)]

    def z(mu: Tensor, sd: float) -> Tensor:
        lanes, width = mu.expand(n, 3), torch.full((n, 3), sd, dtype=F64)
        d = method.prior_gradient(lanes, width, s, eps[0])
        l = method.likelihood_gradient(lanes, width, eps[1])
        g = torch.cat([d[0] + l[0], d[1] + l[1]], 1)
        return g.mean(0) / (g.std(0) / math.sqrt(n)).clamp(min=1e-12)

    best = y / sigma**2 / precision
    assert z(best, sd).abs().max() < 6
    assert z(best + 0.2 * sd, sd)[:3].min() > 6
    assert z(best, 1.2 * sd)[3:].min() > 6
    assert z(best, sd / 1.2)[3:].max() < -6


@pytest.mark.parametrize("schedule", [None, Flat(0.05)], ids=["descending", "low"])
@pytest.mark.parametrize("sigma", [0.8, 0.2])
def test_the_likelihood_form_is_the_posterior_where_that_was_derived(schedule: Any, sigma: float) -> None:
    """Independent entries: mean and sd of 2000 draws, six numbers at 6 standard errors and 3 % (6 % for the variance)
    of room for the noise of the optimiser."""
    tau = 1.3
    backend = REDDiff(steps=1500, scale="likelihood", lr=0.05, schedule=schedule)
    posterior = ppl.infer(program_of(normal(tau), sigma=sigma, identity=True), backend, draws=2000)
    variance = 1 / (1 / tau**2 + 1 / sigma**2)
    mean = torch.tensor([1.0, -0.5, 0.3], dtype=F64) * variance / sigma**2
    assert (posterior.mean("x") - mean).abs().max() < 6 * math.sqrt(variance / 2000) + 0.03 * math.sqrt(variance)
    assert (posterior.sd("x").square() / variance - 1).abs().max() < 6 * math.sqrt(2 / 2000) + 0.06


@pytest.mark.parametrize("scale", ["published", "likelihood"])
def test_chunks_seeds_costs_and_resumption(scale: Any, tmp_path: Path) -> None:
    program = program_of(normal())
    backend = REDDiff(steps=12, scale=scale)
    whole = ppl.infer(program, backend, draws=9, chains=2)
    assert torch.equal(ppl.infer(program, backend, draws=9, chains=2)["x"], whole["x"])
    assert not torch.equal(ppl.infer(program, backend, draws=9, chains=2, seed=1)["x"], whole["x"])
    part = ppl.infer(program, REDDiff(steps=12, scale=scale, chunk=5), draws=9, chains=2)
    torch.testing.assert_close(part["x"], whole["x"], rtol=1e-10, atol=1e-10)
    assert whole.cost.denoiser_calls == 12 + (scale == "likelihood")
    assert whole.cost.vjps == 0

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.step == 6:
            raise Killed

    path = tmp_path / "run"
    with pytest.raises(Killed):
        ppl.infer(program, backend, draws=9, chains=2, callback=kill, checkpoint=path, checkpoint_every=0)
    assert torch.equal(ppl.infer(program, backend, draws=9, chains=2, checkpoint=path)["x"], whole["x"])


@pytest.mark.parametrize("scale", ["published", "likelihood"])
def test_nonlinear_data_and_plates(scale: Any) -> None:
    prior = normal()

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 2):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    program = Program(model, torch.ones(2, 3, dtype=F64))
    posterior = ppl.infer(program, REDDiff(steps=15, scale=scale, lr=0.01), draws=4)
    assert posterior["x"].shape == (1, 4, 2, 3)
    assert "residual_chi" not in posterior.info


def test_options_are_checked() -> None:
    for make in (
        lambda: REDDiff(steps=0),
        lambda: REDDiff(lr=0.0),
        lambda: REDDiff(lam=-1.0),
        lambda: REDDiff(weighting="cubic"),
        lambda: REDDiff(scale="none"),
        lambda: REDDiff(chunk=0),
    ):
        with pytest.raises(OptionError):
            make()

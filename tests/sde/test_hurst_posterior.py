"""The posterior of the Hurst index: its densities, what the Markov approximation does to it, engines against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from sde import (
    FractionalGaussianNoise,
    MarkovIncrements,
    MarkovNoise,
    Path,
    Process,
    fgn_autocovariance,
    hurst_mle,
    hurst_whittle,
    refitted_noise,
)
from sde.fractional import Kind
from sde.increments import Increments
from sde.innovation_fit import whitener
from sde.toeplitz import inverse_column, stationary_log_density

DOUBLE = torch.float64
ONE = torch.ones((), dtype=DOUBLE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def series(hurst: float, n: int, count: int, seed: int = 0) -> Tensor:
    return FractionalGaussianNoise(torch.tensor(hurst, dtype=DOUBLE), n).draw((count,), generator(seed))


def markov(hurst: Tensor, n: int, scale: Tensor | float = 1.0) -> MarkovIncrements:
    return MarkovIncrements(refitted_noise(hurst, 1.0, n, kind="I"), n, scale=scale)


def moments(grid: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of a density on an even grid, (grid, *batch) -> (*batch)."""
    p = log_p.softmax(0)
    mean = (p * grid[:, None]).sum(0)
    return mean, (p * (grid[:, None] - mean) ** 2).sum(0).sqrt()


# Densities.


def dense(hurst: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    lags = torch.arange(x.shape[-1], dtype=DOUBLE)
    covariance = scale**2 * fgn_autocovariance((lags[:, None] - lags).abs(), hurst)
    return torch.distributions.MultivariateNormal(torch.zeros_like(x), covariance, validate_args=False).log_prob(x)


def fast(hurst: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return stationary_log_density(fgn_autocovariance(torch.arange(x.shape[-1], dtype=DOUBLE), hurst[None]), x, scale)


@pytest.mark.parametrize("hurst", [0.1, 0.5, 0.9])
def test_density_and_two_derivatives_are_the_dense_ones(hurst: float) -> None:
    at = (torch.tensor(hurst, dtype=DOUBLE), torch.tensor(1.3, dtype=DOUBLE), series(0.7, 12, 1)[0])
    every = (0, 1, 2)
    for order in (lambda f: f, lambda f: torch.func.grad(f, every), lambda f: torch.func.hessian(f, every)):
        for found, expected in zip(
            *(torch.utils._pytree.tree_leaves(order(f)(*at)) for f in (fast, dense)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_gradient_of_many_draws_at_once() -> None:
    """The order of transforms that engines use: a gradient of a vmap, of batches within."""
    x, hurst = series(0.6, 20, 3), torch.tensor([0.2, 0.8], dtype=DOUBLE)

    def total(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda h: torch.vmap(lambda one: f(one, ONE, x).sum())(h).sum())

    torch.testing.assert_close(total(fast)(hurst), total(dense)(hurst))


def test_long_records_near_both_ends() -> None:
    """A thousand values at H = 0.02 and 0.98, where the covariance is worst conditioned."""
    x = series(0.5, 1024, 1)[0]
    for hurst in (0.02, 0.98):
        h = torch.tensor(hurst, dtype=DOUBLE)
        torch.testing.assert_close(fast(h, ONE, x), dense(h, ONE, x), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("hurst", [0.15, 0.8])
def test_whitener_is_the_limit_of_predictors(hurst: float) -> None:
    """The power series of 1 / psi: nothing ahead, then one over the error of a prediction and minus its coefficients.

    600 values are nearly all the past there is.
    """
    column, _ = inverse_column(fgn_autocovariance(torch.arange(600, dtype=DOUBLE), hurst))
    half = whitener(np.array([hurst]), math.pi * (np.arange(4096) + 0.5) / 4096)[0]
    at = np.concatenate([half, half[::-1].conj()])
    series = (np.fft.ifft(at) * np.exp(1j * math.pi * np.arange(8192) / 8192)).real
    assert series[0] ** 2 == pytest.approx(float(column[0]), rel=2e-3)
    np.testing.assert_allclose(series[:6] / series[0], (column[:6] / column[0]).numpy(), atol=2e-3)
    assert np.abs(series[-6:]).max() < 2e-3


@pytest.mark.parametrize("kind", get_args(Kind))
def test_markov_density_is_that_of_its_increments(kind: Kind) -> None:
    """Against the dense covariance of the map from normal numbers, for two indices at once; and of its draws."""
    hurst, scale = torch.tensor([0.2, 0.7], dtype=DOUBLE), torch.tensor([1.5, 0.5], dtype=DOUBLE)
    noise = refitted_noise(hurst, 0.1, 16, kind=kind)
    law = MarkovIncrements(noise, 16, 0.1, scale)
    factor = Increments(noise, np.linspace(0, 1.6, 17)).factor() * scale[:, None, None]
    exact = torch.distributions.MultivariateNormal(torch.zeros(16, dtype=DOUBLE), scale_tril=factor)
    x = exact.sample((5,))
    torch.testing.assert_close(law.log_prob(x), exact.log_prob(x))
    torch.testing.assert_close(law.expand((5, 2)).log_prob(x), exact.log_prob(x))
    torch.testing.assert_close(MarkovIncrements(MarkovNoise(0.3, 2.0, kind), 4, 0.5).log_prob(torch.zeros(4)).shape, ())


@pytest.mark.parametrize("kind", get_args(Kind))
def test_markov_draws_have_their_density(kind: Kind) -> None:
    """z-values of all second moments of 6 increments; 21 of them, |z| above 4.9 once in 50,000 runs."""
    noise, count = refitted_noise(0.3 * ONE, 1.0, 6, kind=kind), 20_000
    x = MarkovIncrements(noise, 6).draw((count,), generator())
    factor = Increments(noise, np.arange(7.0)).factor()
    exact = factor @ factor.mT
    spread = ((exact**2 + exact.diagonal()[:, None] * exact.diagonal()) / count).sqrt()
    assert float(((x.mT @ x / count - exact) / spread).abs().max()) < 4.9


def test_markov_density_has_a_gradient() -> None:
    x = series(0.6, 24, 1)[0]
    start = (torch.tensor(0.35, dtype=DOUBLE, requires_grad=True), torch.tensor(1.2, dtype=DOUBLE, requires_grad=True))
    assert torch.autograd.gradcheck(lambda h, s: markov(h, 24, s).log_prob(x), start)
    assert torch.autograd.gradgradcheck(lambda h, s: markov(h, 24, s).log_prob(x), start)


@pytest.mark.parametrize("hurst", [0.1, 0.3, 0.7, 0.9])
def test_refitted_increments_have_the_exact_law(hurst: float) -> None:
    """Divergence of 100 increments from the exact law below 0.05 nat; weights for continuous time leave 3 and more."""
    noise = refitted_noise(torch.tensor(hurst, dtype=DOUBLE), 1.0, 100, kind="I")
    lags = torch.arange(100, dtype=DOUBLE)
    exact = fgn_autocovariance((lags[:, None] - lags).abs(), hurst)

    def divergence(noise: MarkovNoise) -> float:
        factor = Increments(noise, np.arange(101.0)).factor()
        ratio = torch.cholesky_solve(exact, factor)
        return 0.5 * float(ratio.trace() - 100 - torch.logdet(ratio))

    assert divergence(noise) < 0.05
    if hurst == 0.1:
        assert divergence(MarkovNoise(hurst, 100.0, "I")) > 3


# The posterior.


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_approximation_leaves_the_posterior_where_it_is(hurst: float) -> None:
    """Means within 0.25 exact sd and sds within 5 %, on six records of 128; no chance is involved but in the data."""
    n, grid = 128, torch.linspace(0.012, 0.988, 245, dtype=DOUBLE)
    x = series(hurst, n, 6, seed=7)
    mean, sd = moments(grid, FractionalGaussianNoise(grid[:, None], n).log_prob(x))
    shifted, wider = moments(grid, markov(grid[:, None], n).log_prob(x))
    assert float(((shifted - mean) / sd).abs().max()) < 0.25
    assert float((wider / sd - 1).abs().max()) < 0.05


def model_of(law: Callable[[Tensor, int, Tensor], dist.TorchDistribution], n: int) -> Callable[[Tensor], None]:
    """H and the scale of a record, with a prior on both."""

    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Beta(2 * ONE, 2 * ONE))
        s = pyro.sample("s", dist.LogNormal(0 * ONE, 1.0))
        pyro.sample("y", law(h, n, s), obs=x)

    return model


LAWS: dict[str, Callable[[Tensor, int, Tensor], dist.TorchDistribution]] = {
    "exact": lambda h, n, s: FractionalGaussianNoise(h, n, scale=s),
    "markov": lambda h, n, s: markov(h, n, s),
}
ENGINES: dict[str, tuple[Any, int, int]] = {
    "NUTS": (ppl.NUTS(warmup=150), 150, 2),
    "HMC": (ppl.HMC(warmup=80), 25, 12),
    "SVI": (ppl.Importance(ppl.SVI(guide=ppl.FullRank(), steps=150, particles=8, lr=0.05)), 1000, 1),
    "Laplace": (ppl.Importance(ppl.Laplace()), 1000, 1),
}


def exact_moments(law: Callable[..., dist.TorchDistribution], x: Tensor) -> tuple[float, float]:
    """Posterior mean and sd of H by quadrature over H and log scale."""
    h, log_s = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE), torch.linspace(-1.5, 3, 90, dtype=DOUBLE)
    log_p = law(h[:, None], len(x), log_s.exp()).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(log_s)
    mean, sd = moments(h, (log_p.logsumexp(1) + dist.Beta(2.0, 2.0).log_prob(h))[:, None])
    return float(mean), float(sd)


SHORT = [("exact", "Laplace"), ("markov", "SVI")]
LONG = [(law, engine) for law in LAWS for engine in ENGINES if (law, engine) not in SHORT]


@pytest.mark.parametrize(("law", "engine"), [*SHORT, *(pytest.param(*one, marks=pytest.mark.slow) for one in LONG)])
def test_engines_agree_with_quadrature(law: str, engine: str) -> None:
    """Means of H within 4.5 standard errors from the effective draws, sds within 25 % (ESS of 150: 6 % each)."""
    x = 2 * series(0.7, 40, 1, seed=1)[0]
    mean, sd = exact_moments(LAWS[law], x)
    backend, draws, chains = ENGINES[engine]
    program = ppl.Program(model_of(LAWS[law], 40), x, compile="never")
    posterior = ppl.infer(program, backend, draws=draws, chains=chains, seed=0, progress=False)
    weights = posterior.weights
    ess = float(posterior.summary().loc["h", "ess_bulk"]) if weights is None else float(1 / weights.square().sum())
    assert ess > 60
    assert abs(float(posterior.mean("h")) - mean) < 4.5 * sd / math.sqrt(ess)
    assert abs(float(posterior.sd("h")) / sd - 1) < 0.25


def test_many_records_in_one_batch() -> None:
    """`program.over`: each record's posterior mean within 4.5 standard errors of its own quadrature."""
    x = torch.stack([series(h, 32, 1, seed=2)[0] for h in (0.2, 0.8)])
    program = ppl.Program(model_of(LAWS["exact"], 32), x[0], compile="never").over(x=x)
    posterior = ppl.infer(program, ppl.HMC(warmup=80), draws=25, chains=12, seed=0, progress=False)
    draws = posterior.draws["h"]
    assert draws.shape == (2, 12, 25)
    for one, record in zip(draws, x, strict=True):
        mean, sd = exact_moments(LAWS["exact"], record)
        ess = ppl.diagnostics.ess_of(one)
        assert abs(float(one.mean()) - mean) < 4.5 * sd / math.sqrt(float(ess))


SEEN, NOISE = 8, 0.3
RECORD = torch.tensor([0.3, 0.5, 0.4, 0.9, 1.1, 0.8, 1.0, 1.3], dtype=DOUBLE)


def latent_path(u: Tensor) -> Path:
    """A path whose roughness H = Phi(u) is uniform for normal u, on a grid that its weights are fitted to."""
    h = 0.01 + 0.98 * torch.special.ndtr(u)
    noise = refitted_noise(h, 1 / SEEN, SEEN)
    return Path(Process(noise=noise), torch.linspace(1 / SEEN, 1, SEEN, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))


LATENT_ENGINES: dict[str, tuple[Any, int, int]] = {
    "NUTS": (ppl.NUTS(warmup=200), 200, 3),
    "HMC": (ppl.HMC(warmup=150), 60, 12),
    "EllipticalSlice": (ppl.EllipticalSlice(warmup=100), 150, 40),
}


@pytest.mark.parametrize("engine", ["HMC", "EllipticalSlice", pytest.param("NUTS", marks=pytest.mark.slow)])
def test_latent_path_and_its_hurst_index(engine: str) -> None:
    """The marginal of H from chains over H and the path together, against exact evidences of linear paths on a grid.

    Mean and mean square of u, where H = Phi(u): |z| below 4.5, wrong once in 75,000 runs for the two.
    """
    u = torch.linspace(-3.5, 3.5, 71, dtype=DOUBLE)
    eye, log_p = torch.eye(SEEN, dtype=DOUBLE), dist.Normal(0.0, 1.0).log_prob(u)
    evidence = torch.stack([latent_path(one).gaussian().log_evidence(eye, RECORD, NOISE**2) for one in u])
    p = (log_p + evidence).softmax(0)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", latent_path(pyro.sample("u", dist.Normal(0 * ONE, 1.0))))
        pyro.sample("y", dist.Normal(x[:, 0], NOISE).to_event(1), obs=y)

    backend, draws, chains = LATENT_ENGINES[engine]
    program = ppl.Program(model, RECORD, compile="never")
    posterior = ppl.infer(program, ppl.NoiseSpace(backend), draws=draws, chains=chains, seed=0, progress=False)
    found = posterior.draws["u"]
    for power in (1, 2):
        expected = float(p @ u**power)
        ess = float(ppl.diagnostics.ess_of(found**power))
        assert ess > 80
        spread = float((found**power).std()) / math.sqrt(ess)
        assert abs(float((found**power).mean()) - expected) < 4.5 * spread


@pytest.mark.slow
def test_calibrated_under_the_exact_likelihood() -> None:
    """200 records of 256 from the prior, H and scale unknown: false alarm 1e-3 over H, scale and the log likelihood."""
    program = ppl.Program(model_of(LAWS["exact"], 256), torch.zeros(256, dtype=DOUBLE), compile="never")
    result = ppl.diagnostics.sbc(program, ppl.Importance(ppl.Laplace()), simulations=200, draws=400, ranks=99, seed=0)
    print(result)
    assert result.passes(1e-3), str(result)
    assert result.thin_enough, str(result)


def test_posterior_and_maximum_are_close() -> None:
    """On 512 values the posterior mean of H lies within half its sd of the maximum likelihood estimate."""
    x, grid = series(0.3, 512, 4), torch.linspace(0.1, 0.5, 161, dtype=DOUBLE)
    table = fgn_autocovariance(torch.arange(512, dtype=DOUBLE), grid[:, None, None])
    mean, sd = moments(grid, stationary_log_density(table, x))
    assert float(((mean - hurst_mle(x).hurst) / sd).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MarkovIncrements(MarkovNoise(0.3, 4.0), 0), "n must be a positive integer"),
        (lambda: MarkovIncrements(MarkovNoise(0.3, 4.0), 5), r"5 steps of 1 leave the noise's horizon of 4"),
        (lambda: MarkovIncrements(MarkovNoise(lambda t: 0.3 + 0 * t, 4.0), 4), "depends on time"),
        (lambda: hurst_mle(torch.zeros(2, 50)), "zero throughout"),
        (lambda: hurst_whittle(torch.zeros(50)), "zero throughout"),
        (lambda: hurst_mle(torch.ones(50), low=0.9, high=0.1), r"0 < low < high < 1, got low=0\.9"),
    ],
)
def test_bad_input(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_whole_numbers_and_arrays_are_series_too() -> None:
    """Counts, as those of ticks, are not rounded back to whole indices; arrays are taken as they are."""
    x = (10 * series(0.3, 256, 1)[0]).round()
    for estimate in (hurst_mle, hurst_whittle):
        expected = estimate(x)
        for same in (x.long(), x.numpy(), x.tolist()):
            found = estimate(same)  # type: ignore[arg-type]
            assert 0.15 < float(expected.hurst) < 0.45
            torch.testing.assert_close(float(found.hurst), float(expected.hurst), rtol=1e-3, atol=1e-3)

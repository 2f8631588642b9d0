"""Exact laws of fractional Brownian motion: covariances, draws, likelihoods and estimates of the Hurst index."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from scipy import integrate
from torch import Tensor

from sde import (
    FractionalGaussianNoise,
    davies_harte,
    fbm_covariance,
    fgn_autocovariance,
    hosking,
    hurst_mle,
    hurst_whittle,
    innovations,
    whittle_log_likelihood,
)
from sde.fractional import Kind
from sde.hurst import fgn_spectrum

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_type_two_covariance_is_that_of_its_kernel(hurst: float) -> None:
    """int_0^s (s - u)^(a-1) (t - u)^(a-1) du / Gamma(a)^2 by quadrature with the end's power as weight."""
    a, s, t = hurst + 0.5, 0.4, 1.0
    value, _ = integrate.quad(lambda u: (t - u) ** (a - 1), 0, s, weight="alg", wvar=(0, a - 1))
    found = fbm_covariance(torch.tensor(s), torch.tensor(t), hurst, "II", unit=False)
    assert float(found) == pytest.approx(value / math.gamma(a) ** 2, rel=1e-6)


@pytest.mark.parametrize(("hurst", "value"), [(0.2, 1.9174698473), (0.3, 1.3833763219), (0.9, 1.9302629059)])
def test_kernel_normalisation_of_type_one(hurst: float, value: float) -> None:
    one = torch.ones((), dtype=DOUBLE)
    assert float(fbm_covariance(one, one, hurst, "I", unit=False)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_unit_normalisation_and_start(kind: Kind) -> None:
    t = torch.tensor([0.0, 0.25, 1.0, 3.0], dtype=DOUBLE)
    torch.testing.assert_close(fbm_covariance(t, t, 0.3, kind), t**0.6)
    assert float(fbm_covariance(t[0], t[2], 0.3, kind)) == 0.0


def test_types_agree_for_brownian_motion() -> None:
    t = torch.linspace(0.1, 2, 7, dtype=DOUBLE)
    expected = torch.minimum(t[:, None], t)
    for kind in get_args(Kind):
        torch.testing.assert_close(fbm_covariance(t[:, None], t, 0.5, kind), expected)


@pytest.mark.parametrize("hurst", [0.1, 0.9])
@pytest.mark.parametrize("method", ["davies_harte", "hosking", "distribution"])
def test_draws_have_the_covariance(method: str, hurst: float) -> None:
    """z-values of all second moments of 8 increments; 36 of them, |z| above 4.9 once in 30,000 runs."""
    n, count = 8, 20_000
    lags = torch.arange(n + 1, dtype=DOUBLE)
    rho = fgn_autocovariance(lags, hurst)
    if method == "davies_harte":
        x = davies_harte(rho, torch.randn(2, count, 2 * n, generator=generator(), dtype=DOUBLE))[1]
    elif method == "hosking":
        x = hosking(rho, torch.randn(count, n, generator=generator(), dtype=DOUBLE))
    else:
        law = FractionalGaussianNoise(torch.tensor(hurst, dtype=DOUBLE), n, dt=0.5, scale=2.0)
        x = law.draw((count,), generator()) / (2 * 0.5**hurst)
    exact = rho[(lags[:n, None] - lags[:n]).abs().long()]
    spread = ((exact**2 + exact.diagonal()[:, None] * exact.diagonal()) / count).sqrt()
    assert float(((x.mT @ x / count - exact) / spread).abs().max()) < 4.9


def test_both_series_of_an_embedding_are_independent() -> None:
    """Products of the two series at every lag; 64 z-values, |z| above 4.9 once in 16,000 runs."""
    rho = fgn_autocovariance(torch.arange(9, dtype=DOUBLE), 0.8)
    one, other = davies_harte(rho, torch.randn(2, 20_000, 16, generator=generator(3), dtype=DOUBLE))
    assert float((one.mT @ other / math.sqrt(20_000)).abs().max()) < 4.9


def test_hosking_goes_on_from_a_past() -> None:
    rho = fgn_autocovariance(torch.arange(20, dtype=DOUBLE), 0.8)
    noise = torch.randn(3, 20, generator=generator(), dtype=DOUBLE)
    whole = hosking(rho, noise)
    torch.testing.assert_close(hosking(rho, noise[:, 12:], past=whole[:, :12]), whole[:, 12:])


def dense_log_prob(x: Tensor, hurst: float, scale: float) -> Tensor:
    lags = torch.arange(x.shape[-1], dtype=DOUBLE)
    covariance = scale**2 * fgn_autocovariance((lags[:, None] - lags).abs(), hurst)
    return torch.distributions.MultivariateNormal(torch.zeros_like(lags), covariance).log_prob(x)


@pytest.mark.parametrize("hurst", [0.2, 0.9])
def test_likelihoods_are_the_dense_one(hurst: float) -> None:
    law = FractionalGaussianNoise(torch.tensor(hurst, dtype=DOUBLE), 50, dt=0.1, scale=torch.tensor(3.0, dtype=DOUBLE))
    x = law.draw((4,), generator())
    expected = dense_log_prob(x, hurst, 3 * 0.1**hurst)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=1e-9, atol=1e-8)
    found = innovations(fgn_autocovariance(torch.arange(50, dtype=DOUBLE), hurst), x).log_likelihood(3 * 0.1**hurst)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def test_best_scale_is_the_best() -> None:
    x = torch.randn(60, generator=generator(), dtype=DOUBLE)
    found = innovations(fgn_autocovariance(torch.arange(60, dtype=DOUBLE), 0.6), x)
    best = found.log_likelihood()
    assert bool(best > found.log_likelihood(found.scale * 1.01))
    assert bool(best > found.log_likelihood(found.scale / 1.01))
    torch.testing.assert_close(best, found.log_likelihood(found.scale))


def test_gradient_of_the_density_by_the_hurst_index() -> None:
    x = torch.randn(20, generator=generator(), dtype=DOUBLE)
    assert torch.autograd.gradcheck(
        lambda h, s: FractionalGaussianNoise(h, 20, scale=s).log_prob(x),
        (torch.tensor(0.3, dtype=DOUBLE, requires_grad=True), torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)),
    )


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_spectrum_is_that_of_the_autocovariance(hurst: float) -> None:
    """rho_k = 2 int_0^pi f cos(k w) dw; the singular end is integrated in log w."""
    for lag in (0, 1, 5):
        u = torch.linspace(math.log(1e-14), math.log(math.pi), 20_001, dtype=DOUBLE)
        w = u.exp()
        value = 2 * torch.trapezoid(fgn_spectrum(w, hurst) * torch.cos(lag * w) * w, u)
        exact = fgn_autocovariance(torch.tensor(float(lag), dtype=DOUBLE), hurst)
        assert float(value) == pytest.approx(float(exact), abs=2e-3)


@pytest.mark.parametrize("hurst", [0.3, 0.7])
def test_estimates_of_the_hurst_index(hurst: float) -> None:
    """Mean of 12 series of 256: sd of one is .04, so 4.5 standard errors of the mean are .05 (once in 100,000 runs)."""
    x = FractionalGaussianNoise(torch.tensor(hurst, dtype=DOUBLE), 256, scale=2.0).draw((12,), generator(1))
    exact, whittle = hurst_mle(x), hurst_whittle(x)
    assert abs(float(exact.hurst.mean()) - hurst) < 0.06
    assert float((exact.hurst - whittle.hurst).abs().max()) < 0.05
    assert float((exact.scale / 2).log().abs().max()) < 0.5
    nearby = innovations(fgn_autocovariance(torch.arange(256, dtype=DOUBLE), hurst), x).log_likelihood()
    assert bool((exact.log_likelihood >= nearby - 1e-9).all())
    assert bool((whittle.log_likelihood >= whittle_log_likelihood(x, hurst) - 1e-6).all())


def test_inside_a_program() -> None:
    """A posterior of H by HMC agrees with quadrature of prior times exact likelihood, within 4.5 standard errors."""
    import pyro
    import pyro.distributions as dist

    import ppl

    x = FractionalGaussianNoise(torch.tensor(0.7, dtype=DOUBLE), 64).draw((), generator(2))

    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Uniform(torch.tensor(0.0, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)))
        pyro.sample("x", FractionalGaussianNoise(h, 64), obs=x)

    h = torch.linspace(0.005, 0.995, 199, dtype=DOUBLE)
    log_p = FractionalGaussianNoise(h, 64).log_prob(x)
    p = (log_p - log_p.logsumexp(0)).exp()
    mean = float((p * h).sum())
    posterior = ppl.infer(ppl.Program(model, x), ppl.HMC(warmup=150), draws=100, chains=8, seed=0, progress=False)
    row = posterior.summary().loc["h"]
    assert abs(row["mean"] - mean) < 4.5 * row["mcse"]
    assert row["ess_bulk"] > 100


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: FractionalGaussianNoise(1.2, 8), r"must lie in \(0, 1\)"),
        (lambda: FractionalGaussianNoise(0.3, 0), "n must be a positive integer"),
        (lambda: FractionalGaussianNoise(0.3, 4, dt=0.0), "dt must be positive"),
        (lambda: fbm_covariance(torch.ones(1), torch.ones(1), 0.3, "III"), "kind must be"),  # type: ignore[arg-type]
        (lambda: davies_harte(torch.tensor([1.0, -0.9, 0.9]), torch.randn(2, 3)), "rho at lags"),
        (lambda: davies_harte(torch.tensor([1.0, 0.9, -0.9]), torch.randn(2, 4)), "negative eigenvalue"),
        (lambda: innovations(torch.ones(3), torch.ones(5)), "needs the autocovariance at lags 0 to 4"),
        (lambda: hurst_mle(torch.tensor([1.0, math.nan, 2.0, 1.0])), "finite increments"),
        (lambda: hurst_whittle(torch.ones(3)), "n of at least 8"),
    ],
)
def test_bad_input(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]

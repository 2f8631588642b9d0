"""The fractional Ornstein-Uhlenbeck model: its exact law against quadrature, its path and posterior against that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ppl
from models.fractional_ou import FractionalOU, fou_covariance, fou_stationary_covariance, fou_stationary_spectrum
from ppl.diagnostics.ess import ess_of
from ppl.errors import OptionError
from sde import fbm_covariance

DOUBLE = torch.float64
# Var X(1) and Cov(X(1/2), X(1)) for rate 1, Var X(2) for rate 2; by double quadrature, to 1e-4.
PUBLISHED = {
    0.2: (0.4849, 0.1421, 0.3367),
    0.3: (0.4618, 0.1594, 0.2952),
    0.5: (0.4323, 0.1917, 0.2499),
    0.7: (0.4149, 0.2186, 0.2335),
    0.9: (0.4037, 0.2399, 0.2349),
}


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@pytest.mark.parametrize("hurst", PUBLISHED)
def test_reference_values(hurst: float) -> None:
    s, t, rate = at(1, 0.5, 2), at(1, 1, 2), at(1, 1, 2)
    torch.testing.assert_close(fou_covariance(s, t, rate, hurst), at(*PUBLISHED[hurst]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("hurst", [0.15, 0.6])
def test_covariance_is_the_double_integral(hurst: float) -> None:
    """The definition, on a fine grid for B: what is left is the grid, of order n^-2H."""
    n, rate = 1500, 3.0
    v = torch.linspace(0, 1, n + 1, dtype=DOUBLE)
    kernel = fbm_covariance(v[:, None], v, hurst)

    def weights(t: int) -> Tensor:  # X(v_t) as a functional of B
        w = torch.where(v <= v[t], -rate * (-rate * (v[t] - v)).exp() / n, 0.0)
        w[0], w[t] = w[0] / 2, w[t] / 2 + 1
        return w

    for s, t in ((300, 1500), (750, 750), (1200, 1230)):
        found = fou_covariance(v[s], v[t], rate, hurst)
        torch.testing.assert_close(found, weights(s) @ kernel @ weights(t), rtol=0, atol=2e-4)


def test_brownian_case_is_the_textbook_one() -> None:
    s, t, rate = at(0, 0.2, 3), at(1, 5, 3.5), 2.0
    exact = 0.49 * ((-rate * (t - s)).exp() - (-rate * (t + s)).exp()) / (2 * rate)
    torch.testing.assert_close(fou_covariance(s, t, rate, 0.5, 0.7), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hurst", [0.1, 0.4, 0.8])
def test_late_covariance_is_the_stationary_one(hurst: float) -> None:
    lag, rate = at(0, 0.1, 2.5), 1.3
    stationary = fou_stationary_covariance(lag, rate, hurst)
    torch.testing.assert_close(fou_covariance(at(60.0), 60 + lag, rate, hurst), stationary, rtol=1e-7, atol=1e-9)
    variance = math.gamma(2 * hurst + 1) / (2 * rate ** (2 * hurst))
    torch.testing.assert_close(stationary[0], at(variance)[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("hurst", [0.3, 0.7])
def test_spectrum_is_that_of_the_covariance(hurst: float) -> None:
    """int S(w) cos(w lag) dw, in u = w^(2 - 2H) near 0 and with the tail w^(-1 - 2H) added."""
    rate, lag = 1.3, at(0.0, 0.7, 2.0)
    q = 2 - 2 * hurst
    edge, n = 400.0, 400_000
    u = (torch.arange(n, dtype=DOUBLE) + 0.5) / n * edge**q
    w = u ** (1 / q)
    density = fou_stationary_spectrum(w, rate, hurst) * w ** (1 - q) / q * edge**q / n
    level = float(fou_stationary_spectrum(at(edge), rate, hurst)) * edge
    found = 2 * (density * (lag[:, None] * w).cos()).sum(-1)
    tail = at(level / hurst, 0, 0)  # oscillation averages out at other lags
    torch.testing.assert_close(found + tail, fou_stationary_covariance(lag, rate, hurst), rtol=0, atol=2e-3)


def test_gradients_of_the_covariance() -> None:
    s, t = at(0.5, 1.0, 0.0), at(0.8, 1.0, 1.0)
    point = [at(v)[0].requires_grad_() for v in (1.2, 0.3, 0.9)]
    assert torch.autograd.gradcheck(lambda a, h, c: fou_covariance(s, t, a, h, c), point)


@pytest.mark.parametrize(("hurst", "bound"), [(0.2, 0.06), (0.3, 0.025), (0.5, 0.015), (0.7, 0.015), (0.9, 0.08)])
def test_path_has_nearly_the_exact_covariance(hurst: float, bound: float) -> None:
    """Eight factors and steps of 0.02: errors of 0.039, 0.017, 0.009, 0.009 and 0.060 were measured."""
    model = FractionalOU(dt=0.02)
    assert model.covariance_error(torch.linspace(0.1, 2, 20), rate=1.0, hurst=hurst) < bound


def test_a_past_makes_it_stationary() -> None:
    model, times = FractionalOU(past=8.0, dt=0.05), at(0.5, 1.0, 2.0)
    _, covariance = model.law(times + model.past, at(1.0)[0], at(0.0)[0], at(1.0)[0], at(0.4)[0])
    exact = fou_stationary_covariance((times[:, None] - times).abs(), 1.0, 0.4)
    torch.testing.assert_close(covariance, exact, rtol=0, atol=1e-3)


# The posterior -------------------------------------------------------------------------------------------------------

GRID = torch.linspace(0.04, 0.96, 47, dtype=DOUBLE)


def problem() -> tuple[FractionalOU, Tensor, Tensor]:
    """25 noisy values at irregular times of a path with H = 0.35, drawn from the exact law."""
    g = torch.Generator().manual_seed(5)
    times = torch.rand(25, generator=g, dtype=DOUBLE).sort().values * 4 + 0.02
    model = FractionalOU(rate=1.5, mean=0.0, scale=1.0, noise=0.1, dt=0.03)
    mean, covariance = model.law(times, at(1.5)[0], at(0.0)[0], at(1.0)[0], at(0.35)[0], 0.1)
    return model, times, mean + torch.linalg.cholesky(covariance) @ torch.randn(25, generator=g, dtype=DOUBLE)


def moments(log_joint: Tensor) -> tuple[float, float]:
    weight = log_joint.softmax(0)
    mean = (weight * GRID).sum()
    return float(mean), float((weight * (GRID - mean) ** 2).sum().sqrt())


def approximate(model: FractionalOU, times: Tensor, y: Tensor) -> tuple[float, float]:
    """Posterior of H on the grid, with the path of the program integrated out."""
    zero, found = at(0.0)[0], []
    for h in GRID:
        covariance = model.path(times, zero + 1.5, zero, zero + 1, h).gaussian().covariances[0].reshape(25, 25)
        law = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance + 0.01 * torch.eye(25))
        found.append(law.log_prob(y))
    return moments(torch.stack(found))


@pytest.mark.slow
def test_hamiltonian_chains_find_the_posterior_of_the_hurst_index() -> None:
    """Mean and second moment agree with the grid of the program's own path; false alarm about 1e-4."""
    model, times, y = problem()
    engine = ppl.NoiseSpace(ppl.HMC(warmup=150, adaptation="quarter_turn", max_steps=64))
    posterior = ppl.infer(model.program(times, y), engine, draws=150, chains=8, seed=1, progress=False)
    mean, sd = approximate(model, times, y)
    h = posterior.draws["hurst"]
    square = (h - mean) ** 2
    assert abs(float(h.mean()) - mean) < 4 * sd / math.sqrt(float(ess_of(h)))
    assert abs(float(square.mean()) - sd**2) < 4 * float(square.std()) / math.sqrt(float(ess_of(square)))
    assert posterior.draws["x"].shape == (8, 150, 25, 1)


def test_approximation_moves_the_posterior_little() -> None:
    """0.25 posterior sd; the exact one integrates the continuous path out."""
    model, times, y = problem()
    exact, sd = moments(model.marginal(times, y).log_joint({"hurst": GRID}))
    found, _ = approximate(model, times, y)
    assert abs(found - exact) < 0.25 * sd
    assert 0.2 < exact < 0.5


def test_all_parameters_can_be_unknown() -> None:
    model = FractionalOU(initial=FractionalOU().mean, noise=FractionalOU().rate)
    times = at(0.2, 0.5, 1.1)
    names = ["rate", "mean", "scale", "hurst", "noise", "initial"]
    assert sorted(model.program(times, at(0, 1, 2)).latents) == sorted([*names, "x"])
    assert sorted(model.marginal(times, at(0, 1, 2)).latents) == sorted(names)


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="rate must be positive"):
        FractionalOU(rate=-1.0)
    with pytest.raises(OptionError, match="noise must be zero or more"):
        FractionalOU(noise=-0.1)
    with pytest.raises(OptionError, match="past must be zero or more"):
        FractionalOU(past=-1.0)
    with pytest.raises(ValueError, match="Hurst index"):
        FractionalOU(hurst=1.5)
    with pytest.raises(ValueError, match="rate must be positive"):
        fou_covariance(at(1), at(1), -1.0, 0.5)
    with pytest.raises(OptionError, match="marginal"):
        FractionalOU(noise=0.0).program(at(1), at(1))

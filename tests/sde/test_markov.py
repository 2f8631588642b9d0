"""The Markov approximation of fractional Brownian motion: weights, errors and derivatives against reference tables.

Reference values were computed once with 70 digits; those for type II and ten factors or more carry the ridge's error.
"""

from __future__ import annotations

import math
import re
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from sde import MarkovNoise, fbm_covariance
from sde.fractional import Kind

DOUBLE = torch.float64


def paper(hurst: float | Tensor, horizon: float, kind: Kind, factors: int) -> MarkovNoise:
    """The published grid in the kernel normalisation."""
    return MarkovNoise(
        torch.as_tensor(hurst, dtype=DOUBLE), horizon, kind, factors, "paper", unit=False, zero=False, max_error=2.0
    )


WEIGHTS = [
    ("I", 1, 1, 0.2, [1.6803675965]),
    ("I", 1, 10, 0.9, [-0.35112009284]),
    ("I", 3, 1, 0.7, [1.3523330358, -0.69777480572, -0.31885471219]),
    ("I", 5, 1, 0.2, [0.6341345685, -0.12499787178, 0.76253562486, -0.04447630704, 2.5199574555]),
    ("I", 5, 2, 0.5, [1.3997389176, -0.54036245682, 0.18891447858, -0.10921898695, 0.060928047616]),
    ("I", 5, 10, 0.9, [3.2903573954, -3.6031663168, 1.2301749413, -1.6102698493, 0.6667569476]),
    ("II", 1, 10, 0.3, [1.9368471071]),
    ("II", 3, 1, 0.9, [1.6948224, -1.3196922313, -0.26397529494]),
    ("II", 5, 1, 0.2, [66.736184286, -92.542575878, 31.701810212, -5.8260406789, 3.9532736797]),
    ("II", 5, 2, 0.7, [2.17989632, -1.0660698011, -0.35156530356, -0.12775875875, -0.26346331362]),
    ("II", 5, 10, 0.5, [1.6779987552, -0.89770109364, 0.32669225357, -0.17819553369, 0.09684619983]),
]


@pytest.mark.parametrize(("kind", "factors", "horizon", "hurst", "expected"), WEIGHTS)
def test_weights(kind: Kind, factors: int, horizon: float, hurst: float, expected: list[float]) -> None:
    found = paper(hurst, float(horizon), kind, factors).weights()
    tolerance = 1e-5 if (kind, factors) == ("II", 5) else 1e-7
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), rtol=tolerance, atol=0.0)


ERRORS = [
    ("I", 1, 1, [4.9150e-01, 3.4571e-01, 5.1404e-01, 8.1049e-01, 9.7540e-01]),
    ("I", 5, 1, [2.8273e-01, 1.2883e-01, 1.1312e-01, 3.1283e-01, 7.1380e-01]),
    ("I", 10, 5, [1.9519e-01, 1.0225e-01, 1.9787e-01, 4.3073e-01, 7.9076e-01]),
    ("I", 20, 10, [1.5486e-01, 9.3565e-02, 2.0836e-01, 4.4325e-01, 7.9767e-01]),
    ("II", 3, 1, [2.2538e-01, 9.1907e-02, 1.0309e-03, 1.2213e-02, 8.6044e-03]),
    ("II", 5, 5, [1.6421e-01, 5.7612e-02, 1.7957e-03, 6.0028e-03, 7.1273e-03]),
    ("II", 5, 10, [1.4335e-01, 4.7123e-02, 1.3473e-02, 2.3363e-02, 3.6168e-02]),
]


@pytest.mark.parametrize(("kind", "factors", "horizon", "expected"), ERRORS)
def test_predicted_error(kind: Kind, factors: int, horizon: float, expected: list[float]) -> None:
    found = torch.stack([
        paper(hurst, float(horizon), kind, factors).relative_error() for hurst in (0.2, 0.3, 0.5, 0.7, 0.9)
    ])  # fmt: skip
    tolerance = 1e-2 if factors == 20 else 1e-3
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), rtol=tolerance, atol=0.0)


# ||C_approx - C|| / ||C|| on t_i = i T / 100, from the tables.
COVARIANCES = [
    ("I", 3, 1.0, 0.7, 1.2805e-01),
    ("I", 5, 2.0, 0.3, 1.0349e-02),
    ("I", 10, 10.0, 0.9, 7.1889e-01),
    ("II", 3, 1.0, 0.3, 8.0837e-03),
    ("II", 5, 2.0, 0.7, 6.3472e-04),
]


@pytest.mark.parametrize(("kind", "factors", "horizon", "hurst", "expected"), COVARIANCES)
def test_covariance_error(kind: Kind, factors: int, horizon: float, hurst: float, expected: float) -> None:
    t = horizon * torch.arange(1, 101, dtype=DOUBLE) / 100
    exact = fbm_covariance(t[:, None], t, hurst, kind, unit=False)
    found = paper(hurst, horizon, kind, factors).covariance(t[:, None], t)
    assert float((found - exact).norm() / exact.norm()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "hurst", "expected"),
    [
        ("I", 0.2, [1.609222, 0.077535, -2.305435, 1.770957, -16.638876]),
        ("I", 0.7, [4.841985, -5.793557, 0.065010, -1.367210, 0.268458]),
        ("II", 0.5, [0.641720, 1.726145, -3.782715, -0.240380, -3.089829]),
        ("II", 0.7, [5.899899, -6.269770, -0.754946, -0.661782, -0.140690]),
    ],
)
def test_derivative_by_the_hurst_index(kind: Kind, hurst: float, expected: list[float]) -> None:
    found = torch.autograd.functional.jacobian(
        lambda h: paper(h, 2.0, kind, 5).weights(), torch.tensor(hurst, dtype=DOUBLE)
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), rtol=1e-5, atol=2e-6)


def test_wide_grids_agree_with_quadrature_of_the_covariance() -> None:
    """The closed-form error, recomputed from Var B^H, Var B and their covariance by quadrature over (0, T)."""
    for kind in get_args(Kind):
        noise = MarkovNoise(0.3, 2.0, kind, 3, (1e-3, 50.0))
        nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(60))
        t = 1 + nodes
        # E (B^H - B)^2 = Var B^H + Var B - 2 Cov; at the optimum the integral of Cov(B^H - B, B) is zero.
        difference = fbm_covariance(t, t, 0.3, kind) - noise.covariance(t, t)
        total = 2**1.6 / 1.6
        expected = float(noise.relative_error()) ** 2
        assert float((weights * difference).sum() / total) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("hurst", [0.2, 0.3, 0.5, 0.7, 0.9])
def test_bridge_at_the_default(hurst: float) -> None:
    """Posterior sd of B given B(2) + 0.1 n within 1.4 % of the exact process, at the default eight factors."""
    t, end = torch.tensor([0.25, 0.5, 1.0, 1.5, 1.9, 2.0], dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE)

    def sd(covariance: object) -> Tensor:
        return (covariance(t, t) - covariance(t, end) ** 2 / (covariance(end, end) + 0.01)).sqrt()  # type: ignore[operator]

    exact = sd(lambda a, b: fbm_covariance(a, b, hurst, "I"))
    assert float((sd(MarkovNoise(hurst, 2.0, "I").covariance) / exact - 1).abs().max()) < 0.014


def test_brownian_motion_is_inside() -> None:
    """At H = 1/2 the factor of rate 0 carries everything."""
    noise = MarkovNoise(0.5, 3.0, "I")
    weights = noise.weights(dtype=DOUBLE)
    torch.testing.assert_close(weights, torch.eye(9, dtype=DOUBLE)[0], rtol=0.0, atol=1e-6)


def test_scaling_of_the_horizon() -> None:
    """w(gamma / a, a T) = a^(H - 1/2) w(gamma, T)."""
    short = MarkovNoise(0.3, 1.0, "II", 4, (0.1, 100.0), unit=False).weights(dtype=DOUBLE)
    long = MarkovNoise(0.3, 5.0, "II", 4, (0.1, 100.0), unit=False).weights(dtype=DOUBLE)
    torch.testing.assert_close(long, 5**-0.2 * short)


@pytest.mark.parametrize("hurst", [0.2, 0.9])
def test_refit_gives_increments_their_variance(hurst: float) -> None:
    steps = 100
    noise = MarkovNoise(hurst, 1.0, "II", grid="wide").refit(1 / steps, steps)
    decay, gain = map(torch.from_numpy, noise.transition(1 / steps))
    powers = decay ** torch.arange(steps)[:, None]
    response = math.sqrt(1 / steps) * (powers @ (noise.weights(dtype=DOUBLE) * gain))
    found = response[0] ** 2 + (response.diff() ** 2).sum()
    times = torch.tensor([1 - 1 / steps, 1.0], dtype=DOUBLE)
    exact = fbm_covariance(times[:, None], times, hurst, "II")
    assert float(found / (exact[0, 0] + exact[1, 1] - 2 * exact[0, 1])) == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_variance_of_an_increment(kind: Kind) -> None:
    """The closed form against the response to noise, after a thousand steps."""
    dt, steps = 0.002, 1000
    noise = MarkovNoise(0.3, 2.0, kind, 4, (1.0, 1e3))
    decay, gain = map(torch.from_numpy, noise.transition(dt))
    response = math.sqrt(dt) * (decay ** torch.arange(steps)[:, None] @ (noise.weights(dtype=DOUBLE) * gain))
    found, exact = noise.step_variance(dt)
    assert float(found) == pytest.approx(float(response[0] ** 2 + (response.diff() ** 2).sum()), rel=0.02)
    times = torch.tensor([1.998, 2.0], dtype=DOUBLE)
    covariance = fbm_covariance(times[:, None], times, 0.3, kind)
    increment = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert float(exact) == pytest.approx(float(increment), rel=1e-3)


def test_initial_factors_have_their_stationary_covariance() -> None:
    noise = MarkovNoise(0.7, 2.0, "I")
    factor = noise.initial_factor
    np.testing.assert_allclose(factor @ factor.T, noise.initial_covariance, rtol=1e-6, atol=1e-9)
    positive = noise.rates[1:]
    np.testing.assert_allclose(noise.initial_covariance[1:, 1:], 1 / (positive[:, None] + positive))


def test_hurst_that_depends_on_time() -> None:
    times = torch.linspace(0, 1, 5, dtype=DOUBLE)
    noise = MarkovNoise(lambda t: 0.3 + 0.4 * t, 1.0, "II")
    found = noise.weights(times, dtype=DOUBLE)
    assert found.shape == (5, 8)
    torch.testing.assert_close(found[-1], MarkovNoise(0.7, 1.0, "II", grid="wide").weights(dtype=DOUBLE))


def test_batch_of_hurst_indices() -> None:
    h = torch.tensor([[0.2, 0.4], [0.6, 0.8]], dtype=DOUBLE)
    noise = MarkovNoise(h, 1.0, "I")
    assert noise.weights().shape == (2, 2, 9)
    torch.testing.assert_close(noise.weights()[1, 0], MarkovNoise(h[1, 0], 1.0, "I").weights())
    assert noise.relative_error().shape == (2, 2)


def test_what_it_says_of_itself() -> None:
    text = MarkovNoise(0.2, 1.0, "II").describe(dt=0.005)
    assert "relative error of the path 0.025" in text
    assert "variance of an increment over 0.005 times that of the process 1.12" in text


@pytest.mark.parametrize("hurst", [0.0, 1.0, -0.2, 1.5])
def test_hurst_outside(hurst: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        MarkovNoise(hurst, 1.0)


def test_where_no_grid_of_so_few_factors_will_do() -> None:
    """The error names the fewest factors that will, and its cure works."""
    with pytest.raises(ValueError, match="these 1 factors miss") as error:
        MarkovNoise(0.1, 100.0, factors=1)
    found = re.search(r"factors=(\d+) with grid=\((.*), (.*)\), in rate", str(error.value))
    assert found is not None
    factors, low, high = int(found[1]), float(found[2]), float(found[3])
    assert factors == 2
    assert float(MarkovNoise(0.1, 100.0, factors=factors, grid=(low, high)).relative_error()) < 0.5


def test_grid_that_cannot_represent_the_horizon() -> None:
    with pytest.raises(ValueError, match=r"predicted relative error 0\.88.*grid=\(.*leaves 0\.") as error:
        MarkovNoise(0.9, 10.0, "I", 5, "paper", zero=False)
    better = str(error.value).split("grid=(")[1].split(")")[0]
    low, high = map(float, better.split(","))
    assert float(MarkovNoise(0.9, 10.0, "I", 5, (low, high), zero=False).relative_error()) < 0.5


def test_weights_that_are_not_determined() -> None:
    with pytest.raises(ValueError, match="so close that their weights are not determined"):
        MarkovNoise(0.3, 1.0, "II", 12, (1.0, 1.0001), ridge=0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "III"}, "kind must be"),
        ({"factors": 0}, "BrownianNoise"),
        ({"horizon": -1.0}, "horizon must be positive"),
        ({"grid": "fine"}, "grid must be"),
        ({"grid": (2.0, 1.0)}, "lowest, highest"),
    ],
)
def test_other_bad_input(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MarkovNoise(**{"hurst": 0.3, "horizon": 1.0, **options})  # type: ignore[arg-type]

"""Refitted noise: the law of its increments against the exact one, and gradients in the Hurst index."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde import MarkovNoise, fbm_covariance, refitted_noise
from sde.increments import Increments

DOUBLE = torch.float64
STEPS, DT = 120, 0.02


def covariance(noise: MarkovNoise) -> Tensor:
    factor = Increments(noise, torch.linspace(0, STEPS * DT, STEPS + 1, dtype=DOUBLE)).factor()
    return factor @ factor.mT


def exact(hurst: float) -> Tensor:
    times = DT * torch.arange(1, STEPS + 1, dtype=DOUBLE)
    values = fbm_covariance(times[:, None], times, hurst, "II")
    return torch.nn.functional.pad(values, (1, 0, 1, 0)).diff(dim=0).diff(dim=1)


def divergence(covariance: Tensor, other: Tensor) -> float:
    """KL(N(0, covariance) || N(0, other))."""
    ratio = torch.linalg.solve(other, covariance)
    return 0.5 * float(ratio.trace() - len(ratio) - torch.logdet(ratio))


@pytest.mark.parametrize("hurst", [0.03, 0.1, 0.24, 0.5, 0.76, 0.95])
def test_increments_have_the_exact_law(hurst: float) -> None:
    """0.05 nat over the whole record: no test of one record could tell the two apart."""
    noise = refitted_noise(torch.tensor(hurst, dtype=DOUBLE), DT, STEPS)
    assert divergence(covariance(noise), exact(hurst)) < 0.05


def test_best_weights_in_continuous_time_have_not() -> None:
    noise = MarkovNoise(0.1, STEPS * DT, grid="wide")
    assert divergence(covariance(noise), exact(0.1)) > 3
    assert float(covariance(noise)[60, 60] / exact(0.1)[60, 60]) < 0.7


def test_series_passes_through_the_weights_of_one_index() -> None:
    fitted = MarkovNoise(0.31, STEPS * DT, grid=(0.1, 1e4), max_error=math.inf).refit(DT, STEPS).weights(dtype=DOUBLE)
    found = refitted_noise(0.31, DT, STEPS).weights(dtype=DOUBLE)
    torch.testing.assert_close(found, fitted, rtol=0, atol=1e-2 * float(fitted.abs().max()))


def test_gradient_in_the_hurst_index() -> None:
    """Of the variance of an increment, dt^2H up to a factor that moves slowly: against differences."""

    def variance(h: Tensor) -> Tensor:
        return covariance(refitted_noise(h, DT, STEPS))[60, 60]

    h = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(variance(h), h)
    by_difference = (variance(h.detach() + 1e-5) - variance(h.detach() - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, by_difference, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(slope, torch.as_tensor((exact(0.201) - exact(0.199))[60, 60] / 0.002), rtol=0.05, atol=0)


def test_several_indices_at_once() -> None:
    h = torch.tensor([0.1, 0.6], dtype=DOUBLE)
    both = refitted_noise(h, DT, STEPS).weights()
    torch.testing.assert_close(both[1], refitted_noise(h[1], DT, STEPS).weights())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be an integer of at least two"):
        refitted_noise(0.3, 0.1, 1)
    with pytest.raises(ValueError, match="Hurst index must lie in"):
        refitted_noise(1.2, 0.1, 10)

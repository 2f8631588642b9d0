"""Distances against values computed by hand, closed forms and other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl.diagnostics import (
    energy_distance,
    max_sliced_wasserstein,
    mmd_squared,
    mmd_test,
    random_directions,
    sliced_over_floor,
    sliced_wasserstein,
    sliced_wasserstein_floor,
    wasserstein_1d,
    z_bound,
)
from ppl.errors import OptionError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_wasserstein_on_the_line_by_hand(p: float) -> None:
    x, y = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0], [7.0]])
    torch.testing.assert_close(wasserstein_1d(x, y, p), torch.tensor([(1 + 4.0**p) / 2]))


def test_wasserstein_with_weights_agrees_with_scipy_and_with_copies() -> None:
    from scipy.stats import wasserstein_distance

    x, y = randn(5, 2), randn(7, 2, seed=2)
    w, v = torch.rand(5, generator=generator(3)).double(), torch.rand(7, generator=generator(4)).double()
    w, v = w / w.sum(), v / v.sum()
    found = wasserstein_1d(x, y, 1, w, v)
    for c in range(2):
        assert math.isclose(float(found[c]), wasserstein_distance(x[:, c], y[:, c], w, v), rel_tol=1e-10)
    copies = torch.tensor([0, 1, 1, 1, 2, 2])
    weighted = wasserstein_1d(x[:3], y, 2, torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64) / 6)
    torch.testing.assert_close(weighted, wasserstein_1d(x[copies], y, 2))


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_distance_of_a_shift(p: float) -> None:
    """A shift by m gives W_p = |theta.m|: in the plane the mean is 2/pi |m| and the mean square |m|^2 / 2."""
    x, m = randn(10, 2), torch.tensor([3.0, 4.0], dtype=torch.float64)
    angle = (torch.arange(720, dtype=torch.float64) + 0.5) * math.pi / 720
    theta = torch.stack([angle.cos(), angle.sin()], 1)
    expected = 5 * 2 / math.pi if p == 1 else 5 / math.sqrt(2)
    assert math.isclose(float(sliced_wasserstein(x, x + m, p=p, directions=theta)), expected, rel_tol=1e-5)
    projections = 4000
    found = float(sliced_wasserstein(x, x + m, p=p, generator=generator(), projections=projections)) ** p
    sd = math.sqrt(1 / 2 - 4 / math.pi**2) * 5 if p == 1 else 25 * math.sqrt(1 / 8)  # of |cos| and cos^2
    assert abs(found - expected**p) < z_bound(1e-5) * sd / math.sqrt(projections)


def test_sliced_distance_takes_log_weights_and_events() -> None:
    x, y = randn(4, 2, 3), randn(9, 2, 3, seed=2)
    theta = random_directions(50, 6, generator())
    twice = torch.cat([x, x[:1]])
    weighted = sliced_wasserstein(x, y, directions=theta, log_weight=torch.tensor([2.0, 1, 1, 1]).log() + 7)
    torch.testing.assert_close(weighted, sliced_wasserstein(twice, y, directions=theta))
    torch.testing.assert_close(sliced_wasserstein(y, x, directions=theta), sliced_wasserstein(x, y, directions=theta))
    with pytest.raises(ShapeError, match="event shape"):
        sliced_wasserstein(x, y[:, 0], directions=theta)
    with pytest.raises(OptionError, match="generator"):
        sliced_wasserstein(x, y)
    with pytest.raises(OptionError, match="p must"):
        sliced_wasserstein(x, y, directions=theta, p=0.5)


def test_directions_fill_the_sphere() -> None:
    """E theta theta^T = I / d; entries have variance at most 2 / (d (d + 2)). False alarm 1e-5."""
    n, d = 20_000, 3
    theta = random_directions(n, d, generator())
    error = (theta.T @ theta / n - torch.eye(d) / d).abs().max()
    assert error < z_bound(1e-5, tests=6) * math.sqrt(2 / (d * (d + 2)) / n) * 1.01


def test_max_sliced_finds_the_direction() -> None:
    """Only the variance along one axis differs: means and most directions see nothing. W_2 = |s - 1| there."""
    x = randn(400, 10)
    scale = torch.ones(10, dtype=torch.float64)
    scale[4] = 5
    value, direction = max_sliced_wasserstein(x, x * scale, generator=generator(), p=2)
    assert abs(float(direction[4])) > 0.99
    axis = wasserstein_1d(x[:, 4:5], x[:, 4:5] * 5, 2).sqrt()
    assert float(axis) - 1e-9 <= float(value) < float(axis) * 1.02
    assert float(value) >= float(sliced_wasserstein(x, x * scale, generator=generator(), p=2))


def test_floor_and_ratio_of_a_perfect_and_a_wrong_sampler() -> None:
    """A perfect sampler is at the floor: both are averages over one law, checked with the jackknife error.

    Root ESS n/2 (every draw twice) raises the ratio to sqrt(3/2), the formula of particle-defaults, section 3.
    """

    def normal(n: int, g: torch.Generator) -> Tensor:
        return torch.randn(n, 3, generator=g, dtype=torch.float64)

    g = generator()
    floor = sliced_wasserstein_floor(normal, 500, generator=g, references=12)
    again = sliced_wasserstein_floor(normal, 500, generator=g, references=12)
    assert abs(floor.value - again.value) < z_bound(1e-4) * 1.5 * math.hypot(floor.stderr, again.stderr)
    # W_1 of two samples of n from one normal: sqrt(2/n) int sqrt(F (1 - F)) E|N(0,1)| = sqrt(2/n) 1.8060 sqrt(2/pi).
    assert abs(floor.value / (math.sqrt(2 / 500) * 1.8060 * math.sqrt(2 / math.pi)) - 1) < 0.15

    def ratios(make: object, count: int = 30) -> Tensor:
        assert callable(make)
        return torch.tensor(
            [sliced_over_floor(make(), normal, generator=g, projections=50).ratio for _ in range(count)]
        )

    exact = ratios(lambda: normal(500, g))
    doubled = ratios(lambda: normal(250, g).repeat(2, 1))
    for found, expected in ((exact, 1.0), (doubled, math.sqrt(1.5))):
        assert abs(float(found.mean()) - expected) < z_bound(1e-4, 2) * float(found.std()) / math.sqrt(30) + 0.02
    with pytest.raises(OptionError, match="three"):
        sliced_wasserstein_floor(normal, 10, generator=g, references=2)


def test_mmd_by_hand_and_unbiased() -> None:
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [2.0]])
    k = lambda a, b: math.exp(-((a - b) ** 2) / (2 * 1.5**2))  # noqa: E731
    xx = (k(0, 1) + k(0, 3) + k(1, 3)) / 3
    xy = sum(k(a, b) for a in (0, 1, 3) for b in (0.5, 2)) / 6
    found = float(mmd_squared(x, y, bandwidth=1.5, scales=(1.0,)))
    assert math.isclose(found, xx + k(0.5, 2) - 2 * xy, rel_tol=1e-9)
    g = generator()
    null = torch.stack([mmd_squared(*torch.randn(2, 20, 2, generator=g), bandwidth=1.0) for _ in range(200)])
    assert abs(float(null.mean())) < z_bound(1e-5) * float(null.std()) / math.sqrt(200)


def test_mmd_permutation_test_has_size_and_power() -> None:
    """P(p <= 0.1) = 0.1 under the null: 0.1 of 200 within a binomial bound; a shift by one is found."""
    g = generator()
    p = torch.tensor(
        [mmd_test(*torch.randn(2, 15, 2, generator=g), generator=g, permutations=99).p_value for _ in range(200)]
    )
    assert abs(float((p <= 0.1).double().mean()) - 0.1) < z_bound(1e-4) * math.sqrt(0.1 * 0.9 / 200)
    x, y = torch.randn(2, 60, 2, generator=g)
    assert mmd_test(x, y + 1, generator=g).p_value <= 0.001
    with pytest.raises(OptionError, match="bandwidth"):
        mmd_squared(torch.zeros(3, 1), torch.zeros(3, 1))


def test_energy_distance_of_normals() -> None:
    """Closed form: E|N(m, s^2)| with s^2 = 2; U-statistic standard error from repeats. False alarm 1e-5."""
    g, m = generator(), 1.3
    s = math.sqrt(2)
    absolute = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * absolute - 2 * 2 / math.sqrt(math.pi)
    values = torch.stack(
        [energy_distance(torch.randn(50, 1, generator=g), m + torch.randn(40, 1, generator=g)) for _ in range(200)]
    )
    assert abs(float(values.mean()) - expected) < z_bound(1e-5) * float(values.std()) / math.sqrt(200)

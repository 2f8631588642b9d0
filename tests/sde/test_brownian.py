"""Brownian motion as a function of seed and time."""

from __future__ import annotations

import math

import pytest
import torch

from sde import BrownianMotion

DOUBLE = torch.float64


def test_order_and_company_of_queries_do_not_matter() -> None:
    w = BrownianMotion(7, (3,), end=2.0, dtype=DOUBLE)
    times = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 2
    together = w(times)
    for i in (0, 17, 49):
        assert torch.equal(w(times[i]), together[i])
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(w(times[shuffled]), together[shuffled])
    assert torch.equal(w(times.reshape(5, 10)), together.reshape(5, 10, 3))


def test_the_path_does_not_change_when_it_is_refined() -> None:
    w = BrownianMotion(3, (), end=1.0, dtype=DOUBLE)
    coarse, fine = torch.linspace(0, 1, 11, dtype=DOUBLE), torch.linspace(0, 1, 101, dtype=DOUBLE)
    torch.testing.assert_close(w.increments(fine).reshape(10, 10).sum(1), w.increments(coarse), atol=1e-3, rtol=0)


def test_covariance() -> None:
    """min(s, t) at six times, two of them not dyadic: 21 z-values of 40,000 paths, above 4.7 once in 20,000 runs."""
    count = 40_000
    w = BrownianMotion(11, (count,), start=1.0, end=4.0, dtype=DOUBLE)
    times = torch.tensor([1.1, 1.75, 2.0, 2.5, 3.9, 4.0], dtype=DOUBLE)
    x = w(times)
    exact = torch.minimum(times[:, None], times) - 1
    spread = ((exact**2 + exact.diagonal()[:, None] * exact.diagonal()) / count).sqrt()
    assert float(((x @ x.mT / count - exact) / spread).abs().max()) < 4.7
    assert float((x.mean(1) / (exact.diagonal() / count).sqrt()).abs().max()) < 4.7


def test_increments_below_the_last_halving_keep_their_variance() -> None:
    """Var W(t) = t at the middle of an interval of the last level: |z| above 4.5 once in 150,000 runs."""
    w = BrownianMotion(5, (2000,), depth=4, dtype=DOUBLE)
    t = torch.tensor([1 / 32], dtype=DOUBLE)  # the middle of an interval of the last level
    value, count = w(t)[0], 2000
    assert abs(float((value**2).mean()) / (1 / 32) - 1) < 4.5 * math.sqrt(2 / count)


def test_normal_numbers_are_normal() -> None:
    """Kolmogorov's distance, above 2.2 / sqrt(n) once in 8,000 runs; neighbouring keys do not correlate."""
    w = BrownianMotion(0, (100_000,), dtype=DOUBLE)(torch.tensor(1.0))
    ordered = torch.special.ndtr(w.sort().values)
    steps = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    assert float((ordered - steps).abs().max()) < 2.2 / math.sqrt(100_000)
    assert abs(float((w[1:] * w[:-1]).mean())) < 4.5 / math.sqrt(100_000)


def test_seeds_and_components_differ() -> None:
    t = torch.tensor([0.3, 1.0])
    one, other = BrownianMotion(1, (2,))(t), BrownianMotion(2, (2,))(t)
    assert float((one - other).abs().min()) > 1e-4
    assert float((one[:, 0] - one[:, 1]).abs().min()) > 1e-4
    assert float(BrownianMotion(1, ())(torch.tensor(0.0))) == 0.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="end must come after the start"):
        BrownianMotion(0, (), start=1.0, end=1.0)
    with pytest.raises(ValueError, match="times must lie between"):
        BrownianMotion(0)(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="depth must be"):
        BrownianMotion(0, depth=0)

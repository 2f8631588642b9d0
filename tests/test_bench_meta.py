"""What the benchmark of few-shot learners computes from predictions."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from benchmarks.meta import bootstrap, interval, scores
from benchmarks.meta_learners import either, seeded, widened
from models.meta import Episodes, LinearRegressions, Sinusoids
from models.meta.predictive import Predictive

LINES = LinearRegressions(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.5]), 0.3, 4, 10)


def exact(episodes: Episodes) -> Predictive:
    mean, variance = LINES.predictive(episodes)
    return Predictive(dist.Normal(mean[None], variance.sqrt()[None]))


def blurred(episodes: Episodes) -> Predictive:
    """The exact predictive, its mean off by N(0, 0.5^2), its variance as before."""
    law = exact(episodes).law
    return Predictive(dist.Normal(law.mean + 0.5 * torch.randn(law.mean.shape, generator=seeded(9)), law.stddev))


def test_widened_finds_what_is_missing() -> None:
    """A mean off by N(0, 0.5^2) wants the variance 0.25 more; the grid is a quarter apart."""
    new = LINES(50, seeded(1))
    added = (widened(blurred, LINES)(new).law.variance - blurred(new).law.variance).mean()
    assert 0.35 < math.sqrt(float(added)) < 0.7
    assert float((widened(exact, LINES)(new).law.variance - exact(new).law.variance).mean()) < 0.15**2


def test_scores_of_exact_predictions() -> None:
    """Calibrated, better than the blurred ones, and the squared error is the variance: within its own interval."""
    new = LINES(256, seeded(1))
    good, bad = (scores(f(new), new) for f in (exact, blurred))
    assert good["PIT error"][0] < 0.03 < bad["PIT error"][0]
    assert good["log-likelihood"][0] > bad["log-likelihood"][0] + 0.1
    error, half = good["squared error"]
    # Two half intervals of 95 %: a false alarm below 1e-4.
    assert error == pytest.approx(float(exact(new).variance.mean()), abs=2 * half)


def test_intervals() -> None:
    """1.96 standard errors; by resampling of a mean the same, within 4 standard errors of 200 rounds."""
    each = torch.randn(400, generator=seeded(3), dtype=torch.float64)
    mean, half = interval(each)
    assert half == pytest.approx(1.96 * float(each.std()) / 20)
    again, spread = bootstrap(lambda i: each[i].mean(), 400)
    assert again == pytest.approx(mean)
    assert spread == pytest.approx(half, rel=4 / math.sqrt(2 * 200))


def test_either_draws_from_all() -> None:
    source = either([Sinusoids(5, 15), Sinusoids(10, 10)])
    generator = seeded(0)
    assert {source(1, generator).support.x.shape[1] for _ in range(40)} == {5, 10}

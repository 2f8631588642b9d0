"""Ridge head and amortised Bayes against exact linear regression."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from models.meta import Episodes, Gaussian, LinearRegressions, mlp
from models.meta.abml import ABML, FittedABML
from models.meta.network import Network
from models.meta.ridge_head import FittedRidgeHead, RidgeHead
from models.meta.tasks_images import few_shot_digits
from ppl.errors import DataError, OptionError

F: dict[str, Any] = {"dtype": torch.float64}
LINES = LinearRegressions(torch.tensor([0.0, 0.0], **F), torch.tensor([0.5, 0.5], **F), 0.2, 4, 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(episodes: Episodes) -> Episodes:
    """The last support point hidden."""
    mask = torch.ones(episodes.support.mask.shape, dtype=torch.bool)
    mask[:, -1] = False
    return Episodes(
        episodes.x_support, episodes.y_support, episodes.x_query, episodes.y_query, mask, None, episodes.way
    )


def test_ridge_head_is_bayesian_regression() -> None:
    """f(x) = x, with lambda = 1 / spread^2 and the true noise: the exact predictive, masked points left out."""
    network = Network(torch.nn.Linear(1, 1, bias=False).double())
    theta = torch.tensor([1.0, math.log(4.0), math.log(0.2), 0.0], **F)
    episodes = masked(LINES(5, seeded()))
    found = FittedRidgeHead(network, theta, theta[:0]).predict(episodes)
    mean, variance = LINES.predictive(episodes)
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.variance, variance)


def test_ridge_head_learns_its_prior() -> None:
    """Trained from lambda = 1 and noise 0.5 it comes near the exact likelihood, within 0.05 nats."""
    network = Network(torch.nn.Linear(1, 1, bias=False).double())
    fitted = RidgeHead(steps=200, lr=0.05).fit(network, LINES)
    new = LINES(500, seeded(1))
    mean, variance = LINES.predictive(new)
    exact = dist.Normal(mean, variance.sqrt()).log_prob(new.query.y).mean()
    assert float(fitted.predict(new).log_prob(new.query.y).mean()) == pytest.approx(float(exact), abs=0.05)
    assert float(fitted.theta[-2].exp()) == pytest.approx(0.2, rel=0.15)


def test_ridge_head_of_classes() -> None:
    tasks = few_shot_digits(way=3, shots=3, queries=4, classes=range(7))(60, seeded())
    fitted = RidgeHead(steps=60, batch=8, lr=5e-3).fit(mlp([64, 32, 16]), tasks)
    new = few_shot_digits(way=3, shots=3, queries=8, classes=range(7, 10), held_out=True)(30, seeded(1))
    p = fitted.predict(new).mean
    assert torch.allclose(p.sum(-1), torch.ones(()))
    assert float((p.argmax(-1) == new.query.y).double().mean()) > 0.7


def test_abml_inner_steps_find_the_posterior_mean() -> None:
    """A linear network: many small steps with many draws end at the mean-field optimum of the exact posterior."""
    network = mlp([1, 1])
    network.module.double()
    episodes = masked(LINES(3, seeded()))
    prior = torch.cat([LINES.mean, LINES.spread.log()])
    options = ABML(inner_steps=400, inner_lr=0.02, draws=64)
    q = options.adapted(network, Gaussian(0.2), prior, episodes.support, seeded(1))
    exact = LINES.posterior(episodes.support)
    mean, spread = q[:, :2], q[:, 2:].exp()
    # Of a normal the best independent one has its mean, and the inverse diagonal of its precision as variances.
    best = torch.linalg.inv(exact.covariance).diagonal(dim1=-2, dim2=-1).rsqrt()
    assert torch.allclose(mean, exact.mean, atol=0.05)
    assert torch.allclose(spread, best, rtol=0.15)


def test_abml_gradient_runs_through_the_inner_steps() -> None:
    """By central differences at the same noise."""
    network = mlp([1, 3, 1])
    network.module.double()
    options = ABML(inner_steps=2, inner_lr=0.05, draws=2)
    episodes = LINES(2, seeded())
    start = torch.cat([network.start, torch.full_like(network.start, 0.1).log()]).requires_grad_()

    def loss(theta: torch.Tensor) -> torch.Tensor:
        g = seeded(4)
        q = options.adapted(network, Gaussian(0.5), theta, episodes.support, g)
        return options._bound(network, Gaussian(0.5), q, theta, episodes.points, g).mean()

    (slope,) = torch.autograd.grad(loss(start), start)
    for i in (0, 7, 12, 19):
        step = 1e-5 * torch.eye(len(start), **F)[i]
        difference = (loss((start + step).detach()) - loss((start - step).detach())) / 2e-5
        assert float(slope[i]) == pytest.approx(float(difference), rel=1e-4, abs=1e-8)


def test_abml_learns_lines() -> None:
    """Mean of the slopes found, and predictions better than those of the prior.

    The inner steps settle below 2 over the largest curvature of a loss, mean (x^2 + 1) / 0.09: 0.02 up to mean x^2 = 8.
    """
    lines = LinearRegressions(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.3]), 0.3, 5, 5)
    fitted = ABML(inner_steps=5, inner_lr=0.02, spread=0.3, steps=150, batch=8, lr=0.05).fit(
        mlp([1, 1]), Gaussian(0.3), lines
    )
    assert float((fitted.theta[:2] - lines.mean).abs().max()) < 0.25
    new = lines(200, seeded(1))
    blind = FittedABML(ABML(inner_steps=0), fitted.network, fitted.likelihood, fitted.theta, fitted.history)
    after, before = (f.predict(new, 50).log_prob(new.query.y).mean() for f in (fitted, blind))
    assert float(after) > float(before) + 0.05


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="spread"):
        ABML(spread=0.0)
    with pytest.raises(OptionError, match="noise"):
        RidgeHead(noise=-1.0)
    with pytest.raises(DataError, match="query sets"):
        RidgeHead(steps=1).fit(mlp([1, 2]), LinearRegressions(torch.ones(2), torch.ones(2), queries=0))

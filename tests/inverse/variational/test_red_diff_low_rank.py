"""RED-diff with a diagonal-plus-low-rank covariance, against the optimum of its loss and the exact posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import REDDiff
from inverse.problem import DiffusionProblem
from inverse.variational.red_diff_gaussian import LowRankFit
from models.references import gaussian_problem
from ppl import Program
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import GaussianMixture

F64 = torch.float64
Y = torch.tensor([1.0, -0.5], dtype=F64)
SIGMA = 0.6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MATRIX = torch.randn(2, 3, generator=seeded(3), dtype=F64)
ROOT = torch.randn(3, 3, generator=seeded(4), dtype=F64)
COVARIANCE = ROOT @ ROOT.T + 0.3 * torch.eye(3, dtype=F64)
CENTER = torch.tensor([0.5, -1.0, 0.2], dtype=F64)


def problem() -> DiffusionProblem:
    prior = GaussianMixture(torch.ones(1, dtype=F64), CENTER[None], COVARIANCE[None])

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ MATRIX.T, SIGMA).to_event(1), obs=y)

    return DiffusionProblem.of(Program(model, Y))


def fit(rank: int = 3) -> LowRankFit:
    return LowRankFit(REDDiff(scale="likelihood", covariance="low_rank", rank=rank), problem(), Cost(), rank)


@dataclass(frozen=True)
class Flat:
    """The same noise level at every step."""

    level: float

    def grid(self, steps: int) -> Tensor:
        return torch.cat([torch.full((steps,), self.level, dtype=F64), torch.zeros(1, dtype=F64)])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("s", [0.02, 0.2])
def test_gradients_vanish_at_the_derived_optimum_and_only_there(s: float, late: bool) -> None:
    """(S + s^2 I)^{-1} = (C + s^2 I)^{-1} + A'A / sigma^2 for S = diag(sd^2) + U U', and mu the mean that goes with it.

    200 000 lanes; 15 gradients within 6 standard errors: a false alarm in 3e-8 of runs. Moving mu by a fifth of an sd
    or U by a fifth of its length must show at more than 6.
    """
    eye = torch.eye(3, dtype=F64)
    prior_precision = torch.linalg.inv(COVARIANCE + s**2 * eye)
    precision = prior_precision + MATRIX.T @ MATRIX / SIGMA**2
    best = torch.linalg.solve(precision, prior_precision @ CENTER + MATRIX.T @ Y / SIGMA**2)
    covariance = torch.linalg.inv(precision) - s**2 * eye
    sd = math.sqrt(0.3 * float(torch.linalg.eigvalsh(covariance).min()))
    root = torch.linalg.cholesky(covariance - sd**2 * eye)
    n, method = 200_000, fit()
    eps, xi = (torch.randn(n, 3, generator=seeded(k), dtype=F64) for k in (1, 2))

    def z(mu: Tensor, factor: Tensor, sd: float = sd) -> dict[str, Tensor]:
        width = torch.full((n, 3), sd, dtype=F64)
        found = method.gradients(mu.expand(n, 3), width, factor.expand(n, 3, 3), s, eps, xi, late=late)
        along = (found[2] * factor).flatten(1).sum(1)
        parts = dict(zip(("mu", "sd", "factor"), found, strict=True)) | {"along": along}
        return {k: v.mean(0) / (v.std(0) / math.sqrt(n)).clamp(min=1e-12) for k, v in parts.items()}

    for value in z(best, root).values():
        assert value.abs().max() < 6
    away = z(best + 0.2 * covariance.diagonal().sqrt(), root)["mu"]
    assert away.abs().max() > 6
    assert z(best, 1.2 * root)["along"] > 6
    assert z(best, root / 1.2)["along"] < -6
    assert z(best, root, 1.5 * sd)["sd"].min() > 6


def test_the_score_is_that_of_the_gaussian() -> None:
    """Woodbury's identity against a dense solve, with two columns for six entries."""
    u = 0.2 + torch.rand(4, 2, 3, generator=seeded(0), dtype=F64)
    factor = torch.randn(4, 2, 3, 2, generator=seeded(1), dtype=F64)
    move = torch.randn(4, 2, 3, generator=seeded(2), dtype=F64)
    flat = factor.flatten(1, 2)
    dense = torch.diag_embed(u.flatten(1).square()) + flat @ flat.mT
    expected = -torch.linalg.solve(dense, move.flatten(1)).reshape(move.shape)
    torch.testing.assert_close(fit(2)._score(move, u, factor), expected)


def test_correlations_that_independent_entries_miss() -> None:
    """500 draws, covariance in units of the exact one: sixteen entries within 6 standard errors, sqrt(2/500), and 0.1
    for the noise of the optimiser; independent entries are off by more."""
    exact = gaussian_problem(0.3, dim=4, observations=2)
    factor = torch.linalg.cholesky(torch.linalg.inv(exact.posterior.covariance_matrix))
    room = 6 * math.sqrt(2 / 500) + 0.1

    def error(covariance: Any) -> tuple[float, float]:
        backend = REDDiff(steps=1000, scale="likelihood", covariance=covariance, rank=4)
        draws = ppl.infer(exact.program, backend, draws=500)["x"][0]
        gap = factor.T @ torch.cov(draws.T) @ factor - torch.eye(4, dtype=F64)
        mean = factor.T @ (draws.mean(0) - exact.posterior.mean)
        return float(mean.abs().max()), float(gap.abs().max())

    mean, spread = error("low_rank")
    assert mean < 6 / math.sqrt(500) + 0.1
    assert spread < room
    assert error("diagonal")[1] > room


def test_without_covariance_it_is_the_most_probable_point() -> None:
    """At one low level, mu is the mode for the prior blurred by it, with hardly any spread."""
    s = 0.1
    exact = gaussian_problem(0.3, dim=4, observations=2)
    blurred = exact.prior.covariance_matrix + s**2 * torch.eye(4, dtype=F64)
    mode = GaussianMixture(exact.prior.weights, exact.prior.mean[None], blurred[None]).condition_linear(
        exact.matrix, exact.program.data["y"], 0.09
    )
    schedule: Any = Flat(s)
    backend = REDDiff(steps=1500, lr=0.05, scale="likelihood", covariance="none", schedule=schedule)
    posterior = ppl.infer(exact.program, backend, draws=100)
    # Draws differ by the noise of Adam alone: four means within 6 standard errors, and 0.02 sd of room for its bias.
    sd = mode.variance.sqrt()
    assert ((posterior.mean("x") - mode.mean).abs() < 6 * posterior.sd("x") / math.sqrt(100) + 0.02 * sd).all()
    assert (posterior.sd("x") / sd).max() < 0.6
    assert posterior.cost.denoiser_calls == 1501


def test_rank_is_capped_and_forms_are_checked() -> None:
    assert fit(8).rank == 3
    assert REDDiff() == REDDiff(covariance=None)
    for options in (
        {"covariance": "full"},
        {"covariance": "diagonal"},
        {"covariance": "low_rank"},
        {"scale": "likelihood", "covariance": "low_rank", "rank": 0},
    ):
        with pytest.raises(OptionError, match=r"covariance|rank"):
            REDDiff(**options)

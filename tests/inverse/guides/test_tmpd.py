"""TMPD against its formula in matrices; deterministic, so there is no false alarm."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import GuidedSampler, TMPDGuide
from inverse.guides import PiGDMGuide
from inverse.guides.testing import check_guide
from inverse.problem import DiffusionProblem
from ppl import Program
from ppl.cost import Cost
from ppl.errors import CapabilityError, OptionError
from sde import DPMSolver2MSDE, GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_of(covariance: Tensor) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), torch.linspace(-1, 1, 3, dtype=F64)[None], covariance[None])


def problem_of(prior: GaussianMixture, m: int = 2) -> DiffusionProblem:
    matrix = torch.randn(m, 3, generator=seeded(3), dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T, 0.3).to_event(1), obs=y)

    return DiffusionProblem.of(Program(model, torch.randn(m, generator=seeded(4), dtype=F64)))


POSITIVE = torch.tensor([[1.0, 0.4, 0.1], [0.4, 0.8, 0.3], [0.1, 0.3, 0.5]], dtype=F64)
NEGATIVE = torch.tensor([[4.0, -1.9, 0.0], [-1.9, 1.0, 0.0], [0.0, 0.0, 0.5]], dtype=F64)


@pytest.mark.parametrize("covariance", [POSITIVE, NEGATIVE], ids=["positive", "negative"])
@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize(("m", "limit"), [(2, 64), (5, 3)])
def test_formula_in_matrices(covariance: Tensor, jacobian: bool, m: int, limit: int) -> None:
    problem = problem_of(prior_of(covariance), m)
    s = 1.2
    x = problem.prior.start(problem.noise(4, seeded(5)), s)
    guide = TMPDGuide(jacobian, exact_limit=limit).bind(problem)
    found = guide(x, s)
    B, d = problem.likelihood.gaussian.operator.dense(), problem.likelihood.gaussian.data
    J = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(3, dtype=F64))
    sums = s**2 * J.T.sum(1)
    v = sums.clamp(min=0)
    assert guide.floored == 4 * int((sums < 0).sum())
    S = torch.eye(m, dtype=F64) + B @ torch.diag(v) @ B.T
    D = problem.prior.denoise(x, s)
    r = d - D @ B.T
    g = torch.linalg.solve(S, r.T).T @ B
    expected = D + (s**2 * g @ J if jacobian else v * g)
    torch.testing.assert_close(found.posterior, expected, rtol=1e-8, atol=1e-10)
    if limit == 64:
        log_twist = dist.MultivariateNormal(torch.zeros(m, dtype=F64), S).log_prob(r)
        shift = problem.likelihood.gaussian.log_normaliser + 0.5 * m * torch.log(torch.tensor(2 * torch.pi, dtype=F64))
        torch.testing.assert_close(found.log_twist, log_twist + shift, rtol=1e-9, atol=1e-9)


def test_the_floor_is_reached_by_the_negative_case() -> None:
    problem = problem_of(prior_of(NEGATIVE))
    guide = TMPDGuide().bind(problem)
    guide(problem.prior.start(problem.noise(2, seeded()), 1.0), 1.0)
    assert guide.floored == 2
    sampler = GuidedSampler(TMPDGuide(), DPMSolver2MSDE(), steps=10)
    assert any("negative row sums" in note for note in ppl.infer(problem.program, sampler, draws=2).attrs["notes"])


def test_isotropic_priors_need_not_say_their_sd() -> None:
    problem = problem_of(prior_of(0.49 * torch.eye(3, dtype=F64)), m=5)
    x = problem.prior.start(problem.noise(4, seeded()), 0.8)
    for limit in (64, 2):
        found, known = TMPDGuide(exact_limit=limit).bind(problem)(x, 0.8), PiGDMGuide().bind(problem)(x, 0.8)
        torch.testing.assert_close(found.posterior, known.posterior, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.log_twist, known.log_twist, rtol=1e-9, atol=1e-9)
        check_guide(TMPDGuide(exact_limit=limit), problem, seeded(5), sigma=0.8)


def test_costs_and_limits() -> None:
    problem = problem_of(prior_of(POSITIVE))
    for jacobian, vjps in ((True, 14), (False, 7)):
        cost = Cost()
        TMPDGuide(jacobian).bind(problem, cost)(torch.zeros(7, 3, dtype=F64), 1.0)
        assert (cost.vjps, cost.likelihood_evals) == (vjps, 7)
    draws = ppl.infer(problem.program, GuidedSampler(TMPDGuide(), DPMSolver2MSDE(), steps=20), draws=5)["x"]
    assert draws.shape == (1, 5, 3)
    prior = prior_of(POSITIVE)

    def poisson(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="Poisson"):
        TMPDGuide().bind(DiffusionProblem.of(Program(poisson, torch.ones(3, dtype=F64))))
    for bad in ({"exact_limit": -1}, {"cg_steps": 0}):
        with pytest.raises(OptionError):
            TMPDGuide(**bad)  # type: ignore[arg-type]

"""FreeDoM against DPS, matrices and PiGDM; losses by pyro.factor."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_problems import MATRIX, Y, full, isotropic, linear, seeded
from torch import Tensor

import ppl
from inverse.guides.dps import DPSGuide
from inverse.guides.freedom import FreeDoMGuide
from inverse.guides.pigdm import PiGDMGuide
from inverse.guides.testing import check_guide
from inverse.particles import TwistedSMC
from inverse.problem import DiffusionProblem
from inverse.samplers.freedom import FreeDoM
from inverse.samplers.guided import GuidedSampler
from models.references import gaussian_problem
from ppl import Program
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError
from sde import DPMSolver2MSDE, GaussianMixture

F64 = torch.float64


def by_factor(prior: Any = None, noise: float = 1.0, matrix: Tensor = MATRIX) -> DiffusionProblem:
    """The same data as a loss."""
    prior = isotropic() if prior is None else prior

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.factor("loss", -(y - x @ matrix.T).square().sum(-1) / (2 * noise**2))

    return DiffusionProblem.of(Program(model, Y))


def both() -> DiffusionProblem:
    """Data and a factor that is no quadratic."""
    prior = isotropic()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ MATRIX.T, 0.5).to_event(1), obs=y)
        pyro.factor("loss", -x.pow(4).sum(-1))

    return DiffusionProblem.of(Program(model, Y))


WEIGHTS = ("damped", "likelihood", "relative", "alpha")


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("make", [linear, by_factor, both])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_contract(weight: Any, make: Any, sigma: float) -> None:
    check_guide(FreeDoMGuide(weight), make(), seeded(5), sigma=sigma)


def test_the_likelihood_weight_is_dps() -> None:
    problem = both()
    x = problem.prior.start(problem.noise(4, seeded()), 1.0)
    found, dps = FreeDoMGuide("likelihood").bind(problem)(x, 1.0), DPSGuide(weight="likelihood").bind(problem)(x, 1.0)
    torch.testing.assert_close(found.posterior, dps.posterior)
    torch.testing.assert_close(found.log_twist, dps.log_twist)


def test_weights_in_matrices() -> None:
    """u = s^2 J^T B^T (d - B D); a correlated prior, so that a forgotten transpose or Jacobian shows."""
    problem, s, b = linear(full(), 0.2), 0.8, 0.5
    x = problem.prior.start(problem.noise(4, seeded(2)), s)
    C = problem.prior.covariance_matrix
    J = C @ torch.linalg.inv(C + s**2 * torch.eye(3, dtype=F64))
    B, d = problem.likelihood.gaussian.operator.dense(), problem.likelihood.gaussian.data
    D = problem.prior.denoise(x, s)
    g = (d - D @ B.T) @ B
    u = s**2 * g @ J
    t = (g * u).sum(1) / ((g * u).sum(1) + (u @ B.T).square().sum(1))
    length = ((x - D).square().mean(1) / u.square().mean(1)).sqrt()
    for weight, expected in (
        ("likelihood", u),
        ("damped", t[:, None] * u),
        ("relative", length[:, None] * u),
        ("alpha", math.sqrt(1 + b**2) / (1 - (b / s) ** 2) * u / s**2),
    ):
        guide = FreeDoMGuide(weight, scale=0.3)  # type: ignore[arg-type]
        found = guide.bind(problem)(x, s, b)
        torch.testing.assert_close(found.posterior - D, 0.3 * expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.log_twist, problem.likelihood.log_prob(D))
    assert [FreeDoMGuide(w).size for w in WEIGHTS] == [1.0, 1.0, 0.02, 1.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("s", [0.05, 1.0, 30.0])
def test_damped_is_pigdm_where_all_data_are_alike(s: float) -> None:
    """B B^T = 400 I, an isotropic prior: one step of conjugate gradients is the solution."""
    rows = torch.linalg.qr(torch.randn(3, 2, generator=seeded(6), dtype=F64))[0].T
    problem = linear(noise=0.05, matrix=rows)
    x = problem.prior.start(problem.noise(5, seeded()), s)
    found, exact = FreeDoMGuide().bind(problem)(x, s), PiGDMGuide().bind(problem)(x, s)
    torch.testing.assert_close(found.posterior, exact.posterior, rtol=1e-9, atol=1e-10)
    loss = FreeDoMGuide().bind(by_factor(noise=0.05, matrix=rows))(x, s)
    torch.testing.assert_close(loss.posterior, exact.posterior, rtol=1e-5, atol=1e-6)


def test_a_loss_that_bends_the_other_way_is_not_damped() -> None:
    prior = isotropic(2)

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("loss", x.square().sum(-1) / 8)

    problem = DiffusionProblem.of(Program(model))
    x = problem.prior.start(problem.noise(4, seeded()), 1.0)
    damped, plain = (FreeDoMGuide(w).bind(problem)(x, 1.0).posterior for w in ("damped", "likelihood"))
    torch.testing.assert_close(damped, plain)


def test_measured_bias_and_what_diverges() -> None:
    """Sixteen dimensions, noise 0.05: mean error in sd and variance ratios, with room for 500 draws (0.05 and 10 %)."""
    problem = gaussian_problem(0.05)
    posterior = ppl.infer(problem.program, FreeDoM(travel_repeats=3), draws=500)
    x, exact = posterior["x"][0], problem.posterior
    basis = torch.linalg.svd(problem.matrix)[2]
    C = exact.covariance_matrix
    assert float((x.mean(0) - exact.mean).norm() / C.trace().sqrt()) < 0.35
    for seen, low, high in ((basis[:6], 1.2, 2.2), (basis[6:], 0.75, 1.1)):
        assert low < float((seen @ x.T.cov() @ seen.T).trace() / (seen @ C @ seen.T).trace()) < high
    with pytest.raises(NotFiniteError, match="beyond all bounds"):
        ppl.infer(problem.program, FreeDoM(weight="likelihood"), draws=5)


def test_factors_are_used_and_particles_correct_the_bias() -> None:
    """x ~ N(0, I), factor -2 (x_0 - 1)^2: exactly N(0.8, 0.2); root ESS decides the error bar, five of them allowed."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64))

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("loss", -2 * (x[..., 0] - 1).square())

    program = Program(model)
    draws = ppl.infer(program, FreeDoM(steps=60), draws=400)["x"][0]
    assert 0.6 < float(draws[:, 0].mean()) < 1.1
    assert abs(float(draws[:, 1].mean())) < 0.25
    for weight in ("damped", "relative"):
        found = ppl.infer(program, TwistedSMC(guide=FreeDoMGuide(weight), steps=60), draws=800)
        error = math.sqrt(0.2 / float(found.info["root_ess"]))
        assert error < 0.1
        assert abs(float(found["x"][0, :, 0].mean()) - 0.8) < 5 * error
        # The evidence of the factor: int N(x; 0, 1) exp(-2 (x - 1)^2) = sqrt(1 / 5) exp(-2 / 5).
        assert found.log_evidence is not None
        assert abs(float(found.log_evidence.value) + 0.4 + 0.5 * math.log(5)) < 0.2
    with pytest.raises(OptionError, match="step"):
        TwistedSMC(guide=FreeDoMGuide("alpha"))


def test_costs_and_other_solvers() -> None:
    problem, cost = both(), Cost()
    FreeDoMGuide().bind(problem, cost)(torch.zeros(7, 3, dtype=F64), 1.0)
    assert (cost.vjps, cost.likelihood_evals) == (7, 14)
    sampler = FreeDoM(steps=10, travel_repeats=3)
    cost = ppl.infer(problem.program, sampler, draws=4).cost
    assert (cost.denoiser_calls, cost.denoiser_evals) == (30, 120)
    draws = ppl.infer(problem.program, GuidedSampler(FreeDoMGuide(), DPMSolver2MSDE(), steps=20), draws=6)["x"]
    assert bool(draws.isfinite().all())
    with pytest.raises(OptionError, match="Ancestral"):
        GuidedSampler(FreeDoMGuide("alpha"), DPMSolver2MSDE())


def test_options_are_checked() -> None:
    for bad in ({"weight": "strong"}, {"scale": 0.0}):
        with pytest.raises(OptionError):
            FreeDoMGuide(**bad)
    for wrong in (
        {"travel_repeats": 0},
        {"travel_length": 0},
        {"travel_between": (2.0, 1.0)},
        {"steps": 0},
        {"chunk": 0},
    ):
        with pytest.raises(OptionError):
            FreeDoM(**wrong)

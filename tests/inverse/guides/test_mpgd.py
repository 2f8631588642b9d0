"""MPGD against matrices and PiGDM; projections; losses by pyro.factor."""

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
from inverse.guides.mpgd import MPGDGuide
from inverse.guides.pigdm import PiGDMGuide
from inverse.guides.testing import check_guide
from inverse.particles import TwistedSMC
from inverse.problem import DiffusionProblem
from inverse.samplers.mpgd import MPGD
from models.references import gaussian_problem
from ppl import Program
from ppl.cost import Cost
from ppl.errors import CapabilityError, NotFiniteError, OptionError, ShapeError

F64 = torch.float64


def by_factor() -> DiffusionProblem:
    prior = isotropic()

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("loss", -(x - 0.3).pow(4).sum(-1))

    return DiffusionProblem.of(Program(model))


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(
    ("weight", "make"),
    [
        (w, m)
        for w in ("damped", "likelihood", "relative", "norm")
        for m in (linear, by_factor)
        if w != "norm" or m is linear
    ],
)
def test_contract(weight: Any, make: Any, sigma: float) -> None:
    check_guide(MPGDGuide(weight), make(), seeded(5), sigma=sigma)


def half(x: Tensor) -> Tensor:
    """A linear autoencoder: onto a plane, and not along the axes."""
    plane = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.0, 2.0]], dtype=F64)
    return x @ torch.linalg.pinv(plane) @ plane + 0.1


@pytest.mark.parametrize("project", [None, half], ids=["free", "projected"])
def test_weights_in_matrices(project: Any) -> None:
    problem, s = linear(full(), 0.2), 0.8
    x = problem.prior.start(problem.noise(4, seeded(2)), s)
    B, d = problem.likelihood.gaussian.operator.dense(), problem.likelihood.gaussian.data
    D = problem.prior.denoise(x, s)
    eye, zero = torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64)
    P = torch.stack([half(e) - half(zero) for e in eye]) if project else eye
    at = half(D) if project else D
    g = (d - at @ B.T) @ B @ P.T
    sd = problem.prior.data_std
    v = s**2 * sd**2 / (s**2 + sd**2)
    t = g.square().sum(1) / (g.square().sum(1) + v * (g @ B.T).square().sum(1))
    scaled = math.sqrt(1 + s**2)
    residual = 0.2 * (d - at @ B.T)
    norm = (residual @ (0.2 * B) @ P.T) / residual.norm(dim=1, keepdim=True)
    for weight, expected in (
        ("likelihood", v * g),
        ("damped", t[:, None] * v * g),
        ("relative", scaled * g / g.square().mean(1, keepdim=True).sqrt()),
        ("norm", scaled * norm),
    ):
        found = MPGDGuide(weight, 0.3, project=project).bind(problem)(x, s)  # type: ignore[arg-type]
        torch.testing.assert_close(found.posterior - D, 0.3 * expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.log_twist, problem.likelihood.log_prob(D))


@pytest.mark.parametrize("s", [0.05, 1.0, 30.0])
def test_damped_is_pigdm_where_all_data_are_alike(s: float) -> None:
    rows = torch.linalg.qr(torch.randn(3, 2, generator=seeded(6), dtype=F64))[0].T
    problem = linear(noise=0.05, matrix=rows)
    x = problem.prior.start(problem.noise(5, seeded()), s)
    found, exact = MPGDGuide().bind(problem)(x, s), PiGDMGuide(jacobian=False).bind(problem)(x, s)
    torch.testing.assert_close(found.posterior, exact.posterior, rtol=1e-9, atol=1e-10)


def test_projection_has_a_range_a_shape_and_plates() -> None:
    problem = linear()
    x = problem.prior.start(problem.noise(4, seeded()), 1.0)
    free = MPGDGuide().bind(problem)(x, 1.0)
    guide = MPGDGuide(project=half, project_between=(2.0, 5.0)).bind(problem)
    torch.testing.assert_close(guide(x, 1.0).posterior, free.posterior)
    assert not torch.allclose(guide(x, 3.0).posterior, MPGDGuide().bind(problem)(x, 3.0).posterior)
    with pytest.raises(ShapeError, match="decode"):
        MPGDGuide(project=lambda x: x[..., :1]).bind(problem)(x, 1.0)
    prior = isotropic()

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 2):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    plated = DiffusionProblem.of(Program(model, torch.zeros(2, 3, dtype=F64)))
    found = MPGDGuide(project=half).bind(plated)(torch.zeros(4, 2, 3, dtype=F64), 1.0)
    assert found.posterior.shape == (4, 2, 3)
    check_guide(MPGDGuide(project=half), problem, seeded(5), sigma=1.0)


def test_measured_bias_and_what_diverges() -> None:
    """Sixteen dimensions, noise 0.05: as the docstring says, with room for 500 draws."""
    problem = gaussian_problem(0.05)
    x, exact = ppl.infer(problem.program, MPGD(), draws=500)["x"][0], problem.posterior
    basis = torch.linalg.svd(problem.matrix)[2]
    C = exact.covariance_matrix
    assert 0.6 < float((x.mean(0) - exact.mean).norm() / C.trace().sqrt()) < 1.0
    for seen, low, high in ((basis[:6], 4.0, 8.0), (basis[6:], 1.0, 1.5)):
        assert low < float((seen @ x.T.cov() @ seen.T).trace() / (seen @ C @ seen.T).trace()) < high
    with pytest.raises(NotFiniteError, match="beyond all bounds"):
        ppl.infer(problem.program, MPGD(weight="likelihood"), draws=5)


def test_factors_costs_and_particles() -> None:
    problem, cost = by_factor(), Cost()
    MPGDGuide().bind(problem, cost)(torch.zeros(7, 3, dtype=F64), 1.0)
    assert (cost.vjps, cost.likelihood_evals) == (0, 14)
    cost = ppl.infer(problem.program, MPGD(steps=10, travel_repeats=2), draws=4).cost
    assert (cost.denoiser_calls, cost.vjps) == (20, 0)
    draws = ppl.infer(problem.program, MPGD(steps=50), draws=200)["x"][0]
    # The prior means are (-1, 0, 1); the factor pulls each towards 0.3 and narrows it.
    assert float(draws.mean(0)[0]) > -0.8
    assert float(draws.mean(0)[2]) < 0.85
    program = linear().program
    exact = problem.prior.condition_linear(MATRIX, Y, 1.0)
    found = ppl.infer(program, TwistedSMC(guide=MPGDGuide(), steps=60), draws=800)
    error = exact.stddev / math.sqrt(float(found.info["root_ess"]))
    assert float(error.max()) < 0.2
    assert bool(((found["x"][0].mean(0) - exact.mean).abs() < 5 * error).all())
    with pytest.raises(CapabilityError, match=r"pyro\.factor"):
        MPGDGuide("norm").bind(problem)


def test_options_are_checked() -> None:
    for bad in (
        {"weight": "strong"},
        {"scale": 0.0},
        {"data_std": -1.0},
        {"project": 3},
        {"project_between": (2.0, 1.0)},
    ):
        with pytest.raises(OptionError):
            MPGDGuide(**bad)
        with pytest.raises(OptionError):
            MPGD(**bad)
    for bad in ({"eta": 1.5}, {"travel_repeats": 0}):
        with pytest.raises(OptionError):
            MPGD(**bad)
    assert "0x" not in repr(MPGD(project=half))

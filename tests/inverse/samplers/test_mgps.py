"""MGPS: its bridge, its midpoints, its law without data in matrices, and its measured bias."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pytest
import torch
from affine import Matrices, gaussian, law, program_of, seeded
from torch import Tensor

import ppl
from inverse.problem import DiffusionProblem
from inverse.samplers.mgps import MGPS, bridge
from inverse.samplers.trajectory import trajectory_levels
from models.references import gaussian_problem
from ppl import Program
from ppl.errors import OptionError
from sde import DiffusionPrior, GaussianMixture, VariancePreserving

F64 = torch.float64


@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_the_bridge_is_the_conditional_law(m: float) -> None:
    """x_m ~ N(0, v), x_b and x_a noised further: condition their joint Gaussian."""
    a, b, v = 2.0, 1.0, 0.7 + m**2
    joint = torch.tensor([[v, v, v], [v, v + b**2 - m**2, v + b**2 - m**2], [v, v + b**2 - m**2, v + a**2 - m**2]])
    seen, cross = joint[[0, 2]][:, [0, 2]].double(), joint[1, [0, 2]].double()
    gain = torch.linalg.solve(seen, cross)
    x_m, x_a = torch.tensor([0.4], dtype=F64), torch.tensor([-1.1], dtype=F64)
    mean, variance = bridge(x_a, x_m, a, b, m)
    torch.testing.assert_close(mean, gain[0] * x_m + gain[1] * x_a, rtol=1e-6, atol=1e-7)
    assert variance == pytest.approx(float(joint[1, 1].double() - gain @ cross), abs=1e-6)


def test_midpoints() -> None:
    vp = VariancePreserving()
    for b in (0.02, 0.5, 30.0):
        half = MGPS(midpoint=0.5).middle(b, 0.7, 1e-4)
        times = [float(vp.time(torch.tensor(s / 0.7, dtype=F64))) for s in (half, b)]
        assert times[0] == pytest.approx(0.5 * times[1], rel=1e-6)
        assert MGPS(midpoint=1.0).middle(b, 0.7, 1e-4) == pytest.approx(b)
        assert MGPS(midpoint=0.0).middle(b, 0.7, 0.01) == 0.01
        assert MGPS(midpoint=0.9).middle(b, 0.7, b) == b


@pytest.mark.parametrize("warm", [True, False])
def test_without_fit_its_law_is_that_of_the_formulas(warm: bool) -> None:
    """Cold it is the prior, in ancestral steps; warm, x_m comes from the denoised midpoint of the step before."""
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p = Matrices.of(problem)
    sampler = MGPS(steps=10, fit_steps=0, warm_start=warm, midpoint=0.6)
    levels = trajectory_levels(None, 10, problem).tolist()
    d, eye = len(p.m0), p.eye
    zero, pick = torch.zeros(d, d, dtype=F64), torch.cat([eye, torch.zeros(d, d, dtype=F64)], 1)
    # Joint state (x, clean), where clean is the denoised midpoint.
    mean = torch.cat([p.m0, torch.zeros(d, dtype=F64)])
    cov = torch.block_diag(p.C0 + levels[0] ** 2 * eye, zero)
    for i, (a, b) in enumerate(pairwise(levels)):
        J, k = p.denoiser(a)
        if b == 0:
            F, shift, noises = torch.cat([J @ pick, J @ pick]), torch.cat([k, k]), torch.zeros(2 * d, d, dtype=F64)
        elif not warm or i == 0:
            F, shift, noises = step(p, J @ pick, k, a, b, sampler.middle(b, problem.prior.data_std, levels[-2]))
        else:
            old = torch.cat([zero, eye], 1)
            F, shift, noises = step(p, old, 0 * k, a, b, sampler.middle(b, problem.prior.data_std, levels[-2]))
        mean, cov = F @ mean + shift, F @ cov @ F.T + noises @ noises.T
    found_mean, found = law(sampler.method(problem))
    torch.testing.assert_close(found_mean, mean[:d], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, cov[:d, :d], rtol=1e-8, atol=1e-9)
    if not warm:
        mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * eye
        for a, b in pairwise(levels):
            J, k = p.denoiser(a)
            ratio = (b / a) ** 2
            F = ratio * eye + (1 - ratio) * J
            mean, cov = F @ mean + (1 - ratio) * k, F @ cov @ F.T + b**2 * (1 - ratio) * eye
        torch.testing.assert_close(found, cov, rtol=1e-8, atol=1e-9)


def step(p: Matrices, C: Tensor, c: Tensor, a: float, b: float, m: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step with x_0 ~ C (x, clean) + c: matrices on the joint state, shift, and columns of the noise."""
    d, eye = len(p.m0), p.eye
    pick = torch.cat([eye, torch.zeros(d, d, dtype=F64)], 1)
    ratio, whole = (m / a) ** 2, a**2 - m**2
    middle, middle_shift, sd = ratio * pick + (1 - ratio) * C, (1 - ratio) * c, m * math.sqrt(1 - ratio)
    to_x, to_m = (b**2 - m**2) / whole, (a**2 - b**2) / whole
    J, k = p.denoiser(m)
    F = torch.cat([to_x * pick + to_m * middle, J @ middle])
    shift = torch.cat([to_m * middle_shift, J @ middle_shift + k])
    spread = math.sqrt((a**2 - b**2) * (b**2 - m**2) / whole)
    noises = torch.cat([torch.cat([to_m * sd * eye, spread * eye], 1), torch.cat([sd * J, 0 * eye], 1)])
    return F, shift, noises


def test_potential_in_matrices() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p, x = Matrices.of(problem), problem.prior.start(problem.noise(5, seeded(7)), 1.0)
    J, k = p.denoiser(0.7)
    expected = (p.d - (x @ J.T + k) @ p.B.T) @ p.B @ J
    torch.testing.assert_close(MGPS().method(problem).potential(x, 0.7), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_measured_bias(noise: float) -> None:
    """500 draws: the mean is good to 0.05 sd, variances to 6 %. Unguided draws are off by 1.4 sd and a factor 200."""
    problem = gaussian_problem(noise)
    x, exact = ppl.infer(problem.program, MGPS(), draws=500)["x"][0], problem.posterior
    basis, C = torch.linalg.svd(problem.matrix)[2], exact.covariance_matrix
    assert float((x.mean(0) - exact.mean).norm() / C.trace().sqrt()) < 0.26
    for seen in (basis[:6], basis[6:]):
        assert 0.65 < float((seen @ x.T.cov() @ seen.T).trace() / (seen @ C @ seen.T).trace()) < 1.4


def test_costs() -> None:
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (4,), sigma_max=10.0, dtype=F64)
    for warm in (True, False):
        cost = ppl.infer(program_of(network), MGPS(steps=6, fit_steps=3, warm_start=warm), draws=5).cost
        assert (cost.denoiser_calls, cost.vjps) == (6 + 5 * 3 + 5 * warm, 5 * 15)


def test_any_likelihood() -> None:
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", pyro.distributions.Poisson(x[..., 0].exp()), obs=y)
        pyro.factor("loss", -2 * (x[..., 1] - 1).square())

    x = ppl.infer(Program(model, torch.tensor(20.0)), MGPS(steps=40), draws=200)["x"][0]
    assert 2.4 < float(x[:, 0].mean()) < 3.2
    assert 0.6 < float(x[:, 1].mean()) < 1.0


def test_options_are_checked() -> None:
    for bad in ({"midpoint": -0.1}, {"midpoint": 1.1}, {"fit_steps": -1}, {"learning_rate": 0.0}, {"optimizer": "x"}):
        with pytest.raises(OptionError):
            MGPS(**bad)

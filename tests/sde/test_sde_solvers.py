"""Solvers on Gaussian priors, where every one is affine: moments are carried exactly, with no Monte Carlo.

Rows of a batch stand for the coefficients of independent standard normals, so that a step acts on all of them at once
and the variance of x is the sum of their squares.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sde import (
    DDIM,
    Ancestral,
    CovarianceCorrected,
    DPMSolver2M,
    DPMSolver2MSDE,
    EDMHeun,
    GaussianMixture,
    Solver,
    edm_grid,
    log_grid,
    sample,
)

F64 = torch.float64
ALL = [
    Ancestral(),
    DDIM(),
    DDIM(0.5),
    DDIM(1.0),
    EDMHeun(),
    EDMHeun(churn=0.2),
    DPMSolver2M(),
    DPMSolver2MSDE(),
    DPMSolver2MSDE(0.5),
]


def standard(tau: float, shape: tuple[int, ...] = (1,)) -> GaussianMixture:
    """N(0, tau^2 I)."""
    return GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, *shape, dtype=F64), torch.tensor([tau**2], dtype=F64)
    )


def end_variance(solver: Solver, sigmas: Tensor, tau: float = 1.0) -> float:
    """Variance at sigmas[-1] of the solver on N(0, tau^2), started exactly."""
    prior = standard(tau)
    x = torch.full((1, 1), math.sqrt(float(sigmas[0]) ** 2 + tau**2), dtype=F64)
    x = torch.cat([x, torch.zeros(len(sigmas), 1, dtype=F64)])
    state: Any = None
    for i, (a, b) in enumerate(pairwise(sigmas)):
        operator = prior.covariance(x, a)
        move = solver.step(x, a, b, prior.denoise(x, a), state, denoiser=prior.denoise, covariance=operator)
        variance = move.covariance if isinstance(move.covariance, Tensor) else move.covariance.dense()[0, 0, 0]
        x, state = move.mean.clone(), move.state
        x[i + 1] += variance.sqrt()
    return float(x.square().sum())


def slope(solver: Solver) -> float:
    """Order of the error in the variance at sigma = 0.1, by the two finest of four grids."""
    errors = []
    for steps in (40, 80, 160, 320):
        sigmas = log_grid(10.0, 0.1, steps + 1)[:-1]
        errors.append(abs(end_variance(solver, sigmas) - 1.01))
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("solver", [s for s in ALL if s != EDMHeun(churn=0.2)], ids=repr)
def test_variance_converges_at_the_declared_order(solver: Solver) -> None:
    """Fixed churn does not vanish with the step, and has its own test."""
    assert abs(slope(solver) - solver.order) < 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize("solver", ALL, ids=repr)
@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_limit_is_the_prior(solver: Solver, tau: float) -> None:
    """With many steps to sigma = 0 the variance is that of the prior, up to sigma_min^2 and the step."""
    variance = end_variance(solver, log_grid(20 * tau, 0.003 * tau, 800), tau)
    assert abs(variance / tau**2 - 1) < 0.02


def test_churn_keeps_the_marginal_and_vanishes_as_steps_grow() -> None:
    """The chain with churn has the right variance at every level up to second order in the step plus the churn."""
    errors = [
        abs(end_variance(EDMHeun(churn=10 / steps), log_grid(10.0, 0.1, steps + 1)[:-1]) - 1.01)
        for steps in (80, 160, 320)
    ]
    assert math.log2(errors[1] / errors[2]) > 1.7
    assert errors[-1] < 3e-4


def test_known_variance_of_the_plain_ancestral_step() -> None:
    """The bias it is known for: without Cov[x_0 | x] it loses most of the variance in 10 steps, a tenth in 100."""
    kept = [end_variance(Ancestral(), log_grid(80.0, 0.002, steps)) for steps in (10, 100)]
    assert kept[0] < 0.6
    assert 0.85 < kept[1] < 0.95


def test_ddim_with_full_noise_is_ancestral() -> None:
    grid = log_grid(10.0, 0.01, 7)
    assert abs(end_variance(DDIM(1.0), grid) - end_variance(Ancestral(), grid)) < 1e-12


def test_multistep_sde_without_noise_is_the_ode() -> None:
    grid = log_grid(10.0, 0.01, 7)
    assert abs(end_variance(DPMSolver2MSDE(0.0), grid) - end_variance(DPMSolver2M(), grid)) < 1e-12


def full_gaussian(d: int = 4) -> GaussianMixture:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(d, d, generator=generator, dtype=F64)
    mean = torch.randn(1, d, generator=generator, dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (factor @ factor.T + 0.01 * torch.eye(d, dtype=F64))[None])


def observed() -> GaussianMixture:
    A = torch.tensor([[1.0, 0.0, 0.5, -1.0], [0.0, 1.0, 0.0, 0.0]], dtype=F64)
    return full_gaussian().condition_linear(A, torch.tensor([0.3, -2.0], dtype=F64), 0.01)


@pytest.mark.parametrize("make", [full_gaussian, observed])
@pytest.mark.parametrize("steps", [1, 3])
def test_covariance_corrected_is_exact_for_gaussians_at_any_number_of_steps(make: Any, steps: int) -> None:
    prior = make()
    d = prior.event_shape.numel()
    sigmas = log_grid(5.0, 0.1, steps)
    eye = torch.eye(d, dtype=F64)
    mean, covariance = prior.mean, prior.covariance_matrix + 25 * eye
    points = torch.cat([torch.zeros(1, d, dtype=F64), eye])
    for a, b in pairwise(sigmas):
        operator = prior.covariance(points, a)
        move = CovarianceCorrected().step(points, a, b, operator.mean, covariance=operator)
        jacobian = (move.mean[1:] - move.mean[0]).T
        mean = move.mean[0] + jacobian @ mean
        assert not isinstance(move.covariance, Tensor)
        covariance = jacobian @ covariance @ jacobian.T + move.covariance.dense()[0]
    torch.testing.assert_close(mean, prior.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, prior.covariance_matrix, rtol=1e-12, atol=1e-12)


def test_covariance_corrected_draws_have_the_right_moments() -> None:
    """Through the loop and the operator's own draws. 14 z-scores at 4.9: false alarm below 2e-5."""
    prior, n = full_gaussian(), 20_000
    generator = torch.Generator().manual_seed(0)
    x = prior.start(torch.randn(n, 4, generator=generator, dtype=F64))
    x = sample(CovarianceCorrected(), prior.denoise, x, prior.sigmas(3), generator, covariance=prior.covariance)
    exact = prior.covariance_matrix
    z_mean = (x.mean(0) - prior.mean) / (exact.diagonal() / n).sqrt()
    centred = x - prior.mean
    spread = (exact.diagonal()[:, None] * exact.diagonal() + exact.square()) / n
    z_cov = (centred.T @ centred / n - exact) / spread.sqrt()
    assert float(torch.cat([z_mean, z_cov.flatten()]).abs().max()) < 4.9


@pytest.mark.parametrize("solver", [*ALL, CovarianceCorrected()], ids=repr)
def test_contract(solver: Solver) -> None:
    """Types, the exact last step, state that permutes with its particles, and no change of inputs."""
    prior = standard(1.0, (2, 3))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 3, generator=generator, dtype=F64)
    order = torch.tensor([3, 3, 0, 1, 4])

    def step(x: Tensor, a: float, b: float, state: Any) -> Any:
        extra = {"denoiser": prior.denoise, "covariance": prior.covariance(x, a)}
        return solver.step(x, torch.tensor(a), torch.tensor(b), prior.denoise(x, a), state, **extra)

    before = x.clone()
    first = step(x, 2.0, 1.0, None)
    assert torch.equal(x, before)
    assert first.mean.shape == x.shape
    noise = torch.randn(x.shape, generator=generator, dtype=F64)
    assert first.sample(noise).shape == x.shape
    assert (first.state is not None) == solver.has_history
    if solver.has_history:
        assert all(value.shape[0] == 5 for value in first.state.values())
    permuted = None if first.state is None else {name: value[order] for name, value in first.state.items()}
    second, shuffled = step(first.mean, 1.0, 0.4, first.state), step(first.mean[order], 1.0, 0.4, permuted)
    torch.testing.assert_close(shuffled.mean, second.mean[order], rtol=1e-13, atol=1e-13)
    last = step(second.mean, 0.4, 0.0, second.state)
    torch.testing.assert_close(last.mean, prior.denoise(second.mean, 0.4), rtol=1e-13, atol=1e-13)
    if isinstance(last.covariance, Tensor):
        assert float(last.covariance) == 0
    if not solver.stochastic:
        assert float(first.covariance) == 0
    with pytest.raises(ValueError, match="0 <= sigma_next < sigma"):
        step(x, 1.0, 2.0, None)


@pytest.mark.parametrize("solver", [*ALL, CovarianceCorrected()], ids=repr)
def test_loop_is_reproducible_and_leaves_the_global_generator_alone(solver: Solver) -> None:
    prior, x = standard(1.0, (2,)), torch.ones(3, 2, dtype=F64)
    state = torch.get_rng_state()
    runs = [
        sample(
            solver,
            prior.denoise,
            x,
            edm_grid(5.0, 0.1, 6),
            torch.Generator().manual_seed(seed),
            covariance=prior.covariance,
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) != solver.stochastic
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_stays_float32() -> None:
    prior = standard(1.0, (2,)).to(dtype=torch.float32)
    for solver in ALL:
        x = sample(solver, prior.denoise, torch.ones(3, 2), prior.sigmas(5), torch.Generator().manual_seed(0))
        assert x.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIM(eta=1.5), "eta must lie"),
        (lambda: DPMSolver2MSDE(eta=-1.0), "eta must be"),
        (lambda: EDMHeun(churn=40.0), "churn must lie"),
        (lambda: EDMHeun(churn_min=2.0, churn_max=1.0), "churn_min < churn_max"),
        (lambda: EDMHeun(churn_noise=0.0), "churn_noise"),
        (lambda: EDMHeun().step(torch.ones(1), 1.0, 0.5, torch.ones(1)), "denoiser="),
        (lambda: CovarianceCorrected().step(torch.ones(1), 1.0, 0.5, torch.ones(1)), "covariance="),
        (lambda: sample(CovarianceCorrected(), lambda x, s: x, torch.ones(1, 1), log_grid(1, 0.1, 2)), "covariance="),
        (lambda: sample(DDIM(), lambda x, s: x, torch.ones(1, 1), torch.tensor([0.1, 1.0])), "descending"),
        (lambda: DDIM().step(torch.ones(2), torch.ones(2), 0.5, torch.ones(2)), "one noise level for all rows"),
    ],
)
def test_solver_options_are_checked(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_enters_with_its_standard_deviation() -> None:
    """x_next = mean + c z for a variance c^2, and churn adds churn_noise^2 (b^2 - low^2), low = b / (1 + churn)."""
    prior, x, noise = standard(1.0, (2,)), torch.ones(3, 2, dtype=F64), torch.full((3, 2), 2.0, dtype=F64)
    move = Ancestral().step(x, 2.0, 1.0, prior.denoise(x, 2.0))
    torch.testing.assert_close(move.sample(noise) - move.mean, math.sqrt(0.75) * noise)
    churned = EDMHeun(churn=0.25, churn_noise=1.1).step(x, 2.0, 1.0, prior.denoise(x, 2.0), denoiser=prior.denoise)
    assert float(churned.covariance) == pytest.approx(1.1**2 * (1 - 0.8**2))
    outside = EDMHeun(churn=0.25, churn_max=0.5).step(x, 2.0, 1.0, prior.denoise(x, 2.0), denoiser=prior.denoise)
    assert float(outside.covariance) == 0

"""Langevin chains at a noise level keep their exact law, and the draws made from it are the posterior's."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_levels import as_network, at_level, mixture, problem_of, seeded, with_prior, worst
from torch import Tensor

import ppl
from inverse import AnnealedLangevin
from inverse.mcmc.mala import Replicas
from inverse.mcmc.noised_target import NoisedTarget, lowest_noise
from inverse.mcmc.reverse import ReverseDiffusion
from inverse.problem import DiffusionProblem
from inverse.side_by_side import SideBySide
from models.references import gaussian_problem
from ppl.cost import Cost
from ppl.diagnostics import ess_of, z_bound
from ppl.errors import NotFiniteError, OptionError
from sde import Ancestral, DiffusionPrior, DPMSolver2M, GaussianMixture

F64 = torch.float64


@torch.no_grad()
def after_steps(problem: Any, levels: list[float], final: bool, nodes: int | None, eta: float, n: int) -> Any:
    """Replicas that start from exact draws of every level and make eight steps, with the acceptance of the last."""
    target = NoisedTarget(SideBySide.alone(DiffusionProblem.of(problem.program)), 1, Cost(), None)
    target.at(torch.tensor(levels, dtype=F64), final)
    laws = [at_level(problem, s, final and i == 0) for i, s in enumerate(levels)]
    replicas = Replicas(target, torch.stack([law.draw((n,), seeded(10 + i)) for i, law in enumerate(laws)]), nodes)
    generator = seeded(1)
    for _ in range(8):
        moved = replicas.step(torch.full((len(levels),), eta, dtype=F64), generator)
    return replicas, laws, moved.accept.mean(1)


@pytest.mark.parametrize("nodes", [None, 2], ids=["density", "line"])
def test_steps_keep_the_exact_law_of_their_level(nodes: int | None) -> None:
    """20,000 independent lanes at three levels, the lowest with the corrected likelihood; false alarm 3e-4 each.

    Power: without its likelihood, its prior or its proposal term in the test the worst level is off by more than 3.
    """
    replicas, laws, accept = after_steps(problem_of(mixture()), [0.3, 0.8, 3.0], True, nodes, 2.0, 20_000)
    assert (accept > 0.2).all()
    assert (accept < 0.97).all()  # else there was nothing to be refused
    for x, law in zip(replicas.x, laws, strict=True):
        assert worst(x, law, 1e-4) < 1


def test_steps_that_are_not_tested_do_not_keep_it() -> None:
    """The check itself: the bias of plain Langevin steps is seen."""
    problem = problem_of(mixture())
    target = NoisedTarget(SideBySide.alone(DiffusionProblem.of(problem.program)), 1, Cost(), None)
    target.at(torch.tensor([0.3], dtype=F64), True)
    law = at_level(problem, 0.3, True)
    with torch.no_grad():
        replicas = Replicas(target, law.draw((20_000,), seeded())[None], None)
        generator = seeded(1)
        for _ in range(8):
            replicas.step(torch.tensor([2.0], dtype=F64), generator, metropolis=False)
    assert worst(replicas.x[0], law, 1e-4) > 2


def test_the_draw_that_follows_is_the_posterior_itself_at_any_level() -> None:
    """x_s from its exact law, then x_0 | x_s: the posterior, for s up to nearly sigma_y / ||A||; false alarm 1e-4 each.

    With the plain likelihood in place of the corrected one the law is another: the check sees that.
    """
    problem = problem_of(
        GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None])
    )
    top = problem.sigma / float(torch.linalg.matrix_norm(problem.matrix, 2))
    reverse = ReverseDiffusion(DiffusionProblem.of(problem.program), None, 1, None)
    with torch.no_grad():
        for share in (0.3, 0.95):
            s = share * top
            x = reverse(at_level(problem, s, True).draw((20_000,), seeded(1)), s, seeded(2))
            assert worst(x, problem.posterior, 1e-4) < 1
        wide = reverse(at_level(problem, s, False).draw((20_000,), seeded(1)), s, seeded(2))
    assert worst(wide, problem.posterior, 1e-4) > 2


def test_a_step_costs_one_call_and_no_point_twice() -> None:
    problem = problem_of(mixture())
    for nodes, rows in ((None, 1), (2, 3)):
        diffusion, cost = DiffusionProblem.of(problem.program), Cost()
        with torch.no_grad(), diffusion.counting(cost):
            target = NoisedTarget(SideBySide.alone(diffusion), 1, cost, None)
            target.at(torch.tensor([0.3, 1.0], dtype=F64), True)
            replicas = Replicas(target, torch.zeros(2, 5, 2, dtype=F64), nodes)
            for _ in range(4):
                replicas.step(torch.tensor([0.1, 0.1], dtype=F64), seeded())
        assert (cost.denoiser_calls, cost.denoiser_evals) == (1 + 4, 10 + 4 * 10 * rows)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_gaussian_posterior(sigma: float) -> None:
    """32 statistics in whitened coordinates, each with its own effective size; family-wise false alarm 1e-4.

    Measured at sigma = 0.05 with 32 chains: acceptance 0.58, 0.04 effective draws for each row through the denoiser.
    """
    problem = gaussian_problem(sigma)
    posterior = ppl.infer(problem.program, AnnealedLangevin(), draws=150, chains=32, seed=0)
    factor = torch.linalg.cholesky(problem.posterior.covariance_matrix)
    gap = posterior["x"] - problem.posterior.mean
    u = torch.linalg.solve_triangular(factor, gap[..., None], upper=False)[..., 0]
    size, square = ess_of(u).clamp(max=4800), ess_of(u.square()).clamp(max=4800)
    assert float(size.min()) > 1500
    bound = z_bound(1e-4, 32)
    assert float((u.mean((0, 1)) * size.sqrt()).abs().max()) < bound
    assert float(((u.square().mean((0, 1)) - 1) * (square / 2).sqrt()).abs().max()) < bound
    assert float(posterior.info["acceptance_rate"].mean()) == pytest.approx(0.574, abs=0.08)
    assert float(posterior.info["r_hat"].max()) < 1.02
    assert posterior.cost.denoiser_evals < 32 * (500 + 150 * 5) + 150 * 32 * 10 + 64 * 32


def test_a_network_needs_no_density() -> None:
    """The mixture behind a denoiser alone: line integrals, the second-order solver; whitened mean and variance.

    False alarm 1e-4; the solver's 20 steps from s to 0 leave an error far below the bound.
    """
    exact = gaussian_problem(0.3, dim=3, observations=2)
    prior = as_network(exact.prior, sigma_min=1e-3)
    posterior = ppl.infer(with_prior(exact, prior), AnnealedLangevin(denoise_steps=20), draws=150, chains=32, seed=0)
    factor = torch.linalg.cholesky(exact.posterior.covariance_matrix)
    gap = posterior["x"] - exact.posterior.mean
    u = torch.linalg.solve_triangular(factor, gap[..., None], upper=False)[..., 0]
    size, square = ess_of(u).clamp(max=4800), ess_of(u.square()).clamp(max=4800)
    bound = z_bound(1e-4, 6)
    assert float((u.mean((0, 1)) * size.sqrt()).abs().max()) < bound
    assert float(((u.square().mean((0, 1)) - 1) * (square / 2).sqrt()).abs().max()) < bound


def counts(prior: Any, y: float = 3.0) -> ppl.Program:
    """A count with log rate x: no Gaussian form."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x[..., 0].exp()), obs=y)

    return ppl.Program(model, torch.tensor(y, dtype=F64), compile="never")


def quadrature(prior: GaussianMixture, y: float = 3.0) -> tuple[float, float]:
    """Mean and variance of x given a count y, on a fine grid."""
    x = torch.linspace(-12, 12, 40_001, dtype=F64)
    log = prior.log_prob(x[:, None]) + y * x - x.exp()
    p = torch.softmax(log, 0)
    mean = (p * x).sum()
    return float(mean), float((p * (x - mean).square()).sum())


def test_counts_against_quadrature() -> None:
    """A likelihood that is not Gaussian: blurred by sigma_min, here by 1e-3 of its variance; false alarm 1e-4."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    backend = AnnealedLangevin(sigma_min=0.02, levels=10, steps=5, warmup=100)
    posterior = ppl.infer(counts(prior), backend, draws=100, chains=32, seed=0)
    mean, variance = quadrature(prior)
    x = posterior["x"][..., 0]
    bound = z_bound(1e-4, 2)
    assert abs(float(x.mean()) - mean) / math.sqrt(variance) * float(ess_of(x).sqrt()) < bound
    square = (x - mean).square()
    assert abs(float(square.mean()) - variance) / float(square.std()) * float(ess_of(square).sqrt()) < bound
    assert any("blurred" in note for note in posterior.attrs["notes"])


def broken(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of a standard normal that knows no numbers above 1.5."""
    return torch.where(x > 1.5, torch.nan, x / (1 + sigma.reshape(-1, 1) ** 2))


def test_chains_that_leave_are_dropped_and_the_rest_is_kept() -> None:
    """Without a test some chains meet the NaN; with one the move is refused."""
    prior = DiffusionPrior(broken, (1,), sigma_min=0.01, sigma_max=0.5, data_std=1.0, dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    program = ppl.Program(model, torch.zeros(1, dtype=F64), compile="never")
    options: dict[str, Any] = {"levels": 2, "steps": 3, "warmup": 10, "thin": 1, "denoise_steps": 2}
    tested = ppl.infer(program, AnnealedLangevin(**options), draws=20, chains=30, seed=0)
    assert tested.complete
    assert tested["x"].shape == (30, 20, 1)
    assert float(tested.info["diverging"].sum()) > 0
    plain = AnnealedLangevin(**options, metropolis=False, step_size=0.5)
    assert plain.exact == "never"
    posterior = ppl.infer(program, plain, draws=20, chains=30, seed=0)
    left = posterior["x"].shape[0]
    assert 0 < left < 30
    assert not posterior.complete
    assert bool(posterior["x"].isfinite().all())
    lost = [note for note in posterior.attrs["notes"] if "was dropped: not finite from transition" in note]
    assert len(lost) == 30 - left
    wild = AnnealedLangevin(**(options | {"warmup": 300}), metropolis=False, step_size=1e4)
    with pytest.raises(NotFiniteError, match="all 30 chains left"):
        ppl.infer(program, wild, draws=20, chains=30, seed=0)


def test_levels_that_do_not_suit_the_data() -> None:
    exact = gaussian_problem(0.3, dim=3, observations=2)
    with pytest.raises(OptionError, match="1 / "):
        ppl.infer(exact.program, AnnealedLangevin(sigma_min=5.0), draws=2)
    program = with_prior(exact, as_network(exact.prior, sigma_min=0.4))
    with pytest.raises(OptionError, match="TwistedSMC"):
        ppl.infer(program, AnnealedLangevin(), draws=2)
    problem = DiffusionProblem.of(exact.program)
    (found,) = lowest_noise(NoisedTarget(SideBySide.alone(problem), 1, Cost(), None), None)
    norm = float(torch.linalg.matrix_norm(exact.matrix, 2)) / exact.sigma
    assert found == pytest.approx(min(0.7 / norm, 0.2 * exact.prior.data_std))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels"),
        ({"warmup": -1}, "warmup"),
        ({"thin": 0}, "thin"),
        ({"nodes": -1}, "nodes"),
        ({"step_size": 0.0}, "step_size"),
        ({"sigma_min": -1.0}, "sigma_min"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"solver": DPMSolver2M()}, "adds no noise"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AnnealedLangevin(**options)


def test_chunks_change_nothing() -> None:
    exact = gaussian_problem(0.3, dim=3, observations=2)
    program = with_prior(exact, as_network(exact.prior, sigma_min=1e-3))
    options: dict[str, Any] = {"levels": 3, "steps": 2, "warmup": 10, "solver": Ancestral()}
    whole, parts = (
        ppl.infer(program, AnnealedLangevin(**options, chunk=chunk), draws=5, chains=4, seed=0) for chunk in (None, 3)
    )
    torch.testing.assert_close(parts["x"], whole["x"], rtol=1e-10, atol=1e-10)
    assert parts.cost.denoiser_calls > whole.cost.denoiser_calls

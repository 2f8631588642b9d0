"""Noise and return: the proposal leaves the prior as it is, and the test makes it the posterior."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_levels import mixture, problem_of, seeded, worst
from torch import Tensor

import ppl
from inverse import DiffusionPCN
from inverse.mcmc.diffusion_pcn import _Returning
from inverse.problem import DiffusionProblem
from inverse.side_by_side import SideBySide
from models.references import ExactProblem
from ppl.diagnostics import ess_of, z_bound
from ppl.errors import OptionError
from ppl.monitor import Monitor
from sde import DDIM, Ancestral, DiffusionPrior, GaussianMixture

F64 = torch.float64


def gaussian() -> GaussianMixture:
    root = torch.randn(3, 3, generator=seeded(1), dtype=F64)
    return GaussianMixture(
        torch.ones(1, dtype=F64), torch.ones(1, 3, dtype=F64), (root @ root.T + 0.1 * torch.eye(3, dtype=F64))[None]
    )


@torch.no_grad()
def after_moves(problem: ExactProblem, lanes: int, moves: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Independent chains from the exact posterior after some moves, and the acceptance of the last."""
    backend = DiffusionPCN(warmup=0, **options)
    walk = _Returning(backend, SideBySide.alone(DiffusionProblem.of(problem.program), seeded(1)), lanes, Monitor())
    walk.x = problem.posterior.draw((lanes,), seeded(2))
    walk.value_of_x = walk._log_likelihood(walk.x)
    for step in range(moves):
        found = walk.advance(step)
    return walk.x, found["acceptance_rate"]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("level", [0.2, 1.0])
def test_moves_keep_a_gaussian_posterior_at_any_number_of_steps(steps: int, level: float) -> None:
    """40,000 independent chains, 5 moves; false alarm 1e-4 each. Without the test the prior would come back."""
    problem = problem_of(gaussian(), sigma=0.5)
    x, accept = after_moves(problem, 40_000, 5, steps=steps, level=level, jump=0.0)
    assert worst(x, problem.posterior, 1e-4) < 1
    assert 0.05 < float(accept.mean()) < 0.95


def test_moves_keep_a_posterior_of_several_modes() -> None:
    """Jumps from random levels, 30 steps back; false alarm 1e-4. The error of the reverse diffusion is below that."""
    problem = problem_of(mixture(), sigma=1.0)
    x, _ = after_moves(problem, 10_000, 4, steps=30, level=0.5, jump=0.5)
    assert worst(x, problem.posterior, 1e-4) < 1


def test_a_step_that_leaves_out_the_covariance_is_seen() -> None:
    """The check itself, and the honest limit: with plain ancestral steps three are not enough, and the chain is off."""
    problem = problem_of(gaussian(), sigma=0.5)
    x, _ = after_moves(problem, 40_000, 5, steps=3, level=0.5, jump=0.0, solver=Ancestral())
    assert worst(x, problem.posterior, 1e-4) > 2


def test_the_posterior_from_the_prior_on() -> None:
    """Warmup, the learned level, bookkeeping: six statistics by their own effective sizes; false alarm 1e-4."""
    problem = problem_of(gaussian(), sigma=0.5)
    posterior = ppl.infer(problem.program, DiffusionPCN(steps=1, warmup=200, thin=4), draws=150, chains=40, seed=0)
    z = []
    for i in range(3):
        v = (posterior["x"][..., i] - problem.posterior.mean[i]) / problem.posterior.stddev[i]
        square = v.square()
        z += [float(v.mean() * ess_of(v).sqrt()), float((square.mean() - 1) * (ess_of(square) / 2).sqrt())]
    assert max(map(abs, z)) < z_bound(1e-4, 6)
    plain = posterior.info["acceptance_rate"][posterior.info["level"] == posterior.info["level"].min()]
    assert float(plain.mean()) == pytest.approx(0.234, abs=0.15)
    assert posterior.info["base_level"] > 0


@pytest.mark.parametrize("y", [0.0, 3.0])
def test_counts_and_data_that_forbid_values(y: float) -> None:
    """A Poisson count whose rate is x itself, which must be positive: by quadrature; false alarm 1e-4."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 1, dtype=F64), torch.full((1,), 4.0, dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        rate = torch.where(x[..., 0] > 0, x[..., 0], torch.nan)
        pyro.sample("y", dist.Poisson(rate, validate_args=False), obs=y)

    program = ppl.Program(model, torch.tensor(y, dtype=F64), compile="never")
    grid = torch.linspace(1e-6, 20, 40_001, dtype=F64)
    p = torch.softmax(prior.log_prob(grid[:, None]) + y * grid.log() - grid, 0)
    mean = (p * grid).sum()
    posterior = ppl.infer(program, DiffusionPCN(steps=1, warmup=100, thin=2), draws=150, chains=40, seed=0)
    x = posterior["x"][..., 0]
    assert bool((x > 0).all())
    assert abs(float((x.mean() - mean) / x.std())) * float(ess_of(x)) ** 0.5 < z_bound(1e-4, 2)


def test_proposals_that_are_not_finite_are_refused() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(x > 1.5, torch.nan, x / (1 + sigma**2))

    prior = DiffusionPrior(broken, (1,), sigma_min=0.01, sigma_max=0.5, data_std=1.0, dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    program = ppl.Program(model, torch.zeros(1, dtype=F64), compile="never")
    posterior = ppl.infer(program, DiffusionPCN(steps=3, warmup=10, level=0.4), draws=30, chains=12, seed=0)
    assert bool(posterior["x"].isfinite().all())
    assert float(posterior.info["diverging"].sum()) > 0
    assert posterior.complete


def test_chains_without_a_first_draw_are_dropped() -> None:
    """A chain begins with a draw of the prior; where its reverse diffusion fails the others go on."""

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(x > 0.6, torch.nan, x / (1 + sigma**2))

    prior = DiffusionPrior(broken, (1,), sigma_min=0.01, sigma_max=0.5, data_std=1.0, dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    program = ppl.Program(model, torch.zeros(1, dtype=F64), compile="never")
    backend = DiffusionPCN(steps=3, warmup=2, level=0.1)
    posterior = ppl.infer(program, backend, draws=5, chains=20, seed=0)
    assert 0 < posterior["x"].shape[0] < 20
    assert not posterior.complete
    assert bool(posterior["x"].isfinite().all())


def test_precise_data_are_reported() -> None:
    posterior = ppl.infer(
        problem_of(gaussian(), sigma=0.001).program, DiffusionPCN(steps=1, warmup=20, level=1.0), draws=30, chains=4
    )
    assert any("were accepted" in note for note in posterior.attrs["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.0}, "level"),
        ({"jump": 1.5}, "jump"),
        ({"steps": 0}, "steps"),
        ({"solver": DDIM()}, "adds no noise"),
        ({"target_accept": 0.0}, "target_accept"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DiffusionPCN(**options)


def test_a_level_that_the_prior_does_not_have() -> None:
    with pytest.raises(OptionError, match="sigma_max"):
        ppl.infer(problem_of(mixture()).program, DiffusionPCN(level=1e6), draws=2)

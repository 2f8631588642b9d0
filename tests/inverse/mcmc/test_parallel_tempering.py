"""Swaps and steps keep the exact law of every level at once, and chains cross between modes with the right odds."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_levels import as_network, at_level, mixture, problem_of, seeded, with_prior, worst
from torch import Tensor

import inverse
import ppl
from inverse import ParallelTempering
from inverse.mcmc.mala import Replicas
from inverse.mcmc.parallel_tempering import _Tempered
from inverse.problem import DiffusionProblem
from inverse.side_by_side import SideBySide
from models.references import ExactProblem
from ppl.errors import OptionError
from ppl.monitor import Monitor
from sde import GaussianMixture

F64 = torch.float64


def of_chains(values: Tensor, wanted: Tensor, alpha: float) -> float:
    """The largest t statistic of chain means (chain, draw, n) over its bound; above 1 is a failure.

    Chains are independent, and few changes of mode make ESS estimates flatter: no ESS is used.
    """
    from scipy.stats import t

    means = values.mean(1)
    found = (means.mean(0) - wanted) / means.std(0) * len(means) ** 0.5
    return float(found.abs().max()) / float(t.isf(alpha / 2 / found.numel(), len(means) - 1))


@torch.no_grad()
def after_rounds(problem: ExactProblem, nodes: int | None, chains: int, rounds: int, **options: Any) -> _Tempered:
    """All levels from their exact laws, then rounds as after warmup."""
    backend = ParallelTempering(levels=4, warmup=0, nodes=nodes, sigma_min=0.3, sigma_max=4.0, **options)
    diffusion, monitor = DiffusionProblem.of(problem.program), Monitor()
    walk = _Tempered(backend, SideBySide.alone(diffusion, seeded(1)), chains, monitor)
    walk.target.at(walk.sigmas[0], True)
    laws = [at_level(problem, float(s), i == 0) for i, s in enumerate(walk.sigmas[0])]
    start = torch.stack([law.draw((chains,), seeded(10 + i)) for i, law in enumerate(laws)])
    walk.replicas = Replicas(walk.target, start, walk.nodes)
    for step in range(rounds):
        walk.advance(step)
    return walk


@pytest.mark.parametrize(("nodes", "chains"), [(None, 20_000), (1, 4000)], ids=["density", "line"])
def test_rounds_keep_the_law_of_every_level(nodes: int | None, chains: int) -> None:
    """Independent chains at four levels, about half of the swaps accepted; false alarm 4e-4 each.

    Power: a swap without any of its four densities of the prior or of its likelihood is off by more than 2.
    """
    problem = problem_of(mixture())
    walk = after_rounds(problem, nodes, chains, 6)
    rates = walk.tried[0, 0] / walk.tried[1, 0]
    assert (rates > 0.1).all()
    assert (rates < 0.9).all()
    for i, s in enumerate(walk.sigmas[0].tolist()):
        assert worst(walk.replicas.x[i], at_level(problem, s, i == 0), 1e-4) < 1


def test_what_is_kept_of_a_state_belongs_to_it() -> None:
    """After rounds with swaps the stored score, likelihood and density are those of the stored values and levels."""
    for nodes in (None, 1):
        walk = after_rounds(problem_of(mixture()), nodes, 50, 5)
        r = walk.replicas
        with torch.no_grad():
            fresh = Replicas(walk.target, r.x, walk.nodes)
        torch.testing.assert_close(r.score, fresh.score)
        torch.testing.assert_close(r.raw["seen"], fresh.raw["seen"])
        torch.testing.assert_close(r.log_prior, fresh.log_prior)
        assert (walk.who[0].sort(0).values == torch.arange(4)[:, None]).all()
        assert not torch.equal(walk.who[0], torch.arange(4)[:, None].expand(4, 50))


def test_separated_modes_keep_their_weights() -> None:
    """Modes 40 standard deviations apart and data that hardly tell them: weights within their error; false alarm 1e-4.

    The premise: an annealed chain that is in a mode stays there. Round trips and swaps are reported.
    """
    prior = GaussianMixture(
        torch.tensor([0.7, 0.2, 0.1], dtype=F64),
        torch.tensor([[-10.0, 0.0], [10.0, 5.0], [0.0, -12.0]], dtype=F64),
        torch.full((3,), 0.25, dtype=F64),
    )
    problem = problem_of(prior, sigma=20.0)
    posterior = ppl.infer(problem.program, ParallelTempering(levels=10, warmup=150), draws=100, chains=40, seed=0)
    shares = problem.posterior.responsibilities(posterior["x"], 1e-6)
    assert of_chains(shares[..., 1:], problem.posterior.weights[1:], 1e-4) < 1
    assert float(shares.mean(1).std(0).max()) < 0.25  # 0.46 if chains never crossed
    assert float(posterior.info["round_trips"].double().mean()) > 2
    assert (posterior.info["swap_acceptance"] > 0.2).all()
    assert posterior.info["swap_acceptance"].shape == (9,)
    assert bool((posterior.info["sigmas"].diff() > 0).all())
    stuck = ppl.infer(problem.program, inverse.AnnealedLangevin(levels=8, steps=4), draws=40, chains=16, seed=0)
    sides = problem.posterior.responsibilities(stuck["x"], 1e-6)[..., 0]
    assert float(sides.std(1).max()) < 1e-6
    assert float(stuck.info["r_hat"].max()) > 1.5


def test_modes_behind_a_denoiser_alone() -> None:
    """The same without a density: line integrals and the second-order solver; false alarm 1e-4."""
    prior = GaussianMixture(
        torch.tensor([0.7, 0.3], dtype=F64), torch.tensor([[-6.0], [6.0]], dtype=F64), torch.full((2,), 0.25, dtype=F64)
    )
    exact = problem_of(prior, sigma=10.0)
    backend = ParallelTempering(levels=6, warmup=60)
    posterior = ppl.infer(with_prior(exact, as_network(prior)), backend, draws=80, chains=24, seed=0)
    right = (posterior["x"] > 0).double()
    assert of_chains(right, exact.posterior.weights[1:], 1e-4) < 1
    assert float(right.mean(1).std()) < 0.35  # 0.46 if chains never crossed
    assert float(posterior.info["line_error"]) <= 0.02


def test_a_sign_that_the_data_do_not_tell() -> None:
    """y = x^2 + noise, the prior a wide normal: both signs, half each, and x^2 as by quadrature; false alarm 1e-4."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.full((1,), 4.0, dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., 0].square(), 1.0), obs=y)

    program = ppl.Program(model, torch.tensor(9.0, dtype=F64), compile="never")
    grid = torch.linspace(-8, 8, 20_001, dtype=F64)
    p = torch.softmax(-0.5 * (grid.square() / 4 + (9 - grid.square()).square()), 0)
    mean = (p * grid.square()).sum()
    backend = ParallelTempering(levels=6, warmup=100, sigma_min=0.01)
    posterior = ppl.infer(program, backend, draws=80, chains=32, seed=0)
    x = posterior["x"]
    values, wanted = torch.cat([(x > 0).double(), x.square()], -1), torch.stack([torch.full_like(mean, 0.5), mean])
    assert of_chains(values, wanted, 1e-4) < 1
    assert float(values.mean(1).std(0)[0]) < 0.3  # 0.5 if chains never crossed


def test_a_ladder_that_is_cut_is_reported() -> None:
    """Two levels for sixteen dimensions of spread 1 and of 80."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 16, dtype=F64), torch.ones(1, dtype=F64))
    backend = ParallelTempering(levels=2, warmup=20, sigma_min=0.05, sigma_max=5.0)
    posterior = ppl.infer(problem_of(prior).program, backend, draws=20, chains=4, seed=0)
    assert any("take more levels" in note for note in posterior.attrs["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "levels"),
        ({"steps": 0}, "steps"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"sigma_max": -1.0}, "sigma_max"),
        ({"denoise_steps": 0}, "denoise_steps"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ParallelTempering(**options)


def test_levels_out_of_order() -> None:
    with pytest.raises(OptionError, match="above the lowest level"):
        ppl.infer(problem_of(mixture()).program, ParallelTempering(sigma_min=0.5, sigma_max=0.4), draws=2)

"""The state of particles in the singular basis: all of it is selected and stored together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from particle_checks import F64, gaussian_prior, hidden, program_of
from torch import Tensor
from torch.utils import _pytree as pytree

import ppl
from inverse.particles import DDSMC, FPSSMC, MCGdiff
from inverse.particles.start import GaussianStart
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import SpectralData
from ppl.cost import Cost
from sde import GaussianMixture
from sde.denoiser import count_calls

MATRIX = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -0.4]], dtype=F64)
Y = torch.tensor([1.5, -0.5], dtype=F64)
BACKENDS = [
    MCGdiff(steps=4, particles=12, runs=1),
    FPSSMC(steps=4, particles=12, runs=1),
    DDSMC(steps=4, particles=12, runs=1),
    DDSMC(steps=4, particles=12, runs=1, reconstruction="flow", ode_steps=3),
]
IDS = ["MCGdiff", "FPSSMC", "DDSMC", "DDSMC flow"]


def program(dtype: torch.dtype = F64) -> ppl.Program:
    prior = gaussian_prior() if dtype == F64 else gaussian_prior().to(dtype=dtype)
    return program_of(prior, MATRIX.to(dtype), 0.3, Y.to(dtype))


def walked(backend: Any) -> tuple[Any, Any]:
    """A kernel and its population after two steps, when solvers have a history."""
    problem, generator = DiffusionProblem.of(program()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        kernel = backend.kernel(problem, Cost())
        population = kernel.start(6, generator)
        for level in (0, 1):
            population = kernel.move(population, level, generator)[0]
    return kernel, population


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_all_of_the_state_is_permuted_together(backend: Any) -> None:
    population = walked(backend)[1]
    index = torch.tensor([5, 0, 0, 3])
    chosen = population.select(index)
    leaves, after = pytree.tree_leaves(population.__dict__), pytree.tree_leaves(chosen.__dict__)
    assert len(leaves) == len(after)
    for a, b in zip(leaves, after, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a[index], b)


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_the_state_that_is_stored_goes_on_alike(backend: Any) -> None:
    kernel, population = walked(backend)
    other = kernel.unpack(population.pack(), 2)
    with torch.no_grad():
        first = kernel.move(population, 2, torch.Generator().manual_seed(1))
        second = kernel.move(other, 2, torch.Generator().manual_seed(1))
    assert torch.equal(first[0].x, second[0].x)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_a_retained_path_is_followed_and_weighed(backend: Any) -> None:
    """The first particles go where they are told; their weight depends on where, not on the noise."""
    kernel, population = walked(backend)
    there = population.x[:2] + 0.1
    with torch.no_grad():
        one = kernel.move(population, 2, torch.Generator().manual_seed(1), there)
        other = kernel.move(population, 2, torch.Generator().manual_seed(2), there)
        plain = kernel.move(population, 2, torch.Generator().manual_seed(1))
    assert torch.equal(one[0].x[:2], there)
    assert torch.equal(one[0].x[2:], plain[0].x[2:])
    if not isinstance(backend, FPSSMC):  # whose copy of the data is drawn with the step
        torch.testing.assert_close(one[1][:2], other[1][:2])
    assert not torch.equal(one[0].x[2:], other[0].x[2:])


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_float32_stays_float32_and_calls_are_counted(backend: Any) -> None:
    single = program(torch.float32)
    with count_calls(single.sites["x"].distribution) as count:
        posterior = ppl.infer(single, backend, draws=12, seed=0)
    assert posterior["x"].dtype == torch.float32
    assert posterior.log_evidence is not None
    assert posterior.log_evidence.value.dtype == F64
    assert posterior.cost.denoiser_calls == count.calls
    assert posterior.cost.vjps == 0
    flow = getattr(backend, "reconstruction", "") == "flow"
    assert count.evals == 12 * (3 + 3 + 2 + 1 if flow else 4)


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_chunks_change_nothing(backend: Any) -> None:
    whole = ppl.infer(program(), backend, draws=12, seed=0)
    parts = ppl.infer(program(), replace(backend, chunk=5), draws=12, seed=0)
    torch.testing.assert_close(parts["x"], whole["x"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("prior", [gaussian_prior(), hidden(gaussian_prior())], ids=["correlated", "isotropic"])
def test_the_conditioned_start_is_the_gaussian_one(prior: GaussianMixture) -> None:
    """Mean and log density against the dense formulas."""
    problem = DiffusionProblem.of(program_of(prior, MATRIX, 0.3, Y))
    svd, sigma = SpectralData.of(problem, "test").svd, torch.tensor(2.0, dtype=F64)
    start = GaussianStart.of(problem, svd, sigma)
    origin = prior.start(torch.zeros(1, 3, dtype=F64), sigma)[0]
    root = prior.start(torch.eye(3, dtype=F64), sigma) - origin
    rows = svd.from_spectral(torch.eye(2, dtype=F64))
    covariance, center = root.T @ root, torch.tensor([0.7, -0.2], dtype=F64)
    variance = torch.tensor([0.5, 1.5], dtype=F64)
    gram = rows @ covariance @ rows.T + variance.diag()
    gap = center - rows @ origin
    torch.testing.assert_close(start.gain(gap[None], variance)[0], covariance @ rows.T @ torch.linalg.solve(gram, gap))
    law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), gram)
    torch.testing.assert_close(start.log_prob(center, variance), law.log_prob(gap))

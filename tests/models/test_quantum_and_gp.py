"""The exact references of the quantum system and of the Gaussian process, by brute force."""

from __future__ import annotations

import itertools

import torch

from models.gp_predictive import gp_posterior, gp_predictive
from models.quantum import (
    STATE_SD,
    STATES,
    TIME_SD,
    TIMES,
    grid_posterior,
    log_joint,
    success_probability,
    two_level_system,
)

F64 = torch.float64


def test_probability_is_that_of_the_evolved_state() -> None:
    """By matrix exponentials of 40,000 prepared states and times, within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    delta = 0.37
    field = torch.tensor([[1 - delta, delta], [delta, delta - 1]], dtype=torch.complex128)
    chance = success_probability(torch.tensor(delta, dtype=F64))
    for i, (mean, at) in enumerate(zip(STATES, TIMES, strict=True)):
        state = torch.tensor(mean, dtype=F64) + STATE_SD * torch.randn(40_000, 2, generator=generator, dtype=F64)
        state = state / state.norm(dim=1, keepdim=True)
        time = at + TIME_SD * torch.randn(40_000, generator=generator, dtype=F64)
        evolved = torch.linalg.matrix_exp(-1j * time[:, None, None] * field) @ state[..., None].to(torch.complex128)
        seen = evolved[:, 0, 0].abs().square()
        assert abs(float(seen.mean() - chance[i])) < 5 * float(seen.std()) / 200


def test_evidence_of_all_outcomes_is_one() -> None:
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)), dtype=F64)
    a, b = torch.full((1024,), 0.8, dtype=F64), torch.full((1024,), 1.7, dtype=F64)
    _, _, evidence = grid_posterior(a, b, z, points=801)
    assert abs(float(evidence.exp().sum()) - 1) < 1e-5


def test_density_of_the_quantum_program() -> None:
    """The program says the same as the grid, up to the law of its prior's parameters."""
    z = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=F64)
    a, b = torch.tensor(0.9, dtype=F64), torch.tensor(1.4, dtype=F64)
    program = two_level_system().with_data(a=a, b=b, z=z)
    u = torch.tensor([[-1.5], [0.3], [2.0]], dtype=F64)
    ours = program.flat().log_density(u)
    theirs = log_joint(u, a[None], b[None], z[None])[:, 0]
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0])


def test_quadrature_of_the_gaussian_process() -> None:
    """Ratios of the program's density are those of the grid: weight of the lengthscale times normal of the value."""
    program = gp_predictive()
    values = program.simulate(torch.Generator().manual_seed(0))
    program = program.with_data(**{n: values[n] for n in ("query", "x", "y")})
    grid, weight, mean, variance = gp_posterior(values["query"][None], values["x"][None], values["y"][None])
    index = torch.tensor([150, 230, 280, 320])
    f = torch.tensor([0.1, -0.4, 0.5, 1.0], dtype=F64)
    normal = torch.distributions.Normal(mean[0, index], variance[0, index].sqrt())
    exact = weight[0, index].log() + normal.log_prob(f)
    found = program.flat().log_density(torch.stack([grid[index], f], 1))
    torch.testing.assert_close(found - found[0], exact - exact[0], rtol=1e-6, atol=1e-6)

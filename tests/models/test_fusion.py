"""Filters against closed forms, sensors against their own draws."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from models.fusion import (
    Motion,
    Rangefinder,
    TrackPriors,
    WrappedNormal,
    corrected,
    kalman_update,
    particle_filter,
    range_bearing,
    range_bearing_data,
    range_bearing_log_likelihood,
    recursion,
    turning_point,
)
from ppl import Mixture

F64 = torch.float64
ONE = torch.ones(1, 1, dtype=F64)


def walk() -> tuple[Motion, Tensor]:
    motion = Motion(0.9 * ONE, 0.4 * ONE, Mixture(torch.ones(1, dtype=F64), 0 * ONE, ONE[None]))
    generator = torch.Generator().manual_seed(0)
    x = motion.simulate(6, 3, generator)
    return motion, x + torch.randn(x.shape, generator=generator, dtype=F64)


def joint_posterior(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of the last state, and the log evidence, from the joint Gaussian of all states: y (steps,)."""
    steps = len(y)
    variance, prior = [], 1.0
    for _ in range(steps):
        prior = 0.81 * prior + 0.4
        variance.append(prior)
    spread = torch.tensor(
        [[0.9 ** abs(i - j) * variance[min(i, j)] for j in range(steps)] for i in range(steps)], dtype=F64
    )
    seen = spread + torch.eye(steps, dtype=F64)
    gain = torch.linalg.solve(seen, spread[:, -1])
    law = torch.distributions.MultivariateNormal(torch.zeros(steps, dtype=F64), seen)
    return gain @ y, spread[-1, -1] - gain @ spread[:, -1], law.log_prob(y)


def test_recursion_is_the_kalman_filter() -> None:
    motion, y = walk()
    found = recursion(kalman_update(ONE, ONE), motion, y)[-1]
    for row in range(3):
        mean, variance, _ = joint_posterior(y[:, row, 0])
        torch.testing.assert_close(found.mean[row, 0], mean)
        torch.testing.assert_close(found.covariance[row, 0, 0], variance)


def test_particle_filter_finds_evidence_and_mean() -> None:
    """20,000 particles: the evidence within 0.05 and the mean within 0.05 sd, some five standard errors."""
    motion, y = walk()

    def log_likelihood(z: Tensor, now: Tensor) -> Tensor:
        return torch.distributions.Normal(z[..., 0], 1.0).log_prob(now)

    states, evidence = particle_filter(log_likelihood, motion, y, 20_000, torch.Generator().manual_seed(1))
    for row in range(3):
        mean, variance, exact = joint_posterior(y[:, row, 0])
        assert abs(float(evidence[row] - exact)) < 0.05
        assert abs(float(states[-1, row].mean() - mean)) < 0.05 * float(variance) ** 0.5


def test_correction_brings_a_wrong_update_back() -> None:
    """An update that takes the noise for twice as large, refitted to 4000 weighted draws: moments within 10 %."""
    motion, y = walk()

    def log_likelihood(z: Tensor, now: Tensor) -> Tensor:
        return torch.distributions.Normal(z[..., 0], 1.0).log_prob(now[..., 0])

    wrong = kalman_update(ONE, 4 * ONE)
    exact = recursion(kalman_update(ONE, ONE), motion, y)[-1]
    mended = recursion(corrected(wrong, log_likelihood, 4000, torch.Generator().manual_seed(2)), motion, y)[-1]
    off = recursion(wrong, motion, y)[-1]
    sd = exact.covariance[:, 0, 0].sqrt()
    assert float(((mended.mean - exact.mean)[:, 0] / sd).abs().max()) < 0.1
    assert float((mended.covariance / exact.covariance - 1).abs().max()) < 0.1
    assert float((off.covariance / exact.covariance - 1).abs().max()) > 0.3


def test_sensors_are_normalised_and_drawn_from_their_density() -> None:
    """Densities sum to one on a grid; shares of 40,000 draws in ten bins within 5 standard errors."""
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=F64)[:-1] + math.pi / 20_000
    angle = WrappedNormal(torch.tensor(3.0, dtype=F64), 0.3)
    ranges = torch.linspace(-2.0, 40.0, 420_001, dtype=F64)[:-1] + 5e-5
    finder = Rangefinder(torch.tensor(4.0, dtype=F64))
    for law, points, low, high in ((angle, grid, -math.pi, math.pi), (finder, ranges, 0.0, 10.0)):
        step = points[1] - points[0]
        density = law.log_prob(points).exp()
        assert abs(float(density.sum() * step) - 1) < 1e-4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            draws = law.expand((40_000,)).sample()
        edges = torch.linspace(low, high, 11, dtype=F64)
        for a, b in itertools.pairwise(edges.tolist()):
            share = float(density[(points >= a) & (points < b)].sum() * step)
            found = float(((draws >= a) & (draws < b)).double().mean())
            assert abs(found - share) < 5 * math.sqrt(max(share, 1e-4) * (1 - share) / 40_000)


def test_measurements_have_the_density_of_the_program() -> None:
    """As the program that the transformer is trained on says; the seed makes them, and the global generator rests."""
    states = torch.tensor([[3.0, 0.1, 4.0, 0.2], [2.0, 0.0, -1.0, 0.0]], dtype=F64)
    before = torch.random.get_rng_state()
    y = range_bearing_data(states, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(y, range_bearing_data(states, seed=0))
    for state, now in zip(states, y, strict=True):
        told = range_bearing().with_data(range=now[0], bearing=now[1]).log_likelihood({"state": state})
        torch.testing.assert_close(range_bearing_log_likelihood(state, now), told, rtol=1e-9, atol=1e-9)


def test_programs_and_priors_fit_together() -> None:
    program, motion = range_bearing(), turning_point()
    law = TrackPriors().sample(
        5, 3, torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64), torch.Generator().manual_seed(0)
    )
    assert law.means.shape == (5, 3, 4)
    assert motion.simulate(2, 7, torch.Generator().manual_seed(0)).shape == (2, 7, 4)
    assert program.simulate(torch.Generator().manual_seed(0))["range"].shape == ()

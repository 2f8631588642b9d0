"""Conditional sweeps leave the posterior of a path as it is; parameters beside it follow the exact joint posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse.paths import ParticleGibbs, ParticleGibbsKernel, Uncontrolled
from inverse.paths.conditional import Retained, conditional_sweep
from inverse.paths.controls import bind_control
from inverse.paths.particle_filter import PathKernel
from inverse.paths.particle_gibbs import _numbers
from inverse.paths.problem import PathProblem
from ppl.cost import Cost
from ppl.diagnostics import ess_of, z_bound
from ppl.errors import CapabilityError, OptionError
from sde import BrownianNoise, MarkovNoise, Path, Process
from sde.increments import Noise

DOUBLE = torch.float64
NOISES: dict[str, Noise] = {
    "brownian": BrownianNoise(),
    "I": MarkovNoise(0.8, 1.0, "I", 3),
    "II": MarkovNoise(0.3, 1.0, "II", 3),
}
DATA = torch.tensor([0.5, -0.3, 0.9, 1.4], dtype=DOUBLE)
TIMES = torch.arange(1, 5, dtype=DOUBLE) / 4
ZERO = torch.zeros(1, dtype=DOUBLE)


def linear(noise: Noise, dt: float | None = None) -> PathProblem:
    path = Path(Process(lambda x, t: 0.3 - x, 1.0, noise), TIMES, ZERO, dt=dt)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.4).to_event(1), obs=y)

    return PathProblem.of(ppl.Program(model, DATA))


def exact_draws(problem: PathProblem, count: int, generator: torch.Generator) -> Retained:
    """Numbers of independent draws of the posterior: under the exact control all weights are equal."""
    kernel = PathKernel(problem, bind_control(None, problem), Cost())
    population = kernel.start(count, generator)
    weight = kernel.first_weight(population)
    for level in range(kernel.levels - 1):
        population, increment = kernel.move(population, level, generator)
        weight = weight + increment
    assert float(weight.std()) < 1e-6
    return Retained(population.first, population.noise)


def z_of(x: Tensor, problem: PathProblem) -> Tensor:
    """z-scores of means and second moments of draws (draw, n, d), in coordinates in which they are standard normal."""
    law = problem.path.gaussian().condition_linear(torch.eye(4, dtype=DOUBLE), DATA, torch.tensor(0.16, dtype=DOUBLE))
    root = torch.linalg.cholesky(law.covariances[0])
    u = torch.linalg.solve_triangular(root, (x - law.mean).flatten(1)[..., None], upper=False)[..., 0]
    i, j = torch.triu_indices(4, 4).unbind()
    both = (u[:, i] * u[:, j]).mean(0) - (i == j).to(u)
    return torch.cat([u.mean(0), both / torch.where(i == j, math.sqrt(2.0), 1.0)]) * math.sqrt(len(u))


@pytest.mark.parametrize("ancestors", [True, False])
@pytest.mark.parametrize("particles", [2, 6])
@pytest.mark.parametrize("name", list(NOISES))
def test_a_sweep_leaves_the_posterior_as_it_is(name: str, particles: int, ancestors: bool) -> None:
    """From 20,000 exact draws, one sweep without control, resampling at every time, for any number of particles.

    False alarm 1e-4 for each of twelve cases. A good part of the paths moves.
    """
    problem, generator = linear(NOISES[name], dt=1 / 8), torch.Generator().manual_seed(0)
    before = exact_draws(problem, 20_000, generator)
    kernel = PathKernel(problem, Uncontrolled(), Cost())
    after, x = conditional_sweep(kernel, before, particles, generator, threshold=1.0, ancestors=ancestors)
    assert float(z_of(x, problem).abs().max()) < z_bound(1e-4, 14)
    moved = (after.noise != before.noise).flatten(1).any(1).double().mean()
    assert float(moved) > 0.2
    torch.testing.assert_close(
        problem.path.from_noise(torch.cat([after.noise.flatten(1), after.first], 1)), x, rtol=1e-9, atol=1e-9
    )


def test_a_sweep_under_a_control_leaves_the_posterior_as_it_is() -> None:
    """The exact control of other data foresees wrongly, and the weights undo it; false alarm 1e-4."""
    problem, generator = linear(NOISES["I"]), torch.Generator().manual_seed(0)
    before = exact_draws(problem, 20_000, generator)
    other = PathProblem.of(problem.program.with_data(y=DATA.flip(0)))
    kernel = PathKernel(problem, bind_control(None, other), Cost())
    _, x = conditional_sweep(kernel, before, 4, generator, threshold=0.9)
    assert float(z_of(x, problem).abs().max()) < z_bound(1e-4, 14)


@pytest.mark.parametrize("name", list(NOISES))
def test_numbers_found_from_a_path_build_it(name: str) -> None:
    """Exactly; and where the start is hidden their law is that given the path: joint draws stay standard normal."""
    problem, generator = linear(NOISES[name]), torch.Generator().manual_seed(0)
    path = problem.path
    x = path.draw((2000,), generator)
    found = [_numbers(path, one, generator) for one in x]
    z = torch.stack([torch.cat([f.noise.flatten(), f.first]) for f in found])
    torch.testing.assert_close(path.from_noise(z), x, rtol=1e-7, atol=1e-7)
    second = z.mT @ z / len(z) - torch.eye(z.shape[1], dtype=DOUBLE)
    assert float(z.mean(0).abs().max()) * math.sqrt(len(z)) < z_bound(1e-4, z.shape[1])
    assert float(second.abs().max()) * math.sqrt(len(z) / 2) < z_bound(1e-4, second.numel())


Law = Callable[[Tensor], tuple[Path, Tensor]]


def sigma_model(sigma: Tensor) -> tuple[Path, Tensor]:
    return Path(Process(lambda x, t: -x, 1.0, NOISES["II"]), TIMES, ZERO), sigma


def rate_model(rate: Tensor) -> tuple[Path, Tensor]:
    process = Process(lambda x, t: -rate * x, 1.0, NOISES["I"])
    return Path(process, TIMES, torch.full((1,), 1.5, dtype=DOUBLE)), torch.tensor(0.3, dtype=DOUBLE)


def hurst_model(log_odds: Tensor) -> tuple[Path, Tensor]:
    # Three factors are the law of the test itself, also at indices where they are no good approximation.
    noise = MarkovNoise(torch.sigmoid(log_odds), 1.0, "II", 3, max_error=1.0)
    return Path(Process(noise=noise), TIMES, ZERO, dt=1 / 8), torch.tensor(0.1, dtype=DOUBLE)


LAWS: dict[str, tuple[Law, Any]] = {
    "sigma": (sigma_model, dist.LogNormal(torch.tensor(-1.0, dtype=DOUBLE), 0.5)),
    "rate": (rate_model, dist.LogNormal(torch.tensor(0.0, dtype=DOUBLE), 0.7)),
    "hurst": (hurst_model, dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0)),
}


def joint(name: str) -> ppl.Program:
    law, prior = LAWS[name]

    def model(y: Tensor) -> None:
        path, sigma = law(pyro.sample("theta", prior))
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], sigma).to_event(1), obs=y)

    return ppl.Program(model, DATA)


def exact_joint(name: str, points: int = 200) -> Tensor:
    """Mean of theta, x_1, x_4, their squares and theta x_4, by quadrature over theta."""
    law, prior = LAWS[name]
    ends = (0.02, 8.0) if name != "hurst" else (-4.5, 4.5)
    grid = torch.linspace(*ends, points, dtype=DOUBLE)
    weights, values = [], []
    for theta in grid:
        path, sigma = law(theta)
        gaussian, eye = path.gaussian(), torch.eye(4, dtype=DOUBLE)
        weights.append(prior.log_prob(theta) + gaussian.log_evidence(eye, DATA, sigma**2))
        given = gaussian.condition_linear(eye, DATA, sigma**2)
        mean, square = given.mean[:, 0], given.mean[:, 0] ** 2 + given.variance[:, 0]
        rest = [mean[0], mean[3], square[0], square[3], theta * mean[3]]
        values.append(torch.stack([theta, theta**2, *rest]))
    w = torch.softmax(torch.stack(weights), 0)
    assert float(w[[0, -1]].max()) < 1e-4  # the ends are far enough
    return w @ torch.stack(values)


def statistics(posterior: ppl.Posterior) -> Tensor:
    """The same of draws: (chain, draw, 7)."""
    theta, x = posterior["theta"], posterior["x"][..., 0]
    first, last = x[..., 0], x[..., 3]
    return torch.stack([theta, theta**2, first, last, first**2, last**2, theta * last], -1)


def gibbs(particles: int = 8) -> ppl.Gibbs:
    kernels: dict[tuple[str, ...], Any] = {
        ("x",): ParticleGibbsKernel(particles, control=Uncontrolled()),
        ("theta",): ppl.SliceKernel(),
    }
    return ppl.Gibbs(kernels, warmup=30)


JOINT: list[tuple[str, Any, int, int]] = [
    ("sigma", ParticleGibbs(6, control=Uncontrolled(), warmup=20), 40, 16),
    ("sigma", gibbs(6), 40, 8),
    ("rate", ParticleGibbs(6, control=Uncontrolled(), warmup=20), 40, 8),
]
LONG: list[tuple[str, Any, int, int]] = [
    *((name, ParticleGibbs(16, control=Uncontrolled(), warmup=50), 500, 16) for name in LAWS),
    *((name, ParticleGibbs(8, warmup=50), 500, 16) for name in ("sigma", "rate")),
    *((name, gibbs(16), 500, 16) for name in ("sigma", "rate")),
]


@pytest.mark.parametrize(("name", "engine", "draws", "chains"), JOINT, ids=lambda v: type(v).__name__)
def test_joint_posterior_of_parameter_and_path(name: str, engine: Any, draws: int, chains: int) -> None:
    """Seven moments against quadrature, with their effective sizes, which are estimates; false alarm 1e-4 for each."""
    values = statistics(ppl.infer(joint(name), engine, draws=draws, chains=chains))
    size = ess_of(values).clamp(max=draws * chains)
    z = (values.mean((0, 1)) - exact_joint(name)) / values.std((0, 1)) * size.sqrt()
    assert float(z.abs().max()) < z_bound(1e-4, len(z)), z


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine", "draws", "chains"), LONG, ids=lambda v: type(v).__name__)
def test_joint_posterior_at_length(name: str, engine: Any, draws: int, chains: int) -> None:
    test_joint_posterior_of_parameter_and_path(name, engine, draws, chains)


def test_a_control_or_ancestors_make_early_states_move() -> None:
    """Eight particles on a hundred steps: the first state hardly moves without either, and mostly with both."""
    times = torch.arange(1, 101, dtype=DOUBLE) / 100
    path = Path(Process(lambda x, t: -x, 1.0, NOISES["II"]), times, ZERO)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[9::10, 0], 0.3).to_event(1), obs=y)

    program = ppl.Program(model, torch.linspace(0, 1, 10, dtype=DOUBLE))
    rates = []
    for engine in (
        ParticleGibbs(8, ancestors=False, control=Uncontrolled(), warmup=0),
        ParticleGibbs(8, control=Uncontrolled(), warmup=0),
        ParticleGibbs(8, warmup=0),
    ):
        found = ppl.infer(program, engine, draws=10, chains=4)
        assert found.info["update_rate"].shape == (4, 100)
        rates.append(float(found.info["update_rate"][:, 0].mean()))
    assert rates[0] < 0.7 < rates[2]
    assert rates[0] < rates[1]


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="particles"):
        ParticleGibbs(particles=1)
    with pytest.raises(OptionError, match="control must be None"):
        ParticleGibbs(control=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="moves one path"):
        ParticleGibbsKernel().for_sites(("x", "theta"), Cost())
    problem = linear(NOISES["I"], dt=1 / 8)
    values = {"x": problem.path.draw((2,), torch.Generator().manual_seed(0))}
    with pytest.raises(CapabilityError, match="does not tell the numbers that drive it"):
        ParticleGibbsKernel().step(problem.program, values, torch.Generator().manual_seed(0))

    def plain(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(CapabilityError, match="ParticleGibbs needs"):
        ppl.infer(ppl.Program(plain, torch.tensor(1.0)), ParticleGibbs(), draws=2)

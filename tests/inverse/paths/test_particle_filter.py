"""The particle filter along a path: evidence of linear and of curved programs, and what it reads off a program."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.paths import ControlGuide, GuidedParticleFilter, Uncontrolled, linear_control_of
from inverse.paths.problem import PathProblem
from ppl.diagnostics import z_bound
from ppl.errors import CapabilityError, NotFiniteError, OptionError
from sde import MarkovNoise, Path, Process

DOUBLE = torch.float64
# Type, H, theta, log p(1) in continuous time: five factors of the published grid, T = 2, noise 0.1.
FIVE = [
    ("II", 0.3, 0.0, -1.500494),
    ("II", 0.7, 0.0, -1.545778),
    ("II", 0.7, 1.0, -1.557860),
    ("I", 0.3, 1.0, -1.480816),
    ("I", 0.7, 0.0, -1.540700),
]


def five(kind: str, hurst: float, theta: float, steps: int = 100) -> ppl.Program:
    noise = MarkovNoise(hurst, 2.0, kind, 5, "paper", unit=False, zero=False)  # type: ignore[arg-type]
    times = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    path = Path(Process(lambda x, t: -theta * x, 1.0, noise), times, torch.zeros(1, dtype=DOUBLE), dt=2 / steps)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.1), obs=y)

    return ppl.Program(model, torch.ones((), dtype=DOUBLE))


@pytest.mark.parametrize(("kind", "hurst", "theta", "continuous"), FIVE)
def test_evidence_of_the_five_linear_cases(kind: str, hurst: float, theta: float, continuous: float) -> None:
    """Without error under the exact control, 0.05 nat from continuous time; 3 standard errors without a control.

    False alarm 3e-3 for each case, as far as the log of the evidence is normal: the standard error is 0.06.
    """
    program = five(kind, hurst, theta)
    exact = ppl.infer(program, inverse.Exact(), draws=1).log_evidence
    assert exact is not None
    steered = ppl.infer(program, GuidedParticleFilter(), draws=100).log_evidence
    assert steered is not None
    assert float(steered.value) == pytest.approx(float(exact.value), abs=1e-8)
    assert float(steered.stderr) < 1e-6
    assert float(steered.value) == pytest.approx(continuous, abs=0.05)
    free = ppl.infer(program, GuidedParticleFilter(control=Uncontrolled(), runs=1), draws=4000).log_evidence
    assert free is not None
    assert float(free.stderr) < 0.1
    assert abs(float(free.value - exact.value)) < 3 * float(free.stderr)


@pytest.mark.slow
def test_standard_error_of_the_evidence_is_right() -> None:
    """One hundred runs: the variance of (log Z - exact) / stderr is one within 5 standard errors, and its mean zero.

    The particles are resampled at eight times. Expected: chi^2 with 100 degrees, sd of the mean square 0.14.
    """
    program = seen()
    exact = float(ppl.infer(program, inverse.Exact(), draws=1).log_evidence.value)  # type: ignore[union-attr]
    engine = GuidedParticleFilter(control=Uncontrolled(), runs=1)
    found = [ppl.infer(program, engine, draws=1000, seed=seed).log_evidence for seed in range(100)]
    z = torch.stack([(e.value - exact) / e.stderr for e in found if e is not None])
    assert abs(float(z.mean())) < 0.5
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / 100)


def seen(times: int = 8, drift: Callable[..., Tensor] = lambda x, t: -x) -> ppl.Program:
    at = torch.arange(1, times + 1, dtype=DOUBLE) / times
    path = Path(Process(drift, 1.0, MarkovNoise(0.7, 1.0, "I", 3)), at, torch.zeros(1, dtype=DOUBLE))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.4).to_event(1), obs=y)

    return ppl.Program(model, torch.linspace(0.5, 1.5, times, dtype=DOUBLE))


def test_fitted_control_makes_better_weights_than_none() -> None:
    """Both give the evidence, false alarm 1e-4; the fitted one is worth five times the draws."""
    program = five("I", 0.7, 1.0, 12)
    family = ControlGuide(width=4, around=linear_control_of(program))
    guide = ppl.SVI(guide=family, steps=5, lr=1e-3).fit(program.noise_space(), seed=0)
    exact = ppl.infer(program, inverse.Exact(), draws=1).log_evidence
    assert exact is not None
    worth = []
    for control in (guide, Uncontrolled()):
        found = ppl.infer(program, GuidedParticleFilter(control=control, runs=1), draws=2000)
        evidence = found.log_evidence
        assert evidence is not None
        assert abs(float(evidence.value - exact.value)) < z_bound(1e-4, 2) * float(evidence.stderr)
        worth.append(float(found.info["root_ess"]))
    assert worth[0] > 5 * worth[1]


def double_well(y: Tensor, sigma: float = 0.5) -> ppl.Program:
    at = torch.arange(1, len(y) + 1, dtype=DOUBLE) / 4
    path = Path(Process(lambda x, t: 4 * (x - x**3), 0.8), at, torch.zeros(1, dtype=DOUBLE))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        with pyro.plate("times", len(y)):
            pyro.sample("y", dist.StudentT(3.0, x[:, 0], sigma), obs=y)

    return ppl.Program(model, y)


def test_double_well_against_a_filter_on_a_grid() -> None:
    """Curved drift, heavy tails: evidence and last mean against quadrature on 1200 points; false alarm 1e-4 in all."""
    y = torch.tensor([0.3, -0.8, -1.1, 0.9, 1.2, 0.8], dtype=DOUBLE)
    grid = torch.linspace(-4, 4, 1200, dtype=DOUBLE)
    move = dist.Normal(grid + 4 * (grid - grid**3) * 0.25, 0.8 * 0.5).log_prob(grid[:, None]).exp()  # (to, from)
    weight = dist.Normal(0.0, 0.4).log_prob(grid).exp()
    log_z = 0.0
    for n, value in enumerate(y):
        prior = weight if n == 0 else move @ weight * (grid[1] - grid[0])
        weight = prior * dist.StudentT(3.0, grid, 0.5).log_prob(value).exp()
        total = float(weight.sum() * (grid[1] - grid[0]))
        log_z, weight = log_z + math.log(total), weight / total
    mean = float((grid * weight).sum() * (grid[1] - grid[0]))
    sd = math.sqrt(float((grid**2 * weight).sum() * (grid[1] - grid[0])) - mean**2)
    found = ppl.infer(double_well(y), GuidedParticleFilter(runs=1), draws=4000)
    assert found.log_evidence is not None
    value, stderr = (float(v) for v in found.log_evidence)
    bound = z_bound(1e-4, 2)
    assert abs(value - log_z) < bound * stderr
    assert stderr < 0.1
    size = 1 / (1 / 4000 + 1 / float(found.info["root_ess"]))
    assert abs(float(found["x"][0, :, -1, 0].mean()) - mean) < bound * sd / math.sqrt(size)


MODELS: dict[str, tuple[Callable[[Tensor, Tensor], None], list[int]]] = {}


def reads(expected: list[int]) -> Callable[[Callable[[Tensor, Tensor], None]], None]:
    """A model of path and data, and the last time that each of its terms depends on."""

    def take(model: Callable[[Tensor, Tensor], None]) -> None:
        MODELS[model.__name__] = (model, expected)

    return take


@reads([0, 1, 2, 3])
def _plate(x: Tensor, y: Tensor) -> None:
    with pyro.plate("times", 4):
        pyro.sample("y", dist.Normal(x[:, 0], 0.4), obs=y)


@reads([1, 2, 3])
def _increments(x: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(x[1:, 0] - x[:-1, 0], 0.4).to_event(1), obs=y[1:])


@reads([3])
def _joint(x: Tensor, y: Tensor) -> None:
    cov = 0.16 * (torch.eye(4, dtype=DOUBLE) + 0.5)
    pyro.sample("y", dist.MultivariateNormal(x[:, 0], cov), obs=y)


@reads([1, 2])
def _factor(x: Tensor, y: Tensor) -> None:
    pyro.factor("jump", -((x[1, 0] - x[0, 0]) ** 2))
    pyro.sample("y", dist.Poisson(x[2, 0].exp()), obs=torch.tensor(2.0, dtype=DOUBLE))


@reads([0, 1, 0, 3])
def _mask(x: Tensor, y: Tensor) -> None:
    keep = torch.tensor([True, True, False, True])
    pyro.sample("y", dist.Normal(x[:, 0], 0.4).mask(keep).to_event(1), obs=y)


@reads([0, 2])
def _two(x: Tensor, y: Tensor) -> None:
    pyro.sample("a", dist.Normal(0.0 * x[0, 0], 1.0), obs=y[0])
    pyro.sample("b", dist.Normal((x[2, 0] > 0).double(), 1.0), obs=y[1])


def short(name: str) -> ppl.Program:
    path = Path(Process(lambda x, t: torch.sin(x)), torch.arange(1, 5, dtype=DOUBLE) / 4, torch.zeros(1, dtype=DOUBLE))

    def model(y: Tensor) -> None:
        MODELS[name][0](pyro.sample("x", path), y)

    return ppl.Program(model, torch.tensor([0.3, 0.1, -0.4, 0.6], dtype=DOUBLE))


@pytest.mark.parametrize("name", list(MODELS))
def test_terms_belong_to_the_last_time_they_depend_on(name: str) -> None:
    program = short(name)
    problem = PathProblem.of(program)
    assert problem.last.tolist() == MODELS[name][1]
    x = problem.path.draw((5,), torch.Generator().manual_seed(1))
    torch.testing.assert_close(problem.terms(x).sum(1), program.log_likelihood({"x": x}))
    found = ppl.infer(program, GuidedParticleFilter(runs=1), draws=2000).log_evidence
    weights = program.log_likelihood({"x": problem.path.draw((20_000,), torch.Generator().manual_seed(2))}).exp()
    assert found is not None
    error = math.hypot(float(found.stderr), float(weights.std() / weights.mean()) / math.sqrt(20_000))
    assert abs(float(found.value) - math.log(float(weights.mean()))) < z_bound(1e-4) * error


def test_a_dependence_that_no_probe_meets_is_made_good() -> None:
    """A term that looks at the last time only where no probe was: draws are weighed by the whole likelihood."""
    path = Path(Process(), torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.factor("far", torch.where(x[1, 0] > 2.5, -50.0, 0.0) - 0.5 * x[0, 0] ** 2)

    problem = PathProblem.of(ppl.Program(model, torch.zeros(1, dtype=DOUBLE)))
    assert problem.last.tolist() == [0]
    found = ppl.infer(problem.program, GuidedParticleFilter(runs=1), draws=4000)
    assert float(found["x"][..., 1, 0].max()) < 2.5


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="control must be None"):
        GuidedParticleFilter(control=3)
    with pytest.raises(OptionError, match="threshold must lie"):
        GuidedParticleFilter(threshold=0.0)

    def rated(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
        x = pyro.sample("x", Path(Process(lambda x, t: -rate * x), torch.tensor([0.5, 1.0], dtype=DOUBLE)))
        pyro.sample("y", dist.Normal(x[:, 0], 0.4).to_event(1), obs=y)

    program = ppl.Program(rated, torch.zeros(2, dtype=DOUBLE))
    with pytest.raises(CapabilityError, match=r"other latents \['rate'\].*ParticleGibbs"):
        ppl.infer(program, GuidedParticleFilter(), draws=2)

    def plates(y: Tensor) -> None:
        path = Path(Process(), torch.tensor([0.5, 1.0], dtype=DOUBLE))
        with pyro.plate("paths", 2):
            x = pyro.sample("x", path)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 0.4), obs=y)

    with pytest.raises(CapabilityError, match="stands in a plate"):
        ppl.infer(ppl.Program(plates, torch.zeros(2, dtype=DOUBLE)), GuidedParticleFilter(), draws=2)
    fit = ppl.SVI(guide=ControlGuide(width=4), steps=2).fit(seen(4).noise_space(), seed=0)
    with pytest.raises(CapabilityError, match=r"steers 1 x 4 driving numbers.*has 1 x 8"):
        ppl.infer(seen(8), GuidedParticleFilter(control=fit), draws=2)
    wild = seen(8, lambda x, t: 1e200 * (x - 2).clamp_min(0) ** 3)  # few paths leave the finite numbers
    with pytest.raises(NotFiniteError, match=r"not finite at time .* smaller dt"):
        ppl.infer(wild, GuidedParticleFilter(control=Uncontrolled()), draws=4000)

"""One linear path, every backend: means, covariances and evidence are the exact ones within Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.paths import ControlGuide, GuidedParticleFilter, ParticleGibbs, ParticleGibbsKernel, Uncontrolled
from inverse.paths.testing import check_path_backend
from sde import MarkovNoise, Path, Process

DOUBLE = torch.float64


def program(kind: str = "I", times: int = 4, coordinates: int = 1, dt: float | None = None) -> ppl.Program:
    """A fractional Ornstein-Uhlenbeck path, every state of which is seen with noise 0.4."""
    hurst = torch.linspace(0.7, 0.3, coordinates, dtype=DOUBLE) if coordinates > 1 else 0.7
    noise = MarkovNoise(hurst, 1.0, kind, 3)  # type: ignore[arg-type]
    process = Process(lambda x, t: 0.5 - 1.5 * x, 1.2, noise)
    at = torch.arange(1, times + 1, dtype=DOUBLE) / times
    path = Path(process, at, torch.zeros(coordinates, dtype=DOUBLE), dt=dt)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x, 0.4).to_event(2), obs=y)

    generator = torch.Generator().manual_seed(7)
    return ppl.Program(model, torch.randn(times, coordinates, generator=generator, dtype=DOUBLE))


@dataclass(frozen=True)
class Case:
    """How a backend is run: draws, chains, and the bias that a fit is allowed."""

    backend: Callable[[], Any]
    draws: int
    chains: int
    bias: float = 0.0


def control(steps: int) -> ppl.NoiseSpace:
    return ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(width=16), steps=steps, lr=0.02, particles=32))


def gibbs(particles: int) -> ppl.Gibbs:
    return ppl.Gibbs({("x",): ParticleGibbsKernel(particles, control=Uncontrolled())}, warmup=10)


CASES = {
    "Exact": Case(inverse.Exact, 4000, 1),
    "GuidedParticleFilter": Case(GuidedParticleFilter, 4000, 1),
    "GuidedParticleFilter without control": Case(lambda: GuidedParticleFilter(control=Uncontrolled()), 4000, 1),
    "ParticleGibbs": Case(lambda: ParticleGibbs(warmup=5), 50, 16),
    "ParticleGibbs without control": Case(lambda: ParticleGibbs(8, control=Uncontrolled(), warmup=10), 40, 64),
    "Gibbs with ParticleGibbsKernel": Case(lambda: gibbs(8), 30, 16),
    "HMC": Case(lambda: ppl.HMC(warmup=100), 100, 16),
    "NoiseSpace(HMC)": Case(lambda: ppl.NoiseSpace(ppl.HMC(warmup=100)), 100, 16),
    "NoiseSpace(NUTS)": Case(lambda: ppl.NoiseSpace(ppl.NUTS(warmup=60)), 100, 2),
    "NoiseSpace(EllipticalSlice)": Case(lambda: ppl.NoiseSpace(ppl.EllipticalSlice(warmup=50)), 60, 64),
    "NoiseSpace(SMC)": Case(lambda: ppl.NoiseSpace(ppl.SMC(runs=1)), 2000, 1),
    "NoiseSpace(Importance)": Case(lambda: ppl.NoiseSpace(ppl.Importance()), 20_000, 1),
    "NoiseSpace(SVI full rank)": Case(
        lambda: ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=600)), 2000, 1, bias=0.03
    ),
    "NoiseSpace(SVI control)": Case(lambda: control(250), 2000, 1, bias=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_every_backend_agrees_with_the_exact_posterior(name: str) -> None:
    """False alarm 1e-4 for each backend. A flipped sign of the mean, or noise of another size, is far outside."""
    case = CASES[name]
    check_path_backend(case.backend(), program(), draws=case.draws, chains=case.chains, bias=case.bias)


LONG = {
    "GuidedParticleFilter": Case(GuidedParticleFilter, 20_000, 1),
    "GuidedParticleFilter without control": Case(lambda: GuidedParticleFilter(control=Uncontrolled()), 40_000, 1),
    "ParticleGibbs": Case(lambda: ParticleGibbs(warmup=5), 200, 32),
    "ParticleGibbs without control": Case(lambda: ParticleGibbs(32, control=Uncontrolled(), warmup=30), 100, 64),
    "NoiseSpace(HMC)": Case(lambda: ppl.NoiseSpace(ppl.HMC(warmup=300)), 200, 32),
    "NoiseSpace(NUTS)": Case(lambda: ppl.NoiseSpace(ppl.NUTS(warmup=300)), 1000, 4),
    "NoiseSpace(SMC)": Case(lambda: ppl.NoiseSpace(ppl.SMC(runs=1)), 8000, 1),
    "NoiseSpace(SVI full rank)": Case(
        lambda: ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=3000)), 8000, 1, bias=0.05
    ),
    "NoiseSpace(SVI control)": Case(lambda: control(2000), 8000, 1, bias=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("name", LONG)
def test_every_backend_agrees_on_a_larger_path(name: str, kind: str) -> None:
    """Two coordinates with their own Hurst index, eight times, four steps between them; false alarm 1e-4 for each."""
    case = LONG[name]
    larger = program(kind, 8, 2, dt=1 / 32)
    check_path_backend(case.backend(), larger, draws=case.draws, chains=case.chains, bias=case.bias)


@dataclass(frozen=True)
class Wrong:
    """The exact posterior with a fault."""

    shift: float = 0.0
    scale: float = 1.0
    evidence: float = 0.0

    exact: ClassVar[Any] = "always"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def run(self, program: ppl.Program, **options: Any) -> ppl.Posterior:
        found = inverse.Exact().run(program, **options)
        mean = found["x"].mean((0, 1))
        value, stderr = found.log_evidence  # type: ignore[misc]
        draws = {"x": mean + self.shift + self.scale * (found["x"] - mean)}
        return ppl.Posterior(draws=draws, log_evidence=type(found.log_evidence)(value + self.evidence, stderr))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Wrong(shift=0.05), "whitened mean"),
        (Wrong(scale=0.9), "whitened covariance"),
        (Wrong(evidence=0.01), "log evidence"),
    ],
)
def test_the_check_notices(fault: Wrong, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check_path_backend(fault, program(), draws=4000, chains=1)

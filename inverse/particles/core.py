"""The particle core: systematic resampling on an ESS trigger, evidence and ancestry.

    ESS = (sum w)^2 / sum w^2          resample when ESS < threshold * P
    root ESS = 1 / sum_i W_i^2         W_i: final weight carried by the descendants of initial particle i
    se(log Z) = sqrt(sum_i W_i^2 - 1/P)

ESS reads P after every resampling; the root ESS is the honest number of independent draws. A particle of weight zero is
dead and stays so; a run in which all are dead counts as a run of evidence zero. Source: particle-filter lore for the
first, [derived] and measured for the root ESS as an error bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ppl.diagnostics.ess import kish_ess, root_ess
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor
from ppl.weighted import systematic_from

__all__ = [
    "AllDeadError",
    "Kernel",
    "Moves",
    "Population",
    "Run",
    "ancestors",
    "log_count",
    "run_particles",
    "systematic",
    "weigh",
]


class AllDeadError(NotFiniteError):
    """Every particle of a run has weight zero."""


def systematic(log_weight: Tensor, count: int, u: Tensor) -> Tensor:
    """Systematic resampling: (count,) sorted ancestor indices.

    Args:
        log_weight: (particle,) up to a constant.
        count: number of ancestors to draw; index i is drawn count * w_i times, rounded up or down.
        u: 0-d uniform draw on [0, 1).

    Example:
        >>> systematic(torch.tensor([0.5, 0.25, 0.25]).log(), 4, torch.tensor(0.5))
        tensor([0, 0, 1, 2])
    """
    return systematic_from(torch.softmax(log_weight.double(), -1)[None], count, u.double().reshape(1, 1))[0]


class Population(Protocol):
    """The state of all particles at one noise level."""

    @property
    def x(self) -> Tensor:
        """(particle, *site) values at the level."""
        ...

    @property
    def log_twist(self) -> Tensor:
        """(particle,) log of the twist, an estimate of log p(y | x_sigma)."""
        ...

    def select(self, index: Tensor) -> Self:
        """The same state with particles `index`, every part permuted together."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """Tensors from which `Kernel.unpack` builds the state again."""
        ...


class Moves(Protocol):
    """Moves particles at a level without changing what they are draws of."""

    def __call__(self, population: Any, level: int, generator: torch.Generator) -> tuple[Any, float]:
        """The moved population, and the share of particles that took their proposal."""
        ...


P = TypeVar("P", bound="Population")


class Kernel(Protocol[P]):
    """Moves a population down the noise levels; what it targets is the program, whatever its guide."""

    def start(self, particles: int, generator: torch.Generator) -> P:
        """Particles at the first noise level."""
        ...

    def at(self, x: Tensor, level: int) -> P:
        """The population of particles x (particle, *site) at a level, without history."""
        ...

    def first_weight(self, population: P) -> Tensor:
        """Log weight (particle,) of a population that `start` made."""
        ...

    def move(
        self, population: P, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[P, Tensor]:
        """From `level` to the next positive one, with log weight increments (particle,).

        The first particles go to the values `retained` (k, *site), as many as there are.
        """
        ...

    def last_weight(self, population: P) -> Tensor:
        """Log weight increment (particle,) of the final step to the clean value."""
        ...

    def finish(self, population: P, generator: torch.Generator) -> Tensor:
        """Clean values (particle, *site)."""
        ...

    def unpack(self, tensors: dict[str, Tensor], level: int) -> P:
        """The population that `pack` described, at `level`."""
        ...

    @property
    def levels(self) -> int:
        """Number of positive noise levels."""
        ...


@dataclass
class Run:
    """One run of the particle engine, at the last positive noise level."""

    population: Any
    log_weight: Tensor
    roots: Tensor
    log_z: Tensor
    ess: list[float] = field(default_factory=list)
    resampled: int = 0
    accepted: list[float] = field(default_factory=list)

    @property
    def root_ess(self) -> Tensor:
        """Honest number of independent draws."""
        return root_ess(self.log_weight, self.roots, len(self.log_weight))

    @classmethod
    def begin(cls, population: Any, particles: int, device: torch.device) -> Run:
        """Particles of equal weight, each its own root."""
        none = torch.zeros(particles, dtype=torch.float64, device=device)
        return cls(population, none, torch.arange(particles, device=device), none.new_zeros(()))

    def pack(self) -> dict[str, Tensor]:
        """Tensors from which `unpack` builds the run again."""
        return {f"p.{n}": t for n, t in self.population.pack().items()} | self.tally()

    def tally(self) -> dict[str, Tensor]:
        """All but the population."""
        return {
            "log_weight": self.log_weight,
            "roots": self.roots,
            "log_z": self.log_z,
            "ess": torch.tensor(self.ess, dtype=torch.float64),
            "resampled": torch.tensor(self.resampled),
            "accepted": torch.tensor(self.accepted, dtype=torch.float64),
        }

    @classmethod
    def unpack(cls, kernel: Kernel[Any], saved: Mapping[str, Tensor], level: int) -> Run:
        """The run that `pack` described, at a noise level."""
        own = {n.removeprefix("p."): t for n, t in saved.items() if n.startswith("p.")}
        return cls.of_tally(saved, kernel.unpack(own, level))

    @classmethod
    def of_tally(cls, saved: Mapping[str, Tensor], population: Any) -> Run:
        """The run that `tally` described, with its population."""
        return cls(
            population,
            saved["log_weight"],
            saved["roots"],
            saved["log_z"],
            saved["ess"].tolist(),
            int(saved["resampled"]),
            saved["accepted"].tolist(),
        )

    def take(self) -> Any:
        """The population, of which the run keeps nothing, so that a move can free it before it is done."""
        population, self.population = self.population, None
        return population

    @property
    def distinct_roots(self) -> int:
        """Number of initial particles that have descendants."""
        return len(torch.unique(self.roots))

    @property
    def log_evidence(self) -> Tensor:
        """Estimate of log p(y), 0-d float64."""
        return self.log_z + torch.logsumexp(self.log_weight.double(), 0) - log_count(len(self.log_weight))


def run_particles(
    kernel: Kernel[Any],
    particles: int,
    *,
    threshold: float,
    generator: torch.Generator,
    monitor: Monitor,
    label: str,
    moves: Moves | None = None,
) -> Run | None:
    """Run the engine from the first noise level to the last positive one.

    Args:
        kernel: moves and weighs.
        particles: population size P.
        threshold: resample when ESS < threshold * P.
        generator: source of randomness.
        monitor: progress, Ctrl-C, checkpoints.
        label: name of the loop.
        moves: applied after every resampling.

    Returns:
        The finished run, or None when it was interrupted.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        AllDeadError: all weights are zero.
    """
    saved, place = monitor.resume(), getattr(kernel, "place", "noise level")
    if saved is not None:
        start = int(saved["step"])
        run = Run.unpack(kernel, saved, start)
    else:
        start = 0
        run = Run.begin(kernel.start(particles, generator), particles, generator.device)
        weigh(run, kernel.first_weight(run.population), monitor, f"{place} 1 of {kernel.levels}")
    done = start
    for level in monitor.steps(kernel.levels - 1, label, start=start):
        if run.ess[-1] < threshold * particles:
            run.population = run.population.select(ancestors(run, generator))
            if moves is not None and level > 0:
                run.population, share = moves(run.population, level, generator)
                run.accepted.append(share)
        run.population, increment = kernel.move(run.take(), level, generator)
        weigh(run, increment, monitor, f"{place} {level + 2} of {kernel.levels}")
        monitor.report(ess=run.ess[-1])
        done = level + 1
        monitor.checkpoint(done, run.pack)
    if done < kernel.levels - 1:
        return None
    run.ess.pop()
    weigh(run, kernel.last_weight(run.population), monitor, "the clean values")
    return run


def weigh(run: Run, increment: Tensor, monitor: Monitor, where: str) -> None:
    """Multiply the weights; the dead stay dead, whatever their increment."""
    dead = run.log_weight == -torch.inf
    log_weight = torch.where(dead, run.log_weight, run.log_weight + increment.double())
    # Minus infinity is a weight of zero; anything else that is not a number is a fault.
    monitor.check_finite("log weight", log_weight.masked_fill(log_weight == -torch.inf, 0.0), where)
    if not bool((log_weight > -torch.inf).any()):
        raise AllDeadError(
            f"all {len(log_weight)} particles have weight zero at {where}: the data are impossible for every one of "
            "them; check the support of the likelihood, use more particles, or a guide that leads them to the data"
        )
    run.log_weight = log_weight
    run.ess.append(float(kish_ess(log_weight)))


def ancestors(run: Run, generator: torch.Generator) -> Tensor:
    """(particle,) ancestors in proportion to their weights, which go into the evidence; the population is to follow."""
    particles = len(run.log_weight)
    u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    index = systematic(run.log_weight, particles, u)
    run.log_z = run.log_z + torch.logsumexp(run.log_weight, 0) - log_count(particles)
    run.roots = run.roots[index]
    run.log_weight = torch.zeros_like(run.log_weight)
    run.resampled += 1
    return index


def log_count(n: int) -> Tensor:
    """log n, 0-d float64."""
    return torch.tensor(float(n), dtype=torch.float64).log()

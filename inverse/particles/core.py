"""The particle core: systematic resampling on an ESS trigger, evidence, ancestry, and whole runs merged by evidence.

    ESS = (sum w)^2 / sum w^2          resample when ESS < threshold * P
    root ESS = 1 / sum_i W_i^2         W_i: final weight carried by the descendants of initial particle i
    se(log Z) = sqrt(sum_i W_i^2 - 1/P)

ESS reads P after every resampling; the root ESS is the honest number of independent draws. A particle of weight zero is
dead and stays so; a run in which all are dead counts as a run of evidence zero. Source: particle-filter lore for the
first, [derived] and measured for the root ESS as an error bar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ppl.diagnostics.ess import kish_ess, merge_root_ess, root_ess
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor
from ppl.weighted import systematic_from

__all__ = ["AllDeadError", "Kernel", "Merged", "Moves", "Population", "Run", "merge", "run_particles", "systematic"]


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

    def pack(self) -> dict[str, Tensor]:
        """Tensors from which `unpack` builds the run again."""
        return {f"p.{n}": t for n, t in self.population.pack().items()} | {
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
        return cls(
            kernel.unpack(own, level),
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
        return self.log_z + torch.logsumexp(self.log_weight.double(), 0) - _log(len(self.log_weight))


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
    saved = monitor.resume()
    if saved is not None:
        start = int(saved["step"])
        run = Run.unpack(kernel, saved, start)
    else:
        start = 0
        roots = torch.arange(particles, device=generator.device)
        none = torch.zeros(particles, dtype=torch.float64, device=generator.device)
        run = Run(kernel.start(particles, generator), none, roots, none.new_zeros(()))
        _weigh(run, kernel.first_weight(run.population), monitor, f"noise level 1 of {kernel.levels}")
    done = start
    for level in monitor.steps(kernel.levels - 1, label, start=start):
        if run.ess[-1] < threshold * particles:
            _resample(run, generator)
            if moves is not None and level > 0:
                run.population, share = moves(run.population, level, generator)
                run.accepted.append(share)
        run.population, increment = kernel.move(run.take(), level, generator)
        _weigh(run, increment, monitor, f"noise level {level + 2} of {kernel.levels}")
        monitor.report(ess=run.ess[-1])
        done = level + 1
        monitor.checkpoint(done, run.pack)
    if done < kernel.levels - 1:
        return None
    run.ess.pop()
    _weigh(run, kernel.last_weight(run.population), monitor, "the clean values")
    return run


def _weigh(run: Run, increment: Tensor, monitor: Monitor, where: str) -> None:
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


def _resample(run: Run, generator: torch.Generator) -> None:
    """Ancestors in proportion to their weights, which go into the evidence."""
    particles = len(run.log_weight)
    u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    index = systematic(run.log_weight, particles, u)
    run.log_z = run.log_z + torch.logsumexp(run.log_weight, 0) - _log(particles)
    run.population, run.roots = run.population.select(index), run.roots[index]
    run.log_weight = torch.zeros_like(run.log_weight)
    run.resampled += 1


@dataclass(frozen=True)
class Merged:
    """Whole runs, each weighted by its evidence: omega_r = Z_r / sum Z.

    root ESS R = 1 / sum_r omega_r^2 / R_r,   se(log Z) = sqrt(1 / R - 1 / sum P). Source: [derived].

    Args:
        runs: the finished ones.
        dead: how many more ended with evidence zero, which count in the mean.
    """

    runs: tuple[Run, ...]
    dead: int = 0

    @property
    def share(self) -> Tensor:
        """(run,) omega."""
        return torch.softmax(torch.stack([r.log_evidence for r in self.runs]), 0)

    @property
    def root_ess(self) -> Tensor:
        """Honest number of independent draws of all runs together."""
        evidence = torch.stack([r.log_evidence for r in self.runs])
        return merge_root_ess(evidence, torch.stack([r.root_ess for r in self.runs]))

    @property
    def log_evidence(self) -> Tensor:
        """log of the mean of the runs' evidence."""
        return torch.logsumexp(torch.stack([r.log_evidence for r in self.runs]), 0) - _log(len(self.runs) + self.dead)

    @property
    def stderr(self) -> Tensor:
        """Standard error of the log evidence."""
        total = sum(len(r.log_weight) for r in self.runs)
        return (1 / self.root_ess - 1 / total).clamp(min=0).sqrt()

    @property
    def distinct_roots(self) -> int:
        """Initial particles that have descendants, over all runs."""
        return sum(r.distinct_roots for r in self.runs)

    def choose(self, draws: int, generator: torch.Generator) -> list[Tensor]:
        """Ancestors of `draws` equally weighted draws: for each run, indices into its particles."""
        weights = [
            w + torch.log_softmax(r.log_weight.double(), 0) for r, w in zip(self.runs, self.share.log(), strict=True)
        ]
        u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
        index = systematic(torch.cat(weights), draws, u)
        bounds = [0]
        for r in self.runs:
            bounds.append(bounds[-1] + len(r.log_weight))
        return [index[(index >= a) & (index < b)] - a for a, b in pairwise(bounds)]


def merge(
    one_run: Callable[[int], Run | None], *, target: float, limit: int, monitor: Monitor
) -> tuple[Merged | None, bool]:
    """Repeat whole runs until the root ESS of the merge reaches `target`, at most `limit` runs.

    A run that fails is noted, and what other runs found is kept.

    Returns:
        The merge of the finished runs (None when there is none), and whether the target was reached.

    Raises:
        NotFiniteError: no run found anything.
    """
    runs: list[Run] = []
    dead = 0
    for r in range(limit):
        try:
            run = one_run(r)
        except AllDeadError as error:
            dead += 1
            if dead == limit:
                raise
            monitor.note(f"run {r} has evidence zero: {error}")
            continue
        except NotFiniteError as error:
            if not runs:
                raise
            monitor.note(f"stopped after {len(runs)} runs: {error}")
            break
        if run is None:
            break
        runs.append(run)
        merged = Merged(tuple(runs), dead)
        monitor.report(root_ess=float(merged.root_ess))
        if float(merged.root_ess) >= target:
            return merged, True
    return (Merged(tuple(runs), dead) if runs else None), False


def _log(n: int) -> Tensor:
    return torch.tensor(float(n), dtype=torch.float64).log()

"""Particle runs of many problems side by side: one population to the kernel, and each problem resampled by itself.

Problem i has the generator, the weights, the roots and the number of runs that it has alone; problems that have enough
drop out between runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inverse.chunks import Whole, out_of_memory
from inverse.many import ManyProblems, Streams, UnlikeError, lanes_at_a_time
from inverse.particles.core import AllDeadError, Kernel, Run, ancestors, weigh
from inverse.particles.merging import Gathering, Merged
from ppl.backend import in_turn, problem_seeds, stack_problems
from ppl.cost import Cost
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program

if TYPE_CHECKING:
    from inverse.particles.backend import ParticleBackend

__all__ = ["run_problems"]

Outcome = Run | NotFiniteError


def run_problems(
    backend: ParticleBackend,
    program: Program,
    *,
    draws: int,
    chains: int,
    generator: torch.Generator,
    monitor: Monitor,
) -> Posterior:
    """All problems of a program in groups that fit in a batch, or in turn where they are too unlike each other.

    Args:
        backend: whose kernels take lanes with data of their own.
        program: from `program.over(...)`.
        draws: draws per chain.
        chains: independent runs.
        generator: source of the seeds of the problems.
        monitor: of the run.
    """
    seeds = problem_seeds(program, generator)
    try:
        many = ManyProblems.of(program)
        trial = backend.kernel(many.lanes(torch.arange(len(many.singles))), Cost())
        if backend.rejuvenation(many.singles[0], trial) is not None:
            raise UnlikeError("moves after a resampling take one population at a time")
    except UnlikeError as why:
        return in_turn(program, backend, draws=draws, chains=chains, seeds=seeds, monitor=monitor, why=why)
    particles = backend.particles or draws
    at_once = max(lanes_at_a_time(backend.chunk, particles, generator.device) // particles, 1)
    if at_once == 1:
        return in_turn(program, backend, draws=draws, chains=chains, seeds=seeds, monitor=monitor)
    parts: list[Posterior | NotFiniteError] = []
    with torch.no_grad(), many.running(monitor):
        first = 0
        while first < len(many.singles) and not monitor.interrupted:
            members = range(first, min(first + at_once, len(many.singles)))
            group = _Group(backend, many, members, [seeds[i] for i in members], draws, chains, monitor)
            try:
                with monitor.section(f"problems {members[0]}-{members[-1]}"):
                    found = group.run()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(members) == 1:
                    raise
                at_once = math.ceil(len(members) / 2)
                monitor.note(f"{len(members)} problems at a time did not fit into memory; went on with {at_once}")
                continue
            first = members[-1] + 1
            parts += [part for part in found if part is not None]
    if not parts:
        monitor.note(
            f"{type(backend).__name__}: stopped before its first pass over the noise levels was complete: no draws"
        )
        parts = [backend.posterior(many.singles[0], [], chains)]
    return stack_problems(parts, len(many.singles), seeds, monitor)


@dataclass
class _Book:
    """What is known of one problem."""

    kernel: Kernel[Any]
    found: list[tuple[Tensor, Merged]] = field(default_factory=list)
    error: NotFiniteError | None = None


class _Group:
    """Problems whose particles make one population.

    Args:
        backend: options and kernels.
        many: all problems.
        members: those of the group.
        seeds: theirs.
        draws: draws per chain.
        chains: independent runs.
        monitor: of the run.
    """

    def __init__(
        self,
        backend: ParticleBackend,
        many: ManyProblems,
        members: Sequence[int],
        seeds: Sequence[int],
        draws: int,
        chains: int,
        monitor: Monitor,
    ) -> None:
        self.backend, self.many, self.members, self.monitor = backend, many, members, monitor
        self.draws, self.chains, self.particles = draws, chains, backend.particles or draws
        self.streams = Streams.of(seeds, many.singles[0].device)
        self.books = {i: _Book(backend.kernel(many.singles[i], monitor.cost)) for i in members}
        self._kernels: dict[tuple[int, ...], Kernel[Any]] = {}

    def run(self) -> list[Posterior | NotFiniteError | None]:
        """All chains; None for a problem that an interruption left without a run."""
        going = list(self.members)
        for chain in range(self.chains):
            gathered = self._gather(chain, going)
            for i in list(going):
                merged = gathered[i].merged
                book = self.books[i]
                if book.error is not None:
                    going.remove(i)
                    if book.found:
                        self.monitor.note(
                            f"problem {i}: chain {chain} was lost, {len(book.found)} of {self.chains} are kept: "
                            f"{book.error}"
                        )
                elif merged is None:
                    going.remove(i)
                else:
                    if not gathered[i].reached:
                        self.backend.remark(merged, self.draws, self.monitor, f"problem {i}, ")
                    x = self.backend.finish(book.kernel, merged, self.draws, self._stream(i))
                    book.found.append((x, merged))
        return [self._part(i) for i in self.members]

    def _part(self, i: int) -> Posterior | NotFiniteError | None:
        book = self.books[i]
        if book.found:
            return self.backend.posterior(self.many.singles[i], book.found, self.chains)
        return book.error

    def _stream(self, i: int) -> torch.Generator:
        return self.streams.generators[self.members.index(i)]

    def _gather(self, chain: int, going: Sequence[int]) -> dict[int, Gathering]:
        """Rounds of runs, of the problems whose draws are not yet worth what was asked for."""
        target, limit = min(self.draws, self.particles), self.backend.runs
        gathered = {i: Gathering(target, limit, self.monitor, f"problem {i}: ") for i in going}
        for r in range(limit):
            wanting = [i for i in going if not gathered[i].closed]
            if not wanting or self.monitor.interrupted:
                break
            with self.monitor.section(f"chain {chain}, run {r}"):
                outcomes = self._round(wanting)
            for i, outcome in zip(wanting, outcomes, strict=False):  # none after an interruption
                try:
                    gathered[i].take(outcome)
                except NotFiniteError as error:
                    self.books[i].error = error
                    gathered[i].closed = True
        return gathered

    def _kernel(self, wanting: Sequence[int]) -> Kernel[Any]:
        """That of a population with the particles of these problems, one after the other."""
        key = tuple(wanting)
        if key not in self._kernels:
            which = torch.tensor(key).repeat_interleave(self.particles)
            kernel: Any = self.backend.kernel(self.many.lanes(which), self.monitor.cost)
            kernel.chunks = Whole()  # a part of the population would miss its own data
            self._kernels = {key: kernel}
        return self._kernels[key]

    def _round(self, wanting: Sequence[int]) -> list[Outcome]:
        """One run of every problem; nothing when interrupted."""
        saved = self.monitor.finished("run")
        if saved is not None:
            self.streams.unpack(saved.pop("streams"))
            parts = {i: _part(saved, f"{i}.") for i in wanting}
            return [_error(part) or self._finished(self.books[i].kernel, part) for i, part in parts.items()]
        lockstep = _Lockstep(self._kernel(wanting), wanting, self.particles, self.backend.threshold, self.monitor)
        outcomes = lockstep.run(Streams([self._stream(i) for i in wanting]), self.streams)
        if outcomes:
            packed = [(i, _pack(outcome)) for i, outcome in zip(wanting, outcomes, strict=True)]
            tensors = {f"{i}.{name}": tensor for i, pack in packed for name, tensor in pack.items()}
            self.monitor.finish("run", tensors | {"streams": self.streams.pack()})
        return outcomes

    @staticmethod
    def _finished(kernel: Kernel[Any], saved: dict[str, Tensor]) -> Run:
        return Run.unpack(kernel, saved, kernel.levels - 1)


class _Lockstep:
    """Runs of several problems down the noise levels, with one move of all particles at a time.

    Args:
        kernel: of the joint population.
        members: problems, each with `particles` rows.
        particles: of one problem.
        threshold: resample a problem when its ESS < threshold * particles.
        monitor: of the run.
    """

    def __init__(
        self, kernel: Kernel[Any], members: Sequence[int], particles: int, threshold: float, monitor: Monitor
    ) -> None:
        self.kernel, self.members, self.particles = kernel, members, particles
        self.threshold, self.monitor = threshold, monitor
        self.runs: list[Run] = []
        self.errors: dict[int, NotFiniteError] = {}

    def run(self, streams: Streams, stored: Streams) -> list[Outcome]:
        """The finished runs, or what made them fail; nothing when interrupted.

        Args:
            streams: of the members.
            stored: of the whole group, for checkpoints.
        """
        kernel, monitor, levels = self.kernel, self.monitor, self.kernel.levels
        noise: Any = streams  # a problem of many lanes draws from all of them
        saved = monitor.resume()
        if saved is None:
            first = 0
            population = kernel.start(self.particles * len(self.members), noise)
            self.runs = [Run.begin(None, self.particles, streams.device) for _ in self.members]
            self._weigh(kernel.first_weight(population), f"noise level 1 of {levels}")
        else:
            first = int(saved["step"])
            stored.unpack(saved["streams"])
            population = kernel.unpack(_part(saved, "p."), first)
            self.runs = [Run.of_tally(_part(saved, f"{j}."), None) for j in range(len(self.members))]
            failed = {j: _error(_part(saved, f"{j}.")) for j in range(len(self.members))}
            self.errors = {j: error for j, error in failed.items() if error is not None}
        done = first
        for level in monitor.steps(levels - 1, "levels", start=first):
            index = self._index(streams)
            population = population if index is None else population.select(index)
            population, increment = kernel.move(population, level, noise)
            self._weigh(increment, f"noise level {level + 2} of {levels}")
            monitor.report(ess=min((run.ess[-1] for run in self._alive()), default=0.0))
            done = level + 1
            now = population

            def pack() -> dict[str, Tensor]:
                return self._tally() | {f"p.{n}": t for n, t in now.pack().items()} | {"streams": stored.pack()}  # noqa: B023

            monitor.checkpoint(done, pack)
        if done < levels - 1:
            return []
        for run in self._alive():
            run.ess.pop()
        self._weigh(kernel.last_weight(population), "the clean values")
        outcomes: list[Outcome] = []
        for j, run in enumerate(self.runs):
            rows = torch.arange(j * self.particles, (j + 1) * self.particles, device=streams.device)
            run.population = population.select(rows)
            outcomes.append(self.errors.get(j, run))
        return outcomes

    def _alive(self) -> list[Run]:
        return [run for j, run in enumerate(self.runs) if j not in self.errors]

    def _index(self, streams: Streams) -> Tensor | None:
        """Ancestors of the joint population; None where no problem is resampled.

        Particles of a problem that failed are replaced by those of one that did not, so that all stay finite.
        """
        size = self.particles
        good = next((j for j in range(len(self.runs)) if j not in self.errors), None)
        parts, changed = [], False
        for j, run in enumerate(self.runs):
            part = torch.arange(size, device=streams.device)
            if j in self.errors:
                parts.append(part + (j if good is None else good) * size)
                changed = True
                continue
            if run.ess[-1] < self.threshold * size:
                part, changed = ancestors(run, streams.generators[j]), True
            parts.append(part + j * size)
        return torch.cat(parts) if changed else None

    def _weigh(self, increment: Tensor, where: str) -> None:
        """Multiply the weights of every problem; one whose weights are no numbers, or all zero, has failed."""
        for j, part in enumerate(increment.split(self.particles)):
            if j in self.errors:
                continue
            try:
                weigh(self.runs[j], part, self.monitor, f"{where}, problem {self.members[j]}")
            except NotFiniteError as error:
                self.errors[j] = error

    def _tally(self) -> dict[str, Tensor]:
        """Weights, roots and evidence of every problem, and what failed."""
        tensors = {f"{j}.{name}": t for j, run in enumerate(self.runs) for name, t in run.tally().items()}
        packed = {j: _pack(error) for j, error in self.errors.items()}
        return tensors | {f"{j}.{name}": t for j, pack in packed.items() for name, t in pack.items()}


def _pack(outcome: Outcome) -> dict[str, Tensor]:
    if isinstance(outcome, Run):
        return outcome.pack()
    text = torch.tensor(list(str(outcome).encode()), dtype=torch.uint8)
    return {"error": text, "dead": torch.tensor(isinstance(outcome, AllDeadError))}


def _error(saved: dict[str, Tensor]) -> NotFiniteError | None:
    """What made a run fail, if it did."""
    if "error" not in saved:
        return None
    return (AllDeadError if bool(saved["dead"]) else NotFiniteError)(bytes(saved["error"].tolist()).decode())


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

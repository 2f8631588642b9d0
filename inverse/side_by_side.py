"""Chains of one problem, or of many alike, side by side: rows are problem after problem, equally many of each.

Every problem has a stream of noise of its own and adapts by itself, so that its chains are those it has alone; the
denoiser is asked about all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from inverse.many import ManyProblems, Streams, UnlikeError, lanes_at_a_time
from inverse.problem import DiffusionProblem
from ppl.backend import in_turn, problem_seeds, stack_problems
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["ChainNoise", "SideBySide", "run_side_by_side"]


class SideBySide:
    """The problems of one run.

    Args:
        singles: every problem by itself; alike enough for one batch.
        streams: where the noise of each comes from.
        many: the problems of the program, of which `singles` are some; None for one that is not of many.
        members: which of them.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.zeros(2)).over(y=torch.zeros(3, 2))
        >>> side = SideBySide.of(ManyProblems.of(program), range(3), Streams.of([1, 2, 3], torch.device("cpu")))
        >>> len(side), side.noise(4).normal(Size([2])).shape
        (3, torch.Size([12, 2]))
    """

    def __init__(
        self,
        singles: Sequence[DiffusionProblem],
        streams: Streams,
        many: ManyProblems | None = None,
        members: Sequence[int] = (0,),
    ) -> None:
        self.singles, self.streams, self.many, self.members = list(singles), streams, many, list(members)
        self._rows: dict[int, DiffusionProblem] = {}

    @classmethod
    def alone(cls, problem: DiffusionProblem, generator: torch.Generator | None = None) -> SideBySide:
        """One problem; without a generator for what draws nothing."""
        return cls([problem], Streams([torch.Generator(problem.device) if generator is None else generator]))

    @classmethod
    def of(cls, many: ManyProblems, members: Sequence[int], streams: Streams) -> SideBySide:
        """Some of many problems."""
        return cls([many.singles[i] for i in members], streams, many, members)

    def __len__(self) -> int:
        return len(self.singles)

    @property
    def first(self) -> DiffusionProblem:
        """The first problem, for what all share: prior, shape, dtype, device."""
        return self.singles[0]

    def rows(self, each: int) -> DiffusionProblem:
        """The problem whose lanes are `each` rows of every problem."""
        if self.many is None:
            return self.first
        if each not in self._rows:
            self._rows[each] = self.many.lanes(torch.tensor(self.members).repeat_interleave(each))
        return self._rows[each]

    def chunk(self, asked: int | None) -> int | None:
        """Most rows of one denoiser call: what was asked for, else all of one problem; of many, what a device gains."""
        return asked if asked is not None or self.many is None else 2 * lanes_at_a_time(None, 1, self.first.device)

    def noise(self, each: int) -> ChainNoise:
        """Noise for `each` rows of every problem."""
        return ChainNoise(self.first, each, self.streams)

    def normal(self, *shape: int) -> Tensor:
        """(problem, *shape) standard normal noise."""
        return self.streams.normal(shape, self.first.dtype).to(self.first.device)

    def uniform(self, *shape: int) -> Tensor:
        """(problem, *shape) uniform numbers between 0 and 1."""
        return self.streams.uniform(shape, self.first.dtype).to(self.first.device)

    def note(self, monitor: Monitor, index: int, message: str) -> None:
        """A remark on one problem, with its number where there are many."""
        monitor.note(message if self.many is None else f"problem {self.members[index]}: {message}")


class ChainNoise:
    """Standard normal noise for rows, each problem's from its own stream.

    Args:
        problem: says dtype and device.
        each: rows of a problem.
        streams: one for each problem.
    """

    def __init__(self, problem: DiffusionProblem, each: int, streams: Streams) -> None:
        self.problem, self.each, self.streams = problem, each, streams

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        """(rows, *shape)."""
        noise = self.streams.normal((self.each, *shape), self.problem.dtype)
        return noise.flatten(0, 1).to(self.problem.device)

    def some(self, members: Sequence[int]) -> ChainNoise:
        """For the rows of some of the problems."""
        return ChainNoise(self.problem, self.each, self.streams.some(members))


def run_side_by_side(
    backend: Any,
    program: Program,
    run: Callable[[SideBySide], list[Posterior | NotFiniteError]],
    trial: Callable[[SideBySide], object],
    *,
    draws: int,
    chains: int,
    generator: torch.Generator,
    monitor: Monitor,
) -> Posterior:
    """One problem, or all of a program's in groups that fit in a batch, or in turn where they are too unlike.

    Args:
        backend: runs problems in turn.
        program: of one problem or of many.
        run: the chains of some problems; a posterior, or an error, for each.
        trial: raises UnlikeError where problems cannot be run in one batch; it draws nothing and costs nothing.
        draws: draws per chain.
        chains: chains of a problem.
        generator: of the run.
        monitor: of the run.

    Raises:
        NotFiniteError: no chain of any problem is left.
    """
    if program.problems is None:
        problem = DiffusionProblem.of(program)
        with torch.no_grad(), problem.running(monitor):
            found = run(SideBySide.alone(problem, generator))[0]
        if isinstance(found, NotFiniteError):
            raise found
        return found
    seeds = problem_seeds(program, generator)
    parts: list[Posterior | NotFiniteError] = []
    with torch.no_grad():
        try:
            many = ManyProblems.of(program)
            trial(SideBySide.of(many, range(len(seeds)), Streams.of(seeds, generator.device)))
        except UnlikeError as why:
            return in_turn(program, backend, draws=draws, chains=chains, seeds=seeds, monitor=monitor, why=why)
        together = max(lanes_at_a_time(None, chains, generator.device) // chains, 1)
        with many.running(monitor):
            for start in range(0, len(seeds), together):
                members = range(start, min(start + together, len(seeds)))
                streams = Streams.of([seeds[i] for i in members], generator.device)
                with monitor.section(f"problems {members[0]}-{members[-1]}"):
                    found_here = run(SideBySide.of(many, members, streams))
                if parts and monitor.interrupted:
                    break  # cut short: it would cost the finished ones their draws
                parts += found_here
                if monitor.interrupted:
                    break
    return stack_problems(parts, len(seeds), seeds, monitor)

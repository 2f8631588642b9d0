"""Whole particle runs merged by their evidence, as many as the wanted number of independent draws asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from inverse.particles.core import AllDeadError, Run, log_count, systematic
from ppl.diagnostics.ess import merge_root_ess
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor

__all__ = ["Gathering", "Merged", "merge"]


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
        return torch.logsumexp(torch.stack([r.log_evidence for r in self.runs]), 0) - log_count(
            len(self.runs) + self.dead
        )

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


@dataclass
class Gathering:
    """Whole runs, gathered until the root ESS of their merge reaches `target`, at most `limit` runs.

    A run that fails is noted, and what other runs found is kept.

    Args:
        target: root ESS.
        limit: most runs.
        monitor: takes the notes.
        of: whose runs they are, for notes.
    """

    target: float
    limit: int
    monitor: Monitor
    of: str = ""
    runs: list[Run] = field(default_factory=list)
    dead: int = 0
    tried: int = 0
    reached: bool = False
    closed: bool = False

    @property
    def merged(self) -> Merged | None:
        """The merge of the finished runs; None when there is none."""
        return Merged(tuple(self.runs), self.dead) if self.runs else None

    def take(self, outcome: Run | NotFiniteError) -> None:
        """One more run, or what made it fail.

        Raises:
            NotFiniteError: no run found anything.
        """
        self.tried += 1
        self.closed = self.tried == self.limit
        if isinstance(outcome, AllDeadError):
            self.dead += 1
            if self.dead == self.limit:
                raise outcome
            self.monitor.note(f"{self.of}run {self.tried - 1} has evidence zero: {outcome}")
        elif isinstance(outcome, NotFiniteError):
            if not self.runs:
                raise outcome
            self.monitor.note(f"{self.of}stopped after {len(self.runs)} runs: {outcome}")
            self.closed = True
        else:
            self.runs.append(outcome)
            merged = Merged(tuple(self.runs), self.dead)
            self.monitor.report(root_ess=float(merged.root_ess))
            self.reached = float(merged.root_ess) >= self.target
            self.closed = self.closed or self.reached


def merge(
    one_run: Callable[[int], Run | None], *, target: float, limit: int, monitor: Monitor
) -> tuple[Merged | None, bool]:
    """Repeat whole runs until the root ESS of the merge reaches `target`, at most `limit` runs; see `Gathering`.

    Returns:
        The merge of the finished runs (None when there is none), and whether the target was reached.

    Raises:
        NotFiniteError: no run found anything.
    """
    gathering = Gathering(target, limit, monitor)
    while not gathering.closed:
        outcome: Run | NotFiniteError | None
        try:
            outcome = one_run(gathering.tried)
        except NotFiniteError as error:
            outcome = error
        if outcome is None:
            break
        gathering.take(outcome)
    return gathering.merged, gathering.reached

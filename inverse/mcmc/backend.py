"""What all backends of chains with a diffusion prior share: options of the walk, claims, and the run itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from inverse.mcmc.chain import Walk, check_walk, run_walk
from inverse.mcmc.reverse import check_solver
from inverse.problem import DiffusionProblem
from inverse.samplers.lanes import check_chunk
from ppl.backend import Exactness
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Solver

__all__ = ["WalkBackend"]


class WalkBackend:
    """The door of backends whose chains walk side by side; a subclass gives its options, `label` and `walk`."""

    warmup: int
    thin: int
    target_accept: float
    solver: Solver | None
    chunk: int | None

    label: ClassVar[str]
    """Name of the loop."""
    exact: ClassVar[Exactness] = "in_the_limit"
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_walk(self.warmup, self.thin, self.target_accept)
        check_chunk(self.chunk)
        check_solver(self.solver)

    @abstractmethod
    def walk(self, problem: DiffusionProblem, chains: int, generator: torch.Generator, monitor: Monitor) -> Walk:
        """The chains of one run."""

    @property
    def transitions_before(self) -> int:
        """Transitions before the first draw."""
        return self.warmup

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """All chains side by side."""
        problem = DiffusionProblem.of(program)
        return run_walk(
            lambda: self.walk(problem, chains, generator, monitor),
            problem,
            draws=draws,
            chains=chains,
            warmup=self.transitions_before,
            thin=self.thin,
            monitor=monitor,
            label=self.label,
        )

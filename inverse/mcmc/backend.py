"""What all backends of chains with a diffusion prior share: options of the walk, claims, and the run itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from inverse.mcmc.chain import Walk, check_walk, run_walk
from inverse.mcmc.reverse import check_solver
from inverse.samplers.lanes import check_chunk
from inverse.side_by_side import SideBySide, run_side_by_side
from ppl.backend import Exactness
from ppl.errors import NotFiniteError
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
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_walk(self.warmup, self.thin, self.target_accept)
        check_chunk(self.chunk)
        check_solver(self.solver)

    @abstractmethod
    def walk(self, side: SideBySide, chains: int, monitor: Monitor) -> Walk:
        """The chains of one run, `chains` of every problem."""

    @property
    def transitions_before(self) -> int:
        """Transitions before the first draw."""
        return self.warmup

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """All chains side by side, those of all problems together."""

        def run(side: SideBySide) -> list[Posterior | NotFiniteError]:
            return run_walk(
                lambda: self.walk(side, chains, monitor),
                side,
                draws=draws,
                chains=chains,
                warmup=self.transitions_before,
                thin=self.thin,
                monitor=monitor,
                label=self.label,
            )

        return run_side_by_side(
            self,
            program,
            run,
            lambda side: self.walk(side, 1, Monitor()),
            draws=draws,
            chains=chains,
            generator=generator,
            monitor=monitor,
        )

"""PiGDM as a backend: pseudo-inverse guidance in ancestral steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from inverse.guides.pigdm import PiGDMGuide
from inverse.samplers.guided import GuidedSampler
from ppl.backend import Exactness, register
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Ancestral, Schedule, Solver

__all__ = ["PiGDM"]


@register
@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance with the noise level of the program, for linear data with Gaussian noise.

    The guide is exact for an isotropic Gaussian prior; the steps leave out the spread of x_0 given x, by an amount that
    vanishes as steps grow.

    Args:
        steps: solver steps; 100 as published.
        data_std: sd of the data; None takes the prior's.
        jacobian: differentiate the denoiser; False needs no vjp.
        solver: None takes the ancestral step (DDIM with eta = 1, as published).
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Source: Song et al. (2023) [read].

    Example:
        >>> PiGDM(jacobian=False).sampler.guide
        PiGDMGuide(data_std=None, jacobian=False)
    """

    steps: int = 100
    data_std: float | None = None
    jacobian: bool = True
    solver: Solver | None = None
    schedule: Schedule | None = None
    chunk: int | None = None

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.sampler

    @property
    def sampler(self) -> GuidedSampler:
        """The guide and solver that this stands for."""
        guide = PiGDMGuide(self.data_std, self.jacobian)
        solver = Ancestral() if self.solver is None else self.solver
        return GuidedSampler(guide, solver, self.steps, self.schedule, chunk=self.chunk)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw all chains side by side."""
        return self.sampler.run(program, draws=draws, chains=chains, generator=generator, monitor=monitor)

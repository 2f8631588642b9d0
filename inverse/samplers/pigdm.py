"""PiGDM as a backend: pseudo-inverse guidance in ancestral steps."""

from __future__ import annotations

from dataclasses import dataclass

from inverse.guides.pigdm import PiGDMGuide
from inverse.samplers.guided import GuidedPreset, GuidedSampler
from ppl.backend import register
from sde import Ancestral, Schedule, Solver

__all__ = ["PiGDM"]


@register
@dataclass(frozen=True)
class PiGDM(GuidedPreset):
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

    def __post_init__(self) -> None:
        _ = self.sampler

    @property
    def sampler(self) -> GuidedSampler:
        """The guide and solver that this stands for."""
        guide = PiGDMGuide(self.data_std, self.jacobian)
        solver = Ancestral() if self.solver is None else self.solver
        return GuidedSampler(guide, solver, self.steps, self.schedule, chunk=self.chunk)

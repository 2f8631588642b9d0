"""DPS as a backend: ancestral steps with the likelihood at the denoised point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inverse.guides.dps import DPSGuide
from inverse.samplers.guided import GuidedPreset, GuidedSampler
from ppl.backend import register
from sde import Ancestral, Schedule

__all__ = ["DPS"]


@register
@dataclass(frozen=True)
class DPS(GuidedPreset):
    """Diffusion posterior sampling, for any differentiable likelihood.

    Never exact: it drops the spread of x_0 given x, and in the published form the noise level of the data too. For the
    published noise levels give `schedule=sde.VariancePreserving()`, if the denoiser was trained up to sigma 150.

    Args:
        steps: ancestral steps; 1000 as published.
        zeta: step size of the published form, for data in [-1, 1]; see `DPSGuide`.
        weight: "published", or "likelihood" for the gradient with the program's noise level.
        clip: clamp the denoised point, as published with (-1, 1); off, since it biases.
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Source: Chung et al. (2023) [read].

    Example:
        >>> DPS(steps=100, weight="likelihood").exact
        'never'
    """

    steps: int = 1000
    zeta: float = 0.3
    weight: Literal["published", "likelihood"] = "published"
    clip: tuple[float, float] | None = None
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        _ = self.sampler

    @property
    def sampler(self) -> GuidedSampler:
        """The guide and solver that this stands for."""
        guide = DPSGuide(self.zeta, self.weight, self.clip)
        return GuidedSampler(guide, Ancestral(), self.steps, self.schedule, chunk=self.chunk)

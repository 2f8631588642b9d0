"""Guided samplers: one trajectory per draw, all draws side by side."""

from __future__ import annotations

from inverse.samplers.dps import DPS
from inverse.samplers.guided import GuidedSampler
from inverse.samplers.moment_matching import MomentMatching
from inverse.samplers.pigdm import PiGDM

__all__ = ["DPS", "GuidedSampler", "MomentMatching", "PiGDM"]

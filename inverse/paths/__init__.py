"""Inference that uses the structure of a path: guides that steer the driving noise, particles that follow it."""

from __future__ import annotations

__all__ = [
    "ControlGuide",
    "GuidedParticleFilter",
    "LinearControl",
    "MatchedGuide",
    "ParticleGibbs",
    "ParticleGibbsKernel",
    "SDEMatching",
    "Uncontrolled",
    "linear_control",
    "linear_control_of",
    "matching_bound",
]

from inverse.paths.control_guide import ControlGuide
from inverse.paths.controls import Uncontrolled
from inverse.paths.linear_control import LinearControl, linear_control, linear_control_of
from inverse.paths.matching import MatchedGuide, SDEMatching, matching_bound
from inverse.paths.particle_filter import GuidedParticleFilter
from inverse.paths.particle_gibbs import ParticleGibbs, ParticleGibbsKernel

"""Guided samplers: one trajectory per draw, all draws side by side."""

from __future__ import annotations

from inverse.samplers.daps import DAPS
from inverse.samplers.ddnm import DDNM
from inverse.samplers.ddrm import DDRM
from inverse.samplers.diffpir import DiffPIR
from inverse.samplers.dps import DPS
from inverse.samplers.guided import GuidedSampler
from inverse.samplers.moment_matching import MomentMatching
from inverse.samplers.pigdm import PiGDM

__all__ = ["DAPS", "DDNM", "DDRM", "DPS", "DiffPIR", "GuidedSampler", "MomentMatching", "PiGDM"]

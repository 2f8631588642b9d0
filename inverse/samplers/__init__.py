"""Guided samplers: one trajectory per draw, all draws side by side."""

from __future__ import annotations

from inverse.samplers.daps import DAPS
from inverse.samplers.dcps import DCPS
from inverse.samplers.ddnm import DDNM
from inverse.samplers.ddrm import DDRM
from inverse.samplers.diffpir import DiffPIR
from inverse.samplers.dps import DPS
from inverse.samplers.freedom import FreeDoM
from inverse.samplers.guided import GuidedSampler
from inverse.samplers.mgps import MGPS
from inverse.samplers.moment_matching import MomentMatching
from inverse.samplers.mpgd import MPGD
from inverse.samplers.pigdm import PiGDM
from inverse.samplers.resample import ReSample

__all__ = [
    "DAPS",
    "DCPS",
    "DDNM",
    "DDRM",
    "DPS",
    "MGPS",
    "MPGD",
    "DiffPIR",
    "FreeDoM",
    "GuidedSampler",
    "MomentMatching",
    "PiGDM",
    "ReSample",
]

"""Guides: how data bend the denoiser. Options first, `bind(problem)`, then (x, sigma) -> Guided."""

from __future__ import annotations

from inverse.guides.base import BoundGuide, Guide, Guided, as_denoiser
from inverse.guides.closure import ConditionedCovariance
from inverse.guides.dps import DPSGuide
from inverse.guides.freedom import FreeDoMGuide
from inverse.guides.lgd import LGDGuide
from inverse.guides.moment_matching import MomentMatchingGuide
from inverse.guides.mpgd import MPGDGuide
from inverse.guides.pigdm import PiGDMGuide
from inverse.guides.tmpd import TMPDGuide

__all__ = [
    "BoundGuide",
    "ConditionedCovariance",
    "DPSGuide",
    "FreeDoMGuide",
    "Guide",
    "Guided",
    "LGDGuide",
    "MPGDGuide",
    "MomentMatchingGuide",
    "PiGDMGuide",
    "TMPDGuide",
    "as_denoiser",
]

"""Particle methods: exact in the number of particles, whatever the guide."""

from __future__ import annotations

from inverse.particles.closure import MomentClosure
from inverse.particles.conditional import NoiseAndReturn
from inverse.particles.core import run_particles, systematic
from inverse.particles.ddsmc import DDSMC
from inverse.particles.fps import FPSSMC
from inverse.particles.mcgdiff import MCGdiff
from inverse.particles.nuisance import NuisanceSMC
from inverse.particles.twisted import TwistedSMC

__all__ = [
    "DDSMC",
    "FPSSMC",
    "MCGdiff",
    "MomentClosure",
    "NoiseAndReturn",
    "NuisanceSMC",
    "TwistedSMC",
    "run_particles",
    "systematic",
]

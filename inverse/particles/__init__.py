"""Particle methods: exact in the number of particles, whatever the guide."""

from __future__ import annotations

from inverse.particles.conditional import NoiseAndReturn
from inverse.particles.core import run_particles, systematic
from inverse.particles.twisted import TwistedSMC

__all__ = ["NoiseAndReturn", "TwistedSMC", "run_particles", "systematic"]

"""Particle methods: exact in the number of particles, whatever the guide."""

from __future__ import annotations

from inverse.particles.core import ess, merge, root_ess, run_particles, systematic
from inverse.particles.twisted import TwistedSMC

__all__ = ["TwistedSMC", "ess", "merge", "root_ess", "run_particles", "systematic"]

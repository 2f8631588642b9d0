"""Markov chain Monte Carlo: engines whose draws are exact in the limit of many."""

from __future__ import annotations

from ppl.mcmc.elliptical_slice import EllipticalSlice
from ppl.mcmc.hmc import HMC
from ppl.mcmc.nuts import NUTS
from ppl.mcmc.pyro_kernel import Pyro

__all__ = ["HMC", "NUTS", "EllipticalSlice", "Pyro"]

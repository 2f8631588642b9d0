"""Sequential Monte Carlo on any program: particles from the prior, or a fit, to the posterior."""

from __future__ import annotations

from ppl.smc.smc import SMC

__all__ = ["SMC"]

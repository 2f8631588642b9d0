"""Variational inference: fit a guide by gradient steps on the evidence lower bound."""

from __future__ import annotations

from ppl.vi.fitted import FittedGuide
from ppl.vi.guides import AutoGuide, Flow, FullRank, Guide, Hierarchical, LowRank, MeanField
from ppl.vi.svi import SVI

__all__ = ["SVI", "AutoGuide", "FittedGuide", "Flow", "FullRank", "Guide", "Hierarchical", "LowRank", "MeanField"]

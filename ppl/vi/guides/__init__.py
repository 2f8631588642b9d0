"""Guides: families of approximations on the unconstrained vectors of a program."""

from __future__ import annotations

from ppl.vi.guides.auto import AutoGuide
from ppl.vi.guides.flow import Flow
from ppl.vi.guides.full_rank import FullRank
from ppl.vi.guides.guide import Guide
from ppl.vi.guides.hierarchical import Hierarchical
from ppl.vi.guides.low_rank import LowRank
from ppl.vi.guides.mean_field import MeanField

__all__ = ["AutoGuide", "Flow", "FullRank", "Guide", "Hierarchical", "LowRank", "MeanField"]

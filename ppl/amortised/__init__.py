"""Amortised inference: networks trained on simulations of a program, for all its data."""

from __future__ import annotations

from ppl.amortised.mixture import Mixture
from ppl.amortised.priors import MixturePriors
from ppl.amortised.transformer import DistributionTransformer
from ppl.amortised.transformer_fitted import FittedTransformer

__all__ = ["DistributionTransformer", "FittedTransformer", "Mixture", "MixturePriors"]

"""Variational inference with a diffusion prior."""

from __future__ import annotations

from inverse.variational.amortised import AmortisedDenoiser
from inverse.variational.amortised_fitted import FittedDenoiser
from inverse.variational.red_diff import REDDiff
from inverse.variational.score_prior_vi import FittedScorePrior, ScorePriorVI

__all__ = ["AmortisedDenoiser", "FittedDenoiser", "FittedScorePrior", "REDDiff", "ScorePriorVI"]

"""Bayesian meta-learning: a hierarchy over episodes, each with its own network, as a Pyro program.

phi = (mu, Sigma) ~ NIW,   theta_i | phi ~ N(mu, Sigma),   D_i | theta_i
"""

from __future__ import annotations

from models.meta.episodes import Episodes, EpisodeSource, Points

__all__ = ["EpisodeSource", "Episodes", "Points"]

"""Bayesian meta-learning: a hierarchy over episodes, each with its own network, as a Pyro program.

phi = (mu, Sigma) ~ NIW,   theta_i | phi ~ N(mu, Sigma),   D_i | theta_i
"""

from __future__ import annotations

from models.meta.episodes import Episodes, EpisodeSource, Points
from models.meta.network import Bernoulli, Categorical, Gaussian, Likelihood, Network, mlp
from models.meta.niw_math import GlobalLaw, NormalInverseGamma, NormalInverseWishart
from models.meta.program import Hierarchy, empirical_bayes_guide, hierarchy_of

__all__ = [
    "Bernoulli",
    "Categorical",
    "EpisodeSource",
    "Episodes",
    "Gaussian",
    "GlobalLaw",
    "Hierarchy",
    "Likelihood",
    "Network",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "Points",
    "empirical_bayes_guide",
    "hierarchy_of",
    "mlp",
]

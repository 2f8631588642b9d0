"""Bayesian meta-learning: a hierarchy over episodes, each with its own network, as a Pyro program.

phi = (mu, Sigma) ~ NIW,   theta_i | phi ~ N(mu, Sigma),   D_i | theta_i
"""

from __future__ import annotations

from models.meta.adaptation import Adapted, ClosedForm, Prediction, Variational, adapt
from models.meta.cavi import CoordinateAscent
from models.meta.episodes import Episodes, EpisodeSource, Points
from models.meta.fitted_meta import FittedMeta
from models.meta.guides import amortised_guide, empirical_bayes_guide
from models.meta.local import SGLD, Fisher, GaussNewton, LocalNormal
from models.meta.maml import MAML, FittedMAML
from models.meta.network import Bernoulli, Categorical, Gaussian, Likelihood, Network, mlp
from models.meta.niw import NIWMeta
from models.meta.niw_math import GlobalLaw, NormalInverseGamma, NormalInverseWishart
from models.meta.program import Hierarchy, hierarchy_of

__all__ = [
    "MAML",
    "SGLD",
    "Adapted",
    "Bernoulli",
    "Categorical",
    "ClosedForm",
    "CoordinateAscent",
    "EpisodeSource",
    "Episodes",
    "Fisher",
    "FittedMAML",
    "FittedMeta",
    "GaussNewton",
    "Gaussian",
    "GlobalLaw",
    "Hierarchy",
    "Likelihood",
    "LocalNormal",
    "NIWMeta",
    "Network",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "Points",
    "Prediction",
    "Variational",
    "adapt",
    "amortised_guide",
    "empirical_bayes_guide",
    "hierarchy_of",
    "mlp",
]

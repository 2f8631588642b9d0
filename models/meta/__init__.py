"""Bayesian meta-learning: a hierarchy over episodes, each with its own network, as a Pyro program.

phi = (mu, Sigma) ~ NIW,   theta_i | phi ~ N(mu, Sigma),   D_i | theta_i
"""

from __future__ import annotations

from models.meta.adaptation import Adapted, ClosedForm, Variational, adapt, cooled
from models.meta.cavi import CoordinateAscent
from models.meta.episodes import Episodes, EpisodeSource, Points
from models.meta.fisher import Fisher
from models.meta.fitted_meta import FittedMeta
from models.meta.gauss_newton import GaussNewton
from models.meta.guides import amortised_guide, empirical_bayes_guide
from models.meta.local import LocalNormal
from models.meta.maml import MAML, FittedMAML
from models.meta.network import Bernoulli, Categorical, Gaussian, Likelihood, Network, mlp
from models.meta.niw import NIWMeta
from models.meta.niw_math import GlobalLaw, NormalInverseGamma, NormalInverseWishart
from models.meta.program import Hierarchy, hierarchy_of
from models.meta.sgld import SGLD
from models.meta.sleep_study import sleep_study
from models.meta.tasks import LinearRegressions, LineSine, Sinusoids
from models.meta.tasks_images import FewShot, few_shot_digits, few_shot_fashion, few_shot_omniglot

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
    "FewShot",
    "Fisher",
    "FittedMAML",
    "FittedMeta",
    "GaussNewton",
    "Gaussian",
    "GlobalLaw",
    "Hierarchy",
    "Likelihood",
    "LineSine",
    "LinearRegressions",
    "LocalNormal",
    "NIWMeta",
    "Network",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "Points",
    "Sinusoids",
    "Variational",
    "adapt",
    "amortised_guide",
    "cooled",
    "empirical_bayes_guide",
    "few_shot_digits",
    "few_shot_fashion",
    "few_shot_omniglot",
    "hierarchy_of",
    "mlp",
    "sleep_study",
]

"""Stochastic processes as Pyro distributions: diffusion priors, and paths driven by Brownian and fractional noise.

Diffusions live in the noise coordinate x_sigma = x_0 + sigma n.

`DiffusionPrior` turns any denoiser into a distribution; `GaussianMixture` has the same interface with exact answers.
Schedules and wrappers (`EpsDenoiser`, ...) bring in networks that were trained in other coordinates; solvers are steps
of the reverse process. `MarkovNoise` makes fractional Brownian motion a Markov process with a known error.
"""

from __future__ import annotations

__all__ = [
    "DDIM",
    "Ancestral",
    "BlockCovariance",
    "BrownianMotion",
    "BrownianNoise",
    "CallCount",
    "Cosine",
    "CovarianceCorrected",
    "DPMSolver2M",
    "DPMSolver2MSDE",
    "Denoiser",
    "DenoisingPrior",
    "DenseCovariance",
    "DiffusersDenoiser",
    "DiffusionPrior",
    "EDMDenoiser",
    "EDMHeun",
    "EpsDenoiser",
    "Estimate",
    "FractionalGaussianNoise",
    "GaussianMixture",
    "HurstEstimate",
    "JointPrior",
    "KrylovCovariance",
    "LowRankCovariance",
    "MarkovIncrements",
    "MarkovNoise",
    "MeanRevertingPath",
    "NetworkCovariance",
    "Path",
    "Process",
    "RectifiedFlow",
    "Schedule",
    "ScoreDenoiser",
    "Solver",
    "SubspaceCovariance",
    "Transition",
    "TweedieCovariance",
    "VDenoiser",
    "VarianceExploding",
    "VariancePreserving",
    "VelocityDenoiser",
    "call_denoiser",
    "count_calls",
    "davies_harte",
    "edm_grid",
    "fbm_covariance",
    "fgn_autocovariance",
    "from_diffusers",
    "hosking",
    "hurst_mle",
    "hurst_whittle",
    "innovations",
    "log_grid",
    "refitted_noise",
    "sample",
    "solve_torchsde",
    "training_levels",
    "whittle_log_likelihood",
]

from sde.block_covariance import BlockCovariance
from sde.brownian import BrownianMotion
from sde.covariance import DenseCovariance, SubspaceCovariance, TweedieCovariance
from sde.davies_harte import davies_harte
from sde.denoiser import (
    CallCount,
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    call_denoiser,
    count_calls,
)
from sde.diffusers import DiffusersDenoiser, from_diffusers, training_levels
from sde.diffusion import DiffusionPrior
from sde.fractional import FractionalGaussianNoise, fbm_covariance, fgn_autocovariance
from sde.hurst import HurstEstimate, hurst_mle, hurst_whittle, whittle_log_likelihood
from sde.increments import BrownianNoise
from sde.innovations import hosking, innovations
from sde.joint import JointPrior
from sde.krylov import KrylovCovariance
from sde.log_density import Estimate
from sde.low_rank import LowRankCovariance
from sde.markov import MarkovNoise
from sde.markov_increments import MarkovIncrements
from sde.mean_reversion import MeanRevertingPath
from sde.mixture import GaussianMixture
from sde.network_covariance import NetworkCovariance
from sde.path import Path
from sde.prior import DenoisingPrior
from sde.process import Process
from sde.refit import refitted_noise
from sde.schedule import (
    Cosine,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
    edm_grid,
    log_grid,
)
from sde.solve import solve_torchsde
from sde.solvers import (
    DDIM,
    Ancestral,
    CovarianceCorrected,
    DPMSolver2M,
    DPMSolver2MSDE,
    EDMHeun,
    Solver,
    Transition,
    sample,
)

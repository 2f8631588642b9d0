"""Inference that uses the structure of a diffusion: exact, guided, by particles, variational.

Every backend reads data, operator and noise level from the program.
"""

from __future__ import annotations

from inverse.exact import Exact
from inverse.gaussian_likelihood import GaussianLikelihood
from inverse.guides import (
    DPSGuide,
    FreeDoMGuide,
    Guided,
    LGDGuide,
    MomentMatchingGuide,
    MPGDGuide,
    PiGDMGuide,
    TMPDGuide,
    as_denoiser,
)
from inverse.likelihood import Likelihood, read_likelihood
from inverse.mcmc import AnnealedLangevin, DiffusionPCN, ParallelTempering
from inverse.particles import DDSMC, FPSSMC, MCGdiff, MomentClosure, NoiseAndReturn, NuisanceSMC, TwistedSMC
from inverse.paths import GuidedParticleFilter, ParticleGibbs, ParticleGibbsKernel, SDEMatching
from inverse.pnp_dm import PnPDM
from inverse.problem import DiffusionProblem
from inverse.samplers import (
    DAPS,
    DCPS,
    DDNM,
    DDRM,
    DPS,
    MGPS,
    MPGD,
    DiffPIR,
    FreeDoM,
    GuidedSampler,
    MomentMatching,
    PiGDM,
    ReSample,
)
from inverse.sensor import Censored, Quantised
from inverse.split_gibbs import SplitGibbs
from inverse.variational import AmortisedDenoiser, FittedDenoiser, FittedScorePrior, REDDiff, ScorePriorVI

__all__ = [
    "DAPS",
    "DCPS",
    "DDNM",
    "DDRM",
    "DDSMC",
    "DPS",
    "FPSSMC",
    "MGPS",
    "MPGD",
    "AmortisedDenoiser",
    "AnnealedLangevin",
    "Censored",
    "DPSGuide",
    "DiffPIR",
    "DiffusionPCN",
    "DiffusionProblem",
    "Exact",
    "FittedDenoiser",
    "FittedScorePrior",
    "FreeDoM",
    "FreeDoMGuide",
    "GaussianLikelihood",
    "Guided",
    "GuidedParticleFilter",
    "GuidedSampler",
    "LGDGuide",
    "Likelihood",
    "MCGdiff",
    "MPGDGuide",
    "MomentClosure",
    "MomentMatching",
    "MomentMatchingGuide",
    "NoiseAndReturn",
    "NuisanceSMC",
    "ParallelTempering",
    "ParticleGibbs",
    "ParticleGibbsKernel",
    "PiGDM",
    "PiGDMGuide",
    "PnPDM",
    "Quantised",
    "REDDiff",
    "ReSample",
    "SDEMatching",
    "ScorePriorVI",
    "SplitGibbs",
    "TMPDGuide",
    "TwistedSMC",
    "as_denoiser",
    "read_likelihood",
]

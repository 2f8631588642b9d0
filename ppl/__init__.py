"""Programs in, posteriors out: Pyro models with data, and the engines that infer their latents."""

from __future__ import annotations

from ppl import objectives
from ppl.amortised import DistributionTransformer, FittedTransformer, Mixture, MixturePriors
from ppl.backend import Backend, infer, register
from ppl.compare import Comparison, compare
from ppl.errors import (
    CapabilityError,
    CheckpointError,
    DataError,
    NotFiniteError,
    OptionError,
    PilotlightError,
    ProgramError,
    ShapeError,
    TraceError,
    WeightsError,
)
from ppl.gibbs import Gibbs
from ppl.importance import Importance
from ppl.kernels import ConditionalDraw, HMCKernel, Kernel, SliceKernel
from ppl.laplace import Laplace
from ppl.mcmc import HMC, NUTS, EllipticalSlice, Pyro
from ppl.monitor import Event, Monitor
from ppl.noise_space import NoiseReparam, NoiseSpace, lift_noise
from ppl.pathfinder import Pathfinder
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.shadow import warn_if_shadowed
from ppl.smc import SMC
from ppl.transport import Transport
from ppl.vi import SVI, AutoGuide, FittedGuide, Flow, FullRank, Hierarchical, LowRank, MeanField

__all__ = [
    "HMC",
    "NUTS",
    "SMC",
    "SVI",
    "AutoGuide",
    "Backend",
    "CapabilityError",
    "CheckpointError",
    "Comparison",
    "ConditionalDraw",
    "DataError",
    "DistributionTransformer",
    "EllipticalSlice",
    "Estimate",
    "Event",
    "FittedGuide",
    "FittedTransformer",
    "Flow",
    "FullRank",
    "Gibbs",
    "HMCKernel",
    "Hierarchical",
    "Importance",
    "Kernel",
    "Laplace",
    "LowRank",
    "MeanField",
    "Mixture",
    "MixturePriors",
    "Monitor",
    "NoiseReparam",
    "NoiseSpace",
    "NotFiniteError",
    "OptionError",
    "Pathfinder",
    "PilotlightError",
    "Posterior",
    "Program",
    "ProgramError",
    "Pyro",
    "ShapeError",
    "SliceKernel",
    "TraceError",
    "Transport",
    "WeightsError",
    "compare",
    "infer",
    "lift_noise",
    "objectives",
    "register",
]

warn_if_shadowed()

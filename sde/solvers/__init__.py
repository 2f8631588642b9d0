"""Samplers of the reverse diffusion: one Gaussian step per file, one loop for all."""

from __future__ import annotations

from sde.solvers.ancestral import Ancestral
from sde.solvers.covariance_corrected import CovarianceCorrected
from sde.solvers.ddim import DDIM
from sde.solvers.dpm_solver import DPMSolver2M, DPMSolver2MSDE
from sde.solvers.heun import EDMHeun
from sde.solvers.integrate import sample
from sde.solvers.transition import Solver, State, Transition

__all__ = [
    "DDIM",
    "Ancestral",
    "CovarianceCorrected",
    "DPMSolver2M",
    "DPMSolver2MSDE",
    "EDMHeun",
    "Solver",
    "State",
    "Transition",
    "sample",
]

"""Programmable variational inference: objectives are programs, gradients unbiased, estimators chosen per site."""

from __future__ import annotations

from ppl.objectives.bounds import DIWHVI, ELBO, HVI, IWELBO, IWHVI, VIMCO, Renyi, leave_one_out
from ppl.objectives.context import Context
from ppl.objectives.density import Direct, Exact, LogDensity, Reciprocal
from ppl.objectives.draw import Draw, Particles, Stochastic, logmeanexp
from ppl.objectives.engine import Engine, Gradient, gradient
from ppl.objectives.estimators import Enumerate, MeasureValued, Rebar, Reinforce, Relax, Reparam
from ppl.objectives.expectation import Expectation
from ppl.objectives.path import DReG, StickingTheLanding
from ppl.objectives.sir import SIR
from ppl.objectives.smc import SMC
from ppl.objectives.stochastic import Marginal, Normalize
from ppl.objectives.wake_sleep import ForwardKL, Sleep, SymmetricKL, WakeModel

__all__ = [
    "DIWHVI",
    "ELBO",
    "HVI",
    "IWELBO",
    "IWHVI",
    "SIR",
    "SMC",
    "VIMCO",
    "Context",
    "DReG",
    "Direct",
    "Draw",
    "Engine",
    "Enumerate",
    "Exact",
    "Expectation",
    "ForwardKL",
    "Gradient",
    "LogDensity",
    "Marginal",
    "MeasureValued",
    "Normalize",
    "Particles",
    "Rebar",
    "Reciprocal",
    "Reinforce",
    "Relax",
    "Renyi",
    "Reparam",
    "Sleep",
    "StickingTheLanding",
    "Stochastic",
    "SymmetricKL",
    "WakeModel",
    "gradient",
    "leave_one_out",
    "logmeanexp",
]

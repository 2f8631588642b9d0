"""Markov chains on a diffusion prior: all chains in one batch, densities from the score alone."""

from __future__ import annotations

from inverse.mcmc.annealed_langevin import AnnealedLangevin
from inverse.mcmc.diffusion_pcn import DiffusionPCN
from inverse.mcmc.line_integral import LineRule, adaptive_log_ratio, log_ratio
from inverse.mcmc.parallel_tempering import ParallelTempering

__all__ = ["AnnealedLangevin", "DiffusionPCN", "LineRule", "ParallelTempering", "adaptive_log_ratio", "log_ratio"]

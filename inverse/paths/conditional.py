r"""Conditional sequential Monte Carlo over the driving numbers of a path, for particle Gibbs.

Given numbers (z_1 .. z_T) of a retained path, N - 1 others are drawn as by the particle filter; particle 0 is driven by
the retained ones, whichever state it stands in. At a resampling its past may be exchanged for that of particle i with

    probability proportional to  w_i p(y after now | s_i, z after now) / psi(s_i)

which follows all particles to the end by the retained numbers: the numbers of different steps are independent, so that
no transition density enters, which the rank-one noise of (X, Y) would not have. One path is chosen in the end by
weight. The move leaves p(z | y) as it is for any N >= 2 and any control.

Source: Andrieu, Doucet & Holenstein (2010); ancestor sampling for models that do not forget: Lindsten, Jordan & Schon
(2014), section 6 [inferred]; in the driving numbers of a path [derived].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inverse.paths.particle_filter import PathKernel, PathParticles
from ppl.diagnostics.ess import kish_ess
from ppl.errors import NotFiniteError

__all__ = ["Retained", "conditional_sweep"]


class Retained(NamedTuple):
    """Paths of all chains by their numbers.

    Args:
        first: (chain, m K) that start the factors of type I; empty for others.
        noise: (chain, m, steps) driving numbers.
    """

    first: Tensor
    noise: Tensor


def conditional_sweep(
    kernel: PathKernel,
    retained: Retained,
    particles: int,
    generator: torch.Generator,
    *,
    threshold: float = 0.5,
    ancestors: bool = True,
) -> tuple[Retained, Tensor]:
    """One move of the paths of all chains.

    Args:
        kernel: of particles * chains lanes, chains innermost.
        retained: where the chains stand.
        particles: N, the retained one included.
        generator: source of randomness.
        threshold: resample when ESS < threshold * N, chain by chain.
        ancestors: exchange the past of the retained path at resamplings.

    Returns:
        The new paths, and their values at the times of the path, (chain, n, d).

    Raises:
        NotFiniteError: all particles of a chain have weight zero, or a path is not finite.
    """
    chains = len(retained.noise)
    population = kernel.start(particles * chains, generator, retained.first)
    log_weight = kernel.first_weight(population).reshape(particles, chains)
    for level in range(kernel.levels - 1):
        poor = kish_ess(log_weight.mT) < threshold * particles
        if bool(poor.any()):
            index = _ancestors(log_weight, poor, generator)
            if ancestors:
                index[0] = _past(kernel, population, log_weight, level, retained, poor, generator)
            lanes = index * chains + torch.arange(chains, device=index.device)
            population = population.select(lanes.reshape(-1))
            log_weight = torch.where(poor, 0.0, log_weight)
        steps = kernel.steps(level)
        population, increment = kernel.move(population, level, generator, retained.noise[..., steps.start : steps.stop])
        log_weight = _weighed(log_weight, increment, f"time {level + 1} of {kernel.levels - 1}")
    log_weight = _weighed(log_weight, kernel.last_weight(population), "the last time")
    chosen = torch.multinomial(torch.softmax(log_weight.mT, 1), 1, generator=generator)[:, 0]
    last = population.select(chosen * chains + torch.arange(chains, device=chosen.device))
    return Retained(last.first, last.noise), last.history


def _weighed(log_weight: Tensor, increment: Tensor, where: str) -> Tensor:
    """Weights (particle, chain) multiplied; the dead stay dead."""
    found = log_weight + torch.where(log_weight == -torch.inf, 0.0, increment.double().reshape(log_weight.shape))
    top = found.amax(0)
    if not bool(top.isfinite().all()):
        raise NotFiniteError(
            f"no particle of {int((~top.isfinite()).sum())} of {found.shape[1]} chains has a finite weight at {where}: "
            "check the support of the likelihood"
        )
    return found


def _ancestors(log_weight: Tensor, poor: Tensor, generator: torch.Generator) -> Tensor:
    """(particle, chain) ancestors by multinomial draws; the retained particle, and chains that need none, stay."""
    particles, chains = log_weight.shape
    stay = torch.arange(particles, device=log_weight.device)[:, None].expand(-1, chains).clone()
    weights = torch.softmax(log_weight.mT, 1)
    others = torch.multinomial(weights, particles - 1, replacement=True, generator=generator)
    return torch.where(poor, torch.cat([stay[:1], others.mT]), stay)


def _past(
    kernel: PathKernel,
    population: PathParticles,
    log_weight: Tensor,
    level: int,
    retained: Retained,
    poor: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """(chain,) which particle's past the retained path takes on."""
    history = kernel.follow(population, level, retained.noise.repeat(len(log_weight), 1, 1))
    ahead = kernel.missing(history, population) - population.log_twist + population.pending
    total = log_weight + torch.where(ahead.isnan(), -torch.inf, ahead).reshape(log_weight.shape)
    drawn = torch.multinomial(torch.softmax(total.mT, 1), 1, generator=generator)[:, 0]
    return torch.where(poor, drawn, torch.zeros_like(drawn))

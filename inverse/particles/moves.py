r"""Rejuvenation: every particle is noised up a few levels and comes back by guided steps, or stays where it is.

From x_j up the levels to x_k, then down again from the same x_k with the kernel's own proposals,

    accept x_j' in place of x_j with probability min(1, prod w(x_{i+1}', x_i') / prod w(x_{i+1}, x_i)),  i = k ... j - 1

with w the kernel's weight increments, those of the old value along the path by which it was noised up. Noising is the
reversal of the prior's dynamics, p_j(x_j) prod F(x_i | x_{i+1}) = p_k(x_k) prod M(x_{i+1} | x_i), and w is
M psi_{i+1} / (q psi_i), so that the move leaves p_j(x_j) psi_j(x_j) as it is. Source: [derived].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inverse.particles.core import Kernel
from inverse.problem import DiffusionProblem

__all__ = ["NoiseUp", "noised"]


@dataclass(frozen=True)
class NoiseUp:
    """Moves of all particles of a population at once; old and new paths share their denoiser calls.

    Args:
        problem: what is solved.
        kernel: the kernel of the population; exact up to its discretisation, and exactly so with the closure and a
            Gaussian prior.
        sigmas: its noise levels.
        count: moves, one after the other.
        climb: how many levels to go up.
    """

    problem: DiffusionProblem
    kernel: Kernel[Any]
    sigmas: Tensor
    count: int
    climb: int

    def __call__(self, population: Any, level: int, generator: torch.Generator) -> tuple[Any, float]:
        """The moved population, and the share of accepted proposals."""
        shares = []
        for _ in range(self.count):
            population, share = self._move(population, level, generator)
            shares.append(share)
        return population, sum(shares) / len(shares)

    def _move(self, population: Any, level: int, generator: torch.Generator) -> tuple[Any, float]:
        top = max(level - self.climb, 0)
        particles = len(population.x)
        below = float(self.sigmas[level])
        path = [*noised(self.problem, population.x, self.sigmas[top:level], generator, below), population.x]
        both = self.kernel.at(torch.cat([path[0], path[0]]), top)
        log_weight = torch.zeros(2 * particles, dtype=torch.float64, device=generator.device)
        for i in range(top, level):
            both, increment = self.kernel.move(both, i, generator, path[i - top + 1])
            log_weight = log_weight + increment.double()
        old, new = log_weight.split(particles)
        u = torch.rand(particles, generator=generator, dtype=torch.float64, device=generator.device)
        accept = u.log() < new - old  # a proposal that is not a number is not accepted
        index = torch.arange(particles, device=generator.device) + particles * accept
        return both.select(index), float(accept.double().mean())


def noised(
    problem: DiffusionProblem, x: Tensor, sigmas: Tensor, generator: torch.Generator, below: float = 0.0
) -> list[Tensor]:
    """x (particle, *site) of level `below` at all of `sigmas`, highest first, each noised from the one below it."""
    path = []
    for sigma in reversed(sigmas.tolist()):
        x = x + math.sqrt(sigma**2 - below**2) * problem.noise(len(x), generator)
        path.append(x)
        below = sigma
    return path[::-1]

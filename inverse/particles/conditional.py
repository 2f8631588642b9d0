r"""Noise and come back: a Gibbs kernel for a diffusion site, by conditional SMC along its own noising path.

The current value x_0 is noised up a ladder of levels, x_{k+1} = x_k + sqrt(s_{k+1}^2 - s_k^2) n. From the top, which
all particles share, a population comes back by guided steps; particle 0 is held to the path that was just drawn. One
particle is then chosen by weight. Noising is the reversal of the prior's own dynamics, so the path is a draw of its
conditional law and the move leaves p(x_0 | y, all else) invariant, up to the discretisation of the steps (exactly, with
the closure and a Gaussian prior). Source: Andrieu, Doucet & Holenstein (2010) for conditional SMC; the path [derived].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.particles.moves import noised
from inverse.particles.spectral import check_reversal
from inverse.particles.twisted import particle_kernel
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.diagnostics.ess import kish_ess
from ppl.errors import CapabilityError, OptionError
from ppl.program import Program
from sde.schedule import log_grid
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["NoiseAndReturn"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class NoiseAndReturn:
    """A kernel of `ppl.Gibbs` for one diffusion site, whose likelihood may depend on all other sites.

    Args:
        level: noise level to return from, in units of the prior's `data_std`; large values forget more of the current
            value and need more particles.
        steps: noise levels of the way back.
        particles: size of the population, the current value included.
        guide: as for `TwistedSMC`.
        solver: as for `TwistedSMC`.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)
        >>> kernels = {("x",): NoiseAndReturn(steps=4, particles=4), ("sigma",): ppl.SliceKernel()}
        >>> posterior = ppl.infer(ppl.Program(model, torch.ones(2)), ppl.Gibbs(kernels, warmup=5), draws=10, chains=2)
        >>> posterior["x"].shape, posterior["sigma"].shape
        (torch.Size([2, 10, 2]), torch.Size([2, 10]))
    """

    level: float = 1.0
    steps: int = 20
    particles: int = 8
    guide: Any = None
    solver: Solver = field(default_factory=DPMSolver2MSDE)

    invariant: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.level) and self.level > 0):
            raise OptionError(f"level must be positive and finite, in units of the prior's data_std, got {self.level}")
        if self.steps < 2 or self.particles < 2:
            raise OptionError(f"steps and particles must be 2 or more, got {self.steps} and {self.particles}")
        check_reversal(self.solver, "NoiseAndReturn")

    def for_sites(self, sites: tuple[str, ...], cost: Cost) -> _Return:
        """The kernel of a block."""
        if len(sites) != 1:
            raise OptionError(f"NoiseAndReturn moves one diffusion site, got the block {sites}; give each site its own")
        return _Return(self, sites[0], cost)

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """One move of the program's only diffusion site."""
        sites = [n for n, c in program.capabilities.items() if "denoiser" in c]
        if len(sites) != 1:
            raise CapabilityError(f"NoiseAndReturn found the diffusion sites {sites}; name one by a block of ppl.Gibbs")
        return self.for_sites((sites[0],), Cost()).step(program, values, generator)


class _Return:
    """Moves one site of all chains, one chain after the other: each has a likelihood of its own."""

    invariant: ClassVar[bool] = True

    def __init__(self, options: NoiseAndReturn, site: str, cost: Cost) -> None:
        self.options, self.site, self.cost = options, site, cost

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        moved = []
        with torch.no_grad():
            for chain in range(len(values[self.site])):
                given = {n: v[chain] for n, v in values.items() if n != self.site and n in program.latents}
                problem = DiffusionProblem.of(program, self.site, given)
                with problem.counting(self.cost):
                    moved.append(self._move(problem, values[self.site][chain], generator))
        return {self.site: torch.stack(moved)}

    def _move(self, problem: DiffusionProblem, x: Tensor, generator: torch.Generator) -> Tensor:
        """One conditional SMC sweep for one chain, (*site) -> (*site)."""
        options = self.options
        sigmas = log_grid(options.level * problem.prior.data_std, problem.prior.sigma_min, options.steps)
        kernel = particle_kernel(problem, sigmas, options.guide, options.solver, None, self.cost)
        path = noised(problem, x[None], sigmas[:-1], generator)
        population: Any = kernel.at(path[0].expand(options.particles, *x.shape), 0)
        log_weight = x.new_zeros(options.particles)
        for level in range(len(sigmas) - 2):
            if float(kish_ess(log_weight)) < 0.5 * options.particles:
                population = population.select(_keep_first(log_weight, generator))
                log_weight = torch.zeros_like(log_weight)
            population, increment = kernel.move(population, level, generator, path[level + 1])
            log_weight = log_weight + increment
        log_weight = log_weight + kernel.last_weight(population)
        chosen = torch.multinomial(torch.softmax(log_weight.double(), 0), 1, generator=generator)
        return kernel.finish(population.select(chosen), generator)[0]


def _keep_first(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """Multinomial ancestors, of which the first is particle 0 itself: conditional resampling."""
    weights = torch.softmax(log_weight.double(), 0)
    others = torch.multinomial(weights, len(weights) - 1, replacement=True, generator=generator)
    return torch.cat([others.new_zeros(1), others])

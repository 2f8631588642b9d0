r"""The moment-closure kernel: x_0 | x_a ~ N(D, C) with the full Tweedie covariance, given y.

Level a -> b, rho^2 = (b/a)^2, kappa = 1 - rho^2, c^2 = b^2 kappa, in whitened data d = B x + n:

    propose  x_0* = exact draw of N(D, C) given d (Matheron),   x_b = rho^2 x_a + kappa x_0* + c z
    weigh    w <- w psi_b(x_b) / p~(d | x_b, x_a),              psi = N(d; B D, I + B C B^T) at the new state

where p~ is what the old closure predicts of d after it has seen x_b. The last step draws from the closure given d with
weight one. For a Gaussian prior all weights are equal at any number of steps. Source: [derived], and run against exact
posteriors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.guides import MomentMatchingGuide
from inverse.guides.base import BoundGuide
from inverse.guides.closure import floored_cholesky
from inverse.guides.moment_matching import rows_of
from inverse.many import require_alike, require_even
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import CapabilityError, OptionError
from sde import DenseCovariance, LowRankCovariance, NetworkCovariance, SubspaceCovariance

__all__ = ["ClosureKernel", "MomentClosure", "closed_covariance"]

Covariance = SubspaceCovariance | DenseCovariance | LowRankCovariance


@dataclass(frozen=True)
class Closure:
    """All particles at one level, with the closure's moments in the measured directions.

    Args:
        x: (particle, *site).
        covariance: C, with mean D.
        towards: C B^T, (m, particle, *site).
        gram: B C B^T, (particle, m, m).
        factor: Cholesky factor of I + B C B^T.
        residual: d - B D, (particle, m).
        log_twist: log psi, (particle,).
    """

    x: Tensor
    covariance: Covariance
    towards: Tensor
    gram: Tensor
    factor: Tensor
    residual: Tensor
    log_twist: Tensor

    def select(self, index: Tensor) -> Closure:
        """The same state with particles `index`."""
        return Closure(
            self.x[index],
            self.covariance.select(index),
            self.towards[:, index],
            self.gram[index],
            self.factor[index],
            self.residual[index],
            self.log_twist[index],
        )

    def pack(self) -> dict[str, Tensor]:
        """The particles; all else follows from them."""
        return {"x": self.x}


@dataclass(frozen=True)
class MomentClosure:
    """The closure as the guide of `TwistedSMC`: particles move by its own step, with or without an exact covariance.

    In any other engine it is moment matching, which rests on the same moments.

    Args:
        random: random directions for a network's covariance; one vjp each per particle and level, beside one for each
            measurement.

    Source: [derived]; `python -m benchmarks.covariance` compares it with other guides.
    """

    random: int = 2

    exact_when: ClassVar[tuple[str, ...]] = MomentMatchingGuide.exact_when
    acts_in: ClassVar[str] = "denoiser"
    gradient: ClassVar[bool] = True
    per_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.random < 1:
            raise OptionError(f"random must be one direction or more, got {self.random}")

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> BoundGuide:
        """Moment matching for one problem."""
        return MomentMatchingGuide().bind(problem, cost)

    def kernel(self, problem: DiffusionProblem, sigmas: Tensor, chunk: int | None = None) -> ClosureKernel:
        """How particles move."""
        return ClosureKernel(problem, sigmas, self.random, chunk)


class ClosureKernel:
    """Moves a population by the closure's exact conditional draws.

    A network's covariance is taken from its columns along the measured directions and a few random ones, and is the
    same operator in the draw, in the twist and in the weight: the target is the program, with the prior discretised by
    the step that this covariance makes.

    Args:
        problem: prior and Gaussian likelihood.
        sigmas: (levels + 1,) noise levels, the last exactly zero.
        random: random directions for a network's covariance; one vjp each beside those of the data.
        chunk: particles per call of a network; changes memory, nothing else.

    Raises:
        CapabilityError: the likelihood has no linear Gaussian form, or the prior joins networks with exact priors.
    """

    def __init__(self, problem: DiffusionProblem, sigmas: Tensor, random: int = 2, chunk: int | None = None) -> None:
        self.problem, self.sigmas, self.random, self.chunks = problem, sigmas, random, Chunks(chunk)
        self.gaussian = problem.likelihood.gaussian
        if "exact_covariance" not in problem.prior.capabilities:
            require_alike(problem, "the moment closure of a network")
        require_even(problem, "the moment closure")
        self.rows = rows_of(self.gaussian.operator, problem)  # B^T

    @property
    def levels(self) -> int:
        """Number of positive noise levels."""
        return len(self.sigmas) - 1

    def start(self, particles: int, generator: torch.Generator) -> Closure:
        """Particles at the first level, from the prior's own start."""
        noise = self.problem.noise(particles, generator)
        return self.at(self.problem.prior.start(noise, self.sigmas[0]), 0)

    def first_weight(self, population: Closure) -> Tensor:
        """The twist."""
        return population.log_twist

    def unpack(self, tensors: dict[str, Tensor], level: int) -> Closure:
        """The population at a level, from its particles."""
        return self.at(tensors["x"], level)

    def at(self, x: Tensor, level: int) -> Closure:
        """The population of particles x at a level: the only denoiser call of a step."""
        sigma = self.sigmas[level]
        covariance = closed_covariance(self.problem, x, sigma, self.rows[:, 0], self.random, self.chunks)
        rows = self.rows.expand(len(self.rows), *x.shape)
        towards = covariance.matvec(rows)
        gram = self._measure(towards).movedim(0, -1)
        gram = (gram + gram.mT) / 2
        residual = (self.gaussian.data - self.gaussian.operator(covariance.mean)).reshape(len(x), -1)
        factor, _ = floored_cholesky(gram)
        log_twist = self.gaussian.log_normaliser + _log_normal(residual, factor)
        return Closure(x, covariance, towards, gram, factor, residual, log_twist)

    def move(
        self, population: Closure, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Closure, Tensor]:
        """Draw the closure given the data, bridge to the next level, weigh; the first particles go to `retained`."""
        a, b = float(self.sigmas[level]), float(self.sigmas[level + 1])
        ratio = (b / a) ** 2
        kappa, c = 1 - ratio, b * math.sqrt(1 - ratio)
        clean = self._draw(population, generator)
        x = ratio * population.x + kappa * clean + c * self.problem.noise(len(clean), generator)
        if retained is not None:
            x = torch.cat([retained, x[len(retained) :]])
        new = self.at(x, level + 1)
        return new, new.log_twist - self._predictive(population, x, ratio, kappa, c)

    def last_weight(self, population: Closure) -> Tensor:
        """The final draw has weight one."""
        return torch.zeros_like(population.log_twist)

    def finish(self, population: Closure, generator: torch.Generator) -> Tensor:
        """Draws of the closure given the data."""
        return self._draw(population, generator)

    def _draw(self, s: Closure, generator: torch.Generator) -> Tensor:
        """Matheron: u + C B^T S^{-1} (d - B u - n), u ~ N(D, C)."""
        particles = len(s.x)
        plates = self.problem.shape[: len(self.problem.shape) - len(self.problem.prior.event_shape)]
        spread = s.covariance.sample(self.problem.noise(particles, generator, plates + s.covariance.noise_shape))
        noise = self.problem.noise(particles, generator, torch.Size([self.gaussian.size]))
        gap = s.residual - self.gaussian.operator(spread).reshape(particles, -1) - noise
        gain = torch.cholesky_solve(gap[..., None], s.factor)[..., 0]
        return s.covariance.mean + spread + torch.einsum("mp...,pm->p...", s.towards, gain)

    def _predictive(self, s: Closure, x: Tensor, ratio: float, kappa: float, c: float) -> Tensor:
        """log p~(d | x_b, x_a): the closure at a, after x_b = rho^2 x_a + kappa x_0 + c z was seen."""
        shift = (c / kappa) ** 2
        delta = (x - ratio * s.x) / kappa - s.covariance.mean
        seen = s.covariance.solve(s.towards, shift)
        flat, towards = seen.flatten(2), s.towards.flatten(2)
        mean = torch.einsum("mpd,pd->pm", flat, delta.flatten(1))
        gram = s.gram - torch.einsum("ipd,jpd->pij", towards, flat)
        factor, _ = floored_cholesky((gram + gram.mT) / 2)
        return self.gaussian.log_normaliser + _log_normal(s.residual - mean, factor)

    def _measure(self, v: Tensor) -> Tensor:
        """B v with the data axes flattened: (m, particle, *site) -> (m, particle, m)."""
        return self.gaussian.operator(v).reshape(*v.shape[:2], -1)


def closed_covariance(
    problem: DiffusionProblem, x: Tensor, sigma: Tensor, rows: Tensor, random: int, chunks: Chunks
) -> Covariance:
    """C in closed form: the prior's own, or that of a network from its columns along `rows` and a few random ones.

    Args:
        problem: says the prior.
        x: (particle, *site).
        sigma: noise level.
        rows: (m, *site) measured directions, the same for all particles.
        random: random directions.
        chunks: splits calls of a network.

    Raises:
        CapabilityError: the prior joins networks with exact priors.
    """
    prior = problem.prior
    if "exact_covariance" in prior.capabilities:
        return prior.covariance(x, sigma)

    def parts(x: Tensor) -> tuple[Tensor, ...]:
        network = prior.covariance(x, sigma)
        if not isinstance(network, NetworkCovariance):
            raise CapabilityError(
                f"the closure needs a prior with an exact covariance or one of networks alone, got {prior!r}; use "
                "another guide, such as inverse.PiGDMGuide()"
            )
        c = network.low_rank(rows, random)
        return c.mean, c.values, c.vectors, c.outside

    mean, values, vectors, outside = chunks(parts, x)
    return LowRankCovariance(mean, prior.event_shape, values, vectors, outside)


def _log_normal(residual: Tensor, factor: Tensor) -> Tensor:
    """-r^T S^{-1} r / 2 - log|S| / 2 for S = L L^T, (particle, m) -> (particle,); the 2 pi is the likelihood's."""
    white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
    return -0.5 * white.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

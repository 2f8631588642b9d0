r"""Particles moved by the prior's own step given what is said of a coordinate, in the singular basis of the data.

With whitened data u_i = s_i z_i + n_i, z = V^T x, y_i = u_i / s_i and tau_i = 1 / s_i. For the step from level a to b,
N(m, c^2 I) under the prior, a method says N(z_i; o_i, v_i) of coordinates i at level b, knowing x_a:

    propose  z_i ~ N(m_i, c^2) N(z_i; o_i, v_i), normalised               other coordinates ~ N(m, c^2 I)
    twist    psi_a(x_a) = prod_i N(m_i; o_i, c^2 + v_i)                   the integral of the step times what is said
    weigh    w <- w psi_b(x_b) / g_b(x_b)                                 g_b: what was said for the moment only

The target is the law of the prior's path times all that was said and not taken back. No denoiser is differentiated.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.particles.backend import ParticleBackend
from inverse.particles.spectral import SpectralKernel, Step, check_reversal, check_solver, log_normal
from inverse.particles.start import GaussianStart
from inverse.problem import DiffusionProblem
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["ConjugateBackend", "ConjugateKernel", "Said"]


@dataclass(frozen=True)
class ConjugateBackend(ParticleBackend):
    """The door of particle backends with a `ConjugateKernel`, for linear data with Gaussian noise.

    Args:
        solver: the stochastic solver of the prior's steps.

    Raises:
        OptionError: the steps of the solver are not those of the reverse SDE.
    """

    solver: Solver = field(default_factory=DPMSolver2MSDE)

    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver)
        check_reversal(self.solver, type(self).__name__)


@dataclass(frozen=True)
class Said:
    """What is said of the coordinates at a level.

    Args:
        center: (r,) or (particle, r) o.
        variance: (r,) or (particle, r) v.
        active: (r,) or (particle, r) bool, of which coordinates anything is said.
    """

    center: Tensor
    variance: Tensor
    active: Tensor


class ConjugateKernel(SpectralKernel):
    """Moves a population by the prior's step given what is said of its end; a subclass says it.

    Raises:
        OptionError: the steps of the solver are not those of the reverse SDE, c^2 = b^2 (1 - b^2 / a^2).
    """

    def __init__(
        self, problem: DiffusionProblem, sigmas: Tensor, solver: Solver, chunk: int | None, method: str
    ) -> None:
        super().__init__(problem, sigmas, solver, chunk, method)
        check_reversal(solver, method)

    @abstractmethod
    def first(self, own: dict[str, Tensor]) -> tuple[Said, Tensor]:
        """What is said of the first level, and the log of what of it is taken back at once, (particle,) or 0-d."""

    @abstractmethod
    def said(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Said:
        """What is said of the level after, given the coordinates (particle, r) at a level."""

    @abstractmethod
    def taken_back(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Tensor:
        """Log of what was said of a level for the moment only, (particle,) or 0-d."""

    def begin(self, particles: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What else particles carry at the first level."""
        return {}

    def carry(self, own: dict[str, Tensor], level: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What else particles carry at the level after."""
        return {}

    def start(self, particles: int, generator: torch.Generator) -> Step:
        """Particles at the first level, from the prior's start given what is said there."""
        begin = GaussianStart.of(self.problem, self.data.svd, self.sigmas[0])
        own = self.begin(particles, generator)
        said, back = self.first(own)
        x = self.problem.prior.start(self.problem.noise(particles, generator), self.sigmas[0])
        spread = said.variance.sqrt() * self.noise(particles, generator)
        x = x + begin.gain(said.center - self.data.of_x(x) - spread, said.variance)
        known = self.constant + begin.log_prob(said.center, said.variance) - back
        return self.look(x, 0, None, own | {"known": known.expand(particles)})

    def first_weight(self, population: Step) -> Tensor:
        """What the start says of the data, and the weight as after every step."""
        return population.own["known"] + self._increment(population, 0)

    def look(self, x: Tensor, level: int, state: Any, own: dict[str, Tensor]) -> Step:
        """One denoiser call, and the twist."""
        _, mean, state = self.step(x, level, state)
        said = self.said(self.data.of_x(x), level, own)
        gap, spread = said.center - self.data.of_x(mean), self.variance[level] + said.variance
        twist = log_normal(gap.double(), spread.double(), said.active)
        return Step(x, mean, twist, state, own)

    def move(
        self, population: Step, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Step, Tensor]:
        """The prior's step given what is said of its end, and its weight; the first particles go to `retained`."""
        said, variance = self.said(self.data.of_x(population.x), level, population.own), self.variance[level]
        noise = self.problem.noise(len(population.x), generator)
        mean, z = self.data.of_x(population.mean), self.data.of_x(noise)
        gain = variance / (variance + said.variance)
        seen = mean + gain * (said.center - mean) + (variance * (1 - gain)).clamp(min=0).sqrt() * z
        x = population.mean + math.sqrt(variance) * noise
        x = self.data.replace(x, torch.where(said.active, seen, self.data.of_x(x)))
        if retained is not None:
            x = torch.cat([retained, x[len(retained) :]])
        new = self.look(x, level + 1, population.state, self.carry(population.own, level, generator))
        return new, self._increment(new, level + 1)

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """(rows, r) standard normal noise for the coordinates."""
        return self.problem.noise(rows, generator, self.data.s.shape[-1:])

    def _increment(self, population: Step, level: int) -> Tensor:
        """log psi less what is taken back."""
        return population.log_twist - self.taken_back(self.data.of_x(population.x), level, population.own)

r"""Particles moved by any guide in any stochastic solver; the weights undo what the guide got wrong.

    propose  x_b ~ N(m', c^2 I)       m' : the solver's step with E[x_0 | x, y] of the guide
    weigh    w <- w N(x_b; m, c^2 I) / N(x_b; m', c^2 I) psi_b(x_b) / psi_a(x_a)       m : the same step without guide

At the last level x_0 = D(x) and w <- w p(y | x_0) / psi. History of the solver, of both paths, is part of the state.
Source: Wu et al. (2023) [read]; with a second-order solver as the kernel [derived].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inverse.chunks import Chunks
from inverse.particles.spectral import check_solver
from inverse.problem import DiffusionProblem
from sde.solvers.transition import Solver

__all__ = ["GuidedKernel"]


@dataclass(frozen=True)
class Led:
    """All particles at one level: estimates with and without data, and every state that the next step needs."""

    x: Tensor
    prior: Tensor
    posterior: Tensor
    log_twist: Tensor
    guide_state: Any = None
    free_state: Any = None
    led_state: Any = None

    def select(self, index: Tensor) -> Led:
        """The same state with particles `index`, histories included."""
        return Led(**pytree.tree_map(lambda t: None if t is None else t[index], self.__dict__))

    def pack(self) -> dict[str, Tensor]:
        """All tensors, by path."""
        packed: dict[str, Tensor] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                packed[name] = value
            elif value is not None:  # histories are flat dictionaries
                packed |= {f"{name}.{key}": tensor for key, tensor in value.items()}
        return packed


class GuidedKernel:
    """Moves a population by a guided solver step.

    The target has the prior's start at the first level, and x_0 = D(x) at the last; after `at` and `start` the first
    step of a solver with history is of first order.

    Args:
        problem: prior and likelihood.
        sigmas: (levels + 1,) noise levels, the last exactly zero.
        guide: a bound guide, `guide(x, sigma, sigma_next, state) -> Guided`.
        solver: a stochastic solver that needs one evaluation per step.
        chunk: particles per guide call.

    Raises:
        OptionError: the solver has no density, needs more than one evaluation or a covariance.
    """

    def __init__(
        self,
        problem: DiffusionProblem,
        sigmas: Tensor,
        guide: Callable[..., Any],
        solver: Solver,
        chunk: int | None = None,
    ) -> None:
        check_solver(solver)
        self.problem, self.sigmas, self.guide, self.solver = problem, sigmas, guide, solver
        self.chunks = Chunks(chunk)

    @property
    def levels(self) -> int:
        """Number of positive noise levels."""
        return len(self.sigmas) - 1

    def start(self, particles: int, generator: torch.Generator) -> Led:
        """Particles at the first level, from the prior's own start."""
        noise = self.problem.noise(particles, generator)
        return self.at(self.problem.prior.start(noise, self.sigmas[0]), 0)

    def first_weight(self, population: Led) -> Tensor:
        """The twist."""
        return population.log_twist

    def at(self, x: Tensor, level: int) -> Led:
        """The population of particles x at a level, without history."""
        return self._look(x, level, None)

    def unpack(self, tensors: dict[str, Tensor], level: int) -> Led:
        """The population that `pack` described."""
        fields: dict[str, Any] = {}
        for path, tensor in tensors.items():
            name, _, key = path.partition(".")
            if key:
                fields.setdefault(name, {})[key] = tensor
            else:
                fields[name] = tensor
        return Led(**fields)

    def move(
        self, population: Led, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Led, Tensor]:
        """One guided step and its weight; the first particles go to `retained`."""
        a, b = self.sigmas[level], self.sigmas[level + 1]
        free = self.solver.step(population.x, a, b, population.prior, population.free_state)
        led = self.solver.step(population.x, a, b, population.posterior, population.led_state)
        assert isinstance(free.covariance, Tensor)
        assert isinstance(led.covariance, Tensor)
        guide_state, before = population.guide_state, population.log_twist
        del population  # a large one; nothing of it outlives its use while the guide fills the next
        noise = self.problem.noise(len(before), generator)
        if retained is not None:
            kept = len(retained)
            own = (retained - led.mean[:kept]) / led.covariance.sqrt().to(retained)
            noise = torch.cat([own, noise[kept:]])
        x = led.sample(noise)
        # |x - m'|^2 = c^2 |noise|^2 exactly; written so that nothing cancels.
        shift = (led.mean - free.mean).flatten(1).div_(free.covariance.sqrt())
        log_ratio = -torch.linalg.vecdot(shift, noise.flatten(1)) - 0.5 * torch.linalg.vecdot(shift, shift)
        states = {"free_state": free.state, "led_state": led.state}
        del free, led, noise, shift
        new = replace(self._look(x, level + 1, guide_state), **states)
        return new, log_ratio + new.log_twist - before

    def last_weight(self, population: Led) -> Tensor:
        """log p(y | x_0) - log psi: from here on the likelihood is exact."""
        clean = self._clean(population)
        return self.chunks(self.problem.likelihood.log_prob, clean) - population.log_twist

    def finish(self, population: Led, generator: torch.Generator) -> Tensor:
        """The clean values; the last step of the solver adds no noise."""
        return self._clean(population)

    def _clean(self, s: Led) -> Tensor:
        return self.solver.step(s.x, self.sigmas[-2], self.sigmas[-1], s.prior, s.free_state).mean

    def _look(self, x: Tensor, level: int, guide_state: Any) -> Led:
        """The guide's two estimates at a level: the only denoiser call of a step."""
        a, b = self.sigmas[level], self.sigmas[level + 1]

        def call(x: Tensor, state: Any) -> tuple[Any, ...]:
            g = self.guide(x, a, b, state)
            return g.prior, g.posterior, g.log_twist, g.state

        prior, posterior, log_twist, state = self.chunks(call, x, guide_state)
        return Led(x, prior, posterior, log_twist, state)

r"""FPS-SMC: particles filter a noisy copy of the data, drawn from the first level on, that shares its noise with x.

With y_i = z_i + tau_i n along every singular direction, the copy is o = y + W + e: W the noise of the path, of variance
b^2 in x_b = x_0 + W_b, and e noise of its own of variance (slack b)^2, both with independent increments. Then

    o_b = z_b + r_b,  r_b = tau n + e_b,  v_b = tau^2 + (slack b)^2,   r_b | r_a ~ N(l r_a, v_b (1 - l)),  l = v_b / v_a

and the particles filter a chain whose observation noise has memory. With m, c^2 of the prior's step from a to b,

    o_b ~ p(o_b | o_a, y) = N(y + (b / a)^2 (o_a - y), (1 + slack^2) b^2 (1 - (b / a)^2))
    x_b ~ N(x_b; m, c^2) N(o_b; z_b + l (o_a - z_a), v_b (1 - l)), normalised
    w   <- w N(o_b; m + l (o_a - z_a), c^2 + v_b (1 - l)) / p(o_a | o_b)

where p(o_a | o_b) = p(o_b | o_a, y) p(o_a | y) / p(o_b | y): copies far from y are not favoured on the way.
The published weights have l = 0 and tau^2 for v_b (1 - l): noise of the data that is drawn anew at every level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.particles.conjugate import ConjugateBackend, ConjugateKernel, Said
from inverse.particles.spectral import log_normal
from inverse.problem import DiffusionProblem
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde.solvers.transition import Solver

__all__ = ["FPSSMC"]


@register
@dataclass(frozen=True)
class FPSSMC(ConjugateBackend):
    """FPS-SMC for linear data with Gaussian noise and an operator with a decomposition; no vjp.

    Exact for the program with the prior as the solver's steps make it, at any number of them, as particles grow: copy
    and path are one model of which the data are a part, for any slack above zero. As steps grow too it is exact for
    the program itself. Every particle has a copy of its own; one for all, as published, is exact on average over runs.
    The published weights also forget that all levels share the noise of the data: they count the data again at every
    level, and the variance in measured directions goes to zero as steps grow.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per denoiser call; changes memory, nothing else.
        solver: the stochastic solver of the prior's steps.
        slack: noise of the copy beside that of x, in units of the level: large values say less at high levels, small
            ones pin the particles to their first residuals.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.

    Source: Dou & Song (2024), algorithm 2 [read]; slack, the memory in the weights, a copy for every particle and the
    exact start [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> posterior = ppl.infer(program, FPSSMC(steps=50), draws=500)
        >>> abs(posterior.log_evidence.value.item() + 1.4305) < 0.2                 # log N(1; 0, 1.25)
        True
    """

    slack: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.slack > 0 and math.isfinite(self.slack)):
            raise OptionError(f"slack must be positive and finite, in units of the noise level, got {self.slack}")

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> FPSKernel:
        """The prior's step given a noisy copy of the data."""
        return FPSKernel(problem, self.levels(problem), self.solver, self.chunk, self.slack)


class FPSKernel(ConjugateKernel):
    """Says where a particle's noisy copy of the data is."""

    def __init__(
        self, problem: DiffusionProblem, sigmas: Tensor, solver: Solver, chunk: int | None, slack: float
    ) -> None:
        super().__init__(problem, sigmas, solver, chunk, "FPSSMC")
        levels = sigmas.to(self.tau.device).double().reshape(-1, *[1] * self.tau.ndim)
        spread = self.tau.double().square() + (slack * levels).square()
        # v_b (1 - l) from v_a - v_b = slack^2 (a^2 - b^2): in float32 l rounds to 1 for data far noisier than b.
        fallen = slack**2 * (levels[:-1].square() - levels[1:].square())
        self.fresh = (spread[1:] * fallen / spread[:-1]).to(self.tau)
        self.spread = spread.to(self.tau)
        self.scale = math.sqrt(1 + slack**2)  # of the copy's noise, in units of that of x
        self.every = torch.ones_like(self.tau, dtype=torch.bool)

    def begin(self, particles: int, generator: torch.Generator) -> dict[str, Tensor]:
        """(particle, r) copies of the data at the first level and the one after."""
        now = self.center + self.scale * float(self.sigmas[0]) * self.noise(particles, generator)
        return {"now": now, "next": self._next(now, 0, generator)}

    def carry(self, own: dict[str, Tensor], level: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The copies one level on."""
        return {"now": own["next"], "next": self._next(own["next"], level + 1, generator)}

    def first(self, own: dict[str, Tensor]) -> tuple[Said, Tensor]:
        """The copy at the first level; nothing is taken back."""
        return Said(own["now"], self.spread[0], self.every), self.tau.new_zeros((), dtype=torch.float64)

    def said(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Said:
        """The copy at the level after, less what is remembered of the noise at this one."""
        memory = self.spread[level + 1] / self.spread[level]
        return Said(own["next"] - memory * (own["now"] - seen), self.fresh[level], self.every)

    def taken_back(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Tensor:
        """Log density of the copy at the level given that at the one after: by it the next step was proposed."""
        a, b = float(self.sigmas[level]), float(self.sigmas[level + 1])
        spread = self.tau.new_full(self.tau.shape, self.scale**2 * (a**2 - b**2))
        return log_normal((own["now"] - own["next"]).double(), spread.double())

    def _next(self, copy: Tensor, level: int, generator: torch.Generator) -> Tensor:
        """The copy at the level after; at the last it is the data."""
        if level + 1 == self.levels:
            return self.center.expand_as(copy)
        spread = self.scale * math.sqrt(self.variance[level])
        return self.center + self.kept(level) * (copy - self.center) + spread * self.noise(len(copy), generator)

r"""DDSMC: particles on a decoupled chain, whose steps are draws of a Gaussian given the data, noised again.

x^ is the clean value seen from x_a and the chain's step is N(m, c^2 I). Direction by direction in the singular basis,
with q the prior's mean and l, g, W numbers of the level, W_a = W_b + g_a^2 c^2 and W = 0 at the last,

    psi_a(x_a)       = prod_i N(y_i; q + l (x^ - q), tau_i^2 + W_a)
    p~(y | x_b, x_a) = prod_i N(y_i; q + l (x^ - q) + g_a (z_b - m), tau_i^2 + W_b)
    x_b ~ N(x_b; m, c^2) p~(y | x_b, x_a), normalised,        w <- w psi_b(x_b) / p~(y | x_b, x_a)

"tweedie":  m the solver's step with x^ = D(x_a), c^2 = b^2 (1 - b^2 / a^2);   l = 1, g_a = sd^2 / (sd^2 + b^2)
"flow":     m = x^ the end of the probability flow from x_a, c = b, so that every level keeps the prior's law;
            l_a = g_a = l_b sd / sqrt(sd^2 + b^2), the correlation of x_0 with x^

For a prior N(q, sd^2 I) psi is exact and all steps have weight one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from inverse.many import lane_zeros
from inverse.particles.backend import ParticleBackend
from inverse.particles.spectral import SpectralKernel, Step, check_reversal, check_solver, log_normal
from inverse.problem import DiffusionProblem
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import edm_grid
from sde.solvers import DPMSolver2M, DPMSolver2MSDE, sample
from sde.solvers.transition import Solver

__all__ = ["DDSMC"]

Reconstruction = Literal["flow", "tweedie"]


@register
@dataclass(frozen=True)
class DDSMC(ParticleBackend):
    """DDSMC for linear data with Gaussian noise and an operator with a decomposition; no vjp.

    Exact for the program with the prior as the chain makes it, at any number of levels, as particles grow. With "flow"
    that is the prior itself as the flow is solved finely, at any number of levels; with "tweedie" as steps grow. The
    published interpolations between the two have the prior's law in no limit and are not offered, and the last step
    is the chain's own, weighed by the likelihood, where the published one returns a mean.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per denoiser call; changes memory, nothing else.
        reconstruction: how x_0 is seen from a noise level: "flow" or "tweedie".
        ode_steps: denoiser calls of the probability flow at every level, for "flow".
        solver: the stochastic solver of the prior's steps, for "tweedie".

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.

    Source: Ekstrom Kelvinius, Zhao & Lindsten (2025), algorithm 1, and filipekstrm/ddsmc [read]; the limits, the last
    step and the second-order chain [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> posterior = ppl.infer(program, DDSMC(steps=50), draws=500)
        >>> abs(posterior.log_evidence.value.item() + 1.4305) < 0.1                 # log N(1; 0, 1.25)
        True
    """

    reconstruction: Reconstruction = "tweedie"
    ode_steps: int = 10
    solver: Solver = field(default_factory=DPMSolver2MSDE)

    limit: ClassVar[tuple[str, ...]] = ("particles", "steps", "ode_steps")
    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction not in ("flow", "tweedie"):
            raise OptionError(f'reconstruction must be "flow" or "tweedie", got {self.reconstruction!r}')
        if self.ode_steps < 2:
            raise OptionError(f"ode_steps must be 2 or more denoiser calls per level, got {self.ode_steps}")
        check_solver(self.solver)
        check_reversal(self.solver, "DDSMC")

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> DDSMCKernel:
        """The decoupled chain, or the solver's."""
        levels = self.levels(problem)
        if self.reconstruction == "flow":
            flow = _Flow(problem, levels, self.solver, self.chunk, "DDSMC")
            flow.ode_steps = self.ode_steps
            return flow
        return DDSMCKernel(problem, levels, self.solver, self.chunk, "DDSMC")


class DDSMCKernel(SpectralKernel):
    """Moves a population by draws of a Gaussian x_0 given the data; here around D(x), in the solver's chain."""

    def __init__(
        self, problem: DiffusionProblem, sigmas: Tensor, solver: Solver, chunk: int | None, method: str
    ) -> None:
        super().__init__(problem, sigmas, solver, chunk, method)
        self.mean = self.data.of_x(problem.prior.start(lane_zeros(problem)))
        self.keep, self.slope = self.closure()
        width = [0.0]
        for slope, c in zip(self.slope[-2::-1], self.variance[-2::-1], strict=True):
            width.append(width[-1] + slope**2 * c)
        self.width = width[::-1]

    def closure(self) -> tuple[list[float], list[float]]:
        """l and g by level; g is not used at the last."""
        sd = self.problem.prior.data_std
        return [1.0] * self.levels, [sd**2 / (sd**2 + b**2) for b in self.sigmas[1:].tolist()]

    def start(self, particles: int, generator: torch.Generator) -> Step:
        """Particles at the first level, from the prior's own start."""
        noise = self.problem.noise(particles, generator)
        return self.look(self.problem.prior.start(noise, self.sigmas[0]), 0, None, {})

    def first_weight(self, population: Step) -> Tensor:
        """The twist."""
        return population.log_twist

    def look(self, x: Tensor, level: int, state: Any, own: dict[str, Tensor]) -> Step:
        """Reconstruct, and the twist."""
        clean, mean, state = self.step(x, level, state)
        gap = self.center - self.mean - self.keep[level] * (self.data.of_x(clean) - self.mean)
        return Step(x, mean, self._log_normal(gap, self.width[level]), state, {"gap": gap})

    def move(
        self, population: Step, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Step, Tensor]:
        """The chain's step given the data, and its weight; the first particles go to `retained`."""
        slope, variance = self.slope[level], self.variance[level]
        noise = self.problem.noise(len(population.x), generator)
        gap, mean = population.own["gap"], self.data.of_x(population.mean)
        gain = slope * variance / (self.width[level] + self.tau.square())
        spread = (variance * (1 - slope * gain)).clamp(min=0).sqrt()
        moved = mean + gain * gap + spread * self.data.of_x(noise)
        x = self.data.replace(population.mean + math.sqrt(variance) * noise, moved)
        if retained is not None:
            x = torch.cat([retained, x[len(retained) :]])
        left = gap - slope * (self.data.of_x(x) - mean)
        new = self.look(x, level + 1, population.state, {})
        return new, new.log_twist - self._log_normal(left, self.width[level + 1])

    def _log_normal(self, gap: Tensor, width: float) -> Tensor:
        """Log density of the data, (particle, r) -> (particle,), by the closure's variance `width` of x_0."""
        return self.constant + log_normal(gap.double(), self.tau.double().square() + width)


class _Flow(DDSMCKernel):
    """The decoupled chain: the end of the probability flow, noised to the next level."""

    ode_steps = 2

    def noise_variance(self, a: float, b: float) -> float:
        """All the noise of the next level."""
        return b**2

    def closure(self) -> tuple[list[float], list[float]]:
        """l = g by level."""
        variance, keep = self.problem.prior.data_std**2, [1.0]
        for b in reversed(self.sigmas[1:-1].tolist()):
            keep.append(keep[-1] * math.sqrt(variance / (variance + b**2)))
        return keep[::-1], keep[::-1]

    def step(self, x: Tensor, level: int, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The end of the flow, twice: it is where the next step starts."""
        top, low = float(self.sigmas[level]), float(self.sigmas[-2])
        # Near the last level there is no use for more steps than there are levels left.
        steps = min(self.ode_steps, self.levels - level)
        levels = edm_grid(top, low, steps) if steps > 1 else torch.tensor([top, 0.0], dtype=torch.float64)
        clean = self.chunks(lambda rows: sample(DPMSolver2M(), self.problem.prior.denoise, rows, levels), x)
        return clean, clean, None

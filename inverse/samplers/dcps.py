r"""Divide and conquer: blocks of noise levels, each with a posterior of its own to reach, 0 in the end.

A block runs from level a_0 down to e, with the target p_e(x) p(y | x)^{tau_e},   tau_e = sd^2 / (sd^2 + e^2):

    seen from b > e:   log g_b(x) ~ tau_e log p(y | x_e),   x_e = D + (e / b)^2 (x - D) + e sqrt(1 - (e / b)^2) z
    at a_0:            tamed Langevin steps on log p_{a_0} + log g_{a_0}
    step a -> b:       a Gaussian fitted to p(x_b | x_a) g_b(x_b)     (inverse/samplers/mean_field.py)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.guides.base import denoise_with_vjp, likelihood_gradient
from inverse.guides.damping import per_lane
from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.mean_field import MeanField, Optimizer
from inverse.samplers.trajectory import TrajectorySampler, trajectory_levels
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule

__all__ = ["DCPS"]


@register
@dataclass(frozen=True)
class DCPS(TrajectorySampler):
    r"""DCPS for any differentiable likelihood or `pyro.factor`.

    Never exact: each transition is a Gaussian with a diagonal covariance, and the data reach a block only through a
    draw of its end. The bias shrinks with steps, and up to a few with blocks. Measured on the sixteen-dimensional
    Gaussian problem at noise 0.05: mean off by 0.06 posterior sd, variance 1.01 times the truth in the measured
    directions and 0.97 times in the others; 0.16 sd, 1.4 and 0.79 at 25 steps. One block gives 0.24 sd, 0.62 and 0.80;
    six give 0.09 sd, 1.7 and 1.0, since the target of a block takes no note of the noise that x has at its end.

    Args:
        steps: noise levels.
        blocks: intermediate posteriors, the last of which is the posterior; equally many levels each; 3 published.
        langevin_steps: tamed Langevin steps at the start of a block; 10 to 100 published.
        langevin_size: gamma, in units of the variance of x at the level; 1e-3 published.
        fit_steps: gradient steps of the fit of a transition; 2 published.
        learning_rate: of the fit, in sds of the transition; 1 published, for "sgd" in units of the data.
        optimizer: "sgd", whose gradients are shortened to length one, or "adam".
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Denoiser evaluations per draw: `steps * (1 + fit_steps) + blocks * langevin_steps`, nearly all of them with a vjp.

    Source: Janati et al. (2024) in the form of Badr-MOUFAD/dcps [read]. There the data of a block are scaled
    by alpha_e, which is the power tau_e for unit data and linear Gaussian noise; the power for any likelihood and any
    sd, and the units of the steps [derived]. Published "sgd" moves by the full length however small the gradient.

    Example:
        >>> DCPS(steps=60, blocks=3).boundaries()
        (20, 40, 60)
    """

    steps: int = 100
    blocks: int = 3
    langevin_steps: int = 10
    langevin_size: float = 1e-3
    fit_steps: int = 2
    learning_rate: float = 1.0
    optimizer: Optimizer = "sgd"
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if not 1 <= self.blocks <= self.steps:
            raise OptionError(f"blocks must lie between 1 and steps={self.steps}, got {self.blocks}")
        if self.langevin_steps < 0:
            raise OptionError(f"langevin_steps must be zero or more, got {self.langevin_steps}")
        if not 0 < self.langevin_size < 1:
            raise OptionError(f"langevin_size must lie in (0, 1), got {self.langevin_size}; 1e-3 is published")
        _ = self.fit

    @property
    def fit(self) -> MeanField:
        """The fit of a transition."""
        return MeanField(self.fit_steps, self.learning_rate, self.optimizer)

    def boundaries(self) -> tuple[int, ...]:
        """Index of the level at which every block ends."""
        return tuple(round(self.steps * (k + 1) / self.blocks) for k in range(self.blocks))

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Blocks:
        """The steps that lanes take on a problem."""
        levels = trajectory_levels(self.schedule, self.steps, problem).tolist()
        return _Blocks(self, problem, levels, cost)


class _Blocks(Descent):
    """The method that `run_lanes` runs."""

    def __init__(self, options: DCPS, problem: DiffusionProblem, levels: list[float], cost: Cost | None) -> None:
        super().__init__(problem, levels, cost)
        self.options = options
        self.ends = options.boundaries()

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """Langevin steps where a block begins, and one fitted transition."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        end = self.levels[next(e for e in self.ends if e > step)]
        if step == 0 or step in self.ends:
            for _ in range(self.options.langevin_steps):
                x = self.langevin(x, a, end, noise.normal(self.problem.shape))
        clean = self.problem.prior.denoise(x, a)
        ratio = (b / a) ** 2
        mean = clean + ratio * (x - clean)
        if b == 0:
            return {"x": mean}

        def gradient(x: Tensor) -> Tensor:
            z = noise.normal(self.problem.shape) if end > 0 else None
            return self.potential(x, b, end, z)[1]

        return {"x": self.options.fit.draw(mean, b * math.sqrt(1 - ratio), gradient, noise)}

    def tempering(self, end: float) -> float:
        """tau_e."""
        variance = self.problem.prior.data_std**2
        return variance / (variance + end**2)

    def potential(self, x: Tensor, level: float, end: float, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """D and grad log g at a level, by the mean of x_e where there is no z; at the end itself D is x."""
        tau = self.tempering(end)
        if level == end:
            return x, tau * likelihood_gradient(self.problem, x, self.cost)[1]
        clean, vjp = denoise_with_vjp(self.problem, x, level, self.cost)
        ratio = (end / level) ** 2
        ahead = clean + ratio * (x - clean)
        if z is not None:
            ahead = ahead + end * math.sqrt(1 - ratio) * z
        g = tau * likelihood_gradient(self.problem, ahead, self.cost)[1]
        return clean, ratio * g + (1 - ratio) * vjp(g)

    def langevin(self, x: Tensor, level: float, end: float, z: Tensor) -> Tensor:
        """x + h G / (1 + gamma sd_x |G|) + sqrt(2 h) z,  h = gamma sd_x^2,  sd_x^2 = sd^2 + level^2."""
        clean, slope = self.potential(x, level, end, None)
        drift = (clean - x) / level**2 + slope
        gamma = self.options.langevin_size
        variance = self.problem.prior.data_std**2 + level**2
        length = torch.linalg.vector_norm(drift.flatten(1), dim=1)
        tame = per_lane(1 + gamma * math.sqrt(variance) * length, x)
        return x + gamma * variance * drift / tame + math.sqrt(2 * gamma * variance) * z

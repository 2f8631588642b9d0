r"""Midpoint guidance: a point at a lower level, where the likelihood is easier to judge, and a bridge back to the step.

Step a -> b with a midpoint m <= b:

    p(x_m | x_a) ~ N(D + (m / a)^2 (x_a - D), m^2 (1 - (m / a)^2)),   D = D(x_a, a)
    x_m ~ a Gaussian fitted to p(x_m | x_a) p(y | D(x_m, m))     (inverse/samplers/mean_field.py)
    x_b = ((b^2 - m^2) x_a + (a^2 - b^2) x_m) / (a^2 - m^2) + sqrt((a^2 - b^2) (b^2 - m^2) / (a^2 - m^2)) z
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.guides.base import denoise_with_vjp, likelihood_gradient
from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.mean_field import MeanField, Optimizer
from inverse.samplers.trajectory import TrajectorySampler, trajectory_levels
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule, VariancePreserving

__all__ = ["MGPS", "bridge"]


def bridge(x: Tensor, middle: Tensor, a: float, b: float, m: float) -> tuple[Tensor, float]:
    """Mean and variance of x_b given x_a = x and x_m = middle, m <= b <= a.

    Example:
        >>> import torch
        >>> bridge(torch.ones(1), torch.zeros(1), 2.0, 1.0, 0.0)
        (tensor([0.2500]), 0.75)
    """
    whole, upper, lower = a**2 - m**2, a**2 - b**2, b**2 - m**2
    return (lower * x + upper * middle) / whole, upper * lower / whole


@register
@dataclass(frozen=True)
class MGPS(TrajectorySampler):
    r"""MGPS for any differentiable likelihood or `pyro.factor`.

    Never exact: the law of the midpoint is fitted by a Gaussian with a diagonal covariance, and the likelihood is taken
    at the mean of x_0 given the midpoint. The variance is the better the more steps, the mean is not. Measured on the
    sixteen-dimensional Gaussian problem at noise 0.05: mean off by 0.17 posterior sd, variance 1.10 times the truth in
    the measured directions and 0.80 times in the others; 1.6 and 0.52 at 25 steps, 1.00 and 0.89 at 300, with the mean
    where it was.

    Args:
        steps: noise levels.
        midpoint: eta: the midpoint lies at this share of the time of b in a variance-preserving diffusion of unit data;
            0.5 to 0.75 published. 1 puts it at b itself.
        fit_steps: gradient steps of the fit; 2 leave a variance of 3 where 5 leave 1.1.
        learning_rate: of the fit, in sds of the transition.
        optimizer: "sgd", whose gradients are shortened to length one, or "adam", as published, which at a
            rate of 0.1 takes several times the steps.
        warm_start: begin the fit from the denoised midpoint of the step before, at one more evaluation per step.
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Denoiser evaluations per draw: `steps * (1 + fit_steps)`, the fit's with a vjp, and `steps` for a warm start.

    Source: Moufad et al. (2025) in the form of YazidJanati/mgps [read]; the warm start there is the law given the
    denoised midpoint, as here, without its first stage of fits at level 1. The midpoint in coordinates of
    the noise level, the units of the fit, and "sgd" as the default [derived]: half way down a grid that is even in the
    logarithm of the level, the midpoint is so low that the data are missed by eight times their noise.

    Example:
        >>> [round(MGPS(midpoint=0.5).middle(b, data_std=1.0, lowest=0.01), 2) for b in (80.0, 1.0, 0.1)]
        [2.86, 0.44, 0.06]
    """

    steps: int = 100
    midpoint: float = 0.75
    fit_steps: int = 5
    learning_rate: float = 1.0
    optimizer: Optimizer = "sgd"
    warm_start: bool = True
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if not 0 <= self.midpoint <= 1:
            raise OptionError(f"midpoint must lie in [0, 1], got {self.midpoint}; 0.5 to 0.75 are published")
        _ = self.fit

    @property
    def fit(self) -> MeanField:
        """The fit of the midpoint."""
        return MeanField(self.fit_steps, self.learning_rate, self.optimizer)

    def middle(self, b: float, data_std: float, lowest: float) -> float:
        """Level of the midpoint of a step to b, at a share of the time of b in a variance-preserving diffusion."""
        time = VariancePreserving()
        t = time.time(torch.tensor(b / data_std, dtype=torch.float64))
        return min(b, max(lowest, data_std * float(time.noise_to_signal(self.midpoint * t))))

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Midpoints:
        """The steps that lanes take on a problem."""
        levels = trajectory_levels(self.schedule, self.steps, problem).tolist()
        return _Midpoints(self, problem, levels, cost)


class _Midpoints(Descent):
    """The method that `run_lanes` runs."""

    def __init__(self, options: MGPS, problem: DiffusionProblem, levels: list[float], cost: Cost | None) -> None:
        super().__init__(problem, levels, cost)
        self.options = options

    def begin(self, lanes: int, noise: Noise) -> dict[str, Tensor]:
        """x at the first noise level."""
        x = self.problem.prior.start(noise.normal(self.problem.shape), self.levels[0])
        return {"x": x, "clean": x} if self.options.warm_start else {"x": x}

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One fitted midpoint, and the bridge from it."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        clean = self.problem.prior.denoise(x, a)
        if b == 0:
            return {"x": clean, "clean": clean} if self.options.warm_start else {"x": clean}
        m = self.options.middle(b, self.problem.prior.data_std, self.levels[-2])
        ratio = (m / a) ** 2
        sd = m * math.sqrt(1 - ratio)
        start = None
        if self.options.warm_start and step > 0:
            start = (1 - ratio) / sd * (state["clean"] - clean)
        middle = self.options.fit.draw(clean + ratio * (x - clean), sd, lambda v: self.potential(v, m), noise, start)
        mean, variance = bridge(x, middle, a, b, m)
        moved = mean + math.sqrt(variance) * noise.normal(self.problem.shape)
        if not self.options.warm_start:
            return {"x": moved}
        return {"x": moved, "clean": self.problem.prior.denoise(middle, m)}

    def potential(self, x: Tensor, level: float) -> Tensor:
        """grad_x log p(y | D(x, level))."""
        clean, vjp = denoise_with_vjp(self.problem, x, level, self.cost)
        return vjp(likelihood_gradient(self.problem, clean, self.cost)[1])

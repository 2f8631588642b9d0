r"""Decoupled annealing: at every level a clean point given the data, noised again to the next level.

At level s, from x_s:    x^ = probability flow from (x_s, s) down to min(0.01, s / 10)
                         x_0 ~ p(y | x_0) N(x_0; x^, s^2 I),  in closed form or by a chain that starts at x^
                         x_{s'} = x_0 + s' z,                 and x_0 itself after the last level
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from inverse.guides.base import likelihood_gradient
from inverse.many import require_even
from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.trajectory import TrajectorySampler
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule, edm_grid

__all__ = ["DAPS"]

Inner = Literal["auto", "closed", "langevin", "hmc"]


@register
@dataclass(frozen=True)
class DAPS(TrajectorySampler):
    r"""DAPS with the likelihood of the program, at its own noise level; any differentiable likelihood, no vjp.

    Never exact: it takes x_0 | x_s for N(x^, s^2 I), which is too wide at large s, and x^ is a point of the flow and no
    draw. The published settings replace the noise level of the data by 0.01 whatever it is; that is not followed here.

    Args:
        steps: noise levels.
        ode_steps: Euler steps of the probability flow at every level, each one denoiser call; 4 published.
        inner: how x_0 is drawn: "closed" for linear data with Gaussian noise, "langevin", or "hmc"; "auto" takes the
            closed form where there is one and Langevin elsewhere.
        inner_steps: steps of a chain.
        step_size: eta of the chains at the first level, in squared units of the prior; 1e-4 to 1e-5 published, for data
            in [-1, 1].
        step_decay: eta at the last level over eta at the first; linear in the index of the level.
        momentum: m of "hmc", v <- m v + sqrt(eta) g + sqrt(2 (1 - m)) z, x <- x + sqrt(eta) v.
        sigma_min: last noise level; None takes what the data resolve in closed form, and a fifth of the prior's
            `data_std` for chains, whose steps would have to shrink with it (0.1 published, for data of sd about 0.5).
        schedule: source of the noise levels; None takes the published grid, that of Karras et al. with rho = 7, from
            the prior's sigma_max.
        chunk: most draws at a time.

    Raises:
        CapabilityError: on run, with inner="closed", if the likelihood is not linear and Gaussian.
        OptionError: on run, if steps of the chain are too large for it to be stable.

    Source: Zhang et al. (2024), algorithm 1, and zhangbingliang2019/DAPS [read]; the closed form [derived], momentum
    0.45 [inferred].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.ones(2)), DAPS(steps=20), draws=100)
        >>> posterior.mean("x").sub(1.0).abs().max() < 0.1
        tensor(True)
    """

    steps: int = 200
    ode_steps: int = 4
    inner: Inner = "auto"
    inner_steps: int = 100
    step_size: float = 1e-4
    step_decay: float = 0.01
    momentum: float = 0.45
    sigma_min: float | None = None
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if self.inner not in ("auto", "closed", "langevin", "hmc"):
            raise OptionError(f'inner must be "auto", "closed", "langevin" or "hmc", got {self.inner!r}')
        for name in ("ode_steps", "inner_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be one or more, got {getattr(self, name)}")
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise OptionError(f"step_size must be positive, got {self.step_size}")
        if not 0 < self.step_decay <= 1:
            raise OptionError(f"step_decay must lie in (0, 1], got {self.step_decay}")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum must lie in [0, 1), got {self.momentum}; 0 is Langevin")
        if self.sigma_min is not None and not self.sigma_min > 0:
            raise OptionError(f"sigma_min must be positive, or None, got {self.sigma_min}")

    def levels(self, problem: DiffusionProblem) -> Tensor:
        """(steps + 1,) float64 noise levels on a problem, the last exactly 0."""
        if self.schedule is not None:
            return self.schedule.grid(self.steps)
        low = self.sigma_min
        if low is None:
            low = problem.lowest_level if self.closed(problem) else problem.prior.data_std / 5
        if not low < problem.prior.sigma_max:
            raise OptionError(f"sigma_min={low:.4g} is not below the prior's sigma_max={problem.prior.sigma_max:.4g}")
        return edm_grid(problem.prior.sigma_max, low, self.steps)

    def closed(self, problem: DiffusionProblem) -> bool:
        """Whether x_0 is drawn in closed form."""
        return self.inner == "closed" or (self.inner == "auto" and problem.likelihood.is_gaussian)

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Decoupled:
        """The steps that lanes take on a problem."""
        return _Decoupled(self, problem, self.levels(problem).tolist(), cost)


class _Decoupled(Descent):
    """The method that `run_lanes` runs."""

    def __init__(self, options: DAPS, problem: DiffusionProblem, levels: list[float], cost: Cost | None) -> None:
        super().__init__(problem, levels, cost)
        self.options = options
        self.closed = options.closed(problem)
        if self.closed:
            require_even(problem, "DAPS in closed form")
            gaussian = problem.likelihood.gaussian
            self._operator, self._data = gaussian.operator, gaussian.data.to(problem.device, problem.dtype)
            return
        # A chain with curvature h is stable for eta h < 2; of a likelihood without Gaussian form h is not known.
        known = float(problem.likelihood.gaussian.operator.norm().max()) ** 2 if problem.likelihood.is_gaussian else 0.0
        for i, s in enumerate(self.levels[:-1]):
            if self.step(i) * (known + 1 / s**2) >= 2:
                most = 2 * options.step_size / self.step(i) / (known + 1 / s**2)
                raise OptionError(
                    f"step_size={options.step_size:.3g} is too large for the chain at level {s:.3g}, where it must be "
                    f'below {most:.3g}; lower step_size or step_decay, raise sigma_min, or use inner="closed" for '
                    "linear data with Gaussian noise"
                )

    def step(self, level: int) -> float:
        """eta of the chain at a level."""
        passed = level / max(self.steps - 1, 1)
        return self.options.step_size * (1 + passed * (self.options.step_decay - 1))

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """Down the flow, a clean point given the data, and up to the next level."""
        s, after = self.levels[step], self.levels[step + 1]
        center = self._flow(state["x"], s)
        clean = self._draw(center, s, noise) if self.closed else self._chain(center, s, self.step(step), noise)
        return {"x": clean + after * noise.normal(self.problem.shape) if after > 0 else clean}

    def _flow(self, x: Tensor, s: float) -> Tensor:
        """Euler steps of dx / ds = (x - D) / s."""
        points = edm_grid(s, min(0.01, s / 10), self.options.ode_steps + 1)[:-1]
        for a, b in pairwise(points.tolist()):
            x = x + (b - a) / a * (x - self.problem.prior.denoise(x, a))
        return x

    def _draw(self, center: Tensor, s: float, noise: Noise) -> Tensor:
        """Matheron: u + s^2 B^T (I + s^2 B B^T)^{-1} (d - B u - n), u ~ N(center, s^2 I)."""
        u = center + s * noise.normal(self.problem.shape)
        gap = self._data - self._operator(u) - noise.normal(self._operator.out_shape)
        self.cost.likelihood_evals += len(u)
        return u + s**2 * self._operator.adjoint(self._operator.solve_gram(gap, 1.0, s**2))

    def _chain(self, center: Tensor, s: float, eta: float, noise: Noise) -> Tensor:
        """Unadjusted Langevin, or its momentum form, on log p(y | x) - |x - center|^2 / (2 s^2), from the center."""
        momentum = self.options.momentum if self.options.inner == "hmc" else 0.0
        x, v = center, torch.zeros_like(center)
        if self.options.inner == "hmc":
            v = noise.normal(self.problem.shape)
        for _ in range(self.options.inner_steps):
            gradient = likelihood_gradient(self.problem, x, self.cost)[1] - (x - center) / s**2
            v = momentum * v + math.sqrt(eta) * gradient
            v = v + math.sqrt(2 * (1 - momentum)) * noise.normal(self.problem.shape)
            x = x + math.sqrt(eta) * v
        return x

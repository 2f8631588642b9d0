r"""DiffPIR: half-quadratic splitting along the reverse diffusion.

x0 = argmin |d - B x|^2 + (lambda / a^2) |x - D(x_a, a)|^2 = D + v B^T (I + v B B^T)^{-1} (d - B D),   v = a^2 / lambda
x_b = x0 + b (sqrt(1 - zeta) (x_a - x0) / a + sqrt(zeta) z)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.trajectory import TrajectorySampler, trajectory_levels
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule

__all__ = ["DiffPIR"]


@register
@dataclass(frozen=True)
class DiffPIR(TrajectorySampler):
    """DiffPIR with the noise level of the program, for linear data with Gaussian noise.

    Never exact. lambda = 1 + a^2 / sd^2 would make the proximal step the posterior mean of an isotropic Gaussian prior;
    constant and larger it trusts the denoiser more. The spread of the draws depends on zeta: it is not the posterior's.
    No vjp, and one solve with I + v B B^T per step.

    Args:
        steps: denoiser evaluations per draw; 20 to 100 as published.
        lam: lambda, weight of the denoised point; 7 to 8 published, 3 to 25 tried.
        zeta: share of the noise that is fresh, in [0, 1]; 0.1 to 1 published.
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian.

    Source: Zhu et al. (2023), algorithm 1 [read]; the choice zeta = 0.3 within the published range [inferred].

    Example:
        >>> DiffPIR(zeta=1.0).exact
        'never'
    """

    steps: int = 100
    lam: float = 7.0
    zeta: float = 0.3
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if not (self.lam > 0 and math.isfinite(self.lam)):
            raise OptionError(f"lam must be positive, got {self.lam}; 7 to 8 are published")
        if not 0 <= self.zeta <= 1:
            raise OptionError(f"zeta must lie in [0, 1], got {self.zeta}; 0.1 to 1 are published")

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Splitting:
        """The steps that lanes take on a problem."""
        levels = trajectory_levels(self.schedule, self.steps, problem).tolist()
        return _Splitting(self, problem, levels, cost)


class _Splitting(Descent):
    """The method that `run_lanes` runs."""

    def __init__(self, options: DiffPIR, problem: DiffusionProblem, levels: list[float], cost: Cost | None) -> None:
        super().__init__(problem, levels, cost)
        self.options = options
        gaussian = problem.likelihood.gaussian
        self._operator = gaussian.operator
        self._data = gaussian.data.to(problem.device, problem.dtype)

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One denoiser call, one proximal step, and part of the noise drawn afresh."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        v, zeta = a**2 / self.options.lam, self.options.zeta
        clean = self.problem.prior.denoise(x, a)
        residual = self._data - self._operator(clean)
        self.cost.likelihood_evals += len(x)
        clean = clean + v * self._operator.adjoint(self._operator.solve_gram(residual, 1.0, v))
        z = noise.normal(self.problem.shape)
        return {"x": clean + b * (math.sqrt(1 - zeta) / a * (x - clean) + math.sqrt(zeta) * z)}

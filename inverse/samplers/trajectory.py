r"""What samplers with a step of their own share: levels, the singular basis of the data, and the run itself.

With whitened data d = B x + n and B = U diag(s) V^T:   u = U^T d,   u_i = s_i (V^T x)_i + n_i,   n ~ N(0, I)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.operators.base import SVD
from inverse.problem import DiffusionProblem
from inverse.samplers.claims import NeverExact
from inverse.samplers.guided import FAR_OFF, residual_chi
from inverse.samplers.lanes import Method, run_lanes
from ppl.cost import Cost
from ppl.errors import CapabilityError, NotFiniteError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Schedule

__all__ = ["SpectralData", "TrajectorySampler", "check_level", "run_trajectories", "trajectory_levels"]


@dataclass(frozen=True)
class SpectralData:
    """The data in the singular basis of the whitened operator.

    Args:
        s: (r,) positive singular values; 1 / s_i is the noise level of the data along direction i.
        u: (r,) U^T d.
        svd: maps to and from the basis.
    """

    s: Tensor
    u: Tensor
    svd: SVD

    @classmethod
    def of(cls, problem: DiffusionProblem, method: str) -> SpectralData:
        """Decompose the operator of a problem.

        Raises:
            CapabilityError: the likelihood is not linear and Gaussian, or the operator has no decomposition.
        """
        gaussian = problem.likelihood.gaussian
        if "svd" not in gaussian.operator.capabilities:
            operator = gaussian.operator
            raise CapabilityError(
                f"{method} works in the singular basis of the whitened operator, but {type(operator).__name__} from "
                f"{operator.in_shape} to {operator.out_shape} has none and is too large for a dense one; use "
                "inverse.DiffPIR, inverse.PiGDM or inverse.MomentMatching, which solve iteratively"
            )
        svd = gaussian.operator.svd()
        u = svd.to_spectral_data(gaussian.data.double())
        return cls(svd.s.to(problem.device, problem.dtype), u.to(problem.device, problem.dtype), svd)

    def of_x(self, x: Tensor) -> Tensor:
        """V^T x, (*batch, *shape) -> (*batch, r)."""
        return self.svd.to_spectral(x)

    def replace(self, x: Tensor, seen: Tensor) -> Tensor:
        """x with its coordinates in the seen directions set to `seen` (*batch, r)."""
        return x + self.svd.from_spectral(seen - self.of_x(x))


def trajectory_levels(schedule: Schedule | None, steps: int, problem: DiffusionProblem) -> Tensor:
    """(steps + 1,) float64 levels: the schedule's, or the prior's grid down to what the data resolve; last 0."""
    if schedule is not None:
        return schedule.grid(steps)
    return problem.prior.grid(problem.prior.sigma_max, problem.lowest_level, steps)


def check_level(x: Tensor, sigma: float) -> None:
    """Raise NotFiniteError when x at a noise level inside a step is not finite, before it is denoised again."""
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise NotFiniteError(
            f"x is not finite at noise level {sigma:.4g}: {bad} of {x.numel()} values are bad; check the denoiser "
            "there, or try float64 or smaller steps"
        )


def run_trajectories(
    method: Method,
    problem: DiffusionProblem,
    *,
    draws: int,
    chains: int,
    chunk: int | None,
    generator: torch.Generator,
    monitor: Monitor,
) -> Posterior:
    """All draws of all chains by `run_lanes`, with the residuals and a note where they are far off the data."""
    with torch.no_grad(), problem.running(monitor):
        x, complete = run_lanes(
            method,
            problem,
            draws=draws,
            chains=chains,
            chunk=chunk,
            generator=generator,
            monitor=monitor,
            label="noise levels",
        )
        results = problem.results(x)
        info = residual_chi(problem, x)
    missed = float(info["residual_chi"].median()) if "residual_chi" in info and x.numel() else 0.0
    if missed > FAR_OFF:
        monitor.note(
            f"the draws miss the data by {missed:.3g} times the noise level, exact draws by about 1; take more steps, "
            "or MomentMatching"
        )
    return Posterior(draws=results, info=info, attrs={"complete": complete})


class TrajectorySampler(NeverExact):
    """The door of backends whose lanes run side by side; a subclass gives its options and `method`."""

    chunk: int | None

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> Method:
        """The steps that lanes take on a problem."""
        raise CapabilityError(f"{type(self).__name__} has no steps; write method(problem, cost) in the subclass")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw all chains side by side."""
        problem = DiffusionProblem.of(program)
        return run_trajectories(
            self.method(problem, monitor.cost),
            problem,
            draws=draws,
            chains=chains,
            chunk=self.chunk,
            generator=generator,
            monitor=monitor,
        )

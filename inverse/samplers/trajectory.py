r"""What samplers with a step of their own share: levels, and the singular basis of the data.

With whitened data d = B x + n and B = U diag(s) V^T:   u = U^T d,   u_i = s_i (V^T x)_i + n_i,   n ~ N(0, I)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inverse.many import UnlikeError
from inverse.operators.decomposition import SVD
from inverse.operators.per_lane import PerLane
from inverse.problem import DiffusionProblem
from inverse.samplers.door import TrajectorySampler
from ppl.errors import CapabilityError, NotFiniteError
from sde import Schedule

__all__ = ["SpectralData", "TrajectorySampler", "check_level", "trajectory_levels"]


@dataclass(frozen=True)
class SpectralData:
    """The data in the singular basis of the whitened operator.

    Args:
        s: (r,) positive singular values; 1 / s_i is the noise level of the data along direction i. (lanes, r) where
            operators differ from lane to lane.
        u: (r,) U^T d; (lanes, r) where data do.
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
            if isinstance(operator, PerLane):
                raise UnlikeError("their operators differ and have no decomposition in one batch")
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

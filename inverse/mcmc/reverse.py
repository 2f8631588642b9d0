"""Draws of x_0 given x_s by the reverse diffusion, for chains: the noise is drawn first, and a lane that leaves is NaN.

x_0 ~ p(x_0 | x_s = x) by `steps` solver steps from level s to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.problem import DiffusionProblem
from ppl.errors import OptionError
from sde import CovarianceCorrected, DPMSolver2MSDE, Solver
from sde.solvers import sample

__all__ = ["ReverseDiffusion", "check_solver"]


def check_solver(solver: Solver | None) -> None:
    """Raise OptionError unless the solver adds noise."""
    if solver is not None and not solver.stochastic:
        raise OptionError(
            f"{solver!r} adds no noise, but x_0 given x_s has to be drawn: the probability flow gives one point; "
            "use DPMSolver2MSDE(), Ancestral() or CovarianceCorrected()"
        )


class ReverseDiffusion:
    """The reverse diffusion of a prior as a draw from p(x_0 | x_s).

    Args:
        problem: whose prior is meant.
        solver: a stochastic step; None takes `CovarianceCorrected` where the prior has an exact covariance, which is
            exact for a Gaussian prior at any number of steps, else `DPMSolver2MSDE`.
        steps: solver steps.
        chunk: most rows of one denoiser call.
    """

    def __init__(self, problem: DiffusionProblem, solver: Solver | None, steps: int, chunk: int | None) -> None:
        self.problem, self.steps, self._chunks = problem, steps, Chunks(chunk)
        self._known = "exact_covariance" in problem.prior.capabilities
        default: Solver = CovarianceCorrected() if self._known else DPMSolver2MSDE()
        self.solver = default if solver is None else solver

    def levels(self, sigma: float) -> Tensor:
        """(steps + 1,) float64 noise levels from sigma to exactly 0."""
        low = self.problem.prior.sigma_min
        if self._known:
            low = min(low, sigma / 10)
        if low >= sigma * (1 - 1e-6):  # the prior denoises nothing in between
            return torch.tensor([sigma, 0.0], dtype=torch.float64)
        return self.problem.prior.grid(sigma, low, self.steps)

    def __call__(self, x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """x_0 (lanes, *shape) given x at level sigma; rows that are not finite come back as NaN."""
        return sample(
            self.solver,
            self.denoise,
            x,
            self.levels(sigma),
            generator,
            covariance=self.problem.prior.covariance,
        )

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, sigma) by parts of the batch; NaN for the rows that are not finite."""
        bad = ~x.flatten(1).isfinite().all(1).reshape(-1, *[1] * (x.ndim - 1))
        out = self._chunks(lambda part: self.problem.prior.denoise(part, sigma), torch.where(bad, 0.0, x))
        return torch.where(bad, torch.nan, out)

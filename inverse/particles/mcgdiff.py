r"""MCGdiff: data with noise tau_i along a direction are what the path itself is at level tau_i.

y_i = z_i + tau_i n has the law of the noised z_i at level tau_i. For the largest level b_i <= tau_i of the grid,

    p(y_i | x_{b_i}) = N(y_i; z_i, tau_i^2 - b_i^2)       is absorbed there, and x_0 is not asked again
    o_i = y_i,  v_i(a) = (a^2 - b_i^2) + (tau_i^2 - b_i^2)       at levels a above: the noise on the way down to b_i

Data noisier than the first level are absorbed by the start, data finer than the last positive level by x_0 itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.particles.conjugate import ConjugateBackend, ConjugateKernel, Said
from inverse.particles.spectral import log_normal
from inverse.problem import DiffusionProblem
from ppl.backend import register
from ppl.cost import Cost
from sde.solvers.transition import Solver

__all__ = ["MCGdiff"]


@register
@dataclass(frozen=True)
class MCGdiff(ConjugateBackend):
    """MCGdiff for linear data with Gaussian noise and an operator with a decomposition; no vjp.

    Exact as particles and steps grow: it takes the path as the reversal of noising, which it is when steps are small.
    Levels tau_i are not put on the grid, of which an operator with many singular values would need many: what noise
    is left between b_i and tau_i is kept in the factor instead. The published kappa is zero.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per denoiser call; changes memory, nothing else.
        solver: the stochastic solver of the prior's steps.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.

    Source: Cardoso et al. (2024), algorithm 1, and gabrielvc/mcg_diff [read]; leftover noise, data finer or noisier
    than all levels, and the exact start [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> posterior = ppl.infer(program, MCGdiff(steps=50), draws=500)
        >>> abs(posterior.log_evidence.value.item() + 1.4305) < 0.1                 # log N(1; 0, 1.25)
        True
    """

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> MCGdiffKernel:
        """The prior's step given where the data are on the path."""
        return MCGdiffKernel(problem, self.levels(problem), self.solver, self.chunk, "MCGdiff")


class MCGdiffKernel(ConjugateKernel):
    """Says where the data are on the path, ever more closely down to the level of their noise."""

    def __init__(
        self, problem: DiffusionProblem, sigmas: Tensor, solver: Solver, chunk: int | None, method: str
    ) -> None:
        super().__init__(problem, sigmas, solver, chunk, method)
        tau, own = self.tau.double(), sigmas.to(self.tau.device)
        levels = own.reshape(-1, *[1] * tau.ndim)
        self.last = (levels > tau).sum(0)  # as many levels as lie above tau come before the first that does not
        absorbed = own[self.last].square()
        spread = (levels.square() - absorbed).clamp(min=0) + (tau.square() - absorbed)
        self.spread = spread.to(self.tau)

    def first(self, own: dict[str, Tensor]) -> tuple[Said, Tensor]:
        """Of all coordinates, as of every level."""
        return self._at(0), torch.zeros((), dtype=torch.float64, device=self.tau.device)

    def said(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Said:
        """Of the coordinates that are not absorbed at this level or above."""
        return self._at(level + 1)

    def taken_back(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Tensor:
        """All but the factors of coordinates that the level absorbs."""
        return log_normal((seen - self.center).double(), self.spread[level].double(), self.last > level)

    def _at(self, level: int) -> Said:
        return Said(self.center, self.spread[level], self.last >= level)

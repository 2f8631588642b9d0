r"""Denoising diffusion restoration: the data enter direction by direction, in the singular basis of the operator.

With x^ = V^T D(x, a), ybar = u / s and data noise tau = 1 / s along each direction, the step from level a to b is

    not seen    x^ + sqrt(1 - eta^2) b (x - x^) / a      + eta b z
    b < tau     x^ + sqrt(1 - eta^2) b (ybar - x^) / tau + eta b z
    b >= tau    (1 - eta_b) x^ + eta_b ybar              + sqrt(b^2 - eta_b^2 tau^2) z
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.many import require_even
from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.trajectory import SpectralData, TrajectorySampler, trajectory_levels
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule

__all__ = ["DDRM", "restored"]


@register
@dataclass(frozen=True)
class DDRM(TrajectorySampler):
    """DDRM with the noise of the program, for linear data with Gaussian noise and an operator with a decomposition.

    Never exact, not even for Gaussian priors: the steps leave out the spread of x_0 given x. No vjp.

    Args:
        steps: denoiser evaluations per draw; 20 as published.
        eta: share of fresh noise in directions that the data say less of than the current level, in [0, 1].
        eta_b: weight of the data where they say more than the current level, in [0, 1].
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.

    Source: Kawar et al. (2022), equations 7 and 8 [read]; data noise of unequal or correlated entries by whitening, and
    the start in directions whose data noise is above the first level [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.1), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), DDRM(), draws=200)
        >>> [round(v, 0) for v in posterior.mean("x").tolist()]                  # the exact mean is (0.99, 0)
        [1.0, ...]
    """

    steps: int = 20
    eta: float = 0.85
    eta_b: float = 1.0
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        for name in ("eta", "eta_b"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must lie in [0, 1], got {getattr(self, name)}; published: 0.85 and 1")

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Restoration:
        """The steps that lanes take on a problem."""
        require_even(problem, "DDRM")
        levels = trajectory_levels(self.schedule, self.steps, problem).tolist()
        return _Restoration(self, problem, SpectralData.of(problem, "DDRM"), levels, cost)


class _Restoration(Descent):
    """The method that `run_lanes` runs."""

    def __init__(
        self, options: DDRM, problem: DiffusionProblem, data: SpectralData, levels: list[float], cost: Cost | None
    ) -> None:
        super().__init__(problem, levels, cost)
        self.options, self.data = options, data

    def begin(self, lanes: int, noise: Noise) -> dict[str, Tensor]:
        """The data with what noise they lack at the first level, and the prior's start elsewhere."""
        top, data = self.levels[0], self.data
        x = self.problem.prior.start(noise.normal(self.problem.shape), top)
        # Noise of its own: the prior's start may mix the directions.
        z = noise.normal(data.s.shape[-1:])
        seen = data.u / data.s + (top**2 - data.s**-2).clamp(min=0).sqrt() * z
        return {"x": data.replace(x, torch.where(data.s * top >= 1, seen, data.of_x(x)))}

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One denoiser call, and one step in the singular basis."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        clean = self.problem.prior.denoise(x, a)
        self.cost.likelihood_evals += len(x)
        z = noise.normal(self.problem.shape)
        return {"x": restored(x, clean, z, a, b, self.data, self.options.eta, self.options.eta_b)}


def restored(
    x: Tensor, clean: Tensor, z: Tensor, a: float, b: float, data: SpectralData, eta: float, eta_b: float = 1.0
) -> Tensor:
    """One step a -> b in the singular basis, from the denoised point `clean` and fresh noise z, all like x."""
    kept = math.sqrt(1 - eta**2)
    moved = clean + kept * b / a * (x - clean) + eta * b * z
    seen, z_seen = data.of_x(clean), data.of_x(z)
    gap = data.u - data.s * seen  # (ybar - x^) / tau
    fine = seen + kept * b * gap + eta * b * z_seen
    coarse = seen + eta_b * gap / data.s + (b**2 - (eta_b / data.s).square()).clamp(min=0).sqrt() * z_seen
    return data.replace(moved, torch.where(data.s * b >= 1, coarse, fine))

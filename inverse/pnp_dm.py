r"""Plug-and-play diffusion sampling: split Gibbs as published, for any differentiable likelihood.

x | z        a draw of p(x_0 | x_rho = z): the reverse diffusion from (z, rho) to 0
z | x, y     ~ N(z; x, rho^2 I) p(y | z): in closed form, or by Metropolis-adjusted Langevin steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor

from inverse.guides.base import likelihood_gradient
from inverse.samplers.lanes import Noise
from inverse.side_by_side import SideBySide
from inverse.split_gibbs import Closed, Splitting, check_sweeps, run_sweeps
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Solver

__all__ = ["PnPDM"]


@register
@dataclass(frozen=True)
class PnPDM:
    r"""Split Gibbs as published, for any differentiable likelihood: biased by the coupling, O(rho^2).

    The x-marginal sees data of noise I + rho^2 B B^T. `SplitGibbs` has no such bias for linear data.

    Args:
        rho: width of the coupling, in the prior's units; None takes a fifth of the prior's `data_std` (0.1 to 0.3
            published for data in [-1, 1]).
        steps: noise levels of the reverse diffusion in every sweep; 20 to 100 published.
        warmup: sweeps before draws are kept; 40 published.
        decay: factor on the coupling from one sweep to the next, from the prior's sigma_max down to rho.
        thin: sweeps per draw.
        inner: how z is drawn: "closed" for linear data with Gaussian noise, or "mala" with the Metropolis test, which
            the published Langevin chain leaves out; "auto" takes the closed form where there is one.
        inner_steps: steps of the chain; 100 published.
        step_size: eta of z + eta grad + sqrt(2 eta) xi, in squared units of the prior; 1e-4 published.
        solver: a stochastic step; None takes `CovarianceCorrected` where the prior has an exact covariance, else
            `DPMSolver2MSDE`.

    Source: Wu et al. (2024), algorithm 1, and zihuiwu/PnP-DM-public [read]; the Metropolis test [derived].

    Example:
        >>> PnPDM().exact
        'never'
    """

    rho: float | None = None
    steps: int = 20
    warmup: int = 40
    decay: float = 0.9
    thin: int = 1
    inner: Literal["auto", "closed", "mala"] = "auto"
    inner_steps: int = 100
    step_size: float = 1e-4
    solver: Solver | None = None

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sweeps(self)
        if self.inner not in ("auto", "closed", "mala"):
            raise OptionError(f'inner must be "auto", "closed" or "mala", got {self.inner!r}')
        if self.inner_steps < 1:
            raise OptionError(f"inner_steps must be one or more, got {self.inner_steps}")
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise OptionError(f"step_size must be positive, got {self.step_size}")

    def splitting(self, side: SideBySide, chains: int = 1, cost: Cost | None = None) -> Splitting:
        """The two draws of a sweep on problems side by side."""
        cost = Cost() if cost is None else cost
        closed = self.inner == "closed" or (self.inner == "auto" and side.first.likelihood.is_gaussian)
        rho = side.first.prior.data_std / 5 if self.rho is None else self.rho
        kind = Closed if closed else Chain
        return kind(self, side, chains, cost, [rho] * len(side))

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """All chains side by side, those of all problems together."""
        return run_sweeps(self, program, draws, chains, generator, monitor)


class Chain(Splitting):
    """z by Metropolis-adjusted Langevin steps from x, on log p(y | z) - |z - x|^2 / (2 rho^2)."""

    metropolis: ClassVar[bool] = True

    def __init__(self, options: PnPDM, side: SideBySide, chains: int, cost: Cost, rhos: Sequence[float]) -> None:
        super().__init__(options, side, chains, cost, rhos)
        self.inner_steps, self.step_size = options.inner_steps, options.step_size

    def split(self, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """`inner_steps` steps from x."""
        return self.walk(x, x, rhos, noise)

    def walk(self, z: Tensor, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """`inner_steps` steps from z, given x; a value that is not finite is refused like any other bad proposal."""
        eta, axes, width = self.step_size, tuple(range(1, x.ndim)), self.of_rows(rhos, x).square()

        def target(z: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = likelihood_gradient(self.problem, z, self.cost)
            gap = z - x
            return value - (gap.square() / (2 * width)).sum(axes), gradient - gap / width

        accepted = x.new_zeros(len(x))
        value, gradient = target(z)
        for _ in range(self.inner_steps):
            xi = noise.normal(self.problem.shape)
            proposal = z + eta * gradient + math.sqrt(2 * eta) * xi
            new_value, new_gradient = target(proposal)
            back = (z - proposal - eta * new_gradient).square().sum(axes) / (4 * eta)
            log_ratio = new_value - value + xi.square().sum(axes) / 2 - back
            uniform = torch.special.ndtr(noise.normal(Size([])))
            keep = uniform.log() < log_ratio  # false for NaN
            wide = keep.reshape(-1, *[1] * len(axes))
            z, gradient = torch.where(wide, proposal, z), torch.where(wide, new_gradient, gradient)
            value, accepted = torch.where(keep, new_value, value), accepted + keep
        return z, accepted / self.inner_steps

r"""The guided sampler: a solver of the reverse diffusion whose denoiser is a guide's, for all draws at once.

    x_next ~ solver(x, sigma, sigma_next, posterior estimate of the guide)

Guides with a conditional covariance and `CovarianceCorrected` give  x_next = rho^2 x + kappa x_0* + c z  with x_0* an
exact draw of the guide's Gaussian closure given the data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inverse.guides.base import BoundGuide, Guide, as_denoiser
from inverse.guides.moment_matching import BoundMomentMatching
from inverse.guides.tmpd import BoundTMPD
from inverse.many import LaneProblem, UnlikeError, require_even
from inverse.problem import DiffusionProblem
from inverse.samplers.claims import NeverExact
from inverse.samplers.door import FAR_OFF, TrajectorySampler, residual_chi
from inverse.samplers.lanes import Noise, check_chunk
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import DDIM, Ancestral, Schedule, Solver

__all__ = ["GuidedPreset", "GuidedSampler", "check_steps", "guided_levels", "residual_chi"]

FAR = 1e6
"""Noise level, in units of data_std, at which x says nothing and the closure is that of the prior itself."""


@register
@dataclass(frozen=True)
class GuidedSampler(TrajectorySampler):
    """Any guide with any solver. One trajectory per draw, no weights: its error does not vanish with more draws.

    Args:
        guide: such as `DPSGuide()`, `PiGDMGuide()`, `MomentMatchingGuide()`.
        solver: a step of `sde.solvers`.
        steps: solver steps per draw.
        schedule: noise levels are `schedule.grid(steps)`, for grids as published; None takes the prior's own grid.
        sigma_min: last positive noise level of the prior's grid; None chooses it: the prior's own for networks, which
            know no lower one; for exact priors and steps without covariance also at most a tenth of what the data
            resolve, since such steps blur by sigma_min.
        informed_start: for a solver that uses the covariance and a prior whose moments are known, begin from the
            closure of the prior given the data, as the first of the steps, and not from noise alone.
        chunk: most draws at a time; None is all of them.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from inverse.guides import PiGDMGuide
        >>> from sde import DPMSolver2MSDE, GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> sampler = GuidedSampler(PiGDMGuide(), DPMSolver2MSDE(), steps=20)
        >>> posterior = ppl.infer(ppl.Program(model, torch.ones(2)), sampler, draws=100)
        >>> bool((posterior.mean("x") - 0.8).abs().max() < 0.3)
        True
    """

    guide: Guide
    solver: Solver
    steps: int = 100
    schedule: Schedule | None = None
    sigma_min: float | None = None
    informed_start: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.guide, Guide):
            raise OptionError(f"guide must be a guide such as DPSGuide(), got {self.guide!r}")
        check_steps(self.steps)
        check_chunk(self.chunk)
        if self.sigma_min is not None and not self.sigma_min > 0:
            raise OptionError(f"sigma_min must be positive, or None, got {self.sigma_min}")
        if self.guide.acts_in == "step" and self.solver not in (Ancestral(), DDIM(eta=1.0)):
            raise OptionError(
                f"{self.guide!r} acts in the ancestral step, so the solver must be Ancestral(), got {self.solver!r}; "
                'or use weight="likelihood"'
            )

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _Guided:
        """The steps that lanes take on a problem."""
        if isinstance(problem, LaneProblem) and not getattr(self.guide, "per_lane", False):
            raise UnlikeError(f"{type(self.guide).__name__} takes one problem at a time")
        if getattr(self.solver, "needs_covariance", False):
            require_even(problem, f"{type(self.solver).__name__} of a guide")
        levels = guided_levels(self, problem)
        return _Guided(problem, self.guide.bind(problem, cost), self.solver, levels)

    def remarks(self, methods: Sequence[Any], missed: float) -> Iterator[str]:
        """What the guide had to mend, and data that were missed."""
        floored = sum(getattr(method.guide, "floored", 0) for method in methods)
        if floored and isinstance(methods[0].guide, BoundMomentMatching):
            yield (
                f"{floored} covariances of the data given x were not positive definite and were floored: the "
                "denoiser's Jacobian is far from symmetric there"
            )
        if floored and isinstance(methods[0].guide, BoundTMPD):
            yield (
                f"TMPD took {floored} negative row sums of the covariance of x_0 given x for zero: entries are "
                "negatively correlated there, and MomentMatchingGuide() keeps what they are"
            )
        if missed > FAR_OFF:
            yield (
                f"the draws miss the data by {missed:.3g} times the noise level, exact draws by about 1: the "
                "guidance is too weak, or its steps diverged; take more steps, another zeta, or MomentMatching"
            )


class GuidedPreset(NeverExact):
    """The door of backends that stand for a guide and a solver; a subclass gives its options and `sampler`."""

    @property
    @abstractmethod
    def sampler(self) -> GuidedSampler:
        """The guide and solver that this stands for."""

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw all chains side by side."""
        return self.sampler.run(program, draws=draws, chains=chains, generator=generator, monitor=monitor)


def check_steps(steps: int) -> None:
    """Raise OptionError unless steps is a positive integer."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"steps must be a positive integer, got {steps!r}")


def guided_levels(sampler: GuidedSampler, problem: DiffusionProblem) -> Tensor:
    """(steps + 1,) float64 noise levels of a sampler on a problem, the last exactly 0."""
    prior, steps = problem.prior, sampler.steps
    if sampler.schedule is not None:
        return sampler.schedule.grid(steps)
    corrected = getattr(sampler.solver, "needs_covariance", False)
    low = sampler.sigma_min
    if low is None:
        low = prior.sigma_min if corrected else problem.lowest_level
    if not low < prior.sigma_max:
        raise OptionError(f"sigma_min={low:.4g} is not below the prior's sigma_max={prior.sigma_max:.4g}")
    if sampler.informed_start and corrected and "exact_covariance" in prior.capabilities:
        far = torch.tensor([FAR * prior.data_std], dtype=torch.float64)
        if steps == 1:
            return torch.cat([far, far.new_zeros(1)])
        if steps == 2:
            return torch.cat([far, far.new_tensor([low, 0.0])])
        return torch.cat([far, prior.grid(prior.sigma_max, low, steps - 1)])
    return prior.grid(prior.sigma_max, low, steps)


class _Guided:
    """The method that `run_lanes` runs."""

    def __init__(self, problem: DiffusionProblem, guide: BoundGuide, solver: Solver, levels: Tensor) -> None:
        self.problem, self.guide, self.solver, self.levels = problem, guide, solver, levels
        self._denoiser: Callable[..., Any] = as_denoiser(guide)
        self._corrected = getattr(solver, "needs_covariance", False)

    @property
    def steps(self) -> int:
        """Solver steps."""
        return len(self.levels) - 1

    def begin(self, lanes: int, noise: Noise) -> dict[str, Tensor]:
        """x at the first noise level."""
        return {"x": self.problem.prior.start(noise.normal(self.problem.shape), self.levels[0])}

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One evaluation of the guide and one solver step."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        guided = self.guide(x, a, b, _part(state, "guide."))
        extra: dict[str, Any] = {"denoiser": self._denoiser}
        if self._corrected:
            if guided.covariance is None:
                raise OptionError(f"{self.solver!r} needs a guide with a covariance, such as MomentMatchingGuide()")
            extra["covariance"] = guided.covariance
        move = self.solver.step(x, a, b, guided.posterior, _part(state, "solver."), **extra)
        if not isinstance(move.covariance, Tensor):
            x = move.sample(noise.normal(move.covariance.noise_shape))
        elif self.solver.stochastic and float(move.covariance) > 0:
            x = move.sample(noise.normal(self.problem.shape))
        else:
            x = move.mean
        solver = {f"solver.{n}": t for n, t in (move.state or {}).items()}
        guide = {f"guide.{n}": t for n, t in (guided.state or {}).items()}
        return {"x": x, **solver, **guide}

    def end(self, state: dict[str, Tensor], noise: Noise) -> Tensor:
        """The clean values."""
        return state["x"]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """The entries of a state that belong to the solver or to the guide; None where there are none."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)} or None

"""Twisted sequential Monte Carlo: a guided sampler whose particles are weighted, so that the guide cannot bias it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from inverse.guides import PiGDMGuide
from inverse.many import LaneProblem, UnlikeError
from inverse.particles.backend import ParticleBackend
from inverse.particles.closure import ClosureKernel, MomentClosure
from inverse.particles.core import Kernel
from inverse.particles.guided import GuidedKernel
from inverse.particles.moves import NoiseUp
from inverse.particles.spectral import check_reversal
from inverse.problem import DiffusionProblem
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["TwistedSMC", "particle_kernel"]


@register
@dataclass(frozen=True)
class TwistedSMC(ParticleBackend):
    """Twisted SMC, its runs repeated and merged by evidence until the root ESS reaches the number of draws.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per guide call; changes memory, nothing else.
        guide: what leads the particles, such as `PiGDMGuide()`; None takes the full moment closure where the prior
            has an exact covariance, and `PiGDMGuide()` otherwise.
        solver: the stochastic solver that a guide acts in.
        moves: after every resampling, noise all particles up and lead them back, this many times; a proposal is
            accepted by the weights of its path. Each costs 2 (climb + 1) denoiser calls per particle.
        climb: levels that a move goes up.

    The target is the program with the discretised prior: the error vanishes as particles (and steps) grow. Draws are
    equally weighted; `info["root_ess"]` says how many independent ones they are worth.

    Source: Wu et al. (2023), twisted diffusion sampler [read]; closure, root ESS and merging [derived], with defaults
    measured on exact problems.

    Example:
        >>> import ppl, torch, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> posterior = ppl.infer(program, TwistedSMC(steps=5), draws=500)
        >>> abs(posterior.log_evidence.value.item() + 1.4305) < 0.05                # log N(1; 0, 1.25)
        True
    """

    guide: Any = None
    solver: Solver = field(default_factory=DPMSolver2MSDE)
    moves: int = 0
    climb: int = 3

    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moves < 0:
            raise OptionError(f"moves must be zero or more per resampling, got {self.moves}")
        if self.climb < 1:
            raise OptionError(f"climb must be one or more noise levels, got {self.climb}")
        if self.moves:
            check_reversal(self.solver, "TwistedSMC(moves=...)")
        if self.guide is not None and not hasattr(self.guide, "bind"):
            raise OptionError(f"expected a guide such as inverse.PiGDMGuide(), got {self.guide!r}")
        if self.guide is not None and self.guide.acts_in != "denoiser":
            raise OptionError(
                f"{self.guide!r} changes the step and not the estimate of x_0, so its proposal has no density here; "
                'use DPSGuide(weight="likelihood") or PiGDMGuide()'
            )

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> Kernel[Any]:
        """The closure, or particles led by a guide."""
        return particle_kernel(problem, self.levels(problem), self.guide, self.solver, self.chunk, cost)

    def rejuvenation(self, problem: DiffusionProblem, kernel: Kernel[Any]) -> NoiseUp | None:
        """Noise up and come back, where asked for."""
        return NoiseUp(problem, kernel, self.levels(problem), self.moves, self.climb) if self.moves else None

    def levels(self, problem: DiffusionProblem) -> Tensor:
        """Noise levels: the prior's own for the closure, which draws its last step; lower ones for a guide's steps."""
        return problem.prior.sigmas(self.steps) if self.guide is None else super().levels(problem)


def particle_kernel(
    problem: DiffusionProblem, sigmas: Tensor, guide: Any, solver: Solver, chunk: int | None, cost: Cost
) -> Kernel[Any]:
    """How particles move: by the full moment closure where the prior has an exact covariance, or led by a guide."""
    if isinstance(problem, LaneProblem) and guide is not None and not getattr(guide, "per_lane", False):
        raise UnlikeError(f"{type(guide).__name__} takes one problem at a time")
    if guide is None and "exact_covariance" in problem.prior.capabilities:
        return ClosureKernel(problem, sigmas)
    if isinstance(guide, MomentClosure):
        return guide.kernel(problem, sigmas, chunk)
    guide = PiGDMGuide() if guide is None else guide
    return GuidedKernel(problem, sigmas, guide.bind(problem, cost), solver, chunk)

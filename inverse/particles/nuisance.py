r"""Nuisance parameters carried on particles: noise level, gain, offset or blur width beside a diffusion site.

Every particle holds (x_s, theta). The target at noise level s is p(theta) p_s(x_s) psi_s(x_s; theta) with the twist of
its own theta, and at level zero p(theta) p(x) p(y | x, theta). A step a -> b is that of twisted SMC with theta held,

    x_b ~ q(x_b | x_a, y, theta),     w <- w p(x_b | x_a) psi_b(x_b; theta) / (q psi_a(x_a; theta)),

and is followed by Metropolis moves of theta that leave p(theta) psi_b(x_b; theta) as it is, for all particles, with the
weights they have. The moves ask for no denoiser: psi is known at every theta from D and C.
Source: Gilks & Berzuini (2001) for moves inside a particle filter [inferred]; with twists of diffusions [derived].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from inverse.particles.backend import ParticleBackend
from inverse.particles.carried import CarriedClosure, CarriedGuide, CarriedProblem
from inverse.particles.closure import MomentClosure
from inverse.particles.core import Kernel
from inverse.particles.lane_twist import SMALL
from inverse.problem import DiffusionProblem
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.program import Program
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["NuisanceSMC"]


@register
@dataclass(frozen=True)
class NuisanceSMC(ParticleBackend):
    """Twisted SMC on diffusion sites together with the other continuous latents of a program, all in one population.

    For linear Gaussian data whose noise, gain, offset or operator depend on nuisance parameters that have a prior of
    their own. With up to 64 measurements and an exact covariance, or with `guide=MomentClosure()` for a network,
    particles move by the moment closure; otherwise they are led by PiGDM in a solver. Problems of `program.over` run
    in turn: every particle reads its likelihood off the program, with parameters of its own and one set of data.
    Beyond 64 measurements noise and gain must change by one factor for all of them; an operator that depends on the
    parameters itself, such as a blur width, must be small (2^16 entries).

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per guide call; changes memory, nothing else.
        moves: Metropolis sweeps over the parameters at every noise level; they cost no denoiser calls.
        solver: the stochastic solver of led particles.
        guide: `MomentClosure()` moves particles of networks by the closure as well, with a vjp per measurement and
            random direction, for up to 64 measurements; None leads them.

    Raises:
        OptionError: an option is out of range.

    Draws are equally weighted; the evidence is that of the whole program. Source: [derived].

    Example:
        >>> import torch, ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.ones(2, dtype=torch.float64))
        >>> posterior = ppl.infer(program, NuisanceSMC(steps=4, runs=1), draws=50)
        >>> posterior["x"].shape, posterior["sigma"].shape
        (torch.Size([1, 50, 2]), torch.Size([1, 50]))
    """

    moves: int = 4
    solver: Solver = field(default_factory=DPMSolver2MSDE)
    guide: MomentClosure | None = None

    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moves < 1:
            raise OptionError(f"moves must be one or more sweeps per noise level, got {self.moves}")
        if self.guide is not None and not isinstance(self.guide, MomentClosure):
            raise OptionError(f"guide must be MomentClosure() or None, which leads by PiGDM, got {self.guide!r}")

    def problem(self, program: Program) -> CarriedProblem:
        """The problem at a reference value of the parameters, with their reader."""
        return CarriedProblem.read(program)

    def levels(self, problem: DiffusionProblem) -> Tensor:
        """Noise levels: the prior's own for the closure, which draws its last step; lower ones for led particles."""
        closed = isinstance(problem, CarriedProblem) and self._closed(problem)
        return problem.prior.sigmas(self.steps) if closed else super().levels(problem)

    def _closed(self, problem: CarriedProblem) -> bool:
        """Whether particles move by the closure."""
        if self.guide is not None and not problem.small:
            raise OptionError(
                f"MomentClosure() factors the covariance of up to {SMALL} measurements for every particle, got "
                f"{problem.reader.data.numel()}; leave guide=None, which leads by PiGDM"
            )
        return problem.closed or self.guide is not None

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> Kernel[Any]:
        """The closure, or led particles."""
        assert isinstance(problem, CarriedProblem)
        levels = self.levels(problem)
        if self._closed(problem):
            random = MomentClosure().random if self.guide is None else self.guide.random
            return CarriedClosure(problem, levels, self.moves, random, self.chunk)
        return CarriedGuide(problem, levels, self.moves, self.solver, self.chunk, cost)

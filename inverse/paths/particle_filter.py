r"""A particle filter along the path of a program, steered by a control whose bias the weights undo.

    z_n ~ q(z_n | s_n),   s_{n+1} = step(s_n, z_n)        s = (X, Y): the state and the factors of its noise
    w <- w N(z_n; 0, I) / q(z_n | s_n)                    after every step
    w <- w g_i(X_1 .. X_i) psi_i(s) / psi_{i-1}(s')       at every time asked for

g_i are the terms of the likelihood that a time completes, psi a control's word on the data to come, one where it has
none. Particles are resampled at the times of the path. With the exact control of a linear program all weights are equal
and the evidence has no error. Source: Gordon, Salmond & Smith (1993) for the filter; Guarniero, Johansen & Lee (2017)
for twists [inferred]; driving numbers of a rank-one noise as the state that is proposed [derived].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.particles.backend import ParticleBackend
from inverse.paths.controls import Chain, Control, Law, bind_control, check_control
from inverse.paths.path_checks import note_coarse_steps
from inverse.paths.problem import PathProblem, path_site
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["GuidedParticleFilter", "PathKernel", "PathParticles"]


@register
@dataclass(frozen=True)
class GuidedParticleFilter(ParticleBackend):
    """Sequential Monte Carlo along the only path of a program, however its data depend on it.

    Every datum weighs the particles at the last time that it depends on, which is read off the program. Runs are
    repeated and merged by evidence until the root ESS reaches the number of draws. The path must be the only latent;
    `ParticleGibbs` moves parameters as well.

    Args:
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        control: None takes the exact control where the path is linear and its data linear and Gaussian, and none
            elsewhere; `inverse.paths.Uncontrolled()`; or a fitted `ControlGuide`.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Path, Process
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> path = Path(Process(lambda x, t: x - x**3), torch.arange(1, 5) * 0.25 * one, 0 * one)
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64))
        >>> posterior = ppl.infer(program, GuidedParticleFilter(), draws=500)
        >>> posterior["x"].shape, bool(posterior.log_evidence.stderr < 0.1)
        (torch.Size([1, 500, 4, 1]), True)
    """

    steps: int | None = field(default=None, init=False, repr=False)
    chunk: int | None = field(default=None, init=False, repr=False)
    control: Any = None

    limit: ClassVar[tuple[str, ...]] = ("particles",)
    needs: ClassVar[frozenset[str]] = frozenset({"path"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_control(self.control)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the filter; see `ppl.infer`."""
        note_coarse_steps(program, path_site(program), monitor)
        return super().run(program, draws=draws, chains=chains, generator=generator, monitor=monitor)

    def problem(self, program: Program) -> PathProblem:
        """The path and its data."""
        return PathProblem.of(program)

    def kernel(self, problem: Any, cost: Cost) -> Any:
        """How particles move."""
        return PathKernel(problem, bind_control(self.control, problem), cost)


@dataclass
class PathParticles:
    """All particles at one time of the path.

    Args:
        x: (particle, d) states.
        y: (particle, m, K) factors.
        first: (particle, m K) numbers that start the factors of type I.
        noise: (particle, m, steps) driving numbers so far.
        history: (particle, n, d) the path at its times; those to come repeat the state.
        score: (particle,) log density of the data so far.
        log_twist: (particle,) log psi.
        pending: (particle,) log p / q of the steps since particles were last weighed.
    """

    x: Tensor
    y: Tensor
    first: Tensor
    noise: Tensor
    history: Tensor
    score: Tensor
    log_twist: Tensor
    pending: Tensor

    def select(self, index: Tensor) -> PathParticles:
        """Particles `index`, with all that they carry."""
        return PathParticles(**{n: v[index] for n, v in self.__dict__.items()})

    def pack(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return dict(self.__dict__)


class PathKernel:
    """Moves particles from time to time of the path.

    Args:
        problem: the path and its data.
        control: what proposes driving numbers.
        cost: takes the evaluations of the likelihood.
        given: values of other latents by particle, (lanes, *shape); None takes those of the problem.
    """

    place = "time"

    def __init__(
        self, problem: PathProblem, control: Control, cost: Cost, given: Mapping[str, Tensor] | None = None
    ) -> None:
        self.problem, self.control, self.cost, self.given = problem, control, cost, given
        self.path = problem.path
        self.chain = Chain(self.path, torch.zeros((), dtype=problem.dtype, device=problem.device))
        self.ends = [0, *(int(end) + 1 for end in self.path.ends)]
        self.seen = set(problem.last.tolist())

    @property
    def levels(self) -> int:
        """The start and every time."""
        return len(self.ends)

    def steps(self, level: int) -> range:
        """Steps of the grid between a time and the next."""
        return range(self.ends[level], self.ends[level + 1])

    def start(self, particles: int, generator: torch.Generator, retained: Tensor | None = None) -> PathParticles:
        """Particles at the start; the first get the numbers `retained` (k, m K)."""
        eps = self._normal((particles, self.chain.starts), generator)
        first, pending = _propose(self.control.start(), eps, retained)
        x, y = self.chain.start(first)
        zero = torch.zeros(particles, dtype=torch.float64, device=x.device)
        noise = x.new_zeros(particles, self.path.noises, self.path.steps)
        history = x[:, None].expand(-1, *self.problem.shape).clone()
        twist = zero + self.control.log_twist(0, x, y)
        return PathParticles(x, y, first, noise, history, zero, twist, pending.double())

    def first_weight(self, population: PathParticles) -> Tensor:
        """What the start is worth to a control that foresees the data."""
        if not self.control.twisted:
            return torch.zeros_like(population.score)
        found = population.pending + population.log_twist
        population.pending = torch.zeros_like(population.pending)
        return found

    def move(
        self, population: PathParticles, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[PathParticles, Tensor]:
        """To the next time; the first particles are driven by the numbers `retained` (k, m, steps of the level)."""
        steps, x, y = self.steps(level), population.x, population.y
        eps = self._normal((len(x), self.path.noises, len(steps)), generator)
        noise, pending = population.noise.clone(), population.pending
        for j, n in enumerate(steps):
            law = self.control.step(n, x, y, population.first)
            z, ratio = _propose(law, eps[..., j], None if retained is None else retained[..., j])
            noise[..., n] = z
            pending = pending + ratio
            x, y = self.chain.step(n, x, y, z)
        self._check_finite(x, level)
        history = population.history.clone()
        history[:, level:] = x[:, None]
        gain = self._gain(history, level)
        twist = torch.zeros_like(pending) + self.control.log_twist(steps.stop, x, y)
        increment = gain + twist - population.log_twist
        # A control that does not foresee the data is judged where they come, not on the way.
        if self.control.twisted or level in self.seen or level == self.levels - 2:
            increment, pending = increment + pending, torch.zeros_like(pending)
        score = population.score + gain
        return PathParticles(x, y, population.first, noise, history, score, twist, pending), increment

    def last_weight(self, population: PathParticles) -> Tensor:
        """What is left between the terms as they were weighed and the whole likelihood: rounding, in the usual case.

        A dependence on later times that the probes did not meet is made good here.
        """
        return self.missing(population.history, population)

    def missing(self, history: Tensor, population: PathParticles) -> Tensor:
        """Log density of the data given whole paths, less what the particles were weighed by."""
        found = self._terms(history).sum(1).double() - population.score
        return torch.where(population.score == -torch.inf, torch.zeros_like(found), found)

    def finish(self, population: PathParticles, generator: torch.Generator) -> Tensor:
        """(particle, n, d) paths."""
        return population.history

    def unpack(self, tensors: dict[str, Tensor], level: int) -> PathParticles:
        """The inverse of `pack`."""
        return PathParticles(**tensors)

    def follow(self, population: PathParticles, level: int, noise: Tensor) -> Tensor:
        """Whole paths when all particles go on by the driving numbers (particle, m, steps): (particle, n, d)."""
        x, y, history = population.x, population.y, population.history.clone()
        for i in range(level, self.levels - 1):
            for n in self.steps(i):
                x, y = self.chain.step(n, x, y, noise[..., n])
            history[:, i] = x
        return history

    def _gain(self, history: Tensor, level: int) -> Tensor:
        """The terms that a time completes, (particle,)."""
        if level not in self.seen:
            return torch.zeros(len(history), dtype=torch.float64, device=history.device)
        return self._terms(history)[:, self.problem.last == level].sum(1).double()

    def _terms(self, history: Tensor) -> Tensor:
        self.cost.add(likelihood_evals=len(history))
        return self.problem.terms(history, self.given)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.problem.dtype, device=self.problem.device)

    def _check_finite(self, x: Tensor, level: int) -> None:
        lost = int((~x.isfinite()).any(1).sum())
        if lost:
            raise NotFiniteError(
                f"the path is not finite at time {float(self.path.times[level]):g} in {lost} of {len(x)} particles: "
                f"drift or diffusion grow faster than steps of {max(self.chain.dts):.3g} can follow; take a smaller dt"
            )


def _propose(law: Law | None, eps: Tensor, retained: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers drawn by a law from normal ones (lanes, m), the first ones given, and log p / q (lanes,)."""
    z = eps if law is None else law.draw(eps)
    if retained is not None:
        z = torch.cat([retained, z[len(retained) :]])
    return z, z.new_zeros(len(z)) if law is None else law.log_ratio(z)

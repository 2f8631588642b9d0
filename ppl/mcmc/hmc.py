"""Hamiltonian Monte Carlo with all chains in one batch, for CPU or GPU and for many problems at once.

    p_{1/2} = p + eps/2 grad,   z' = z + eps M^{-1} p_{1/2},   p' = p_{1/2} + eps/2 grad',   accept with e^{H - H'}

Every transition takes L = ceil(u T / eps) leapfrog steps with one jitter u in [1/2, 3/2) common to all chains. T climbs
the ChEES criterion (`ppl/mcmc/chees.py`), starting from a quarter turn of the slowest direction, or stays there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import OptionError
from ppl.mcmc.adaptation import DualAveraging, Moments, windows
from ppl.mcmc.chees import TrajectoryLength, halton_jitter, quarter_turn
from ppl.mcmc.starts import StartingPoints, check_init
from ppl.mcmc.target import fixed_density, posterior_of
from ppl.option_checks import check_integers

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["HMC"]

MAX_ENERGY_ERROR = 1000.0
# Pooled chains have little noise: the usual 0.05 swings across the edge of stability, and steps end a third too short.
GAMMA = 0.2
TARGET = {"chees": 0.651, "quarter_turn": 0.8}  # of the harmonic mean over chains, of the plain one
LENGTH = ("log_length", "log_average", "square", "centre")  # state of a TrajectoryLength
EARLY_STEPS = 32  # leapfrog steps at most before the first mass matrix is known


@register
@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo, vectorised over chains and problems.

    The chains of a problem share step size, diagonal mass matrix and trajectory length, learned in warmup from all of
    them: many chains adapt in few steps. The step size follows the harmonic mean of the chains' acceptances, so that a
    chain that is stuck is heard (`"quarter_turn"`: in the first half of warmup; then the plain mean).

    Args:
        warmup: adaptation transitions per chain, thrown away.
        target_accept: acceptance the step size is adapted to; 0.651 for `"chees"`, whose harmonic mean over chains
            weighs the low ones (plain mean about 0.85), 0.8 for `"quarter_turn"` when None.
        adaptation: how the length is learned: `"chees"` climbs the change of the squares along a trajectory;
            `"quarter_turn"` takes pi/2 times the widest sd in preconditioned coordinates, which is right for Gaussians.
        length: trajectory length in preconditioned units; learned when None.
        max_steps: leapfrog steps of a trajectory at most.
        radius: chains start uniformly in [-radius, radius] on unconstrained space (noise sites: from their prior).
        init: where chains start instead: a fitted guide, or a backend that fits one, such as `ppl.Pathfinder()`. Chains
            that start close together see less of what they disagree about.

    Raises:
        OptionError: an option is out of range.

    Source: Neal (2011) [inferred]; ChEES: Hoffman, Radul & Sountsov (2021) [inferred], with a jitter of [1/2, 3/2)
    for their [0, 1): on a Gaussian 1.3 times the effective draws of squares for a gradient [derived]. The quarter turn
    is ours [derived].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), HMC(warmup=100), draws=100)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2)
        True
    """

    warmup: int = 500
    target_accept: float | None = None
    adaptation: Literal["chees", "quarter_turn"] = "chees"
    length: float | None = None
    max_steps: int = 512
    radius: float = 2.0
    init: Any = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 16
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integers(self, warmup=20, max_steps=1)
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise OptionError(f"target_accept must lie between 0 and 1, got {self.target_accept!r}")
        if self.adaptation not in ("chees", "quarter_turn"):
            raise OptionError(f'adaptation must be "chees" or "quarter_turn", got {self.adaptation!r}')
        if self.length is not None and not self.length > 0:
            raise OptionError(f"length must be positive, or None to learn it, got {self.length!r}")
        if not self.radius >= 0:
            raise OptionError(f"radius must be zero or more, got {self.radius!r}")
        check_init(self.init)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the chains; see `ppl.infer`."""
        flat = fixed_density(program, "HMC", monitor)
        walk = _Walk(self, flat, program.problems or 1, chains, draws, generator, monitor)
        stored = monitor.resume()
        if stored is None:
            walk.begin()
        else:
            walk.restore(stored)
        flat.prepare(walk.z, 10 * (self.warmup + draws))
        start = 0 if stored is None else int(stored["step"])
        done = start
        for step in monitor.steps(self.warmup + draws, "HMC", start=start):
            walk.advance(step)
            done = step + 1
            monitor.report(step_size=float(walk.step.mean()), leapfrog=walk.last_steps)
            monitor.checkpoint(done, walk.state)
        kept = max(done - self.warmup, 0)
        info = {n: v[:kept] for n, v in walk.statistics.items()}
        info["trajectory_length"] = walk.length if program.problems is not None else walk.length[0]
        stuck = (walk.statistics["moved"][:kept].sum(0) == 0) if kept >= 100 else torch.zeros(0, dtype=torch.bool)
        if bool(stuck.any()):
            monitor.note(f"{int(stuck.sum())} of {len(stuck)} chains never moved; run a longer warmup")
        del info["moved"]
        return posterior_of(program, flat, walk.draws[:kept], info, monitor, complete=kept == draws)


class _Walk:
    """State of all lanes (problem-major), what is being learned, and the draws so far."""

    def __init__(
        self,
        options: HMC,
        flat: FlatDensity,
        problems: int,
        chains: int,
        draws: int,
        generator: torch.Generator,
        monitor: Monitor,
    ) -> None:
        self.options, self.flat, self.generator, self.monitor = options, flat, generator, monitor
        self.problems, self.chains, self.lanes = problems, chains, problems * chains
        self.windows = windows(options.warmup)
        self.last_steps = 0
        dtype, device = flat.program.dtype, generator.device
        self._like = torch.zeros((), dtype=dtype, device=device)
        new = self._like.new_zeros
        self.draws = new((draws, self.lanes, flat.dim))
        self.statistics = {
            "diverging": torch.zeros(draws, self.lanes, dtype=torch.bool, device=device),
            "moved": torch.zeros(draws, self.lanes, dtype=torch.bool, device=device),
            "n_steps": torch.zeros(draws, self.lanes, dtype=torch.int64, device=device),
            **{n: new((draws, self.lanes)) for n in ("lp", "energy", "acceptance_rate", "step_size")},
        }
        self.inverse_mass = torch.ones(problems, flat.dim, dtype=dtype, device=device)
        length = torch.full((problems,), options.length or math.pi / 2, dtype=dtype, device=device)
        self.trajectory = TrajectoryLength.start(length, self.inverse_mass.new_zeros(problems, flat.dim))
        self.target = TARGET[options.adaptation] if options.target_accept is None else options.target_accept
        self.climbs = options.length is None and options.adaptation == "chees"

    # Beginning and going on ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starting points and a first guess of the step size."""
        options = self.options
        start = StartingPoints(self.flat, options.init, options.radius, self.monitor, self.generator)
        self.z = start(self.lanes, self.generator)
        self.lp, self.grad = self._evaluate(self.z)
        self.adapt = DualAveraging.start(self._first_step(), GAMMA)
        self.moments = self._moments(0)

    def state(self) -> dict[str, Tensor]:
        """All that the next transition needs, and the draws so far."""
        kept = self._kept
        return {
            **{n: getattr(self, n) for n in ("z", "lp", "grad", "inverse_mass")},
            **self.adapt.state(),
            **{f"length.{n}": getattr(self.trajectory, n) for n in LENGTH},
            "length.count": torch.tensor(self.trajectory.count),
            "window": torch.tensor(self._window),
            "window.kept": self.moments.kept,
            "draws": self.draws[:kept],
            **{f"info.{n}": v[:kept] for n, v in self.statistics.items()},
        }

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Go on from `state()`."""
        for name in ("z", "lp", "grad", "inverse_mass"):
            setattr(self, name, stored[name])
        length = {n: stored[f"length.{n}"] for n in LENGTH}
        self.trajectory = TrajectoryLength(**length, count=int(stored["length.count"]))
        self.adapt = DualAveraging.resumed(stored, GAMMA)
        self.moments = self._moments(int(stored["window"]))
        self.moments.kept = stored["window.kept"]
        kept = self._kept = len(stored["draws"])
        self.draws[:kept] = stored["draws"]
        for name, values in self.statistics.items():
            values[:kept] = stored[f"info.{name}"]

    _kept = 0
    _window = 0

    def _moments(self, window: int) -> Moments:
        self._window = window
        start, stop = self.windows[min(window, len(self.windows) - 1)]
        return Moments(self.problems, self.chains, self.flat.dim, stop - start, self._like)

    def _first_step(self) -> Tensor:
        """Double or halve, for each problem, until one leapfrog step is accepted about as often as wanted."""
        step = torch.ones(self.problems, dtype=self._like.dtype, device=self._like.device)
        momentum = self._momentum()
        direction = torch.zeros_like(step)
        for _ in range(60):
            ones = torch.ones(self.problems, dtype=torch.int64)
            *_, accept, _ = self._trajectory(momentum, step, ones)
            good = self._by_problem(accept).mean(1) > self.target
            towards = torch.where(good, 1.0, -1.0).to(step.dtype)
            direction = torch.where(direction == 0, towards, direction)
            going = towards == direction
            if not bool(going.any()):
                break
            step = torch.where(going, step * 2**direction, step)
        return step

    # One transition --------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Tensor:
        """Step sizes (problem,) in use."""
        return self.adapt.log_step.exp()

    @property
    def length(self) -> Tensor:
        """Trajectory lengths (problem,) in use, in preconditioned units."""
        return self.trajectory.value

    def _jitter(self, step: int) -> float:
        # Halton's sequence steadies the climb. Kept draws take random jitter: a direction in which the sequence
        # resonates (its neighbours differ by 1/2) was seen to lose a fifth of its effective draws.
        if self.climbs and step < self.options.warmup:
            return halton_jitter(step)
        return float(torch.rand((), generator=self.generator, dtype=torch.float64, device=self._like.device)) + 0.5

    def advance(self, step: int) -> None:
        """One transition of every chain; adapts in warmup, stores after it."""
        options, warming = self.options, step < self.options.warmup
        if step == options.warmup:
            self.adapt.log_step = self.adapt.log_average
            self.trajectory.log_length = self.trajectory.log_average
        size, before = self.step, self.z
        jitter = self._jitter(step)
        cap = options.max_steps if step >= self.windows[0][1] else min(EARLY_STEPS, options.max_steps)
        steps = (jitter * self.length / size).ceil().nan_to_num(1.0).clamp(1, cap).long().cpu()
        momentum = self._momentum()
        uniform = torch.rand(self.lanes, generator=self.generator, dtype=self._like.dtype, device=self._like.device)
        z, p, lp, grad, accept, energy = self._trajectory(momentum, size, steps)
        moved = uniform < accept
        self.z = torch.where(moved[:, None], z, self.z)
        self.lp = torch.where(moved, lp, self.lp)
        self.grad = torch.where(moved[:, None], grad, self.grad)
        self.last_steps = int(steps.max())
        if warming:
            if self.climbs and step >= self.windows[0][1]:
                self._climb(before, z, p, jitter * self.length, accept)
            self._learn(step, accept)
        else:
            self._store(step - options.warmup, moved, accept, energy, size, steps)

    def _trajectory(
        self, momentum: Tensor, size: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Leapfrog from where the chains are: z, p, lp, gradient, acceptance and energy (H at the start, error)."""
        inverse_mass = self._spread(self.inverse_mass)
        eps = self._spread(size)[:, None]
        limit = self._spread(steps.to(size.device))
        before = 0.5 * (momentum.square() * inverse_mass).sum(1) - self.lp
        z, lp, grad, p = self.z, self.lp, self.grad, momentum
        longest = int(steps.max())
        same = bool((steps == steps[0]).all())
        for i in range(longest):
            half = p + 0.5 * eps * grad
            z_next = z + eps * inverse_mass * half
            lp_next, grad_next = self._evaluate(z_next)
            p_next = half + 0.5 * eps * grad_next
            if same:
                z, lp, grad, p = z_next, lp_next, grad_next, p_next
                continue
            on = i < limit  # lanes of problems with shorter trajectories wait
            z, grad, p = (torch.where(on[:, None], a, b) for a, b in ((z_next, z), (grad_next, grad), (p_next, p)))
            lp = torch.where(on, lp_next, lp)
        error = 0.5 * (p.square() * inverse_mass).sum(1) - lp - before
        error = torch.where(torch.isfinite(error), error, torch.full_like(error, math.inf))
        accept = torch.exp(-error.clamp_min(0.0))
        return z, p, lp, grad, accept, torch.stack([before, error])

    def _climb(self, before: Tensor, z: Tensor, p: Tensor, time: Tensor, accept: Tensor) -> None:
        """One step of the length up the ChEES criterion."""

        def split(x: Tensor) -> Tensor:
            return x.reshape(self.problems, self.chains, -1)

        velocity = split(self._spread(self.inverse_mass) * p)
        sd, most = self.inverse_mass.sqrt(), self.options.max_steps * self.step
        self.trajectory.update(split(before), split(z), velocity, sd, time, self._by_problem(accept), most)

    def _learn(self, step: int, accept: Tensor) -> None:
        """Update the step size; at the end of a window the mass matrix and the length."""
        options = self.options
        each = self._by_problem(accept)
        plain = options.adaptation != "chees" and step >= options.warmup // 2
        mean = each.mean(1) if plain else 1 / (1 / each.clamp_min(1e-3)).mean(1)
        self.adapt.update(mean, self.target)
        if self._window == len(self.windows):
            return
        start, stop = self.windows[self._window]
        if not start <= step < stop:
            return
        self.moments.add(step - start, self.z)
        if step == stop - 1:
            self.inverse_mass, widest = self.moments.estimate()
            if options.length is None and not (self.climbs and self._window):
                mean = self.z.reshape(self.problems, self.chains, -1).mean(1)
                self.trajectory = TrajectoryLength.start(quarter_turn(widest), mean)
            # No leap upwards: with the few transitions that may be left, their average would stay above what moves.
            self.adapt = DualAveraging.start(self._first_step(), GAMMA, ambition=1.0)
            self.moments = self._moments(self._window + 1)

    def _store(self, row: int, moved: Tensor, accept: Tensor, energy: Tensor, size: Tensor, steps: Tensor) -> None:
        before, error = energy
        self.draws[row] = self.z
        values = {
            "diverging": error > MAX_ENERGY_ERROR,
            "moved": moved,
            "n_steps": self._spread(steps.to(self.z.device)),
            "lp": self.lp,
            "energy": torch.where(moved, before + error, before),
            "acceptance_rate": accept,
            "step_size": self._spread(size),
        }
        for name, value in values.items():
            self.statistics[name][row] = value
        self._kept = row + 1

    def _momentum(self) -> Tensor:
        noise = torch.randn(
            self.lanes, self.flat.dim, generator=self.generator, dtype=self._like.dtype, device=self._like.device
        )
        return noise / self._spread(self.inverse_mass).sqrt()

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.monitor.cost.add(gradient_evals=self.lanes)
        return self.flat.log_density_and_grad(z)

    def _spread(self, value: Tensor) -> Tensor:
        """(problem, ...) -> (lane, ...)."""
        return value.repeat_interleave(self.chains, 0)

    def _by_problem(self, value: Tensor) -> Tensor:
        """(lane,) -> (problem, chain)."""
        return value.reshape(self.problems, self.chains)

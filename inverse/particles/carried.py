r"""Kernels whose particles carry nuisance parameters: the moment closure and the guided step, each with moves of theta.

The weight of a step takes psi before the moves; the next step starts from psi after them. `nuisance` has the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.guides import Guided, PiGDMGuide
from inverse.guides.base import denoise_with_vjp
from inverse.guides.moment_matching import rows_of
from inverse.particles.closure import closed_covariance
from inverse.particles.guided import GuidedKernel, Led
from inverse.particles.lane_likelihood import LaneReader, Lanes, walk, walk_noise
from inverse.particles.lane_twist import SMALL, FactoredTwist, SpectralTwist, log_normal, log_normaliser
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.program import Program
from sde.solvers.transition import Solver

__all__ = ["CarriedClosure", "CarriedGuide", "CarriedProblem"]


@dataclass(frozen=True)
class CarriedProblem(DiffusionProblem):
    """A problem whose rows are x and the coordinates of the nuisance parameters.

    Args:
        reader: the likelihood for given parameters.
    """

    reader: LaneReader

    @classmethod
    def read(cls, program: Program) -> CarriedProblem:
        """Read it off a program."""
        reader = LaneReader(program)
        own = reader.problem
        return cls(own.program, own.sites, own.prior, own.likelihood, reader)

    @property
    def closed(self) -> bool:
        """Whether particles can move by the closure of an exact covariance."""
        return "exact_covariance" in self.prior.capabilities and self.small

    @property
    def small(self) -> bool:
        """Whether the covariance of the data can be factored for every particle."""
        return self.reader.data.numel() <= SMALL

    def rows(self, x: Tensor, z: Tensor) -> Tensor:
        """x (particle, *shape) and z (particle, dim) as rows."""
        return torch.cat([x.flatten(1), z.to(x)], 1)

    def results(self, x: Tensor) -> dict[str, Tensor]:
        """Draws by site name from rows (chain, draw, d + dim), with deterministic sites where there is any draw."""
        lead = x.shape[:2]
        if 0 in lead:
            return {n: x.new_zeros(*lead, *s.shape) for n, s in self.program.latents.items()}
        flat = x.reshape(lead.numel(), -1)
        value, z = flat.split([self.shape.numel(), self.reader.dim], 1)
        draws = self.reader.values(value.reshape(-1, *self.shape), z.contiguous())
        if self.program.deterministic:
            names = list(self.program.deterministic)
            read = self.program.batched(lambda trace: {n: trace.nodes[n]["value"] for n in names})
            with torch.no_grad():
                draws = {**draws, **read(draws)}
        return {n: v.reshape(*lead, *v.shape[1:]) for n, v in draws.items()}


@dataclass(frozen=True)
class Carried:
    """All particles at one level, with the closure's moments in the directions that each one's data see.

    Args:
        x: (particle, *site).
        lane: what each one's parameters say of the data.
        covariance: C, with mean D.
        towards: C B^T, (particle, m, d).
        gram: B C B^T, (particle, m, m).
        factor: Cholesky factor of I + gram.
        residual: d - B D, (particle, m).
        log_twist: log psi at the parameters after their moves, (particle,).
        before: the same before the moves, which the weights take.
    """

    x: Tensor
    lane: Lanes
    covariance: Any
    towards: Tensor
    gram: Tensor
    factor: Tensor
    residual: Tensor
    log_twist: Tensor
    before: Tensor

    def select(self, index: Tensor) -> Carried:
        """The same state with particles `index`."""
        lane = {n: v[index] for n, v in self.lane.items()}
        own = {n: v[index] for n, v in self.__dict__.items() if isinstance(v, Tensor)}
        return Carried(**own, lane=lane, covariance=self.covariance.select(index))

    def pack(self) -> dict[str, Tensor]:
        """Particles and parameters; all else follows from them."""
        return {"x": self.x, "z": self.lane["z"]}


class CarriedClosure:
    """The moment-closure kernel with a likelihood for every particle; see `closure.ClosureKernel` for the step.

    A network's covariance has its columns along what is measured at the reference parameters and a few random ones. It
    does not depend on the parameters, so that moves of them ask for no denoiser call there either.

    Args:
        problem: prior and reader.
        sigmas: (levels + 1,) noise levels, the last exactly zero.
        sweeps: of the parameters at every level.
        random: random directions for a network's covariance.
        chunk: particles per call of a network.
    """

    def __init__(
        self, problem: CarriedProblem, sigmas: Tensor, sweeps: int, random: int = 2, chunk: int | None = None
    ) -> None:
        self.problem, self.sigmas, self.reader = problem, sigmas, problem.reader
        self.steps = sweeps * self.reader.dim
        self.twist = FactoredTwist(self.reader)
        self.random, self.chunks = random, Chunks(chunk)
        self.rows = rows_of(self.reader.gaussian.operator, problem)[:, 0]

    @property
    def levels(self) -> int:
        """Number of positive noise levels."""
        return len(self.sigmas) - 1

    def start(self, particles: int, generator: torch.Generator) -> Carried:
        """Particles at the first level from the prior's own start, their parameters from their prior."""
        x = self.problem.prior.start(self.problem.noise(particles, generator), self.sigmas[0])
        z = self.reader.sample_prior(particles, generator)
        return self._look(x, z, 0, walk_noise(particles, self.steps, generator, z))

    def first_weight(self, population: Carried) -> Tensor:
        """The twist before the moves."""
        return population.before

    def at(self, x: Tensor, level: int) -> Carried:
        """The population of rows (particle, d + dim) at a level."""
        value, z = x.split([self.problem.shape.numel(), self.reader.dim], 1)
        return self._look(value.reshape(-1, *self.problem.shape), z, level, None)

    def unpack(self, tensors: dict[str, Tensor], level: int) -> Carried:
        """The population at a level, from its particles and parameters."""
        return self._look(tensors["x"], tensors["z"], level, None)

    def move(
        self, population: Carried, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Carried, Tensor]:
        """Draw the closure given the data, bridge to the next level, weigh, move the parameters."""
        s, a, b = population, float(self.sigmas[level]), float(self.sigmas[level + 1])
        ratio = (b / a) ** 2
        kappa, c = 1 - ratio, b * math.sqrt(1 - ratio)
        clean = self._draw(s, generator)
        x = ratio * s.x + kappa * clean + c * self.problem.noise(len(clean), generator)
        if retained is not None:
            x = torch.cat([retained, x[len(retained) :]])
        new = self._look(x, s.lane["z"], level + 1, walk_noise(len(x), self.steps, generator, s.lane["z"]))
        return new, new.before - self._predictive(s, x, ratio, kappa, c)

    def last_weight(self, population: Carried) -> Tensor:
        """The final draw has weight one."""
        return torch.zeros_like(population.log_twist)

    def finish(self, population: Carried, generator: torch.Generator) -> Tensor:
        """Rows: draws of the closure given the data, and parameters moved once more given them."""
        return _settled(self.problem, self._draw(population, generator), population.lane["z"], self.steps, generator)

    def _look(self, x: Tensor, z: Tensor, level: int, noise: Tensor | None) -> Carried:
        """The population at a level: one denoiser call, then moves of the parameters."""
        covariance = closed_covariance(self.problem, x, self.sigmas[level], self.rows, self.random, self.chunks)
        twist, own = self.twist, self.reader.form == "own"
        lane = self.reader(z)
        towards = twist.towards(lane, covariance)
        seen, gram = twist.seen(lane, covariance.mean), twist.gram(lane, towards)

        def evaluate(lane: Lanes, towards: Tensor, seen: Tensor, gram: Tensor) -> Lanes:
            value = twist.value(lane, seen, gram)
            moments = {"towards": towards, "seen": seen, "gram": gram} if own else {}
            return {**lane, **moments, "log_twist": value, "log_target": lane["log_prior"] + value}

        def at(z: Tensor) -> Lanes:
            lane = self.reader(z)
            if not own:
                return evaluate(lane, towards, seen, gram)
            there = twist.towards(lane, covariance)
            return evaluate(lane, there, twist.seen(lane, covariance.mean), twist.gram(lane, there))

        state = evaluate(lane, towards, seen, gram)
        before = state["log_twist"]
        if noise is not None:
            state = walk(state, at, self.reader.scale, noise)
        towards, seen, gram = (state.pop(n, v) for n, v in (("towards", towards), ("seen", seen), ("gram", gram)))
        residual, white, factor = twist.whiten(state, seen, gram)
        towards = towards * (state["gain"] / state["stddev"])[..., None]
        return Carried(x, state, covariance, towards, white, factor, residual, state["log_twist"], before)

    def _draw(self, s: Carried, generator: torch.Generator) -> Tensor:
        """Matheron: u + C B^T S^{-1} (d - B u - n), u ~ N(D, C)."""
        particles, shape, m = len(s.x), self.problem.shape, self.reader.data.numel()
        plates = shape[: len(shape) - len(self.problem.prior.event_shape)]
        spread = s.covariance.sample(self.problem.noise(particles, generator, plates + s.covariance.noise_shape))
        noise = self.problem.noise(particles, generator, torch.Size([m]))
        measured = self.twist.seen(s.lane, spread) * s.lane["gain"] / s.lane["stddev"]
        solved = torch.cholesky_solve((s.residual - measured - noise)[..., None], s.factor)
        return s.covariance.mean + spread + (s.towards.mT @ solved)[..., 0].reshape(s.x.shape)

    def _predictive(self, s: Carried, x: Tensor, ratio: float, kappa: float, c: float) -> Tensor:
        """log p~(d | x_b, x_a): the closure at a, after x_b = rho^2 x_a + kappa x_0 + c z was seen."""
        delta = (x - ratio * s.x) / kappa - s.covariance.mean
        towards = s.towards.movedim(1, 0).reshape(-1, *s.x.shape)
        seen = s.covariance.solve(towards, (c / kappa) ** 2).flatten(2).movedim(0, 1)
        mean = (seen @ delta.flatten(1)[..., None])[..., 0]
        gram = s.gram - s.towards @ seen.mT
        gram = (gram + gram.mT) / 2 + torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        factor = torch.where((failed > 0)[:, None, None], torch.nan, factor)
        return log_normaliser(s.lane) + log_normal(s.residual - mean, factor)


class CarriedGuide(GuidedKernel):
    """Led particles with a likelihood for every one: PiGDM's closure C = v I, v from the prior's `data_std`.

    Args:
        problem: prior and reader.
        sigmas: (levels + 1,) noise levels, the last exactly zero.
        sweeps: of the parameters at every level.
        solver: a stochastic solver that needs one evaluation per step.
        chunk: particles per guide call.
        cost: where vjps are counted.
    """

    problem: CarriedProblem

    def __init__(
        self, problem: CarriedProblem, sigmas: Tensor, sweeps: int, solver: Solver, chunk: int | None, cost: Cost
    ) -> None:
        self.reader, self.cost = problem.reader, cost
        self.steps = sweeps * self.reader.dim
        small = self.reader.data.numel() <= SMALL
        self.twist: FactoredTwist | SpectralTwist = FactoredTwist(self.reader) if small else SpectralTwist(self.reader)
        super().__init__(problem, sigmas, self._guide, solver, chunk)

    def start(self, particles: int, generator: torch.Generator) -> Led:
        """Particles at the first level from the prior's own start, their parameters from their prior."""
        x = self.problem.prior.start(self.problem.noise(particles, generator), self.sigmas[0])
        z = self.reader.sample_prior(particles, generator)
        return self._look(x, 0, {"z": z, "noise": walk_noise(particles, self.steps, generator, z)})

    def first_weight(self, population: Led) -> Tensor:
        """The twist before the moves."""
        return population.guide_state["before"]

    def at(self, x: Tensor, level: int) -> Led:
        """The population of rows (particle, d + dim) at a level, without history."""
        value, z = x.split([self.problem.shape.numel(), self.reader.dim], 1)
        return self._look(value.reshape(-1, *self.problem.shape), level, {"z": z, "noise": z.new_zeros(len(z), 0, 3)})

    def move(
        self, population: Led, level: int, generator: torch.Generator, retained: Tensor | None = None
    ) -> tuple[Led, Tensor]:
        """One guided step, moves of the parameters, and the weight before them."""
        z = population.guide_state["z"]
        state = {"z": z, "noise": walk_noise(len(z), self.steps, generator, z)}
        new, increment = super().move(replace(population, guide_state=state), level, generator, retained)
        return new, increment + (new.guide_state["before"] - new.log_twist)

    def last_weight(self, population: Led) -> Tensor:
        """log p(y | x_0, theta) - log psi: from here on the likelihood is exact."""
        x, lane = self._clean(population), self.reader(population.guide_state["z"])
        seen = self.twist.seen(lane, x) if isinstance(self.twist, FactoredTwist) else self.reader.measured(x)
        residual = (self.reader.data - lane["offset"] - lane["gain"] * seen) / lane["stddev"]
        return log_normaliser(lane) - 0.5 * residual.square().sum(-1) - population.log_twist

    def finish(self, population: Led, generator: torch.Generator) -> Tensor:
        """Rows: the clean values, and parameters moved once more given them."""
        return _settled(self.problem, self._clean(population), population.guide_state["z"], self.steps, generator)

    def _guide(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: dict[str, Tensor]) -> Guided:
        """Denoise once, move the parameters, then lead x by what they say."""
        s = float(sigma)
        v = PiGDMGuide().variance(s, self.problem.prior.data_std)
        prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        self.cost.likelihood_evals += len(x)
        twist, reader = self.twist, self.reader
        fixed = twist.seen(prior) if isinstance(twist, SpectralTwist) else None

        def parts(lane: Lanes) -> tuple[Tensor, Any]:
            if isinstance(twist, SpectralTwist):
                assert fixed is not None
                return fixed, v
            return twist.seen(lane, prior), twist.gram(lane, v)

        def at(z: Tensor) -> Lanes:
            lane = reader(z)
            value = twist.value(lane, *parts(lane))
            return {**lane, "log_twist": value, "log_target": lane["log_prior"] + value}

        lane = at(state["z"])
        before = lane["log_twist"]
        lane = walk(lane, at, reader.scale, state["noise"])
        gradient = twist.gradient(lane, *parts(lane)).reshape(x.shape).to(x)
        led = {"z": lane["z"], "before": before}
        return Guided(prior, prior + s**2 * vjp(gradient), lane["log_twist"].to(x.dtype), led)


def _settled(problem: CarriedProblem, x: Tensor, z: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Rows of x and z, after moves of z that leave p(theta | x, y) as it is: equal ancestors part."""

    def at(z: Tensor) -> Lanes:
        return {"z": z, "log_target": problem.reader.log_density(x, z)}

    return problem.rows(x, walk(at(z), at, problem.reader.scale, walk_noise(len(z), steps, generator, z))["z"])

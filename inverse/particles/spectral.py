r"""Particles in the singular basis of the data: levels, the prior's step, and the state that particles carry.

With whitened data u_i = s_i (V^T x)_i + n_i:  y_i = u_i / s_i with noise tau_i = 1 / s_i, direction by direction.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inverse.chunks import Chunks
from inverse.many import LaneProblem, require_even
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import SpectralData
from ppl.errors import OptionError
from sde.solvers.transition import Solver

__all__ = ["SpectralKernel", "Step", "check_reversal", "check_solver", "log_normal"]


@dataclass(frozen=True)
class Step:
    """All particles at one level, with the mean of the prior's step to the next.

    Args:
        x: (particle, *site).
        mean: (particle, *site) mean of the prior's step; at the last level the clean value.
        log_twist: (particle,).
        state: history of the solver, tensors with a leading particle axis.
        own: what else a particle carries, tensors with a leading particle axis.
    """

    x: Tensor
    mean: Tensor
    log_twist: Tensor
    state: dict[str, Tensor] | None
    own: dict[str, Tensor]

    def select(self, index: Tensor) -> Step:
        """The same state with particles `index`, histories included."""
        return Step(**pytree.tree_map(lambda t: None if t is None else t[index], self.__dict__))

    def pack(self) -> dict[str, Tensor]:
        """All tensors, by path."""
        packed = {"x": self.x, "mean": self.mean, "log_twist": self.log_twist}
        packed |= {f"state.{n}": t for n, t in (self.state or {}).items()}
        return packed | {f"own.{n}": t for n, t in self.own.items()}


def check_solver(solver: Solver) -> None:
    """Raise OptionError unless a step of the solver has a density and needs one evaluation."""
    if not solver.stochastic or solver.calls_per_step != 1 or getattr(solver, "needs_covariance", False):
        raise OptionError(
            f"a particle kernel needs a stochastic solver with one evaluation per step, got {solver}; use "
            "DPMSolver2MSDE(), Ancestral() or DDIM(eta=1.0)"
        )


def step_variance(solver: Solver, a: float, b: float) -> float:
    """c^2 of a step from level a to b, which is the same for every x."""
    none = torch.zeros(1, 1, dtype=torch.float64)
    levels = torch.tensor([a, b], dtype=torch.float64)
    variance = solver.step(none, levels[0], levels[1], none).covariance
    assert isinstance(variance, Tensor)
    return float(variance)


def check_reversal(solver: Solver, method: str) -> None:
    """Raise OptionError unless the solver's steps have the noise of the reverse SDE, so that noising undoes them."""
    if not math.isclose(step_variance(solver, 1.0, 0.5), 0.1875, rel_tol=1e-6):  # b^2 (1 - b^2 / a^2)
        raise OptionError(
            f"{method} takes the path of x for noising run backwards, which the steps of {solver} are not; use "
            "DPMSolver2MSDE(), Ancestral() or DDIM(eta=1.0)"
        )


def log_normal(gap: Tensor, variance: Tensor, active: Tensor | None = None) -> Tensor:
    """log N(gap; 0, diag(variance)) of the active coordinates, (*batch, r) -> (*batch); None is of all."""
    each = -0.5 * (gap.square() / variance + variance.log() + math.log(2 * math.pi))
    return (each if active is None else torch.where(active, each, 0.0)).sum(-1)


class SpectralKernel:
    """What kernels in the singular basis share: levels, the prior's step, packing.

    Coordinates of the data are (r,) for one problem; for many, (particle, r), those of each particle's own.

    Args:
        problem: prior and linear Gaussian likelihood.
        sigmas: (levels + 1,) noise levels, the last exactly zero.
        solver: a stochastic solver that needs one evaluation per step.
        chunk: particles per denoiser call.
        method: name of the backend, for errors.

    Raises:
        CapabilityError: the likelihood is not linear and Gaussian, or its operator has no decomposition.
    """

    def __init__(
        self, problem: DiffusionProblem, sigmas: Tensor, solver: Solver, chunk: int | None, method: str
    ) -> None:
        check_solver(solver)
        require_even(problem, method)
        self.problem, self.sigmas, self.solver = problem, sigmas, solver
        self.chunks = Chunks(chunk)
        self.data = SpectralData.of(problem, method)
        self.center, self.tau = self.data.u / self.data.s, 1 / self.data.s
        # log p(y | x) = constant + sum_i log N(y_i; z_i, tau_i^2): what no x explains, and the change of variables.
        gaussian = problem.likelihood.gaussian
        d = gaussian.data.double()
        missed = d - self.data.svd.from_spectral_data(self.data.svd.to_spectral_data(d))
        scale = self.tau.double().log() + 0.5 * math.log(2 * math.pi)
        squares = missed.square()
        lost = squares.reshape(len(squares), -1).sum(1) if isinstance(problem, LaneProblem) else squares.sum()
        self.constant = gaussian.log_normaliser.double() - 0.5 * lost + scale.sum(-1)
        # Variance c^2 of the prior's steps, by level, and the share of x that they keep; 0 in the last.
        self.variance = [self.noise_variance(float(a), float(b)) for a, b in pairwise(sigmas)]

    @property
    def levels(self) -> int:
        """Number of positive noise levels."""
        return len(self.sigmas) - 1

    def noise_variance(self, a: float, b: float) -> float:
        """c^2 of the step from level a to b."""
        return step_variance(self.solver, a, b)

    def kept(self, level: int) -> float:
        """r in x_b = r x_a + (1 - r) E[x_0] + c z, of the step from a level: r^2 a^2 + c^2 = b^2."""
        a, b = float(self.sigmas[level]), float(self.sigmas[level + 1])
        return math.sqrt(max(b**2 - self.variance[level], 0.0)) / a

    def unpack(self, tensors: dict[str, Tensor], level: int) -> Step:
        """The population that `pack` described."""
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "own": {}}
        for path, tensor in tensors.items():
            name, _, key = path.partition(".")
            if key:
                parts[name][key] = tensor
        return Step(tensors["x"], tensors["mean"], tensors["log_twist"], parts["state"] or None, parts["own"])

    def at(self, x: Tensor, level: int) -> Step:
        """The population of particles x at a level, without history."""
        return self.look(x, level, None, {})

    @abstractmethod
    def look(self, x: Tensor, level: int, state: Any, own: dict[str, Tensor]) -> Step:
        """The population of particles x at a level: the only denoiser calls of a step."""

    def last_weight(self, population: Step) -> Tensor:
        """Zero: the twist of the last level is the likelihood of the clean value."""
        return torch.zeros_like(population.log_twist)

    def finish(self, population: Step, generator: torch.Generator) -> Tensor:
        """The clean values; the last step of the prior adds no noise."""
        return population.mean

    def step(self, x: Tensor, level: int, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Denoised x, mean of the prior's step to the next level, and its history."""
        denoised = self.chunks(lambda rows: self.problem.prior.denoise(rows, self.sigmas[level]), x)
        free = self.solver.step(x, self.sigmas[level], self.sigmas[level + 1], denoised, state)
        return denoised, free.mean, free.state

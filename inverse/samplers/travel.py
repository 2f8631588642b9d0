r"""Guided steps with time travel: a stretch of levels is walked more than once, with fresh noise on the way back.

down:  x_b ~ solver(x_a, a, b, posterior of the guide)          back:  x_a = x_b + sqrt(a^2 - b^2) z
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.guides.base import BoundGuide, Guide
from inverse.problem import DiffusionProblem
from inverse.samplers.descent import Descent
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Noise, check_chunk
from inverse.samplers.trajectory import TrajectorySampler, trajectory_levels
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule, Solver

__all__ = ["GuidedTravel", "Journey", "Travelling", "check_travel", "travel_path"]

Between = tuple[float, float] | None


def check_travel(length: int, repeats: int, between: Between = None) -> None:
    """Raise OptionError unless these describe time travel."""
    if length < 1 or repeats < 1:
        raise OptionError(
            f"travel_length and travel_repeats must be one or more, got {length} and {repeats}; travel_repeats=1 is no "
            "time travel"
        )
    if between is not None and not 0 <= between[0] < between[1]:
        raise OptionError(f"travel_between must be (low, high) noise levels, low < high, or None, got {between}")


def travel_path(levels: Sequence[float], length: int, repeats: int, between: Between = None) -> list[float]:
    """The levels in the order in which they are visited; a rise is a return by fresh noise.

    Args:
        levels: descending noise levels.
        length: levels that a return goes back by.
        repeats: times that every stretch of `length` levels is walked.
        between: a stretch is repeated if it starts between these levels; None repeats all.

    Example:
        >>> travel_path([8.0, 4.0, 2.0, 1.0, 0.0], 1, 2, between=(1.5, 5.0))
        [8.0, 4.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0, 0.0]
    """
    out, last = [levels[0]], len(levels) - 1
    for start in range(0, last, length):
        stretch = list(levels[start + 1 : min(start + length, last) + 1])
        travels = between is None or between[0] <= levels[start] <= between[1]
        for repeat in range(repeats if travels else 1):
            out += ([levels[start]] if repeat else []) + stretch
    return out


class Journey(Descent):
    """A descent that goes back up now and then; a subclass writes `down`."""

    @abstractmethod
    def down(self, x: Tensor, a: float, b: float, z: Tensor) -> Tensor:
        """One step from level a down to b, with standard normal noise z."""

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One step down, or fresh noise on the way back."""
        x, a, b = state["x"], self.levels[step], self.levels[step + 1]
        z = noise.normal(self.problem.shape)
        return {"x": x + math.sqrt(b**2 - a**2) * z if b > a else self.down(x, a, b, z)}


class Travelling(Journey):
    """A journey by a guide without state and a solver without history.

    Args:
        problem: prior and likelihood.
        guide: a bound guide.
        solver: with one evaluation per step, and a scalar variance.
        path: of `travel_path`.
    """

    def __init__(self, problem: DiffusionProblem, guide: BoundGuide, solver: Solver, path: list[float]) -> None:
        super().__init__(problem, path)
        self.guide, self.solver = guide, solver

    def down(self, x: Tensor, a: float, b: float, z: Tensor) -> Tensor:
        """One evaluation of the guide, and one step of the solver."""
        high, low = torch.tensor([a, b], dtype=torch.float64)
        return self.solver.step(x, high, low, self.guide(x, a, b).posterior).sample(z)


class GuidedTravel(TrajectorySampler):
    """The door of backends that travel by a guide; a subclass gives its options, `guide` and `solver`."""

    steps: int
    travel_length: int
    travel_repeats: int
    travel_between: Between
    schedule: Schedule | None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        check_travel(self.travel_length, self.travel_repeats, self.travel_between)
        _ = self.guide

    @property
    @abstractmethod
    def guide(self) -> Guide:
        """The guide that this stands for."""

    @property
    @abstractmethod
    def solver(self) -> Solver:
        """The step between levels."""

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> Travelling:
        """The steps that lanes take on a problem."""
        levels = trajectory_levels(self.schedule, self.steps, problem).tolist()
        path = travel_path(levels, self.travel_length, self.travel_repeats, self.travel_between)
        return Travelling(problem, self.guide.bind(problem, cost), self.solver, path)

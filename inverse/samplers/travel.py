r"""Guided steps with time travel: a stretch of levels is walked more than once, with fresh noise on the way back.

down:  x_b ~ solver(x_a, a, b, posterior of the guide)          back:  x_a = x_b + sqrt(a^2 - b^2) z
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.guides.base import BoundGuide
from inverse.problem import DiffusionProblem
from inverse.samplers.lanes import Noise
from ppl.errors import OptionError
from sde import Solver

__all__ = ["Travelling", "check_travel", "travel_path"]

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


class Travelling:
    """The method that `run_lanes` runs, for a guide without state and a solver without history.

    Args:
        problem: prior and likelihood.
        guide: a bound guide.
        solver: with one evaluation per step, and a scalar variance.
        path: of `travel_path`.
    """

    def __init__(self, problem: DiffusionProblem, guide: BoundGuide, solver: Solver, path: list[float]) -> None:
        self.problem, self.guide, self.solver, self.path = problem, guide, solver, path

    @property
    def steps(self) -> int:
        """Moves between levels, returns included."""
        return len(self.path) - 1

    def begin(self, lanes: int, noise: Noise) -> dict[str, Tensor]:
        """x at the first noise level."""
        return {"x": self.problem.prior.start(noise.normal(self.problem.shape), self.path[0])}

    def advance(self, step: int, state: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """One evaluation of the guide and one step down, or fresh noise on the way back."""
        x, a, b = state["x"], self.path[step], self.path[step + 1]
        z = noise.normal(self.problem.shape)
        if b > a:
            return {"x": x + math.sqrt(b**2 - a**2) * z}
        high, low = torch.tensor([a, b], dtype=torch.float64)
        return {"x": self.solver.step(x, high, low, self.guide(x, a, b).posterior).sample(z)}

    def end(self, state: dict[str, Tensor], noise: Noise) -> Tensor:
        """The clean values."""
        return state["x"]

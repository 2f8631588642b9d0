"""Steps of lanes along a list of noise levels, from the prior's start at the first to the clean value at the last."""

from __future__ import annotations

from torch import Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.lanes import Noise
from ppl.cost import Cost

__all__ = ["Descent"]


class Descent:
    """What methods that `run_lanes` runs share when their state is x; a subclass writes `advance`.

    Args:
        problem: prior and likelihood.
        levels: noise levels in the order in which they are visited, the last one 0.
        cost: counts evaluations of the likelihood.
    """

    def __init__(self, problem: DiffusionProblem, levels: list[float], cost: Cost | None = None) -> None:
        self.problem, self.levels = problem, levels
        self.cost = Cost() if cost is None else cost

    @property
    def steps(self) -> int:
        """Moves between levels."""
        return len(self.levels) - 1

    def begin(self, lanes: int, noise: Noise) -> dict[str, Tensor]:
        """x at the first noise level."""
        return {"x": self.problem.prior.start(noise.normal(self.problem.shape), self.levels[0])}

    def end(self, state: dict[str, Tensor], noise: Noise) -> Tensor:
        """The clean values."""
        return state["x"]

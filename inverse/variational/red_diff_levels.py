"""What all forms of RED-diff share: noise levels, the prior, and Adam for every lane by itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from sde import Schedule

__all__ = ["Levels", "Options", "State", "adam", "begun"]

State = dict[str, Tensor]


def adam(state: State, name: str, gradient: Tensor, lr: float, step: int) -> State:
    """One step of Adam on one entry of a state, its moments included; every lane by itself."""
    beta, gamma, eps = 0.9, 0.99, 1e-8
    first = beta * state[f"{name}.first"] + (1 - beta) * gradient
    second = gamma * state[f"{name}.second"] + (1 - gamma) * gradient.square()
    scale = (second / (1 - gamma ** (step + 1))).sqrt() + eps
    value = state[name] - lr / (1 - beta ** (step + 1)) * first / scale
    return {name: value, f"{name}.first": first, f"{name}.second": second}


def begun(name: str, value: Tensor) -> State:
    """An entry of a state before the first step."""
    return {name: value, f"{name}.first": torch.zeros_like(value), f"{name}.second": torch.zeros_like(value)}


class Options(Protocol):
    """The options that these parts read."""

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate."""
        ...

    @property
    def schedule(self) -> Schedule | None:
        """Source of the noise levels."""
        ...


class Levels:
    """What both forms share: noise levels and the prior."""

    def __init__(self, options: Options, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        prior = problem.prior
        if options.schedule is None:
            grid = prior.grid(prior.sigma_max, problem.lowest_level, options.steps)
        else:
            grid = options.schedule.grid(options.steps)
        self.levels = [float(s) for s in grid[:-1]]

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        return len(self.levels)

    def blank(self, lanes: int) -> Tensor:
        """What the prior alone expects: the denoised point at the first level, from its middle."""
        zero = torch.zeros(lanes, *self.problem.shape, dtype=self.problem.dtype, device=self.problem.device)
        start = self.problem.prior.start(zero, self.levels[0])
        return self.problem.prior.denoise(start, self.levels[0])

"""Small problems that tests of guides share: three dimensions, two data."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.problem import DiffusionProblem
from ppl import Program
from sde import GaussianMixture

__all__ = ["MATRIX", "Y", "full", "isotropic", "linear", "seeded"]

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def isotropic(d: int = 3, sd: float = 0.7) -> GaussianMixture:
    one = torch.ones(1, dtype=F64)
    return GaussianMixture(one, torch.linspace(-1, 1, d, dtype=F64)[None], sd**2 * one)


def full(d: int = 3) -> GaussianMixture:
    root = torch.randn(d, d, generator=seeded(1), dtype=F64)
    one = torch.ones(1, dtype=F64)
    return GaussianMixture(one, torch.linspace(-1, 1, d, dtype=F64)[None], (root @ root.T + 0.2 * torch.eye(d))[None])


MATRIX = torch.randn(2, 3, generator=seeded(3), dtype=F64)
Y = torch.tensor([1.0, -0.5], dtype=F64)


def linear(prior: Any = None, noise: float = 1.0, matrix: Tensor = MATRIX) -> DiffusionProblem:
    prior = isotropic() if prior is None else prior

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T, noise).to_event(1), obs=y)

    return DiffusionProblem.of(Program(model, Y))

"""Exact laws of affine samplers: for a Gaussian prior a sampler is an affine map of its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor

from inverse.problem import DiffusionProblem
from ppl import Program
from sde import GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(d: int = 4) -> GaussianMixture:
    root = torch.randn(d, d, generator=seeded(1), dtype=F64)
    mean = torch.randn(1, d, generator=seeded(2), dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (root @ root.T + 0.2 * torch.eye(d, dtype=F64))[None])


def isotropic(d: int = 4, sd: float = 0.7) -> GaussianMixture:
    one = torch.ones(1, dtype=F64)
    return GaussianMixture(one, torch.linspace(-1, 1, d, dtype=F64)[None], sd**2 * one)


def program_of(prior: Any, noise: Tensor | float = 0.3, m: int = 2, d: int = 4) -> Program:
    """y ~ N(A x, noise^2) with a random A (m, d)."""
    matrix = torch.randn(m, d, generator=seeded(3), dtype=F64)
    y = torch.randn(m, generator=seeded(4), dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T.to(x), torch.as_tensor(noise).to(x)).to_event(1), obs=y)

    return Program(model, y.to(prior.dtype))


def posterior_of(problem: DiffusionProblem) -> GaussianMixture:
    gaussian = problem.likelihood.gaussian
    return problem.prior.condition_linear(gaussian.operator.dense(), gaussian.data.reshape(-1), 1.0)


class Counting:
    """Counts how much noise a method asks for."""

    def __init__(self) -> None:
        self.size = 0

    def normal(self, shape: Size) -> Tensor:
        self.size += Size(shape).numel()
        return torch.zeros(1, *shape, dtype=F64)


class Unit:
    """Lane 0 has no noise; lane i has one in its i-th noise entry and zero elsewhere."""

    def __init__(self, size: int) -> None:
        self.rows = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)])
        self.at = 0

    def normal(self, shape: Size) -> Tensor:
        n = Size(shape).numel()
        self.at += n
        return self.rows[:, self.at - n : self.at].reshape(-1, *shape)


def drive(method: Any, noise: Any, lanes: int) -> Tensor:
    state = method.begin(lanes, noise)
    for step in range(method.steps):
        state = method.advance(step, state, noise)
    return method.end(state, noise)


def law(method: Any) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the draws of an affine sampler, exactly."""
    with torch.no_grad():
        counting = Counting()
        drive(method, counting, 1)
        x = drive(method, Unit(counting.size), counting.size + 1)
    columns = (x[1:] - x[0]).T
    return x[0], columns @ columns.T


@dataclass(frozen=True)
class Matrices:
    """A Gaussian problem in matrices: d = B x + n, n ~ N(0, I), x ~ N(m0, C0)."""

    m0: Tensor
    C0: Tensor
    B: Tensor
    d: Tensor

    @classmethod
    def of(cls, problem: DiffusionProblem) -> Matrices:
        g, prior = problem.likelihood.gaussian, problem.prior
        return cls(prior.mean, prior.covariance_matrix, g.operator.dense(), g.data.reshape(-1))

    @property
    def eye(self) -> Tensor:
        return torch.eye(len(self.m0), dtype=F64)

    def denoiser(self, a: float) -> tuple[Tensor, Tensor]:
        """J and k of D(x, a) = J x + k."""
        J = self.C0 @ torch.linalg.inv(self.C0 + a**2 * self.eye)
        return J, self.m0 - J @ self.m0

r"""Increments of a noise on a grid of times from standard normal numbers, all at once: a triangular matrix, not a loop.

Factors move by Y+ = e^(-gamma dt) Y + m sqrt(dt) eps (`MarkovNoise.transition`), so the increments of B are linear in
eps and in Y at the start. Within a block of steps the responses are constants, which weights contract; between blocks
Y is carried.

Source: the exponential scheme of the Markov approximation, with the projected gain [derived].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Size, Tensor

from sde.incomplete_gamma import Array, constant
from sde.prior import can_look

__all__ = ["BLOCK", "BrownianNoise", "Increments", "Noise"]

BLOCK = 256  # steps that go through one matrix


@runtime_checkable
class Noise(Protocol):
    """What drives a process: weights on Ornstein-Uhlenbeck factors of one Brownian motion per dimension."""

    @property
    def size(self) -> int:
        """How many factors; 0 is Brownian motion."""
        ...

    @property
    def horizon(self) -> float:
        """Last time it stands for; infinite where any will do."""
        ...

    def weights(self, times: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """(*hurst, size), or (times, size) for a Hurst index that depends on time."""
        ...

    def transition(self, dt: Array | float) -> tuple[Array, Array]:
        """Decay and gain of the factors over dt: (*dt, size)."""
        ...


@dataclass(frozen=True)
class BrownianNoise:
    """Brownian motion as a driving noise, without factors.

    Example:
        >>> BrownianNoise().size
        0
    """

    @property
    def size(self) -> int:
        """Zero factors."""
        return 0

    @property
    def horizon(self) -> float:
        """Any time will do."""
        return math.inf

    def weights(self, times: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """No weights."""
        return torch.zeros(0, dtype=dtype)

    def transition(self, dt: Array | float) -> tuple[Array, Array]:
        """No factors to move."""
        empty = np.zeros((*np.shape(dt), 0))
        return empty, empty


def starts_random(noise: Noise) -> bool:
    """Whether the factors have a random start (type I)."""
    return noise.size > 0 and getattr(noise, "kind", "II") == "I"


def varies(noise: Noise) -> bool:
    """Whether weights depend on time."""
    return callable(getattr(noise, "hurst", None))


class Increments:
    """B(t_{n+1}) - B(t_n) on one grid, as a linear map of normal numbers.

    Args:
        noise: Brownian or Markov; with a Hurst index that depends on time, B(t) = sum_k w_k(H(t)) (Y_k(t) - Y_k(0)).
        grid: (steps + 1,) ascending times.

    Raises:
        ValueError: fewer than two times, or times that do not ascend.

    Example:
        >>> from sde import MarkovNoise
        >>> law = Increments(MarkovNoise(0.7, horizon=1.0), torch.linspace(0, 1, 5))
        >>> law(torch.randn(10, 4), None).shape
        torch.Size([10, 4])
    """

    def __init__(self, noise: Noise, grid: Tensor | Array) -> None:
        times = np.asarray(grid.detach().cpu().numpy() if isinstance(grid, Tensor) else grid, dtype=np.float64)
        if times.ndim != 1 or len(times) < 2 or not (np.diff(times) > 0).all():
            raise ValueError(f"a grid is two or more strictly increasing times, got {grid}")
        self.noise, self.grid, self.steps, self.dt = noise, times, len(times) - 1, np.diff(times)
        self._fixed_maps: list[tuple[Array, Array]] | None = None

    @cached_property
    def _moves(self) -> tuple[Array, Array]:
        """Decay and gain times sqrt(dt): (steps, size) each."""
        decay, gain = self.noise.transition(self.dt)
        return decay, gain * np.sqrt(self.dt)[:, None]

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights before and after each step in float64: (*hurst, steps or 1, size)."""
        if varies(self.noise):
            at = self.noise.weights(constant(self.grid, like), dtype=torch.float64)
            return at[:-1], at[1:]
        same = self.noise.weights(dtype=torch.float64)[..., None, :]
        return same, same

    def _block(self, first: int, last: int) -> tuple[Array, Array]:
        """What noise and start do to the factors within a block of steps.

        Returns:
            Y_k before step n per unit of noise j, (n, j, size), zero for j >= n, the block's end included; and per unit
            of Y_k at the block's start, (n, size).
        """
        decay, gain = (move[first:last] for move in self._moves)
        count = last - first
        # Sums of logs rather than quotients of products, which overflow where rates are fast.
        log_decay = np.log(np.maximum(decay, 1e-300)).cumsum(0)
        rate = np.concatenate([np.zeros((1, decay.shape[1])), log_decay])
        before = (np.arange(count + 1)[:, None] > np.arange(count))[..., None]
        return np.where(before, np.exp(np.minimum(rate[:, None] - rate[None, 1:], 0.0)) * gain, 0.0), np.exp(rate)

    @cached_property
    def _blocks(self) -> list[tuple[int, int, Array, Array]]:
        """Every block with its responses; equal blocks of a regular grid are computed once."""
        found: list[tuple[int, int, Array, Array]] = []
        for first in range(0, self.steps, BLOCK):
            last = min(first + BLOCK, self.steps)
            same = (
                bool(found) and last - first == BLOCK and np.allclose(self.dt[first:last], self.dt[:BLOCK], rtol=1e-9)
            )
            response, memory = found[0][2:] if same else self._block(first, last)
            found.append((first, last, response, memory))
        return found

    def __call__(self, eps: Tensor, start: Tensor | None) -> Tensor:
        """Increments from normal numbers.

        Args:
            eps: (*batch, steps), one per step; for a Hurst index with a batch shape, (*batch, *hurst, steps).
            start: (*batch, size) normal numbers for Y(0) of type I; None for others.

        Returns:
            (*batch, steps).
        """
        if self.noise.size == 0:
            return eps * constant(np.sqrt(self.dt), eps).to(eps)
        y = None  # in float64: weights of many factors are large and of both signs
        if starts_random(self.noise):
            if start is None:
                raise ValueError("type I starts from random factors: give their normal numbers, (*batch, size)")
            y = start.double() @ constant(self.noise.initial_factor.T, eps)  # type: ignore[attr-defined]
        parts: list[Tensor] = []
        for (first, last, of_noise, of_start), (matrix, pull) in zip(self._blocks, self._maps(eps), strict=True):
            own = eps[..., first:last]
            increment = _along(own, matrix.to(own).mT)
            if y is not None:
                increment = increment + _along(y, pull.mT).to(own)
            parts.append(increment)
            if last < self.steps:
                moved = own.double() @ constant(of_noise[-1], eps)
                y = moved if y is None else y * constant(of_start[-1], eps) + moved
        return torch.cat(parts, -1)

    def _maps(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What makes increments in every block: of noise (*hurst, n, j), of factors at its start (*hurst, n, size)."""
        fixed = isinstance(getattr(self.noise, "hurst", None), float)
        if fixed and self._fixed_maps is not None:
            return [(constant(a, like), constant(b, like)) for a, b in self._fixed_maps]
        before, after = self.weights(like)
        decay, gain = (constant(move, like) for move in self._moves)
        maps = []
        for first, last, of_noise, of_start in self._blocks:
            w0, w1 = (w if w.shape[-2] == 1 else w[..., first:last, :] for w in (before, after))
            carry = w1 * decay[first:last] - w0  # what an increment takes from Y before its step
            matrix = (constant(of_noise[:-1], like) @ carry[..., None])[..., 0]
            matrix = matrix + torch.diag_embed((w1 * gain[first:last]).sum(-1))
            maps.append((matrix, carry * constant(of_start[:-1], like)))
        if fixed and can_look(before):
            self._fixed_maps = [(a.cpu().numpy(), b.cpu().numpy()) for a, b in maps]
        return maps

    def matrices(self) -> tuple[Tensor, Tensor]:
        """What increments are of driving numbers, and of the numbers of the start: float64.

        Returns:
            (*hurst, steps, steps) lower triangular, and (*hurst, steps, size), without columns unless the start is
            random.
        """
        eye = torch.eye(self.steps, dtype=torch.float64)
        if self.noise.size == 0:
            return torch.from_numpy(np.diag(np.sqrt(self.dt))), eye[:, :0]
        size = self.noise.size
        hurst = Size() if varies(self.noise) else self.noise.weights().shape[:-1]
        eye = eye.expand(*hurst, self.steps, self.steps) if hurst else eye
        if not starts_random(self.noise):
            return self(eye.movedim(-2, 0), None).movedim(0, -1), eye[..., :0]
        start = torch.eye(size, dtype=torch.float64)
        zeros = eye.new_zeros
        lead = (1,) * len(hurst)
        from_noise = self(eye.movedim(-2, 0), zeros(self.steps, *lead, size)).movedim(0, -1)
        return from_noise, self(zeros(size, *hurst, self.steps), start.reshape(size, *lead, size)).movedim(0, -1)

    def factor(self) -> Tensor:
        """Cholesky factor of the covariance of the increments: (*hurst, steps, steps), float64."""
        from_noise, from_start = self.matrices()
        if not from_start.shape[-1]:
            return from_noise
        return torch.linalg.cholesky(from_noise @ from_noise.mT + from_start @ from_start.mT)


def _along(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix over the last axis; a matrix for each noise where there are several: one product, not one per path."""
    if matrix.ndim == 2:
        return x @ matrix
    lead = matrix.shape[:-2]
    flat = x.expand(*x.shape[: x.ndim - 1 - len(lead)], *lead, x.shape[-1]).reshape(-1, lead.numel(), x.shape[-1])
    found = torch.bmm(flat.transpose(0, 1), matrix.reshape(-1, *matrix.shape[-2:])).transpose(0, 1)
    return found.reshape(*x.shape[: x.ndim - 1 - len(lead)], *lead, matrix.shape[-1])

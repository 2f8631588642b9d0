r"""Paths of mean-reverting processes, without a loop over their steps.

    x_{n+1} = x_n + rate (mean - x_n) dt_n + scale (B(t_{n+1}) - B(t_n))

is linear, so a scan by doubling follows all steps in log2(steps) rounds: after round r every position holds the step
2^r positions long that ends there. On a regular grid, from factors that start at zero, it is a convolution of the
driving numbers with the response to one of them, by Fourier transforms. Rates and noise may differ between draws; the
law is that of `Path`, to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from sde.incomplete_gamma import Array, constant
from sde.increments import Increments, Noise, starts_random, varies
from sde.path import Path
from sde.process import Process

__all__ = ["MeanRevertingPath", "causal_convolution", "linear_scan", "scanned_increments", "slow_waves"]


def linear_scan(decay: Tensor, move: Tensor) -> Tensor:
    """x_n = decay_n x_{n-1} + move_n along the last axis, from x = 0; differentiable, log2(n) rounds.

    Args:
        decay: (*batch, n), of absolute value at most about 1; the first is not used.
        move: (*batch, n).

    Returns:
        x after every step, of the broadcast shape.

    Source: Hillis and Steele (1986), parallel prefix over affine maps [inferred].

    Example:
        >>> linear_scan(torch.tensor([0.0, 0.5, 0.5]), torch.tensor([4.0, 0.0, 1.0])).tolist()
        [4.0, 2.0, 2.0]
    """
    decay, x = torch.broadcast_tensors(decay, move)
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat([x[..., :reach], x[..., reach:] + decay[..., reach:] * x[..., :-reach]], -1)
        if 2 * reach < x.shape[-1]:
            decay = torch.cat([decay[..., :reach], decay[..., reach:] * decay[..., :-reach]], -1)
        reach *= 2
    return x


def causal_convolution(response: Tensor, x: Tensor) -> Tensor:
    """sum_j response_j x_{n-j} along the last axis, from both at zero before their first; differentiable.

    Args:
        response: (*batch, n).
        x: (*batch, n).

    Returns:
        (*batch, n).

    Example:
        >>> causal_convolution(torch.tensor([1.0, 0.5]), torch.tensor([4.0, 0.0])).round(decimals=3).tolist()
        [4.0, 2.0]
    """
    n = x.shape[-1]
    size = 2 ** math.ceil(math.log2(2 * n))  # zeros behind both, so that no end comes round to the beginning
    product: Tensor = torch.fft.irfft(torch.fft.rfft(response, size) * torch.fft.rfft(x, size), size)
    return product[..., :n]


def scanned_increments(law: Increments, eps: Tensor, start: Tensor | None) -> Tensor:
    """What `law(eps, start)` gives, factors first: no matrix for each Hurst index where every draw has its own.

    Args:
        law: noise and grid.
        eps: (*batch, steps) normal numbers.
        start: (*batch, size) normal numbers for the factors' start, of type I.
    """
    noise = law.noise
    if noise.size == 0:
        return law(eps, start)
    decay, gain = (constant(move.T, eps).to(eps) for move in noise.transition(law.dt))  # (size, steps)
    move = gain * constant(law.dt, eps).to(eps).sqrt() * eps[..., None, :]
    first = torch.zeros_like(move[..., :1])
    if start is not None:
        first = (start @ constant(noise.initial_factor.T, eps).to(eps))[..., None]  # type: ignore[attr-defined]
        move = torch.cat([move[..., :1] + decay[:, :1] * first, move[..., 1:]], -1)
    after = linear_scan(decay, move)
    before = torch.cat([first, after[..., :-1]], -1)
    w0, w1 = (w.mT.to(eps) for w in law.weights(eps))  # (*hurst, size, steps or 1)
    return (w1 * after - w0 * before).sum(-2)


def slow_waves(steps: int) -> Array:
    """The driving numbers' waves, slowest first: right singular vectors of a sum over steps, (steps, steps).

    Column k is a wave of frequency (k + 1/2) pi / (steps + 1/2); paths of any Hurst index weigh waves nearly by
    themselves.

    Source: singular vectors of the cumulative sum [derived].

    Example:
        >>> waves = slow_waves(5)
        >>> bool(np.allclose(waves.T @ waves, np.eye(5)))
        True
    """
    n, k = np.arange(steps)[:, None], np.arange(steps)
    return np.sqrt(4 / (2 * steps + 1)) * np.cos((k + 0.5) * np.pi * (2 * n + 1) / (2 * steps + 1))


class MeanRevertingPath(Path):
    r"""X at given times, for dX = rate (mean - X) dt + scale dB: an Ornstein-Uhlenbeck process, fractional or not.

    The law of `Path` with that drift, several times faster: hundreds of steps are a few dozen operations, also to
    capture and to differentiate.

    Args:
        rate: of the pull to the mean, per unit of time; a number or 0-d tensor, or (d,) for each coordinate.
        mean: to which it pulls, likewise.
        scale: of the noise, likewise.
        noise: `BrownianNoise()` or a `MarkovNoise`.
        times: (n,) strictly increasing, after `start`.
        initial: (d,) or (*batch, d), X at `start`; a number is one coordinate.
        start: the time of `initial`.
        dt: longest step; None takes one step from time to time. Steps longer than 2 / rate do not settle.
        basis: (noise, noise) orthogonal array: driving numbers are those of its columns, which changes no law. Slow
            waves (`slow_waves`) are what data see first, and engines that scale each number by itself gain by them.
            Engines that walk a path step by step want none.

    Raises:
        ValueError: see `Path`.

    Example:
        >>> from sde import BrownianNoise
        >>> times = torch.linspace(0.1, 1, 10)
        >>> path = MeanRevertingPath(3.0, 1.0, 0.5, BrownianNoise(), times)
        >>> z = torch.randn(path.noise_shape)
        >>> other = Path(Process(lambda x, t: 3.0 * (1.0 - x), 0.5), times)
        >>> bool(torch.allclose(path.from_noise(z), other.from_noise(z), atol=1e-6))
        True
    """

    def __init__(
        self,
        rate: Tensor | float,
        mean: Tensor | float,
        scale: Tensor | float,
        noise: Noise,
        times: Tensor,
        initial: Tensor | float = 0.0,
        *,
        start: float = 0.0,
        dt: float | None = None,
        basis: Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.rate, self.mean_level, self.scale, self.basis = rate, mean, scale, basis
        process = Process(lambda x, t: rate * (mean - x), scale, noise)
        super().__init__(process, times, initial, start=start, dt=dt, validate_args=validate_args)

    def from_noise(self, z: Tensor) -> Tensor:
        """The path of standard normal numbers, differentiable: (*batch, noise) -> (*batch, n, d)."""
        if self.basis is not None:
            z = z @ constant(self.basis.T, z).to(z)
        driving, start = self.split_noise(z)
        if self._regular:
            initial = self.initial.to(driving)[..., None]
            pulled = (self._part(self.mean_level, driving) - initial) * (1 - self._decayed(driving, 1))
            x = (initial + pulled + causal_convolution(self._response(driving), driving)).mT
        else:
            x = self.follow(scanned_increments(self.increments, driving, start))
        return x if len(self.ends) == self.steps else x[..., torch.from_numpy(self.ends).to(x.device), :]

    @property
    def _regular(self) -> bool:
        """Whether every step answers its number alike, whatever came before."""
        dt, noise = self.increments.dt, self.process.noise
        return not starts_random(noise) and not varies(noise) and bool(np.allclose(dt, dt[0], rtol=1e-9, atol=0))

    def _response(self, like: Tensor) -> Tensor:
        """X after every step, from zero, of a number one that drives the first: (*hurst, d or 1, steps)."""
        noise, steps = self.process.noise, self.increments.steps
        dt = float(self.increments.dt[0])
        increments = like.new_zeros(steps)
        increments[0] = math.sqrt(dt)
        if noise.size:
            decay, gain = noise.transition(dt)
            moved = decay ** np.arange(steps)[:, None]  # (steps, size)
            moved = gain * math.sqrt(dt) * np.diff(moved, axis=0, prepend=0.0)
            increments = noise.weights(dtype=torch.float64).to(like) @ constant(moved.T, like).to(like)
        return causal_convolution(self._decayed(like, 0), self._part(self.scale, like) * increments[..., None, :])

    def _decayed(self, like: Tensor, first: int) -> Tensor:
        """What the pull leaves of a distance after first, first + 1 .. steps: (d or 1, steps)."""
        powers = constant(np.arange(first, first + self.increments.steps, dtype=np.float64), like).to(like)
        return (1 - self._part(self.rate, like) * float(self.increments.dt[0])) ** powers

    def _part(self, value: Tensor | float, like: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)[..., None]

    def follow(self, increments: Tensor) -> Tensor:
        """X after every step of the grid: (*batch, d, steps) increments of the noise -> (*batch, steps, d)."""
        rate, mean, scale = (self._part(v, increments) for v in (self.rate, self.mean_level, self.scale))
        pull = rate * constant(self.increments.dt, increments).to(increments)
        x = self.initial.to(increments)[..., None]
        move = scale * increments + pull * (mean - x)  # of X - initial, which starts at 0
        return (x + linear_scan(1 - pull, move)).mT

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> MeanRevertingPath:
        """Independent paths over batch_shape."""
        return MeanRevertingPath(
            self.rate, self.mean_level, self.scale, self.process.noise, self.times,
            self.initial.expand(*Size(batch_shape), -1), start=self.start, dt=self.dt, basis=self.basis,
            validate_args=False,
        )  # fmt: skip

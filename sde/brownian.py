r"""Brownian motion as a function of a seed and a time, whatever the order in which times are asked for.

W(t) is found by halving (start, end): the middle of an interval of length l is the mean of its ends plus sqrt(l) / 2
times a normal number that belongs to the interval, so that every query sees the same path. Below 2^-depth of the whole,
a time draws from the bridge between the ends of its interval with a number of its own.

Normal numbers come from a hash of (seed, interval, component), the same on every device.

Source: Lévy's construction; the virtual tree of Li et al. (2020) and Kidger et al. (2021) [inferred].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Size, Tensor

__all__ = ["BrownianMotion"]

# Odd constants of the splitmix64 generator, as signed 64-bit integers.
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The signed 64-bit integer with these bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift to the right with zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the input."""
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _normal(keys: Tensor) -> Tensor:
    """One standard normal number in float64 for every 64-bit key, by Box and Muller."""
    first, second = (_shift(_mix(keys + _signed(i * GAMMA)), 11).double() for i in (1, 2))
    radius = (-2 * torch.log((first + 0.5) / 2**53)).sqrt()
    return radius * torch.cos(2 * math.pi * second / 2**53)


@dataclass(frozen=True)
class BrownianMotion:
    """W on (start, end), with W(start) = 0: a function of seed and time.

    Args:
        seed: which path.
        shape: of W at one time; components are independent.
        start: first time.
        end: last time.
        depth: halvings before a time has numbers of its own.
        dtype: of the values; they are computed in float64.
        device: of the values.

    Raises:
        ValueError: end not after start, or times outside.

    Example:
        >>> w = BrownianMotion(seed=1, shape=(2,), end=1.0)
        >>> late = w(torch.tensor([0.7]))
        >>> bool((w(torch.tensor([0.1, 0.7]))[1] == late[0]).all())
        True
    """

    seed: int
    shape: Size | tuple[int, ...] = ()
    start: float = 0.0
    end: float = 1.0
    depth: int = 24
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.end > self.start):
            raise ValueError(f"the end must come after the start, got start {self.start} and end {self.end}")
        if not (isinstance(self.depth, int) and 1 <= self.depth <= 48):
            raise ValueError(f"depth must be an integer from 1 to 48, got {self.depth!r}")

    def __call__(self, times: Tensor) -> Tensor:
        """W at times: (*times, *shape).

        Raises:
            ValueError: a time before the start or after the end.
        """
        t = torch.as_tensor(times, dtype=torch.float64, device=self.device)
        if bool(((t < self.start) | (t > self.end) | t.isnan()).any()):
            raise ValueError(
                f"times must lie between {self.start} and {self.end}, got {float(t.min())} to {float(t.max())}"
            )
        flat, inverse = t.reshape(-1).unique(return_inverse=True)
        value = self._values((flat - self.start) / (self.end - self.start)) * math.sqrt(self.end - self.start)
        return value[inverse].to(self.dtype).reshape(t.shape + Size(self.shape))

    def increments(self, times: Tensor) -> Tensor:
        """W(t_{n+1}) - W(t_n) for ascending times: (times - 1, *shape)."""
        return self(times).diff(dim=0)

    def _values(self, u: Tensor) -> Tensor:
        """W at ascending u in (0, 1) for a path over length 1: (times, components), float64."""
        low, high = torch.zeros_like(u)[:, None], self._at(torch.tensor([1], device=u.device))
        high = high.expand(len(u), -1)
        low = low.expand(len(u), high.shape[1])
        node = torch.ones(len(u), dtype=torch.int64, device=u.device)
        at, length = torch.zeros_like(u), 1.0
        for _ in range(self.depth):
            # Neighbouring times share intervals: one number for each.
            kept, place = node.unique_consecutive(return_inverse=True)
            middle = (low + high) / 2 + math.sqrt(length) / 2 * self._at(2 * kept)[place]
            length /= 2
            right = u >= at + length
            low, high = torch.where(right[:, None], middle, low), torch.where(right[:, None], high, middle)
            at, node = at + length * right, 2 * node + right
        share = ((u - at) / length).clamp(0, 1)[:, None]
        own = self._at(u.view(torch.int64) ^ _signed(GAMMA))
        return low + share * (high - low) + (length * share * (1 - share)).sqrt() * own

    def _at(self, keys: Tensor) -> Tensor:
        """Normal numbers of the components for every key: (keys, components)."""
        size = math.prod(self.shape)
        parts = torch.arange(size, dtype=torch.int64, device=keys.device)
        seed = _mix(torch.tensor(_signed(self.seed * GAMMA + 1), device=keys.device))
        return _normal(_mix(_mix(keys ^ seed)[:, None] + parts * _signed(GAMMA)))

"""Nonlinear functions of an expectation, without bias where that is possible.

    (E X)^n      the mean of products of n different copies (a U-statistic)
    exp(E X)     e^l prod_{i <= N} X_i / l,  N ~ Poisson(l)
    E X * E Y    X and Y independent

A function of the mean of the copies would be biased: g(mean X) has not the mean g(E X).
Source: Beskos et al. (2006) for the exponential [inferred]; Hoeffding (1948) [inferred].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.errors import OptionError

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["Expectation"]


class Expectation:
    """Independent copies of a random real.

    Args:
        ctx: where it was drawn.
        fn: draws and computes it again.
        copies: (copies, *outer particles, samples, *data).
    """

    def __init__(self, ctx: Context, fn: Callable[[], Tensor], copies: Tensor) -> None:
        self._ctx, self._fn, self.copies = ctx, fn, copies

    def mean(self) -> Tensor:
        """E X itself; anything nonlinear of it is biased."""
        return self.copies.mean(0)

    def power(self, n: int) -> Tensor:
        """(E X)^n, unbiased.

        Raises:
            OptionError: there are fewer than n copies.
        """
        size = len(self.copies)
        if n < 1 or size < n:
            raise OptionError(
                f"(E X)^{n} without bias needs {n} independent samples or more, got {size}; raise samples="
            )
        # Elementary symmetric polynomial, divided by the number of its terms.
        sums = [torch.ones_like(self.copies[0]), *(torch.zeros_like(self.copies[0]) for _ in range(n))]
        for x in self.copies:
            sums = [sums[0], *(sums[j] + x * sums[j - 1] for j in range(1, n + 1))]
        return sums[n] / math.comb(size, n)

    def exp(self, rate: float = 1.0) -> Tensor:
        """exp(E X), unbiased; its copies are drawn anew, a Poisson number of them.

        Args:
            rate: mean of that number; larger rates have less variance, best near |E X|.
        """
        if not rate > 0:
            raise OptionError(f"rate must be positive, got {rate}")
        ctx = self._ctx
        ctx.ragged = True
        shape = ctx.lead + ctx.engine.plan.sizes
        ctx._seed((ctx._next(), "count"))
        count = torch.poisson(torch.full(shape, float(rate), device=self.copies.device))
        with ctx.particles(max(int(count.max()), 1)) as axis:
            value = self._fn()
        used = torch.arange(axis.size, device=count.device).reshape(-1, *(1,) * count.ndim) < count
        return math.exp(rate) * torch.where(used, value / rate, 1.0).prod(0)

    def log_bound(self) -> Tensor:
        """log of the mean of the copies: below log E X on average (Jensen), closer with more copies."""
        return self.copies.mean(0).log()

    def __mul__(self, other: Expectation) -> Tensor:
        """E X E Y, for independent X and Y."""
        if not isinstance(other, Expectation):
            return NotImplemented
        if other is self:
            return self.power(2)
        return self.mean() * other.mean()

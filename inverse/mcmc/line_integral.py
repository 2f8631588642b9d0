r"""Ratios of densities from a score, without a normaliser: the integral along the line between two points.

    log p(b) - log p(a) = \int_0^1 (b - a) . score(a + u (b - a)) du

n nodes of Gauss and Legendre are exact where log p is a polynomial of degree 2 n along the line. Where the scores at
both ends are known anyway, as in Langevin steps, the rule of Gauss and Lobatto has the same degree with one node less.
A network's score is the gradient of no density; the integral then depends on the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl.errors import OptionError
from sde.log_density import Estimate

__all__ = ["LineRule", "adaptive_log_ratio", "log_ratio"]

# Seven nodes on [-1, 1] and three rules on them: Kronrod's extension of Lobatto's four, Lobatto's own, and one of
# degree 3 without ends. A jump in the score can fool two of them together, hardly all three; and next to an end, which
# rules of Gauss do not look at, it cannot hide.
SEVEN = (-1.0, -math.sqrt(2 / 3), -math.sqrt(0.2), 0.0, math.sqrt(0.2), math.sqrt(2 / 3), 1.0)
RULES = (
    tuple(w / 1470 for w in (77, 432, 625, 672, 625, 432, 77)),
    (1 / 6, 0.0, 5 / 6, 0.0, 5 / 6, 0.0, 1 / 6),
    (0.0, 0.5, 0.0, 1.0, 0.0, 0.5, 0.0),
)


@dataclass(frozen=True)
class LineRule:
    """A quadrature rule on [0, 1], the same read from either end, so that the ratio of b to a is minus that of a to b.

    Args:
        nodes: interior nodes, ascending.
        weights: of the interior nodes.
        end: weight of each end, 0 for a rule without ends.

    Example:
        >>> LineRule.lobatto(1)
        LineRule(nodes=(0.5,), weights=(0.6666666666666666,), end=0.16666666666666666)
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    end: float = 0.0

    @classmethod
    def legendre(cls, nodes: int) -> LineRule:
        """Gauss and Legendre: exact for scores of degree 2 nodes - 1."""
        if nodes < 1:
            raise OptionError(f"nodes must be one or more, got {nodes}")
        u, w = np.polynomial.legendre.leggauss(nodes)
        return cls(tuple((0.5 * (u + 1)).tolist()), tuple((0.5 * w).tolist()))

    @classmethod
    def lobatto(cls, interior: int) -> LineRule:
        """Gauss and Lobatto with both ends: exact for scores of degree 2 interior + 1."""
        if interior < 0:
            raise OptionError(f"interior nodes must be zero or more, got {interior}")
        n = interior + 2
        last = np.polynomial.legendre.Legendre.basis(n - 1)
        u = np.sort(last.deriv().roots().real) if interior else np.zeros(0)
        w = 1 / (n * (n - 1) * last(u) ** 2)
        return cls(tuple((0.5 * (u + 1)).tolist()), tuple(w.tolist()), 1 / (n * (n - 1)))

    def points(self, a: Tensor, b: Tensor) -> Tensor:
        """The interior points of the lines from a to b, (lanes, *shape) -> (nodes, lanes, *shape)."""
        u = torch.tensor(self.nodes, dtype=a.dtype, device=a.device).reshape(-1, *[1] * a.ndim)
        return a + u * (b - a)

    def integrate(self, a: Tensor, b: Tensor, inner: Tensor, at_a: Tensor | None, at_b: Tensor | None) -> Tensor:
        """log p(b) - log p(a), (lanes,), from scores at `points` (nodes, lanes, *shape) and at the ends."""
        mean = torch.zeros_like(a)
        for weight, score in zip(self.weights, inner, strict=True):
            mean = mean + weight * score
        if self.end and at_a is not None and at_b is not None:
            mean = mean + self.end * (at_a + at_b)
        return ((b - a) * mean).flatten(1).sum(1)


def log_ratio(score: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, nodes: int = 5) -> Tensor:
    """log p(b) - log p(a) with one call of the score for all lanes and nodes.

    Args:
        score: grad log p, (rows, *shape) -> (rows, *shape).
        a: (lanes, *shape).
        b: (lanes, *shape).
        nodes: of Gauss and Legendre.

    Returns:
        (lanes,).

    Example:
        >>> a, b = torch.zeros(1, 2), torch.ones(1, 2)
        >>> log_ratio(lambda x: -x, a, b, nodes=1)                       # a normal density: -|b|^2 / 2
        tensor([-1.])
    """
    rule = LineRule.legendre(nodes)
    points = rule.points(a, b)
    return rule.integrate(a, b, score(points.flatten(0, 1)).reshape(points.shape), None, None)


def adaptive_log_ratio(
    score: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    ends: tuple[Tensor, Tensor],
    tolerance: float = 0.01,
    halvings: int = 16,
) -> Estimate:
    """log p(b) - log p(a) between points that may lie far apart: panels are halved until their error is small.

    Lobatto's rule with Kronrod's extension: ends and middle of a panel serve its halves, so that a panel costs five
    evaluations. One that is still off after all halvings is kept as it is, and its error is in the result.

    Args:
        score: grad log p, (rows, *shape) and the lane of every row (rows,) -> (rows, *shape); lanes may have densities
            of their own.
        a: (lanes, *shape).
        b: (lanes, *shape).
        ends: the scores at a and at b, which are not evaluated again.
        tolerance: error allowed for a panel, in nats, in proportion to its length down to a tenth.
        halvings: most halvings of a line.

    Returns:
        Estimate(value, stderr), each (lanes,); stderr is the error of the coarser rules, usually far too large.

    Source: Gander & Gautschi (2000) for the rules [inferred].

    Example:
        >>> a, b = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
        >>> round(adaptive_log_ratio(lambda x, lane: -(x**3), a, b, (-(a**3), -(b**3))).value.item(), 12)
        -0.5
    """
    u = 0.5 * (1 + torch.tensor(SEVEN, dtype=a.dtype, device=a.device))
    full, *checks = 0.5 * torch.tensor(RULES, dtype=a.dtype, device=a.device)
    value, error = a.new_zeros(len(a)), a.new_zeros(len(a))
    lane = torch.arange(len(a), device=a.device)
    start, width = a.new_zeros(len(a)), 1.0
    left, right = (((b - a) * end).flatten(1).sum(1) for end in ends)
    for depth in range(halvings + 1):
        step = (b - a)[lane, None]
        at = (start[:, None] + width * u[1:-1]).reshape(-1, 5, *[1] * (a.ndim - 1))
        x = a[lane, None] + at * step
        inner = score(x.flatten(0, 1), lane.repeat_interleave(5)).reshape(x.shape)
        slope = torch.cat([left[:, None], (inner * step).flatten(2).sum(2), right[:, None]], 1) * width
        best = slope @ full
        off = torch.stack([(best - slope @ check).abs() for check in checks]).amax(0)
        good = (off <= tolerance * max(width, 0.1)) | ~off.isfinite() | (depth == halvings)
        value, error = value.index_add(0, lane[good], best[good]), error.index_add(0, lane[good], off[good])
        if bool(good.all()):
            break
        lane, start, width = lane[~good].repeat(2), start[~good], width / 2
        left, middle, right = (slope[~good, n] / (2 * width) for n in (0, 3, 6))
        start = torch.cat([start, start + width])
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
    return Estimate(value, error)

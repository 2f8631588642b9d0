r"""Ratios of densities from a score, without a normaliser: the integral along the line between two points.

    log p(b) - log p(a) = \int_0^1 (b - a) . score(a + u (b - a)) du

n nodes of Gauss and Legendre are exact where log p is a polynomial of degree 2 n along the line. Where the scores at
both ends are known anyway, as in Langevin steps, the rule of Gauss and Lobatto has the same degree with one node less.
A network's score is the gradient of no density; the integral then depends on the line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl.errors import OptionError
from sde.log_density import Estimate

__all__ = ["LineRule", "adaptive_log_ratio", "log_ratio"]

# Kronrod's seven nodes on [-1, 1] with Gauss's three among them (0, 2, 4, 6 are new), and both sets of weights.
KRONROD = (0.9604912687080202, 0.7745966692414834, 0.4342437493468026, 0.0)
KRONROD_WEIGHTS = (0.1046562260264673, 0.2684880898683334, 0.4013974147759622, 0.4509165386584741)
GAUSS_WEIGHTS = (0.0, 5 / 9, 0.0, 8 / 9)


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
    tolerance: float = 0.01,
    halvings: int = 8,
) -> Estimate:
    """log p(b) - log p(a) between points that may lie far apart: panels are halved until their error is small.

    Seven nodes of Kronrod for each panel, three of which are Gauss's and give the error. A panel that is still off
    after all halvings is kept as it is, and its error is in the result.

    Args:
        score: grad log p, (rows, *shape) and the lane of every row (rows,) -> (rows, *shape); lanes may have densities
            of their own.
        a: (lanes, *shape).
        b: (lanes, *shape).
        tolerance: error allowed for a line, in nats; a panel may have its share by length, and at least a tenth.
        halvings: most halvings of a line.

    Returns:
        Estimate(value, stderr), each (lanes,); stderr is an error by quadrature, usually far too large.

    Example:
        >>> a, b = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
        >>> round(adaptive_log_ratio(lambda x, lane: -(x**3), a, b).value.item(), 12)
        -0.5
    """
    half = torch.tensor(KRONROD, dtype=a.dtype, device=a.device)
    nodes = 0.5 * (1 + torch.cat([-half, half[:-1].flip(0)]))
    full = torch.tensor(KRONROD_WEIGHTS, dtype=a.dtype, device=a.device)
    few = torch.tensor(GAUSS_WEIGHTS, dtype=a.dtype, device=a.device)
    full, few = (0.5 * torch.cat([w, w[:-1].flip(0)]) for w in (full, few))
    value, error = a.new_zeros(len(a)), a.new_zeros(len(a))
    lane = torch.arange(len(a), device=a.device)
    start, width = a.new_zeros(len(a)), 1.0
    wide = [-1] + [1] * (a.ndim - 1)
    for depth in range(halvings + 1):
        step = (b - a)[lane]
        u = start[:, None] + width * nodes
        x = a[lane][:, None] + u.reshape(*u.shape, *wide[1:]) * step[:, None]
        rows = lane.repeat_interleave(len(nodes))
        slope = (score(x.flatten(0, 1), rows).reshape(x.shape) * step[:, None]).flatten(2).sum(2) * width
        best = slope @ full
        off = (best - slope @ few).abs()
        # Far below the error of Gauss's three, which is what `off` measures, as in QUADPACK.
        off = torch.minimum(off, (200 * off / slope.abs().mean(1).clamp(min=1e-30)).pow(1.5) * slope.abs().mean(1))
        good = (off <= tolerance * max(width, 0.1)) | ~off.isfinite() | (depth == halvings)
        value = value.index_add(0, lane[good], best[good])
        error = error.index_add(0, lane[good], off[good])
        if bool(good.all()):
            break
        lane, start, width = lane[~good].repeat(2), start[~good], width / 2
        start = torch.cat([start, start + width])
    return Estimate(value, error)

"""Sliced Wasserstein distances between samples, plain or weighted, and the floor they have between exact draws.

SW_p(x, y)^p = E_theta int_0^1 |F^{-1}_{theta.x}(u) - F^{-1}_{theta.y}(u)|^p du,   theta uniform on the sphere
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.weighted import normalise

__all__ = [
    "Floor",
    "FloorRatio",
    "max_sliced_wasserstein",
    "random_directions",
    "sliced_over_floor",
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "wasserstein_1d",
]

_CHUNK = 2**22  # projected numbers held at once


@dataclass(frozen=True)
class Floor:
    """Distance between independent exact samples of one size: what a perfect sampler scores.

    Args:
        value: mean over pairs of reference sets.
        stderr: its standard error, by leaving out one set at a time.
    """

    value: float
    stderr: float


@dataclass(frozen=True)
class FloorRatio:
    """Distance of a sample to exact references, in units of their own.

    Args:
        distance: mean distance to the reference sets.
        floor: mean distance between them.
    """

    distance: float
    floor: Floor

    @property
    def ratio(self) -> float:
        """Distance over floor, one for a perfect sampler and about sqrt((1 + n / R) / 2) at root ESS R."""
        return self.distance / self.floor.value


def random_directions(projections: int, dim: int, generator: torch.Generator) -> Tensor:
    """Uniform points on the unit sphere.

    Args:
        projections: number of directions.
        dim: of the space.
        generator: on the device wanted.

    Returns:
        (projections, dim) float64.

    Example:
        >>> random_directions(3, 5, torch.Generator().manual_seed(0)).norm(dim=1)
        tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """
    if projections < 1 or dim < 1:
        raise OptionError(f"projections and dim must be one or more, got {projections} and {dim}")
    theta = torch.randn(projections, dim, generator=generator, device=generator.device, dtype=torch.float64)
    return theta / theta.norm(dim=1, keepdim=True)


def _check_p(p: float) -> None:
    if not p >= 1:
        raise OptionError(f"p must be one or more, got {p}")


def wasserstein_1d(
    x: Tensor, y: Tensor, p: float = 1, weights: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """W_p^p between samples on the line, exactly, column by column.

    Args:
        x: (n, columns).
        y: (m, columns); m may differ from n.
        p: order, one or more.
        weights: (n,) of x, non-negative, sum one; equal when None.
        other: (m,) of y.

    Returns:
        (columns,) W_p to the power p.

    Example:
        >>> wasserstein_1d(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), p=2)
        tensor([6.5000])
    """
    _check_p(p)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (len(x), len(y)):
        raise ShapeError(
            f"x (n, columns) and y (m, columns) with n, m > 0 expected, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    xs, i = x.T.sort(-1)
    ys, j = y.T.sort(-1)
    if weights is None and other is None and len(x) == len(y):
        return (xs - ys).abs().pow(p).mean(-1)
    # Both quantile functions are steps: between two neighbouring breakpoints of either, both are constant.
    n, m = len(x), len(y)
    wx = x.new_full((n,), 1 / n) if weights is None else weights.to(x)
    wy = y.new_full((m,), 1 / m) if other is None else other.to(y)
    cx, cy = wx[i].cumsum(-1), wy[j].cumsum(-1)
    cx, cy = cx / cx[:, -1:], cy / cy[:, -1:]
    u = torch.cat([cx, cy], -1).sort(-1).values
    du = torch.diff(u, dim=-1, prepend=u.new_zeros(len(u), 1))
    middle = u - du / 2
    qx = xs.gather(-1, torch.searchsorted(cx, middle).clamp_max(n - 1))
    qy = ys.gather(-1, torch.searchsorted(cy, middle).clamp_max(m - 1))
    return (du * (qx - qy).abs().pow(p)).sum(-1)


def _flat(x: Tensor, y: Tensor, log_weight: Tensor | None, other: Tensor | None) -> tuple[Tensor, ...]:
    """Samples as float64 matrices and weights that sum to one."""
    if x.ndim < 1 or x.shape[1:] != y.shape[1:] or 0 in (len(x), len(y)):
        raise ShapeError(
            f"two samples (draws, *event) of one event shape expected, got {tuple(x.shape)} and {tuple(y.shape)}; "
            "join chains on the first axis"
        )
    for name, sample, lw in (("x", x, log_weight), ("y", y, other)):
        if lw is not None and lw.shape != sample.shape[:1]:
            raise ShapeError(f"log weights of {name} have shape {tuple(lw.shape)}, expected {(len(sample),)}")
    return x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    projections: int = 100,
    p: float = 1,
    log_weight: Tensor | None = None,
    other_log_weight: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    """Sliced Wasserstein distance of order p between two samples.

    Args:
        x: (n, *event).
        y: (m, *event).
        generator: draws the directions.
        projections: number of directions.
        p: order, one or more.
        log_weight: (n,) log weights of x, up to a constant; equal when None.
        other_log_weight: (m,) of y.
        directions: (projections, dim) unit vectors, to compare several samples along the same ones.

    Returns:
        0-d float64, (mean over directions of W_p^p)^(1/p).

    Raises:
        OptionError: if neither generator nor directions came.

    Source: Bonneel et al. (2015) [inferred].

    Example:
        >>> x = torch.zeros(4, 1)
        >>> sliced_wasserstein(x, x + 3, generator=torch.Generator().manual_seed(0))
        tensor(3., dtype=torch.float64)
    """
    _check_p(p)
    u, v = _flat(x, y, log_weight, other_log_weight)
    if directions is None:
        if generator is None:
            raise OptionError("sliced_wasserstein draws directions; pass a generator, or directions of your own")
        directions = random_directions(projections, u.shape[1], generator)
    directions = directions.to(u)
    wx = None if log_weight is None else normalise(log_weight)
    wy = None if other_log_weight is None else normalise(other_log_weight)
    rows = max(1, _CHUNK // (len(u) + len(v)))
    parts = [wasserstein_1d(u @ theta.T, v @ theta.T, p, wx, wy) for theta in directions.split(rows)]
    return torch.cat(parts).mean().pow(1 / p)


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    starts: int = 32,
    steps: int = 50,
    p: float = 2,
    log_weight: Tensor | None = None,
    other_log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Largest W_p over directions, from below: ascent theta <- grad / |grad| of W_p^p from several starts.

    Args:
        x: (n, *event).
        y: (m, *event).
        generator: draws the starts; the difference of the means is one more.
        starts: random directions.
        steps: of ascent.
        p: order, one or more.
        log_weight: (n,) log weights of x.
        other_log_weight: (m,) of y.

    Returns:
        0-d float64 distance and the (dim,) unit direction that attains it.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(50, 3, generator=g)
        >>> value, direction = max_sliced_wasserstein(x, x + torch.tensor([0.0, 2.0, 0.0]), generator=g)
        >>> round(float(value), 6), direction.abs().round(decimals=3)
        (2.0, tensor([0., 1., 0.], dtype=torch.float64))
    """
    _check_p(p)
    u, v = _flat(x, y, log_weight, other_log_weight)
    wx = None if log_weight is None else normalise(log_weight).to(u)
    wy = None if other_log_weight is None else normalise(other_log_weight).to(v)
    theta = random_directions(starts, u.shape[1], generator).to(u)
    shift = (u.mean(0) if wx is None else wx @ u) - (v.mean(0) if wy is None else wy @ v)
    if shift.norm() > 0:
        theta = torch.cat([theta, (shift / shift.norm())[None]])
    best, direction = u.new_zeros(()), theta[0]
    for _ in range(steps + 1):
        with torch.enable_grad():
            free = theta.detach().requires_grad_()
            value = wasserstein_1d(u @ free.T, v @ free.T, p, wx, wy)
            (gradient,) = torch.autograd.grad(value.sum(), free)
        top = value.detach().argmax()
        if value[top] > best:
            best, direction = value[top].detach(), theta[top]
        size = gradient.norm(dim=1, keepdim=True)
        theta = torch.where(size > 0, gradient / size.clamp_min(torch.finfo(size.dtype).tiny), theta)
    return best.pow(1 / p), direction


def sliced_wasserstein_floor(
    sample: Callable[[int, torch.Generator], Tensor],
    draws: int,
    *,
    generator: torch.Generator,
    references: int = 6,
    projections: int = 100,
    p: float = 1,
) -> Floor:
    """Expected sliced Wasserstein distance between two independent exact samples of the same size.

    Args:
        sample: exact sampler, (draws, generator) -> (draws, *event).
        draws: size of each sample.
        generator: draws samples and directions.
        references: exact samples; every pair is compared along the same directions. Six or more are advised.
        projections: number of directions.
        p: order.

    Returns:
        Floor(value, stderr).

    Example:
        >>> normal = lambda n, g: torch.randn(n, 2, generator=g)
        >>> floor = sliced_wasserstein_floor(normal, 400, generator=torch.Generator().manual_seed(0))
        >>> 0.02 < floor.value < 0.15                    # W_1 of two samples of a normal, about 1.0 sqrt(2 / n)
        True
    """
    return _floor([sample(draws, generator) for _ in range(_enough(references))], generator, projections, p)[0]


def _enough(references: int) -> int:
    if references < 3:
        raise OptionError(
            f"a floor with an error bar needs three reference sets or more (six are advised), got {references}"
        )
    return references


def _floor(sets: Sequence[Tensor], generator: torch.Generator, projections: int, p: float) -> tuple[Floor, Tensor]:
    """Mean over pairs, jackknife error, and the directions used."""
    dim = sets[0][0].numel()
    theta = random_directions(projections, dim, generator)
    k = len(sets)
    pair = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i):
            pair[i, j] = pair[j, i] = sliced_wasserstein(sets[i], sets[j], p=p, directions=theta)
    total = pair.sum() / 2
    value = total / (k * (k - 1) / 2)
    without = (total - pair.sum(1)) / ((k - 1) * (k - 2) / 2)
    stderr = ((k - 1) / k * (without - without.mean()).square().sum()).sqrt()
    return Floor(float(value), float(stderr)), theta


def sliced_over_floor(
    x: Tensor,
    sample: Callable[[int, torch.Generator], Tensor],
    *,
    generator: torch.Generator,
    references: int = 6,
    projections: int = 100,
    p: float = 1,
    log_weight: Tensor | None = None,
    draws: int | None = None,
) -> FloorRatio:
    """Sliced Wasserstein distance of a sample to exact draws, in units of what exact draws score.

    Numerator and floor use the same reference sets and directions, so their luck cancels in part.

    Args:
        x: (n, *event) draws to judge.
        sample: exact sampler, (draws, generator) -> (draws, *event).
        generator: draws reference sets and directions.
        references: exact samples to average over.
        projections: number of directions.
        p: order.
        log_weight: (n,) log weights of x.
        draws: size of each reference set, n when None.

    Returns:
        FloorRatio(distance, floor), with .ratio.

    Example:
        >>> normal = lambda n, g: torch.randn(n, 2, generator=g)
        >>> g = torch.Generator().manual_seed(0)
        >>> sliced_over_floor(normal(400, g) + 1, normal, generator=g).ratio > 3
        True
    """
    size = len(x) if draws is None else draws
    sets = [sample(size, generator) for _ in range(_enough(references))]
    floor, theta = _floor(sets, generator, projections, p)
    distances = [sliced_wasserstein(x, s, p=p, directions=theta, log_weight=log_weight) for s in sets]
    return FloorRatio(float(torch.stack(distances).mean()), floor)

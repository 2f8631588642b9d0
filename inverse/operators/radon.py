"""Parallel-beam tomography: line integrals of an image, averaged over the width of each detector.

(A x)_{theta, k} = 1/delta int_{bin k} ds int x(s cos theta - t sin theta, s sin theta + t cos theta) dt

x is constant on each pixel, so a pixel projects to a trapezoid and every entry of A is an exact integral of one. The
adjoint reads the same weights, so it is the transpose to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import flatten_event, image_shape
from ppl.errors import DataError, OptionError

__all__ = ["Radon"]


def _trapezoid_cdf(s: Tensor, wide: float, narrow: float) -> Tensor:
    """Share left of s of the unit trapezoid box(wide) * box(narrow), wide >= narrow >= 0; no cancellation at 0."""
    inner, outer = (wide - narrow) / 2, (wide + narrow) / 2
    corner = (outer - s.abs()).clamp_min(0).square() / (2 * wide * narrow) if narrow > 0 else torch.zeros_like(s)
    flank = torch.where(s > 0, 1 - corner, corner)
    return torch.where(s.abs() <= inner, 0.5 + s / wide, flank)


class Radon(LinearOperator):
    """Sinogram of an image: one row per angle, one column per detector, in units of x times pixels.

    Pixel (i, j) has its centre at X = j - (width - 1) / 2, Y = (height - 1) / 2 - i, and detector k covers
    s = X cos(theta) + Y sin(theta) within spacing / 2 of (k - (detectors - 1) / 2) spacing. What falls beside the
    detectors is not measured.

    Args:
        angles: theta in degrees, counter-clockwise from the horizontal axis; or a number of them, spread evenly over
            [0, 180).
        in_shape: (*channels, height, width).
        detectors: number of detectors; when None as many as see the whole image from every side.
        spacing: width of a detector in pixels.

    out_shape is (*channels, angles, detectors).

    Raises:
        OptionError: no angle, no detector, or a spacing that is not positive.

    Source: pixel footprints as exact trapezoids, [derived]; the transform is that of Natterer (1986) [inferred].

    Example:
        >>> A = Radon([0.0, 90.0], (2, 2), detectors=2)
        >>> A(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))          # sums of columns, sums of rows from the bottom up
        tensor([[4., 6.],
                [7., 3.]])
    """

    angles: Tensor
    first: Tensor
    weights: Tensor

    def __init__(
        self,
        angles: int | Sequence[float] | Tensor,
        in_shape: tuple[int, ...],
        *,
        detectors: int | None = None,
        spacing: float = 1.0,
    ) -> None:
        in_shape = image_shape(in_shape)
        if not (spacing > 0 and math.isfinite(spacing)):
            raise OptionError(f"spacing must be positive and finite, got {spacing}; it is in pixels")
        if isinstance(angles, int):
            theta = torch.arange(angles, dtype=torch.float64) * (180.0 / max(angles, 1))
        else:
            theta = torch.as_tensor(angles, dtype=torch.float64).cpu()
        if theta.ndim != 1 or len(theta) == 0:
            raise OptionError(f"angles must be a positive number or a list of degrees, got {angles!r}")
        if not bool(torch.isfinite(theta).all()):
            raise DataError("angles must be finite, in degrees")
        h, w = in_shape[-2:]
        detectors = math.ceil(math.hypot(h, w) / spacing) if detectors is None else detectors
        if detectors < 1:
            raise OptionError(f"detectors must be one or more, got {detectors}")
        super().__init__(in_shape, (*in_shape[:-2], len(theta), detectors))
        self.detectors, self.spacing = detectors, spacing
        self.register_buffer("angles", theta)
        first, weights = self._footprints(theta, h, w)
        self.register_buffer("first", first)
        self.register_buffer("weights", weights)

    def _footprints(self, theta: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """First detector seen by each pixel (angles, d), and weights (angles, K, d) on it and the next ones."""
        X = (torch.arange(w, dtype=torch.float64) - (w - 1) / 2).expand(h, w).reshape(-1)
        Y = ((h - 1) / 2 - torch.arange(h, dtype=torch.float64))[:, None].expand(h, w).reshape(-1)
        reach = math.ceil(math.sqrt(2) / self.spacing) + 1
        edge = -self.detectors * self.spacing / 2
        firsts, rows = [], []
        for degrees in theta.tolist():
            c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            centre, sides = X * c + Y * s, sorted((abs(c), abs(s)))
            first = torch.floor((centre - sum(sides) / 2 - edge) / self.spacing)
            left = edge + self.spacing * (first + torch.arange(reach + 1, dtype=torch.float64)[:, None]) - centre
            weight = _trapezoid_cdf(left, sides[1], sides[0]).diff(dim=0) / self.spacing
            firsts.append(first.long())
            rows.append(weight)
        return torch.stack(firsts), torch.stack(rows)

    def _places(self, angle: int, step: int) -> Tensor:
        """Detector that each pixel sees, with one extra place at the end for what misses them all."""
        k = self.first[angle] + step
        return torch.where((k >= 0) & (k < self.detectors), k, self.detectors)

    def forward(self, x: Tensor) -> Tensor:
        """Projections, (*batch, *channels, angles, detectors)."""
        flat, views = flatten_event(x, 2), []
        for a in range(len(self.angles)):
            view = x.new_zeros(*flat.shape[:-1], self.detectors + 1)
            for j in range(self.weights.shape[1]):
                view = view.index_add(-1, self._places(a, j), self.weights[a, j].to(x) * flat)
            views.append(view[..., : self.detectors])
        return torch.stack(views, -2)

    def adjoint(self, y: Tensor) -> Tensor:
        """Back-projection with the same weights (unfiltered)."""
        self.check_shape(y, self.out_shape, "data")
        padded = torch.cat([y, torch.zeros_like(y[..., :1])], -1)
        total = y.new_zeros(*y.shape[:-2], self.first.shape[1])
        for a in range(len(self.angles)):
            for j in range(self.weights.shape[1]):
                total = total + self.weights[a, j].to(y) * padded[..., a, :].index_select(-1, self._places(a, j))
        return total.reshape((*y.shape[:-2], *self.in_shape[-2:]))

"""Tweedie covariances of independent priors side by side: diag(C_1, C_2, ...), and how their vectors are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from sde.covariance import dense_matrices

__all__ = ["BlockCovariance", "join", "split"]


@dataclass(frozen=True)
class BlockCovariance:
    """diag(C_1, C_2, ...) on joined vectors.

    Args:
        mean: (*batch, d).
        event_shape: (d,).
        parts: the covariances of the members, on (*batch, *shape of the member).
        shapes: shape of every member, plates first.
    """

    mean: Tensor
    event_shape: Size
    parts: tuple[Any, ...]
    shapes: tuple[Size, ...]

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: that of all members, joined."""
        return Size([sum(s.numel() for s in self._noise_shapes)])

    @property
    def _noise_shapes(self) -> list[Size]:
        batch = self.mean.ndim - 1
        plates = [p.mean.shape[batch : p.mean.ndim - len(p.event_shape)] for p in self.parts]
        return [plate + part.noise_shape for plate, part in zip(plates, self.parts, strict=True)]

    def _each(self, apply: Callable[[Any, Tensor], Tensor], v: Tensor, shapes: Sequence[Size] | None = None) -> Tensor:
        pieces = split(v, self.shapes if shapes is None else shapes)
        return join([apply(p, piece) for p, piece in zip(self.parts, pieces, strict=True)], self.shapes)

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, d)."""
        return self._each(lambda part, piece: part.matvec(piece), v)

    def sample(self, noise: Tensor) -> Tensor:
        """L noise with L L^T = C, for noise: (*extra, *batch, *noise_shape)."""
        return self._each(lambda part, piece: part.sample(piece), noise, self._noise_shapes)

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, d); shift is 0-d."""
        return self._each(lambda part, piece: part.solve(piece, shift), v)

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> BlockCovariance:
        """The operator scale C + shift I, for 0-d scale and shift."""
        return replace(self, parts=tuple(part.affine(scale, shift) for part in self.parts))

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices; for small events."""
        return dense_matrices(self.matvec, self.mean, self.event_shape)

    def select(self, index: Tensor) -> BlockCovariance:
        """The operators of the rows `index` of the first batch axis, as resampling needs them."""
        return replace(self, mean=self.mean[index], parts=tuple(p.select(index) for p in self.parts))


def split(x: Tensor, shapes: Sequence[Size]) -> list[Tensor]:
    """(*batch, d) -> (*batch, *shape) for every shape."""
    pieces = x.split([s.numel() for s in shapes], -1)
    return [piece.reshape(*x.shape[:-1], *s) for piece, s in zip(pieces, shapes, strict=True)]


def join(parts: Sequence[Tensor], shapes: Sequence[Size]) -> Tensor:
    """The inverse of `split`."""
    flat = [p.reshape(*p.shape[: p.ndim - len(s)], s.numel()) for p, s in zip(parts, shapes, strict=True)]
    return torch.cat(flat, -1)

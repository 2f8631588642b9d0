r"""Tweedie covariances Cov[x_0 | x_sigma = x] = sigma^2 dD/dx as linear operators, one per row of a batch.

All of them act on vectors of shape (*extra, *batch, *event), where batch is that of x, and all of them carry
`mean` = D(x, sigma), so that one evaluation serves both moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Size, Tensor

__all__ = ["DenseCovariance", "SubspaceCovariance", "TweedieCovariance"]


@runtime_checkable
class TweedieCovariance(Protocol):
    """A symmetric positive semi-definite operator C for every row of a batch."""

    @property
    def mean(self) -> Tensor:
        """(*batch, *event) the posterior mean E[x_0 | x] that belongs to this covariance."""
        ...

    @property
    def noise_shape(self) -> Size:
        """Shape of the standard normal noise that `sample` takes for one row."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event)."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """L noise with L L^T = C, for noise: (*extra, *batch, *noise_shape)."""
        ...

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        ...

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> TweedieCovariance:
        """The operator scale C + shift I, for 0-d scale and shift."""
        ...

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices, over the flattened event; for small events."""
        ...


def symmetric_root(matrix: Tensor) -> Tensor:
    """L with L L^T = matrix, row by row: Cholesky, or the eigenvectors where rounding made it indefinite."""
    if matrix.shape[-1] == 0:
        return matrix
    root, info = torch.linalg.cholesky_ex(matrix)
    failed = info > 0
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(matrix)
        root = torch.where(failed[..., None, None], vectors * values.clamp(min=0).sqrt()[..., None, :], root)
    return root


def flat_rows(v: Tensor, mean: Tensor, event_shape: Size) -> Tensor:
    """(*extra, rows, d) from (*extra, *batch, *event)."""
    if v.shape[v.ndim - mean.ndim :] != mean.shape:
        raise ValueError(
            f"the covariance was taken at a batch of shape {tuple(mean.shape)}; it acts on vectors that end in this "
            f"shape, got {tuple(v.shape)}; expand them to the batch"
        )
    batch = mean.ndim - len(event_shape)
    extra = v.shape[: v.ndim - mean.ndim]
    return v.reshape(*extra, math.prod(mean.shape[:batch]), event_shape.numel())


def apply_rows(matrices: Tensor, v: Tensor) -> Tensor:
    """(rows or 1, m, m) times (*extra, rows, m)."""
    if matrices.shape[0] == 1:
        return v @ matrices[0].mT
    return (matrices @ v[..., None]).squeeze(-1)


@dataclass(frozen=True)
class SubspaceCovariance:
    r"""C = a I + B (H - a I) B^T with orthonormal B: dense in a small subspace, isotropic outside.

    B holds the columns of `basis`, shared by all rows, and at most one more direction of its own for every row. Nothing
    of size d x d is built for a row unless the subspace is everything.

    Args:
        mean: (*batch, *event).
        event_shape: shape of one event, d entries.
        core: H, (rows or 1, m, m), symmetric positive semi-definite.
        outside: a, (rows or 1,), variance outside the subspace.
        basis: (d, q) orthonormal columns; None for the whole space.
        extra: (rows, d) unit vectors orthogonal to the basis, or zero, or None.
    """

    mean: Tensor
    event_shape: Size
    core: Tensor
    outside: Tensor
    basis: Tensor | None = None
    extra: Tensor | None = None

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: the event's own."""
        return self.event_shape

    def _coordinates(self, v: Tensor) -> Tensor:
        """B^T v."""
        inside = v if self.basis is None else v @ self.basis
        return inside if self.extra is None else torch.cat([inside, (v * self.extra).sum(-1, keepdim=True)], -1)

    def _lift(self, coordinates: Tensor) -> Tensor:
        """B times coordinates."""
        if self.basis is None:
            return coordinates
        q = self.basis.shape[1]
        inside = coordinates[..., :q] @ self.basis.T
        return inside if self.extra is None else inside + coordinates[..., q:] * self.extra

    def _spectral(self, v: Tensor, inside: Callable[[Tensor], Tensor], outside: Tensor) -> Tensor:
        """Apply one map inside the subspace and a multiple of the identity outside."""
        flat = flat_rows(v, self.mean, self.event_shape)
        c = self._coordinates(flat)
        if self.basis is None:
            return inside(c).reshape(v.shape)
        a = outside[:, None]
        return (a * (flat - self._lift(c)) + self._lift(inside(c))).reshape(v.shape)

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event)."""
        return self._spectral(v, lambda c: apply_rows(self.core, c), self.outside)

    @cached_property
    def _root(self) -> Tensor:
        """L with L L^T = H."""
        return symmetric_root(self.core)

    def sample(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise, for noise: (*extra, *batch, *event)."""
        return self._spectral(noise, lambda c: apply_rows(self._root, c), self.outside.sqrt())

    def _shifted(self, scale: Tensor | float, shift: Tensor | float) -> Tensor:
        """scale H + shift I."""
        eye = torch.eye(self.core.shape[-1], dtype=self.core.dtype, device=self.core.device)
        return scale * self.core + shift * eye

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        factor = torch.linalg.cholesky(self._shifted(1.0, shift))

        def inside(c: Tensor) -> Tensor:
            if factor.shape[0] == 1:
                return torch.cholesky_solve(c.reshape(-1, c.shape[-1]).T, factor[0]).T.reshape(c.shape)
            columns = c.reshape(-1, *c.shape[-2:]).permute(1, 2, 0)
            return torch.cholesky_solve(columns, factor).permute(2, 0, 1).reshape(c.shape)

        return self._spectral(v, inside if self.core.shape[-1] else lambda c: c, 1 / (self.outside + shift))

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> SubspaceCovariance:
        """The operator scale C + shift I, for 0-d scale and shift."""
        core, outside = self._shifted(scale, shift), scale * self.outside + shift
        return SubspaceCovariance(self.mean, self.event_shape, core, outside, self.basis, self.extra)

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices, over the flattened event."""
        return dense_matrices(self.matvec, self.mean, self.event_shape)

    def select(self, index: Tensor) -> SubspaceCovariance:
        """The operators of the rows `index` of the first batch axis, as resampling needs them."""
        rows = row_index(index, self.mean, self.event_shape)
        core = self.core if self.core.shape[0] == 1 else self.core[rows]
        outside = self.outside if self.outside.shape[0] == 1 else self.outside[rows]
        extra = None if self.extra is None else self.extra[rows]
        return SubspaceCovariance(self.mean[index], self.event_shape, core, outside, self.basis, extra)


def row_index(index: Tensor, mean: Tensor, event_shape: Size) -> Tensor:
    """Rows of the flattened batch that belong to entries `index` of its first axis."""
    inner = math.prod(mean.shape[1 : mean.ndim - len(event_shape)])
    return (index[:, None] * inner + torch.arange(inner, device=index.device)).flatten()


def dense_matrices(matvec: Callable[[Tensor], Tensor], mean: Tensor, event_shape: Size) -> Tensor:
    """(*batch, d, d), column by column."""
    batch = mean.shape[: mean.ndim - len(event_shape)]
    d = event_shape.numel()
    eye = torch.eye(d, dtype=mean.dtype, device=mean.device).reshape(d, *[1] * len(batch), *event_shape)
    columns = matvec(eye.expand(d, *mean.shape)).reshape(d, *batch, d)
    return columns.movedim(0, -1)


@dataclass(frozen=True)
class DenseCovariance:
    """C as a matrix for every row, in its eigenvectors; eigenvalues below zero count as zero.

    Args:
        mean: (*batch, *event).
        event_shape: shape of one event, d entries.
        values: (rows, d) eigenvalues, zero or more.
        vectors: (rows, d, d) eigenvectors, in columns.
    """

    mean: Tensor
    event_shape: Size
    values: Tensor
    vectors: Tensor

    @classmethod
    def from_matrix(cls, matrix: Tensor, mean: Tensor, event_shape: Size) -> DenseCovariance:
        """From (*batch, d, d) symmetric matrices."""
        d = event_shape.numel()
        values, vectors = torch.linalg.eigh(matrix.reshape(-1, d, d))
        return cls(mean, event_shape, values.clamp(min=0), vectors)

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: the event's own."""
        return self.event_shape

    def _spectral(self, v: Tensor, values: Tensor) -> Tensor:
        """V diag(values) V^T v."""
        flat = flat_rows(v, self.mean, self.event_shape)
        return apply_rows(self.vectors, values * apply_rows(self.vectors.mT, flat)).reshape(v.shape)

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event)."""
        return self._spectral(v, self.values)

    def sample(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise, for noise: (*extra, *batch, *event)."""
        return self._spectral(noise, self.values.sqrt())

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        return self._spectral(v, 1 / (self.values + shift))

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> DenseCovariance:
        """The operator scale C + shift I, for 0-d scale and shift."""
        return DenseCovariance(self.mean, self.event_shape, scale * self.values + shift, self.vectors)

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices, over the flattened event."""
        matrix = self.vectors * self.values[:, None, :] @ self.vectors.mT
        batch = self.mean.shape[: self.mean.ndim - len(self.event_shape)]
        return matrix.reshape(*batch, *matrix.shape[-2:])

    def select(self, index: Tensor) -> DenseCovariance:
        """The operators of the rows `index` of the first batch axis, as resampling needs them."""
        rows = row_index(index, self.mean, self.event_shape)
        return DenseCovariance(self.mean[index], self.event_shape, self.values[rows], self.vectors[rows])

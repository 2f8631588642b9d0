"""Singular value decompositions as maps: of diagonal operators by index, of others by a dense factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inverse.operators.events import flatten_event, numel, scatter, scatter_index

if TYPE_CHECKING:
    from inverse.operators.base import LinearOperator

__all__ = ["SVD", "dense_svd", "diagonal_svd"]


@dataclass(frozen=True)
class SVD:
    """A thin singular value decomposition A = U diag(s) V^T, with fast maps in place of matrices.

    Every s is strictly positive and the order is the operator's own, so r = len(s) is the rank. What V leaves out is
    the null space of A, reached by `complement`.

    Args:
        s: (r,) float64 singular values; (lanes, r) of an operator that differs from lane to lane.
        to_spectral: V^T x, (*batch, *in_shape) -> (*batch, r).
        from_spectral: V z, (*batch, r) -> (*batch, *in_shape).
        to_spectral_data: U^T y, (*batch, *out_shape) -> (*batch, r).
        from_spectral_data: U z, (*batch, r) -> (*batch, *out_shape).

    Example:
        >>> from inverse.operators import Dense
        >>> svd = Dense(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).svd()
        >>> svd.rank, svd.s
        (1, tensor([3.], dtype=torch.float64))
    """

    s: Tensor
    to_spectral: Callable[[Tensor], Tensor]
    from_spectral: Callable[[Tensor], Tensor]
    to_spectral_data: Callable[[Tensor], Tensor]
    from_spectral_data: Callable[[Tensor], Tensor]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return self.s.shape[-1]

    def complement(self, x: Tensor) -> Tensor:
        """Part of x that the operator does not see, x - V V^T x: (*batch, *in_shape) -> the same."""
        return x - self.from_spectral(self.to_spectral(x))


def diagonal_svd(A: LinearOperator) -> SVD:
    """A^T A = diag(g): V picks the entries with g > 0, s = sqrt(g), U = A V / s."""
    ndim, size = len(A.in_shape), numel(A.in_shape)
    ones = torch.ones(A.in_shape, dtype=torch.float64, device=A._device())
    gram = A.adjoint(A.forward(ones)).reshape(size)
    keep = torch.nonzero(gram > (size * torch.finfo(gram.dtype).eps) ** 2 * gram.max()).squeeze(-1)
    s, index = gram[keep].sqrt(), scatter_index(keep, size)

    def to_spectral(x: Tensor) -> Tensor:
        return flatten_event(x, ndim).index_select(-1, keep)

    def from_spectral(z: Tensor) -> Tensor:
        return scatter(z, index).reshape((*z.shape[:-1], *A.in_shape))

    return SVD(
        s,
        to_spectral,
        from_spectral,
        lambda y: to_spectral(A.adjoint(y)) / s.to(y),
        lambda z: A.forward(from_spectral(z / s.to(z))),
    )


def dense_svd(A: LinearOperator) -> SVD:
    """Factorise the matrix in float64; values below the rounding of the largest are dropped."""
    matrix = A.dense()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()
    u, s, v = u[:, keep], s[keep], vh[keep].T.contiguous()
    n_in, n_out = len(A.in_shape), len(A.out_shape)
    return SVD(
        s,
        lambda x: flatten_event(x, n_in) @ v.to(x),
        lambda z: (z @ v.T.to(z)).reshape((*z.shape[:-1], *A.in_shape)),
        lambda y: flatten_event(y, n_out) @ u.to(y),
        lambda z: (z @ u.T.to(z)).reshape((*z.shape[:-1], *A.out_shape)),
    )

r"""Functions of a covariance that is known through its products alone, in the Krylov space of the vector they act on.

    C Q ~ Q T,   Q^T Q = I,   Q e_1 = v / |v|,   T tridiagonal:        f(C) v ~ |v| Q f(T) e_1

With f = sqrt this draws from N(0, C), with f = 1 / (t + shift) it solves. The error falls as fast as f is approximated
by a polynomial on the spectrum of C: geometrically for a solve with a shift. Source: Lanczos (1950); Chow & Saad (2014)
for draws [inferred].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Size, Tensor

from sde.covariance import dense_matrices

__all__ = ["KrylovCovariance", "Tridiagonal", "lanczos"]


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos leaves of a matrix for one vector.

    Args:
        basis: Q, (steps, *lead, d).
        diagonal: of T, (*lead, steps).
        beside: first off-diagonal of T, (*lead, steps - 1).
        norm: |v|, (*lead).
    """

    basis: Tensor
    diagonal: Tensor
    beside: Tensor
    norm: Tensor

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """|v| Q f(T) e_1, (*lead, d), with f taken at eigenvalues of T that are floored at zero."""
        # T is small; its eigenvectors in float64 cost nothing and keep the order of close eigenvalues.
        diagonal, beside = self.diagonal.double(), self.beside.double()
        values, vectors = torch.linalg.eigh(
            torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        )
        weights = (vectors * fn(values.clamp(min=0))[..., None, :] @ vectors[..., 0, :, None])[..., 0]
        weights = (weights * self.norm[..., None]).to(self.basis)
        return torch.einsum("k...d,...k->...d", self.basis, weights)


def lanczos(matvec: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> Tridiagonal:
    """Lanczos with full reorthogonalisation, for every lane of a batch on its own.

    Args:
        matvec: v -> C v for v: (*lead, d), with a symmetric C per lane.
        v: (*lead, d).
        steps: products with C. A lane whose Krylov space ends earlier keeps zeros from there on.

    Example:
        >>> C = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
        >>> lanczos(lambda v: v @ C, torch.ones(1, 3), 3).apply(torch.sqrt)
        tensor([[1.0000, 2.0000, 3.0000]])
    """
    norm = torch.linalg.vector_norm(v, dim=-1)
    q = v / norm.clamp(min=torch.finfo(v.dtype).tiny)[..., None]
    basis, diagonal, beside = [q], [], []
    scale = torch.zeros_like(norm)
    for step in range(steps):
        w = matvec(q)
        diagonal.append((q * w).sum(-1))
        if step == steps - 1:
            break
        known = torch.stack(basis)
        # Twice is enough (Kahan): once leaves what cancellation in the first pass had lost.
        for _ in range(2):
            w = w - torch.einsum("k...d,k...->...d", known, torch.einsum("k...d,...d->k...", known, w))
        length = torch.linalg.vector_norm(w, dim=-1)
        scale = torch.maximum(scale, torch.maximum(diagonal[-1].abs(), length))
        goes_on = length > 10 * torch.finfo(v.dtype).eps * scale
        length = torch.where(goes_on, length, 0.0)
        q = torch.where(goes_on, 1 / length.where(goes_on, 1.0), 0.0)[..., None] * w
        basis.append(q)
        beside.append(length)
    empty = norm.new_zeros(*norm.shape, 0)
    return Tridiagonal(
        torch.stack(basis), torch.stack(diagonal, -1), torch.stack(beside, -1) if beside else empty, norm
    )


class Products(Protocol):
    """A symmetric operator for every row of a batch that can be multiplied with, and little else."""

    @property
    def mean(self) -> Tensor:
        """(*batch, *event) the mean that belongs to the operator."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event)."""
        ...


@dataclass(frozen=True)
class KrylovCovariance:
    r"""scale C + shift I for a C that is known through products: draws and solves take `steps` of them.

    A draw is C^(1/2) z up to the error of the Krylov space, which depends on z: its law is Gaussian in the limit of
    many steps. For particles, whose weights need draws and solves of one and the same operator, take `low_rank`.

    Args:
        products: C.
        event_shape: shape of one event.
        steps: products of one draw or one solve; at most as many as an event has entries are made.
        scale: non-negative.
        shift: non-negative.

    Example:
        >>> from sde.mixture import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 5), 3 * torch.ones(1))
        >>> exact = prior.covariance(torch.zeros(1, 5), 1.0)
        >>> KrylovCovariance(exact, Size([5]), steps=1).solve(torch.ones(1, 5), 0.25)          # 3 / 4 + 1 / 4
        tensor([[1.0000, 1.0000, 1.0000, 1.0000, 1.0000]])
    """

    products: Products
    event_shape: Size
    steps: int = 10
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be one Krylov step or more, got {self.steps}")

    @property
    def mean(self) -> Tensor:
        """(*batch, *event) the mean that belongs to C."""
        return self.products.mean

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: the event's own."""
        return self.event_shape

    def matvec(self, v: Tensor) -> Tensor:
        """(scale C + shift I) v, for v: (*extra, *batch, *event); one product for each of the `extra` vectors."""
        return self.scale * self.products.matvec(v) + self.shift * v

    def _apply(self, v: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """f(C) v."""
        lead = v.shape[: v.ndim - len(self.event_shape)]
        d = self.event_shape.numel()
        space = lanczos(
            lambda u: self.products.matvec(u.reshape(v.shape)).reshape(*lead, d),
            v.reshape(*lead, d),
            min(self.steps, d),
        )
        return space.apply(fn).reshape(v.shape)

    def sample(self, noise: Tensor) -> Tensor:
        """(scale C + shift I)^(1/2) noise, for noise: (*extra, *batch, *event)."""
        return self._apply(noise, lambda t: (self.scale * t + self.shift).sqrt())

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(scale C + (self.shift + shift) I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        return self._apply(v, lambda t: 1 / (self.scale * t + self.shift + shift))

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> KrylovCovariance:
        """The operator scale * this + shift I, for 0-d scale and shift."""
        return replace(self, scale=scale * self.scale, shift=scale * self.shift + shift)

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices, over the flattened event, by d products; for small events."""
        return dense_matrices(self.matvec, self.mean, self.event_shape)

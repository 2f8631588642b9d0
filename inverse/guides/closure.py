r"""The Gaussian closure: x_0 | x ~ N(D, C), data d = B x_0 + n with n ~ N(0, I).

S = I + B C B^T,   r = d - B D,   E[x_0 | x, d] = D + C B^T S^{-1} r,   Cov[x_0 | x, d] = C - C B^T S^{-1} B C
log p(d | x) = log N(r; 0, S);    a draw (Matheron): x_0* = u + C B^T S^{-1} (d - B u - n),  u ~ N(D, C)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Size, Tensor

from inverse.operators import LinearOperator, conjugate_gradient
from sde import TweedieCovariance

__all__ = ["ConditionedCovariance", "FactoredGram", "Gram", "IterativeGram", "floored_cholesky"]


class Gram(Protocol):
    """S = I + B C B^T, and the way back from the data: C B^T."""

    def solve(self, r: Tensor) -> Tensor:
        """S^{-1} r, (*extra, lanes, m) -> the same."""
        ...

    def solve_and_lift(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """S^{-1} r and C B^T S^{-1} r, (*extra, lanes, *shape)."""
        ...


@dataclass(frozen=True)
class FactoredGram:
    """S written down and factored, for few measurements.

    Args:
        towards: (m, lanes, *shape) the columns of C B^T.
        factor: (lanes, m, m) lower Cholesky factor of S.
    """

    towards: Tensor
    factor: Tensor

    @property
    def log_det(self) -> Tensor:
        """(lanes,) log det S."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def solve(self, r: Tensor) -> Tensor:
        """S^{-1} r."""
        return torch.cholesky_solve(r[..., None], self.factor)[..., 0]

    def solve_and_lift(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """S^{-1} r and C B^T S^{-1} r."""
        solved = self.solve(r)
        extra = r.shape[:-2]
        lifted = torch.einsum("ml...,zlm->zl...", self.towards, solved.reshape(extra.numel(), *r.shape[-2:]))
        return solved, lifted.reshape(*extra, *self.towards.shape[1:])


@dataclass(frozen=True)
class IterativeGram:
    """S known through its products, for many measurements: a fixed number of conjugate-gradient steps.

    C B^T is taken of every direction that the steps go in, so C B^T S^{-1} r is the same sum of what was taken.

    Args:
        operator: B.
        product: v -> C v, (*extra, lanes, *shape).
        steps: of conjugate gradients, each one product with C; no more are made and no tolerance is asked.
        preconditioner: close to S^{-1}, on (*extra, lanes, *out_shape); or None.
    """

    operator: LinearOperator
    product: Callable[[Tensor], Tensor]
    steps: int
    preconditioner: Callable[[Tensor], Tensor] | None

    def _gram(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """S u and C B^T u."""
        lifted = self.product(self.operator.adjoint(u))
        return u + self.operator(lifted), lifted

    def solve(self, r: Tensor) -> Tensor:
        """S^{-1} r."""
        return self.solve_and_lift(r)[0]

    def solve_and_lift(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """S^{-1} r and C B^T S^{-1} r."""
        out = self.operator.out_shape
        solution = conjugate_gradient(
            self._gram,
            r.reshape(*r.shape[:-1], *out),
            event_ndim=len(out),
            fixed_steps=self.steps,
            preconditioner=self.preconditioner,
        )
        assert solution.image is not None
        return solution.x.reshape(r.shape), solution.image


def floored_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of I + gram, (lanes, m, m), and which lanes (lanes,) were not positive definite.

    A network's Jacobian may make B C B^T indefinite; there its negative eigenvalues are taken as zero.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + eye)
    finite = gram.isfinite().all(-1).all(-1)
    factor[~finite] = torch.nan  # a lane that diverged; the others go on
    failed = (info > 0) & finite
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram[failed])
        floored = (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT
        factor[failed] = torch.linalg.cholesky(floored + eye)
    return factor, failed


@dataclass(frozen=True)
class ConditionedCovariance:
    """scale (C - C B^T S^{-1} B C) + shift I for every lane, drawn from by Matheron's rule.

    Args:
        mean: (lanes, *shape) E[x_0 | x, d].
        prior: C, on (lanes, *shape).
        operator: B.
        gram: S and C B^T.
        event_shape: shape of one event of the prior; the site has plates in front of it.
        scale: non-negative number.
        shift: non-negative number.
    """

    mean: Tensor
    prior: TweedieCovariance
    operator: LinearOperator
    gram: Gram
    event_shape: Size
    scale: float = 1.0
    shift: float = 0.0

    @property
    def _shape(self) -> Size:
        return self.mean.shape[1:]

    @property
    def _plates(self) -> Size:
        return self._shape[: len(self._shape) - len(self.event_shape)]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Numbers of noise entries for C, for the data, and for the shift."""
        own = self._plates.numel() * self.prior.noise_shape.numel()
        return own, Size(self.operator.out_shape).numel(), self._shape.numel()

    @property
    def noise_shape(self) -> Size:
        """One axis: noise for C, for the data, and for the shift, whether or not there is a shift."""
        return Size([sum(self._sizes)])

    def _measured(self, v: Tensor) -> Tensor:
        """B v, data axes flattened."""
        lead = v.shape[: v.ndim - len(self._shape)]
        return self.operator(v).reshape(*lead, self._sizes[1])

    def matvec(self, v: Tensor) -> Tensor:
        """Products with v (*extra, lanes, *shape)."""
        product = self.prior.matvec(v)
        reduced = product - self.gram.solve_and_lift(self._measured(product))[1]
        return self.scale * reduced + self.shift * v

    def sample(self, noise: Tensor) -> Tensor:
        """A draw of N(0, this) from standard normal noise (*extra, lanes, *noise_shape)."""
        first, second, third = noise.split(self._sizes, dim=-1)
        u = self.prior.sample(first.reshape(*first.shape[:-1], *self._plates, *self.prior.noise_shape))
        draw = u - self.gram.solve_and_lift(self._measured(u) + second)[1]
        return self.scale**0.5 * draw + self.shift**0.5 * third.reshape(u.shape)

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> ConditionedCovariance:
        """The operator scale * this + shift I."""
        a, b = float(scale), float(shift)
        return replace(self, scale=a * self.scale, shift=a * self.shift + b)

    def dense(self) -> Tensor:
        """(lanes, d, d) the matrices over the flattened site; for small sites."""
        d = self._shape.numel()
        eye = torch.eye(d, dtype=self.mean.dtype, device=self.mean.device).reshape(d, 1, *self._shape)
        return self.matvec(eye.expand(d, *self.mean.shape)).reshape(d, len(self.mean), d).movedim(0, -1)

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(this + shift I)^{-1} v, through the dense matrices."""
        matrix = self.dense()
        matrix = matrix + shift * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        flat = v.reshape(*v.shape[: v.ndim - len(self._shape)], -1)
        return torch.linalg.solve(matrix, flat[..., None])[..., 0].reshape(v.shape)

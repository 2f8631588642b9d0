r"""The covariance that a network implies, sigma^2 (J + J^T) / 2 with its Jacobian J, through products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Size, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde.covariance import DenseCovariance, dense_matrices, flat_rows
from sde.jacobian import vector_jacobian
from sde.krylov import KrylovCovariance
from sde.low_rank import LowRankCovariance

__all__ = ["NetworkCovariance"]


class NetworkCovariance:
    r"""C = sigma^2 (J + J^T) / 2 with J the Jacobian of a denoiser at x: one jvp and one vjp for every product.

    An exact denoiser has a symmetric J; a network has nearly one, hence the average. Up to `dense_limit` entries
    `sample`, `solve` and `affine` build the matrix (d vjps per row, once) and take eigenvalues below zero as zero;
    beyond, they take `krylov_steps` products per vector, again with a floor at zero. `low_rank` is for particles.

    Args:
        denoise: x -> D(x, sigma) at a fixed sigma, for x: (*batch, *event).
        x: (*batch, *event) where the Jacobian is taken.
        sigma: 0-d, or broadcastable over the batch.
        event_shape: shape of one event.
        dense_limit: most entries of an event for which the matrix is built.
        on_product: called with the number of rows for every product with J or J^T.
        krylov_steps: products with C of a draw or a solve beyond `dense_limit`.
        at: index -> the covariance at rows `index` of the first batch axis, for `select`; None takes `denoise` there,
            which fits a 0-d sigma and no labels.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        event_shape: Size,
        dense_limit: int = 256,
        on_product: Callable[[int], None] = lambda rows: None,
        krylov_steps: int = 10,
        at: Callable[[Tensor], NetworkCovariance] | None = None,
    ) -> None:
        self.event_shape, self.dense_limit, self.krylov_steps = event_shape, dense_limit, krylov_steps
        # Forward mode refuses expanded tensors.
        x = x.contiguous()
        self._denoise, self._x, self._sigma, self._on_product, self._at = denoise, x, sigma, on_product, at
        self._rows = math.prod(x.shape[: x.ndim - len(event_shape)])
        # Products are tracked as the first evaluation was, and not because the network's parameters are.
        self._grad = torch.is_grad_enabled()
        sigma = sigma.to(x)
        self._variance = sigma.square().reshape(*sigma.shape, *[1] * len(event_shape))
        # Flash and memory-efficient attention have no derivative of a derivative; the plain kernel has.
        with sdpa_kernel(SDPBackend.MATH):
            self.mean, self._pull = vector_jacobian(denoise, x)

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: the event's own."""
        return self.event_shape

    def vjp(self, v: Tensor) -> Tensor:
        """J^T v, for v: (*batch, *event)."""
        self._on_product(self._rows)
        with torch.set_grad_enabled(self._grad):
            return self._pull(v)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, for v: (*batch, *event); one more forward pass."""
        self._on_product(self._rows)
        with torch.set_grad_enabled(self._grad), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(self._denoise, (self._x,), (v.contiguous(),))[1]

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event); each of the `extra` vectors costs one jvp and one vjp."""
        flat_rows(v, self.mean, self.event_shape)
        parts = v.reshape(-1, *self.mean.shape)
        products = [self._variance * (self.jvp(part) + self.vjp(part)) / 2 for part in parts]
        return torch.stack(products).reshape(v.shape) if products else v.clone()

    @cached_property
    def _matrix(self) -> DenseCovariance:
        """The symmetrised Jacobian, from vjps alone."""
        d = self.event_shape.numel()
        if d > self.dense_limit:
            raise RuntimeError(
                f"the covariance of a network is built up to {self.dense_limit} entries, and this event has {d}; "
                "use matvec, sample and solve, which need no matrix, or raise dense_limit if memory allows"
            )
        transposed = dense_matrices(lambda v: torch.stack([self.vjp(part) for part in v]), self.mean, self.event_shape)
        variance = self._variance.reshape(self._variance.shape[: self._variance.ndim - len(self.event_shape)])
        matrix = variance[..., None, None] * (transposed + transposed.mT) / 2
        return DenseCovariance.from_matrix(matrix, self.mean, self.event_shape)

    @property
    def _functions(self) -> DenseCovariance | KrylovCovariance:
        """What takes roots and inverses: the matrix where it is small."""
        if self.event_shape.numel() <= self.dense_limit:
            return self._matrix
        return KrylovCovariance(self, self.event_shape, self.krylov_steps)

    def sample(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise, for noise: (*extra, *batch, *event)."""
        return self._functions.sample(noise)

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        return self._functions.solve(v, shift)

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> DenseCovariance | KrylovCovariance:
        """The operator scale C + shift I."""
        return self._functions.affine(scale, shift)

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices; small events only."""
        return self._matrix.dense()

    def low_rank(self, directions: Tensor | None = None, random: int = 4, seed: int = 0) -> LowRankCovariance:
        """C from its columns along `directions` and a few random ones: one vjp each, and no other product ever.

        The columns are those of J^T: what two probes say of each other is symmetrised, what they say of the rest is
        taken as it is. With as many probes as entries this is the dense matrix.

        Args:
            directions: (m, *inner, *event) with *batch = (rows, *inner): directions in which C has to be exact, such
                as those that are measured; the same for all rows.
            random: random directions, the same for all rows and all times; they measure the variance elsewhere.
            seed: of these.

        Raises:
            ValueError: if there is not a single random direction.
        """
        if random < 1:
            raise ValueError(
                f"random must be one direction or more, which measure the variance elsewhere; got {random}"
            )
        d = self.event_shape.numel()
        inner = self.mean.shape[1 : self.mean.ndim - len(self.event_shape)]
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randn(inner.numel(), d, random, generator=generator, dtype=torch.float64)
        if directions is not None:
            given = directions.reshape(-1, inner.numel(), d).permute(1, 2, 0).to("cpu", torch.float64)
            columns = torch.cat([given, columns], -1)
        basis = torch.eye(d, dtype=torch.float64) if columns.shape[-1] >= d else torch.linalg.qr(columns).Q
        probes = basis.expand(inner.numel(), -1, -1).to(self.mean).repeat(self._rows // max(inner.numel(), 1), 1, 1)
        variance = self._variance.expand(self.mean.shape).reshape(self._rows, d)
        return LowRankCovariance.from_columns(
            lambda v: variance * self.vjp(v.reshape(self.mean.shape)).reshape(v.shape),
            self.mean,
            self.event_shape,
            probes,
            random,
        )

    def select(self, index: Tensor) -> NetworkCovariance:
        """The operators of the rows `index` of the first batch axis: one more call of the denoiser."""
        if self._at is not None:
            return self._at(index)
        if self._sigma.ndim:
            raise ValueError("select needs one noise level for all rows, or `at`; got one per row")
        return NetworkCovariance(
            self._denoise,
            self._x[index],
            self._sigma,
            self.event_shape,
            self.dense_limit,
            self._on_product,
            self.krylov_steps,
        )

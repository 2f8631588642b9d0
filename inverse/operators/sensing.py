"""Compressed sensing: a few random rows of an orthonormal matrix.

A = P T D with D random signs, T a fast orthonormal transform and P the choice of rows: A A^T = I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.events import event_shape, flatten_event, numel, scatter, scatter_index
from inverse.operators.transforms import cosine, hadamard, inverse_cosine
from ppl.errors import OptionError, ShapeError

__all__ = ["GaussianSensing", "SubsampledCosine", "SubsampledHadamard"]


class _OrthonormalRows(LinearOperator):
    """A A^T = I: gram solves divide, A^+ = A^T, and the decomposition is U = I, s = 1, V = A^T."""

    structure = frozenset({"fast_svd"})

    def __init__(self, measurements: int, in_shape: int | tuple[int, ...]) -> None:
        in_shape = event_shape(in_shape)
        size = numel(in_shape)
        if not 1 <= measurements <= size:
            raise OptionError(
                f"measurements must lie between 1 and {size}, the size of in_shape {in_shape}, since the rows "
                f"are orthonormal; got {measurements}"
            )
        super().__init__(in_shape, (measurements,))

    @property
    def gram_scale(self) -> float:
        """The rows are orthonormal: A A^T = I."""
        return 1.0

    def compute_svd(self) -> SVD:
        """U = I, s = 1, V = A^T."""
        s = torch.ones(self.out_shape, dtype=torch.float64, device=self._device())
        return SVD(s, self.forward, self.adjoint, lambda y: y, lambda z: z)


class _SubsampledTransform(_OrthonormalRows):
    """P T D x; a member hands over T and its transpose, on (*batch, size)."""

    signs: Tensor
    keep: Tensor
    places: Tensor

    def __init__(
        self,
        measurements: int,
        in_shape: int | tuple[int, ...],
        transform: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        super().__init__(measurements, in_shape)
        self.transform, self.transpose = transform, transpose
        size, device = numel(self.in_shape), generator.device
        coins = torch.randint(0, 2, (size,), generator=generator, device=device)
        keep = torch.randperm(size, generator=generator, device=device)[:measurements].sort().values
        self.register_buffer("signs", 2.0 * coins - 1.0)
        self.register_buffer("keep", keep)
        self.register_buffer("places", scatter_index(keep, size))

    def forward(self, x: Tensor) -> Tensor:
        """Random signs, transform, chosen rows."""
        return self.transform(self.signs.to(x) * flatten_event(x, len(self.in_shape))).index_select(-1, self.keep)

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros in the other rows, transform back, the same signs."""
        self.check_shape(y, self.out_shape, "data")
        x = self.signs.to(y) * self.transpose(scatter(y, self.places))
        return x.reshape((*y.shape[:-1], *self.in_shape))


class SubsampledHadamard(_SubsampledTransform):
    """Random rows of the Walsh-Hadamard matrix times random signs: a single-pixel camera, O(d log d).

    Args:
        measurements: rows, between one and the size of x.
        in_shape: shape of one x; its size d must be a power of two.
        generator: draws signs and rows, on the device where the operator will live.

    Raises:
        ShapeError: d is no power of two.

    Source: Do et al. (2012), structurally random matrices [inferred].

    Example:
        >>> A = SubsampledHadamard(3, (2, 4), generator=torch.Generator().manual_seed(0))
        >>> A(A.adjoint(torch.tensor([1.0, 2.0, 3.0]))).round()
        tensor([1., 2., 3.])
    """

    def __init__(self, measurements: int, in_shape: int | tuple[int, ...], *, generator: torch.Generator) -> None:
        in_shape = event_shape(in_shape)
        size = numel(in_shape)
        if size & (size - 1):
            raise ShapeError(f"in_shape {in_shape} has {size} entries, which is no power of two; use SubsampledCosine")
        super().__init__(measurements, in_shape, hadamard, hadamard, generator)


class SubsampledCosine(_SubsampledTransform):
    """Random rows of the discrete cosine matrix times random signs, for x of any size, O(d log d).

    Args:
        measurements: rows, between one and the size of x.
        in_shape: shape of one x.
        generator: draws signs and rows, on the device where the operator will live.

    Source: Do et al. (2012), structurally random matrices [inferred].

    Example:
        >>> A = SubsampledCosine(2, (3,), generator=torch.Generator().manual_seed(0))
        >>> A(A.adjoint(torch.tensor([1.0, 2.0]))).round()
        tensor([1., 2.])
    """

    def __init__(self, measurements: int, in_shape: int | tuple[int, ...], *, generator: torch.Generator) -> None:
        super().__init__(measurements, in_shape, cosine, inverse_cosine, generator)


class GaussianSensing(_OrthonormalRows):
    """A uniformly random set of orthonormal rows: a Gaussian matrix, orthonormalised in float64.

    The plain Gaussian matrix G = L A has the same row space; whitening its noise by L^{-1} gives this one.

    Args:
        measurements: rows, between one and the size of x.
        in_shape: shape of one x.
        generator: draws the matrix, on the device where the operator will live.

    Example:
        >>> A = GaussianSensing(2, (2, 2), generator=torch.Generator().manual_seed(0))
        >>> A(A.adjoint(torch.tensor([1.0, 2.0]))).round()
        tensor([1., 2.])
    """

    matrix: Tensor

    def __init__(self, measurements: int, in_shape: int | tuple[int, ...], *, generator: torch.Generator) -> None:
        super().__init__(measurements, in_shape)
        shape = (numel(self.in_shape), measurements)
        gaussian = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        # The signs make the law uniform, whatever the sign convention of the factorisation.
        self.register_buffer("matrix", (q * r.diagonal().sign()).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Products with the rows."""
        return flatten_event(x, len(self.in_shape)) @ self.matrix.T.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Sum of the rows, weighted by y."""
        self.check_shape(y, self.out_shape, "data")
        return (y @ self.matrix.to(y)).reshape((*y.shape[:-1], *self.in_shape))

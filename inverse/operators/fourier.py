"""Subsampled Fourier transforms, real and complex images, and the Hartley basis that diagonalises them.

With F the unitary transform, H x = Re F x - Im F x is real, orthonormal and its own inverse. A gram matrix A^T A that
commutes with shifts is diagonal in it: A^T A = H diag(g) H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.events import event_shape, flatten_event, scatter, scatter_index
from ppl.errors import DataError, ShapeError

__all__ = ["FourierMask", "conjugate_index", "hartley"]


def hartley(x: Tensor) -> Tensor:
    """Two-dimensional Hartley transform, orthonormal and its own inverse.

    Args:
        x: (*batch, height, width), real.

    Returns:
        (*batch, height, width), Re F x - Im F x.

    Example:
        >>> x = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
        >>> torch.allclose(hartley(hartley(x)), x)
        True
    """
    if x.numel() == 0:
        return x.clone()
    z = torch.fft.fft2(x, norm="ortho")
    return z.real - z.imag


def conjugate_index(x: Tensor) -> Tensor:
    """Value at frequency -k for each k: (*batch, height, width) -> the same shape."""
    return torch.roll(torch.flip(x, (-2, -1)), (1, 1), (-2, -1))


class FourierMask(LinearOperator):
    """A x = the observed entries of the unitary 2-D Fourier transform of x, as (re, im): accelerated MRI.

    The transform of a real image has F_{-k} = conj(F_k). Keep one of each such pair when each was measured once; where
    the mask keeps both, they count as two measurements of the same number. The imaginary part at the zero and Nyquist
    frequencies of a real image is zero and carries noise only.

    Args:
        mask: (height, width) bool in the order of torch.fft.fft2 (zero frequency first; use torch.fft.ifftshift on a
            centred mask), True where observed.
        in_shape: (*channels, height, width); with complex_image (*channels, height, width, 2). The shape of mask, with
            the last axis of a complex image, when None.
        complex_image: x has a last axis (re, im).

    out_shape is (*channels, observed, 2).

    Example:
        >>> A = FourierMask(torch.tensor([[True, False], [False, False]]))
        >>> A(torch.ones(2, 2))
        tensor([[2., 0.]])
    """

    structure = frozenset({"fast_svd"})
    keep: Tensor
    places: Tensor
    multiplicity: Tensor

    def __init__(self, mask: Tensor, in_shape: tuple[int, ...] | None = None, *, complex_image: bool = False) -> None:
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise DataError(
                f"mask must be boolean of shape (height, width), got {mask.dtype} of shape {tuple(mask.shape)}; "
                "one mask serves all channels"
            )
        tail = (2,) if complex_image else ()
        shape = (*mask.shape, *tail) if in_shape is None else event_shape(in_shape)
        end = (*mask.shape, *tail)
        if shape[len(shape) - len(end) :] != end:
            raise ShapeError(f"in_shape must end in {end}, the mask's{' and (re, im)' if tail else ''}, got {shape}")
        keep = torch.nonzero(mask.reshape(-1)).squeeze(-1)
        if len(keep) == 0:
            raise DataError("mask observes nothing; at least one frequency must be True")
        super().__init__(shape, (*shape[: len(shape) - len(end)], len(keep), 2))
        self.complex_image = complex_image
        self.register_buffer("keep", keep)
        self.register_buffer("places", scatter_index(keep, mask.numel()))
        self.register_buffer("multiplicity", (mask.double() + conjugate_index(mask.double())) / 2)
        self.height, self.width = mask.shape

    def _pack(self, z: Tensor) -> Tensor:
        """Complex spectrum (*, height, width) -> observed entries (*, observed, 2)."""
        kept = z.reshape(*z.shape[:-2], self.height * self.width)[..., self.keep]
        return torch.stack([kept.real, kept.imag], -1)

    def _unpack(self, y: Tensor) -> Tensor:
        """Observed entries (*, observed, 2) -> complex spectrum (*, height, width), zero elsewhere."""
        real, imag = scatter(y[..., 0], self.places), scatter(y[..., 1], self.places)
        return torch.complex(real, imag).reshape(*y.shape[:-2], self.height, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """Observed Fourier coefficients."""
        if x.numel() == 0:
            return x.new_zeros((*x.shape[: x.ndim - len(self.in_shape)], *self.out_shape))
        z = torch.complex(x[..., 0], x[..., 1]) if self.complex_image else x
        return self._pack(torch.fft.fft2(z, norm="ortho"))

    def adjoint(self, y: Tensor) -> Tensor:
        """Inverse transform of the zero-filled spectrum."""
        self.check_shape(y, self.out_shape, "data")
        if y.numel() == 0:
            return y.new_zeros((*y.shape[: y.ndim - len(self.out_shape)], *self.in_shape))
        z = torch.fft.ifft2(self._unpack(y), norm="ortho")
        return torch.stack([z.real, z.imag], -1) if self.complex_image else z.real

    def compute_svd(self) -> SVD:
        """Complex images: V = A^T, s = 1. Real ones: Hartley columns with s^2 = share of the pair (k, -k) observed."""
        n_in, n_out = len(self.in_shape), len(self.out_shape)
        if self.complex_image:
            s = torch.ones(self.out_shape, dtype=torch.float64, device=self.keep.device).reshape(-1)
            return SVD(
                s,
                lambda x: flatten_event(self.forward(x), n_out),
                lambda z: self.adjoint(z.reshape((*z.shape[:-1], *self.out_shape))),
                lambda y: flatten_event(y, n_out),
                lambda z: z.reshape((*z.shape[:-1], *self.out_shape)),
            )
        gram = torch.broadcast_to(self.multiplicity.double(), self.in_shape).reshape(-1)
        keep = torch.nonzero(gram > 0).squeeze(-1)
        index, s = scatter_index(keep, gram.numel()), gram[keep].sqrt()

        def to_spectral(x: Tensor) -> Tensor:
            return flatten_event(hartley(x), n_in)[..., keep]

        def from_spectral(z: Tensor) -> Tensor:
            return hartley(scatter(z, index).reshape((*z.shape[:-1], *self.in_shape)))

        return SVD(
            s,
            to_spectral,
            from_spectral,
            lambda y: to_spectral(self.adjoint(y)) / s.to(y),
            lambda z: self.forward(from_spectral(z / s.to(z))),
        )

"""Multi-coil magnetic resonance imaging: every coil sees the image through its own sensitivity, at sampled frequencies.

(A x)_c = M F (s_c x),   A^H y = sum_c conj(s_c) F^H M^T y_c,   F unitary

Complex numbers are stored with a last axis (re, im).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import event_shape, scatter, scatter_index
from ppl.errors import DataError, OptionError, ShapeError

__all__ = ["MultiCoilMRI", "coil_sensitivities"]


class MultiCoilMRI(LinearOperator):
    """A x = the observed entries of the unitary 2-D Fourier transform of s_c x for every coil c, as (re, im).

    Args:
        sensitivities: s, (coils, height, width) complex, or (coils, height, width, 2) real as (re, im). Used as they
            are: with sum_c |s_c|^2 = 1 the norm of A is at most one.
        mask: (height, width) bool in the order of torch.fft.fft2 (zero frequency first; use torch.fft.ifftshift on a
            centred mask), True where observed.
        in_shape: (*channels, height, width, 2), or (*channels, height, width) for real images; without channels when
            None.
        complex_image: x has a last axis (re, im).

    out_shape is (*channels, coils, observed, 2).

    Raises:
        ShapeError: sensitivities, mask and in_shape differ in height or width.
        DataError: a mask that is not boolean or observes nothing.

    Source: Pruessmann et al. (1999), SENSE [inferred].

    Example:
        >>> s = torch.tensor([[[1.0 + 0j, 0.0]], [[0.0, 1j]]])                # two coils, two pixels
        >>> A = MultiCoilMRI(s, torch.tensor([[True, False]]))
        >>> A(torch.tensor([[[2.0, 0.0], [4.0, 0.0]]])).mul(2**0.5).round()   # coil two sees 4 i
        tensor([[[2., 0.]],
        <BLANKLINE>
                [[0., 4.]]])
    """

    sensitivities: Tensor
    keep: Tensor
    places: Tensor

    def __init__(
        self,
        sensitivities: Tensor,
        mask: Tensor,
        in_shape: tuple[int, ...] | None = None,
        *,
        complex_image: bool = True,
    ) -> None:
        s = torch.view_as_real(sensitivities) if sensitivities.is_complex() else sensitivities
        if s.ndim != 4 or s.shape[-1] != 2 or not s.is_floating_point():
            raise ShapeError(
                "sensitivities must be complex of shape (coils, height, width), or real with a last axis (re, im), got "
                f"{sensitivities.dtype} of shape {tuple(sensitivities.shape)}"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(s.shape[1:3]):
            raise DataError(
                f"mask must be boolean of shape {tuple(s.shape[1:3])}, that of a sensitivity, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}"
            )
        keep = torch.nonzero(mask.reshape(-1)).squeeze(-1)
        if len(keep) == 0:
            raise DataError("mask observes nothing; at least one frequency must be True")
        end = (*mask.shape, 2) if complex_image else tuple(mask.shape)
        shape = end if in_shape is None else event_shape(in_shape)
        if shape[len(shape) - len(end) :] != end:
            raise ShapeError(
                f"in_shape must end in {end}, the mask's{' and (re, im)' if complex_image else ''}, got {shape}"
            )
        super().__init__(shape, (*shape[: len(shape) - len(end)], len(s), len(keep), 2))
        self.complex_image = complex_image
        self.height, self.width = mask.shape
        # Kept real: .to(dtype) would drop the imaginary part of a complex buffer.
        self.register_buffer("sensitivities", s.contiguous())
        self.register_buffer("keep", keep)
        self.register_buffer("places", scatter_index(keep, mask.numel()))

    def _maps(self, like: Tensor) -> Tensor:
        """s, (coils, height, width) complex."""
        s = self.sensitivities.to(like)
        return torch.complex(s[..., 0], s[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        """Observed Fourier coefficients of every coil."""
        if x.numel() == 0:
            return x.new_zeros((*x.shape[: x.ndim - len(self.in_shape)], *self.out_shape))
        image = torch.complex(x[..., 0], x[..., 1]) if self.complex_image else x
        z = torch.fft.fft2(self._maps(x) * image[..., None, :, :], norm="ortho")
        kept = z.reshape(*z.shape[:-2], self.height * self.width)[..., self.keep]
        return torch.stack([kept.real, kept.imag], -1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Zero-filled images of all coils, combined by the conjugate sensitivities."""
        self.check_shape(y, self.out_shape, "data")
        if y.numel() == 0:
            return y.new_zeros((*y.shape[: y.ndim - len(self.out_shape)], *self.in_shape))
        spectrum = torch.complex(scatter(y[..., 0], self.places), scatter(y[..., 1], self.places))
        coils = torch.fft.ifft2(spectrum.reshape(*y.shape[:-2], self.height, self.width), norm="ortho")
        z = (self._maps(y).conj() * coils).sum(-3)
        return torch.stack([z.real, z.imag], -1) if self.complex_image else z.real


def coil_sensitivities(
    coils: int, shape: tuple[int, int], *, width: float = 0.8, dtype: torch.dtype = torch.complex128
) -> Tensor:
    r"""Smooth sensitivities of coils on a circle around the image, with sum_c |s_c|^2 = 1 at every pixel.

    Before they are normalised, |s_c| = exp(-|r - r_c|^2 / (2 width^2)) in units of half the image, with a phase that
    winds with the angle seen from the coil: a stand-in for measured maps.

    Args:
        coils: number of coils, one or more.
        shape: (height, width) of the image.
        width: reach of a coil in units of half the image; small ones see only their own side.
        dtype: complex64 or complex128.

    Returns:
        (coils, height, width) complex.

    Example:
        >>> coil_sensitivities(4, (8, 8)).abs().square().sum(0).mean().round(decimals=6)
        tensor(1., dtype=torch.float64)
    """
    if coils < 1 or not (width > 0 and math.isfinite(width)):
        raise OptionError(f"coils must be one or more and width positive, got coils {coils}, width {width}")
    Y, X = (torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1).double() for n in shape)
    place = torch.arange(coils, dtype=torch.float64) * (2 * math.pi / coils)
    dx = X - 1.5 * place.cos()[:, None, None]
    dy = Y[:, None] - 1.5 * place.sin()[:, None, None]
    # A common factor would underflow far away, so magnitudes are normalised as logarithms.
    log_power = torch.log_softmax(-(dx.square() + dy.square()) / width**2, 0)
    return torch.polar((0.5 * log_power).exp(), torch.atan2(dy, dx)).to(dtype)

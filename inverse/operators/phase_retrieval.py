"""Phase retrieval: the magnitude of an oversampled Fourier transform, its phase lost.

A x = |F P x|,  P: zero padding, F unitary.     A x = A(-x) = A(x turned by 180 degrees)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.events import image_shape
from inverse.operators.nonlinear import NonlinearOperator
from ppl.errors import OptionError

__all__ = ["PhaseRetrieval"]


class PhaseRetrieval(NonlinearOperator):
    """A x = |F P x| of a real image, zero frequency first.

    Data do not tell x from its equivalents: -x, x turned by 180 degrees, and both; nor from shifts that keep x inside
    its frame (with oversampling 1, any circular shift). The posterior has a mode at each, and its mean is then nobody's
    picture: use `equivalents` and `align` before draws are compared or averaged.

    Args:
        in_shape: (*channels, height, width).
        oversampling: size of the padded image over that of x, one or more; 2 determines the autocorrelation of x.
        squared: measure |F P x|^2, as photon counts do; it is smooth where the magnitude has a kink at zero.

    out_shape is (*channels, padded_height, padded_width).

    Source: Fienup (1982) for the ambiguities [inferred]; Chung et al. (2023) for oversampling 2 [inferred].

    Example:
        >>> A = PhaseRetrieval((1, 2), oversampling=1.0)
        >>> A(torch.tensor([[3.0, 4.0]])).mul(2**0.5).round()
        tensor([[7., 1.]])
    """

    def __init__(self, in_shape: tuple[int, ...], oversampling: float = 2.0, *, squared: bool = False) -> None:
        in_shape = image_shape(in_shape)
        if not (oversampling >= 1 and math.isfinite(oversampling)):
            raise OptionError(f"oversampling must be one or more and finite, got {oversampling}")
        padded = tuple(math.ceil(oversampling * n - 1e-9) for n in in_shape[-2:])
        super().__init__(in_shape, (*in_shape[:-2], *padded))
        self.squared = squared

    def forward(self, x: Tensor) -> Tensor:
        """Magnitudes (or their squares); the gradient where a magnitude vanishes is zero, its smallest subgradient."""
        if x.numel() == 0:
            return x.new_zeros((*x.shape[: x.ndim - len(self.in_shape)], *self.out_shape))
        z = torch.fft.fft2(x, s=self.out_shape[-2:], norm="ortho")
        # `s` pads before the unitary scaling, so the energy of x is kept.
        power = z.real.square() + z.imag.square()
        if self.squared:
            return power
        dark = power == 0
        return torch.where(dark, torch.zeros_like(power), torch.where(dark, torch.ones_like(power), power).sqrt())

    @property
    def limits(self) -> tuple[float, float]:
        """Range of the data without noise."""
        return 0.0, math.inf

    def equivalents(self, x: Tensor) -> Tensor:
        """Images with the same data as x: itself, -x, and both turned by 180 degrees.

        Args:
            x: (*batch, *in_shape).

        Returns:
            (4, *batch, *in_shape).

        Example:
            >>> PhaseRetrieval((1, 2)).equivalents(torch.tensor([[1.0, 2.0]]))[:, 0].tolist()
            [[1.0, 2.0], [-1.0, -2.0], [2.0, 1.0], [-2.0, -1.0]]
        """
        self.check_shape(x, self.in_shape, "image")
        turned = x.flip(-2, -1)
        return torch.stack([x, -x, turned, -turned])

    def align(self, x: Tensor, reference: Tensor) -> Tensor:
        """The equivalent of every x that is nearest to a reference; channels are measured apart and chosen apart.

        Args:
            x: (*batch, *in_shape).
            reference: (*in_shape) or broadcasting to x.

        Returns:
            (*batch, *in_shape).
        """
        options = self.equivalents(x)
        distance = (options - reference).square().sum((-2, -1), keepdim=True)
        choice = distance.argmin(0, keepdim=True)
        return options.gather(0, choice.expand(1, *x.shape)).squeeze(0)

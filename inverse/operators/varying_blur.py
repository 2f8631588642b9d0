"""Blur that changes over the image: point spread functions known on a grid, interpolated between.

A x = sum_g k_g * (w_g x),   w_g >= 0 bilinear weights with sum_g w_g = 1,   * circular convolution

so that a point source at pixel j is seen as sum_g w_g(j) k_g around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import event_shape
from ppl.errors import DataError, ShapeError

__all__ = ["VaryingBlur"]


def _hats(nodes: int, size: int) -> Tensor:
    """(nodes, size) linear interpolation weights; the nodes are spread from the first pixel to the last."""
    if nodes == 1:
        return torch.ones(1, size, dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64) * ((nodes - 1) / max(size - 1, 1))
    return (1 - (place - torch.arange(nodes, dtype=torch.float64)[:, None]).abs()).clamp_min(0)


class VaryingBlur(LinearOperator):
    """Space-varying blur, the same on every channel, edges wrapping around; one transform per kernel.

    Kernels that sum to one keep the total of x, and equal ones give `CircularBlur`. The decomposition is dense where
    the image is small; larger problems go through conjugate gradients.

    Args:
        kernels: (rows, columns, kernel_height, kernel_width), real, no larger than the image: the point spread
            functions at the corners, edges and inner nodes of an even grid over the image. The origin of each is its
            entry (kernel_height // 2, kernel_width // 2). May be traced or carry gradients.
        in_shape: (*channels, height, width).

    Raises:
        DataError: kernels are not real with four axes.
        ShapeError: a kernel is larger than the image, or the grid finer than its pixels.

    Source: Nagy & O'Leary (1998), interpolation of point spread functions [inferred].

    Example:
        >>> sharp = torch.tensor([[0.0, 1.0, 0.0]])
        >>> wide = torch.tensor([[0.25, 0.5, 0.25]])
        >>> A = VaryingBlur(torch.stack([sharp, wide])[None], (1, 5))      # from sharp on the left to wide on the right
        >>> A(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])).mul(8).round()
        tensor([[0., 1., 6., 1., 0.]])
    """

    responses: Tensor
    weights: Tensor

    def __init__(self, kernels: Tensor, in_shape: tuple[int, ...]) -> None:
        if kernels.ndim != 4 or not kernels.is_floating_point():
            raise DataError(
                "kernels must be real of shape (rows, columns, kernel_height, kernel_width), got "
                f"{kernels.dtype} of shape {tuple(kernels.shape)}; one kernel is CircularBlur"
            )
        rows, columns, kh, kw = kernels.shape
        in_shape = event_shape(in_shape)
        if len(in_shape) < 2 or kh > in_shape[-2] or kw > in_shape[-1]:
            raise ShapeError(
                f"kernels of shape {(kh, kw)} must fit into the last two axes of in_shape {tuple(in_shape)}; crop them "
                "or enlarge the image"
            )
        h, w = in_shape[-2:]
        if not (1 <= rows <= h and 1 <= columns <= w):
            raise ShapeError(f"a grid of {rows} x {columns} kernels needs at least as many pixels, got {(h, w)}")
        super().__init__(in_shape, in_shape)
        padded = torch.nn.functional.pad(kernels.reshape(rows * columns, kh, kw), (0, w - kw, 0, h - kh))
        self.register_buffer("responses", torch.roll(padded, (-(kh // 2), -(kw // 2)), (-2, -1)))
        weights = torch.einsum("ri,cj->rcij", _hats(rows, h), _hats(columns, w)).reshape(rows * columns, h, w)
        self.register_buffer("weights", weights.to(kernels.device))

    def _transfer(self, like: Tensor) -> Tensor:
        return torch.fft.fft2(self.responses.to(like))

    def forward(self, x: Tensor) -> Tensor:
        """Each part of x through its own kernel, summed before the transform back."""
        if x.numel() == 0:
            return x.clone()
        parts = torch.fft.fft2(self.weights.to(x) * x[..., None, :, :])
        return torch.fft.ifft2((self._transfer(x) * parts).sum(-3)).real

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlations with every kernel, weighted."""
        self.check_shape(y, self.out_shape, "data")
        if y.numel() == 0:
            return y.clone()
        parts = torch.fft.ifft2(self._transfer(y).conj() * torch.fft.fft2(y)[..., None, :, :]).real
        return (self.weights.to(y) * parts).sum(-3)

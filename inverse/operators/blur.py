"""Circular convolutions: Gaussian, motion and arbitrary blur.

A x = F^* diag(h) F x with h the transfer function of the kernel. Edges wrap around: that is what makes the
decomposition a Fourier transform. Pad x where wrapping would matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.events import event_shape, flatten_event, image_shape, numel, scatter, scatter_index
from inverse.operators.fourier import hartley
from ppl.errors import DataError, OptionError, ShapeError

__all__ = ["CircularBlur", "GaussianBlur", "MotionBlur"]


class CircularBlur(LinearOperator):
    """(A x)_ij = sum_ab k_ab x_{i-a, j-b}, indices taken modulo the image, the same kernel on every channel.

    Args:
        kernel: (kernel_height, kernel_width), real, no larger than the image; its entry (kernel_height // 2,
            kernel_width // 2) is the origin. Used as it is, not normalised. May be traced or carry gradients.
        in_shape: (*channels, height, width).

    Example:
        >>> A = CircularBlur(torch.tensor([[0.0, 0.0, 1.0]]), (1, 4))     # shift by one to the right
        >>> A(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).round()
        tensor([[4., 1., 2., 3.]])
    """

    structure = frozenset({"fast_svd"})
    response: Tensor

    def __init__(self, kernel: Tensor, in_shape: tuple[int, ...]) -> None:
        if kernel.ndim != 2 or not kernel.is_floating_point():
            raise DataError(
                "kernel must be real of shape (kernel_height, kernel_width), "
                f"got {kernel.dtype} of shape {tuple(kernel.shape)}"
            )
        in_shape = event_shape(in_shape)
        if len(in_shape) < 2 or kernel.shape[0] > in_shape[-2] or kernel.shape[1] > in_shape[-1]:
            raise ShapeError(
                f"kernel of shape {tuple(kernel.shape)} must fit into the last two axes of in_shape {tuple(in_shape)}; "
                "crop the kernel or enlarge the image"
            )
        super().__init__(in_shape, in_shape)
        (kh, kw), (h, w) = kernel.shape, in_shape[-2:]
        padded = torch.nn.functional.pad(kernel, (0, w - kw, 0, h - kh))
        self.register_buffer("response", torch.roll(padded, (-(kh // 2), -(kw // 2)), (-2, -1)))

    def transfer(self, dtype: torch.dtype) -> Tensor:
        """h, the (height, width) complex transform of the impulse response."""
        return torch.fft.fft2(self.response.to(dtype))

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        return x.clone() if x.numel() == 0 else torch.fft.ifft2(torch.fft.fft2(x) * transfer).real

    def forward(self, x: Tensor) -> Tensor:
        """Blurred x."""
        return self._filter(x, self.transfer(x.dtype))

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlation with the kernel."""
        self.check_shape(y, self.out_shape, "data")
        return self._filter(y, self.transfer(y.dtype).conj())

    def compute_svd(self) -> SVD:
        """s = |h|, V the Hartley basis, U = V turned by the phase of h."""
        h = self.transfer(torch.float64)
        magnitude = torch.broadcast_to(h.abs(), self.in_shape).reshape(-1)
        floor = numel(self.in_shape[-2:]) * torch.finfo(torch.float64).eps * magnitude.max()
        keep = torch.nonzero(magnitude > floor).squeeze(-1)
        index, n = scatter_index(keep, magnitude.numel()), len(self.in_shape)
        phase = torch.where(h.abs() > floor, h / h.abs().clamp_min(torch.finfo(torch.float64).tiny), torch.ones_like(h))

        def turn(x: Tensor, transfer: Tensor) -> Tensor:
            return self._filter(x, transfer.to(torch.promote_types(x.dtype, torch.complex64)))

        def to_spectral(x: Tensor) -> Tensor:
            return flatten_event(hartley(x), n)[..., keep]

        def from_spectral(z: Tensor) -> Tensor:
            return hartley(scatter(z, index).reshape((*z.shape[:-1], *self.in_shape)))

        return SVD(
            magnitude[keep],
            to_spectral,
            from_spectral,
            lambda y: to_spectral(turn(y, phase.conj())),
            lambda z: turn(from_spectral(z), phase),
        )


class GaussianBlur(CircularBlur):
    """Blur with k_ab proportional to exp(-(a^2 + b^2) / (2 sigma^2)), sum one, edges wrapping around.

    Args:
        sigma: width in pixels, positive; a 0-d tensor may be a latent variable or carry gradients.
        in_shape: (*channels, height, width).
        radius: the kernel has 2 radius + 1 pixels a side; ceil(4 sigma) when None, cut at what the image holds.
            Required when sigma is a tensor, whose value must not decide a shape.

    Example:
        >>> A = GaussianBlur(1.0, (8, 8))
        >>> A(torch.ones(8, 8)).mean()          # the mean is kept
        tensor(1.)
    """

    def __init__(self, sigma: float | Tensor, in_shape: tuple[int, ...], *, radius: int | None = None) -> None:
        in_shape = image_shape(in_shape)
        if isinstance(sigma, Tensor):
            if radius is None:
                raise OptionError("with a tensor sigma give radius, about 4 times its largest plausible value")
            width = sigma
        else:
            if not (sigma > 0 and math.isfinite(sigma)):
                raise OptionError(f"sigma must be positive and finite, got {sigma}; use Identity for no blur")
            radius = math.ceil(4 * sigma) if radius is None else radius
            width = torch.tensor(sigma, dtype=torch.float64)
        if radius < 0:
            raise OptionError(f"radius must be zero or more, got {radius}")
        factors = []
        for size in in_shape[-2:]:
            reach = min(radius, (size - 1) // 2)
            a = torch.arange(-reach, reach + 1, dtype=width.dtype, device=width.device)
            k = torch.exp(-0.5 * (a / width).square())
            factors.append(k / k.sum())
        super().__init__(factors[0][:, None] * factors[1][None, :], in_shape)


class MotionBlur(CircularBlur):
    """Blur along a straight line, sum one, edges wrapping around.

    The line is sampled finely and each sample shared between its four nearest pixels.

    Args:
        length: of the line in pixels, positive.
        angle: in degrees, counter-clockwise from the horizontal axis.
        in_shape: (*channels, height, width).

    Example:
        >>> A = MotionBlur(2.0, 0.0, (1, 5))
        >>> A(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])).mul(8).round()
        tensor([[0., 2., 4., 2., 0.]])
    """

    def __init__(self, length: float, angle: float, in_shape: tuple[int, ...]) -> None:
        if not (length > 0 and math.isfinite(length) and math.isfinite(angle)):
            raise OptionError(f"length must be positive and both finite, got length {length}, angle {angle}")
        in_shape = image_shape(in_shape)
        samples = max(2, 64 * math.ceil(length))
        t = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples * length - length / 2
        theta = math.radians(angle)
        row, col = -t * math.sin(theta), t * math.cos(theta)
        reach = [math.ceil(float(v.abs().max()) - 1e-9) if float(v.abs().max()) > 1e-9 else 0 for v in (row, col)]
        sizes = [2 * r + 1 for r in reach]
        if sizes[0] > in_shape[-2] or sizes[1] > in_shape[-1]:
            raise ShapeError(
                f"a line of {length} pixels at {angle} degrees needs {sizes} pixels, in_shape is {in_shape}"
            )
        # Hat functions share each sample between neighbours.
        rows = torch.arange(-reach[0], reach[0] + 1, dtype=torch.float64)
        cols = torch.arange(-reach[1], reach[1] + 1, dtype=torch.float64)
        hat_r = (1 - (row[:, None] - rows).abs()).clamp_min(0)
        hat_c = (1 - (col[:, None] - cols).abs()).clamp_min(0)
        kernel = torch.einsum("sr,sc->rc", hat_r, hat_c)
        super().__init__(kernel / kernel.sum(), in_shape)

"""Fast orthonormal transforms of the last axis: discrete cosine and Walsh-Hadamard.

X_k = c_k sum_n x_n cos(pi (2 n + 1) k / (2 N)),  c_0 = sqrt(1 / N), c_k = sqrt(2 / N)
X = H x,  H_ij = +-1 / sqrt(N)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl.errors import ShapeError

__all__ = ["cosine", "hadamard", "inverse_cosine"]


def _twiddle(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of pi k / (2 n), scaled so that the transform is orthonormal."""
    angle = torch.arange(n, dtype=torch.float64, device=like.device) * (math.pi / (2 * n))
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64, device=like.device)
    scale[0] = math.sqrt(1 / n)
    return (scale * angle.cos()).to(like.dtype), (scale * angle.sin()).to(like.dtype)


def cosine(x: Tensor) -> Tensor:
    """Orthonormal discrete cosine transform (type II) of the last axis, in O(n log n).

    Args:
        x: (*batch, n), real.

    Returns:
        (*batch, n).

    Source: Makhoul (1980) [inferred].

    Example:
        >>> cosine(torch.ones(4))
        tensor([2., 0., 0., 0.])
    """
    if x.numel() == 0:
        return x.clone()
    c, s = _twiddle(x.shape[-1], x)
    z = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    return z.real * c + z.imag * s


def inverse_cosine(x: Tensor) -> Tensor:
    """Inverse, and so the transpose, of `cosine`.

    Args:
        x: (*batch, n), real.

    Returns:
        (*batch, n).

    Example:
        >>> inverse_cosine(cosine(torch.tensor([1.0, 2.0, 4.0]))).round()
        tensor([1., 2., 4.])
    """
    if x.numel() == 0:
        return x.clone()
    n = x.shape[-1]
    c, s = _twiddle(n, x)
    # The transpose of x -> Re(F x) c + Im(F x) s is y -> Re F^T (c y) + Im F^T (s y), and F^T = F.
    z = torch.fft.fft(x * c).real + torch.fft.fft(x * s).imag
    half = (n + 1) // 2
    index = torch.empty(n, dtype=torch.long, device=x.device)
    index[::2] = torch.arange(half, device=x.device)
    index[1::2] = torch.arange(n - 1, half - 1, -1, device=x.device)
    return z.index_select(-1, index)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, its own inverse, in O(n log n).

    Args:
        x: (*batch, n), n a power of two.

    Returns:
        (*batch, n).

    Raises:
        ShapeError: n is no power of two.

    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ShapeError(f"the Hadamard transform needs a power of two, got {n} entries; pad x or use the cosine one")
    batch, step, y = x.shape[:-1], 1, x
    while step < n:
        pair = y.reshape(*batch, n // (2 * step), 2, step)
        y = torch.stack([pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]], -2).reshape(*batch, n)
        step *= 2
    return y * n**-0.5

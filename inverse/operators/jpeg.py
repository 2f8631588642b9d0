"""Lossy compression: rounded cosine coefficients of 8 x 8 blocks.

y = C^T (q round(C x / q)),  C: the orthonormal cosine transform of each block, q: the quantisation table
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.events import event_shape
from inverse.operators.nonlinear import NonlinearOperator
from ppl.errors import OptionError, ShapeError

__all__ = ["JPEG", "round_through"]

# Annex K of the standard, tables K.1 and K.2.
_LUMINANCE = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99
"""
_CHROMINANCE = """
17 18 24 47 99 99 99 99
18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
"""
# Full-range YCbCr of JFIF, without the offset of the colour channels, which the level shift of the blocks removes.
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def round_through(x: Tensor) -> Tensor:
    """round(x), with the derivative of x: the straight-through estimate of a gradient that is zero almost everywhere.

    Example:
        >>> torch.func.grad(round_through)(torch.tensor(0.3))
        tensor(1.)
    """
    # The derivative of round is zero in every mode, so the difference contributes none but that of x.
    return x + (torch.round(x) - x).detach()


def _table(text: str, quality: int) -> Tensor:
    """Quantisation table at a quality, by the rule of the reference software."""
    base = torch.tensor([[int(v) for v in row.split()] for row in text.split("\n") if row], dtype=torch.float64)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.floor((base * scale + 50) / 100).clamp(1, 255)


class JPEG(NonlinearOperator):
    """The picture that comes back from JPEG: block transform, division by a table, rounding, and back.

    Values in [low, high] stand for 0 to 255. Three channels are turned to YCbCr, at full resolution (no chroma
    subsampling); any other number is compressed one by one with the table for brightness. Entropy coding loses
    nothing and is left out; decoded values are not rounded to integers or clipped.

    The true gradient is zero almost everywhere. The one given here goes straight through the rounding: it is that of
    the identity, a surrogate that guides may follow and that biases what treats it as exact (HMC accepts by the true
    density, so it stays right, but takes few proposals).

    Args:
        in_shape: (*channels, height, width), both divisible by 8; channels of (3,) are colours.
        quality: 1 to 100, as in the reference software.
        low: value of black.
        high: value of white.

    Source: ITU T.81 (1992), annexes A and K, tables K.1 and K.2, with the quality rule of libjpeg [inferred].

    Example:
        >>> A = JPEG((8, 8), quality=50)
        >>> A(torch.full((8, 8), 0.5)).mean()         # 191.25 is stored as 192 in steps of 2
        tensor(0.5059)
    """

    tables: Tensor
    basis: Tensor
    mixing: Tensor

    def __init__(self, in_shape: tuple[int, ...], quality: int = 50, *, low: float = -1.0, high: float = 1.0) -> None:
        if not 1 <= quality <= 100:
            raise OptionError(f"quality must lie between 1 and 100, got {quality}")
        if not low < high:
            raise OptionError(f"the range needs low < high, got low {low}, high {high}")
        in_shape = event_shape(in_shape)
        if len(in_shape) < 2 or in_shape[-1] % 8 or in_shape[-2] % 8:
            raise ShapeError(f"in_shape must end in (height, width) divisible by 8, got {tuple(in_shape)}; crop or pad")
        super().__init__(in_shape, in_shape)
        self.quality, self.low, self.high = quality, low, high
        self.colour = len(in_shape) > 2 and in_shape[-3] == 3
        brightness, colour = _table(_LUMINANCE, quality), _table(_CHROMINANCE, quality)
        self.register_buffer("tables", torch.stack([brightness, colour, colour]) if self.colour else brightness)
        k, n = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
        basis = 0.5 * torch.cos(math.pi * (2 * n + 1) * k / 16)
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis)
        self.register_buffer("mixing", torch.tensor(_TO_YCBCR, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Compressed and decoded."""
        basis, tables, mixing = self.basis.to(x), self.tables.to(x), self.mixing.to(x)
        levels = (x - self.low) * (255 / (self.high - self.low)) - 128
        if self.colour:
            # A grey picture has colour channels of zero: the level shift of 128 acts on brightness alone.
            levels = torch.einsum("ab,...bhw->...ahw", mixing, levels)
        *lead, h, w = levels.shape
        blocks = levels.reshape(*lead, h // 8, 8, w // 8, 8).transpose(-3, -2)
        tables = tables[..., None, None, :, :]
        coefficients = basis @ blocks @ basis.T
        coefficients = tables * round_through(coefficients / tables)
        levels = (basis.T @ coefficients @ basis).transpose(-3, -2).reshape(*lead, h, w)
        if self.colour:
            levels = torch.einsum("ab,...bhw->...ahw", torch.linalg.inv(mixing), levels)
        return self.low + (levels + 128) * ((self.high - self.low) / 255)

"""Space-varying blur against sums written out by hand."""

from __future__ import annotations

import pytest
import torch

from inverse.operators import CircularBlur, VaryingBlur
from ppl.errors import DataError, ShapeError


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_source_spreads_by_its_own_kernel() -> None:
    """Column j of the matrix is the bilinear mix of the kernels at pixel j, centred there."""
    kernels, h, w = randn(2, 3, 2, 3), 4, 5
    x, expected = randn(h, w, seed=1), torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            # Where pixel (i, j) lies on the grid of kernels: rows 0 and 1, columns 0, 1 and 2.
            r, c = i / (h - 1), 2 * j / (w - 1)
            c0 = min(int(c), 1)
            mix = (1 - r) * ((1 - c + c0) * kernels[0, c0] + (c - c0) * kernels[0, c0 + 1])
            mix = mix + r * ((1 - c + c0) * kernels[1, c0] + (c - c0) * kernels[1, c0 + 1])
            for a in range(2):
                for b in range(3):
                    expected[(i + a - 1) % h, (j + b - 1) % w] += mix[a, b] * x[i, j]
    torch.testing.assert_close(VaryingBlur(kernels, (h, w))(x), expected)


def test_equal_kernels_are_one_blur() -> None:
    kernel, x = randn(3, 2), randn(2, 6, 5, seed=1)
    for rows, columns in ((1, 1), (2, 3), (6, 5)):
        A = VaryingBlur(kernel.expand(rows, columns, 3, 2), (2, 6, 5))
        torch.testing.assert_close(A(x), CircularBlur(kernel, (2, 6, 5))(x))


def test_unit_kernels_keep_the_total() -> None:
    kernels = randn(3, 2, 3, 3).abs()
    kernels = kernels / kernels.sum((-2, -1), keepdim=True)
    x = randn(7, 8, seed=1)
    torch.testing.assert_close(VaryingBlur(kernels, (7, 8))(x).sum(), x.sum())


def test_kernels_may_be_learned() -> None:
    kernels, x, y = randn(1, 2, 1, 3), randn(4, 4, seed=1), randn(4, 4, seed=2)

    def score(k: torch.Tensor) -> torch.Tensor:
        return (VaryingBlur(k, (4, 4))(x) * y).sum()

    slope, step = torch.func.grad(score)(kernels), randn(1, 2, 1, 3, seed=3)
    torch.testing.assert_close((slope * step).sum(), score(kernels + step) - score(kernels))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="CircularBlur"):
        VaryingBlur(randn(3, 3), (4, 4))
    with pytest.raises(ShapeError, match="fit"):
        VaryingBlur(randn(1, 1, 5, 3), (4, 4))
    with pytest.raises(ShapeError, match="grid"):
        VaryingBlur(randn(5, 1, 1, 1), (4, 4))

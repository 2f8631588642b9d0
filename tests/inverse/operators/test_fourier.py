"""Fourier masks against the definition of the transform."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.operators import FourierMask
from inverse.operators.fourier import conjugate_index, hartley
from ppl.errors import DataError, ShapeError


def test_coefficients_by_definition() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    angle = 2 * math.pi * (torch.arange(3.0).double()[:, None] * 1 / 3 + torch.arange(4.0).double()[None, :] * 2 / 4)
    expected = torch.stack([(x * angle.cos()).sum(), -(x * angle.sin()).sum()]) / math.sqrt(12)
    torch.testing.assert_close(FourierMask(mask)(x), expected[None])


def test_conjugate_pairs_count_twice() -> None:
    """One of a pair measures half the energy of both; singular values say so."""
    mask = torch.zeros(1, 5, dtype=torch.bool)
    mask[0, 1] = True
    torch.testing.assert_close(FourierMask(mask).svd().s, torch.full((2,), 0.5, dtype=torch.float64).sqrt())
    mask[0, 4] = True
    torch.testing.assert_close(FourierMask(mask).svd().s, torch.ones(2, dtype=torch.float64))
    mask[0, 0] = True
    assert FourierMask(mask).svd().rank == 3


def test_hartley_is_an_orthonormal_involution() -> None:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hartley(hartley(x)), x)
    torch.testing.assert_close(hartley(x).norm(), x.norm())
    spectrum = torch.fft.fft2(x)
    torch.testing.assert_close(conjugate_index(spectrum), spectrum.conj().resolve_conj())


def test_complex_image_round_trip() -> None:
    A = FourierMask(torch.ones(3, 4, dtype=torch.bool), complex_image=True)
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.view_as_complex(A(x)).reshape(3, 4)
    torch.testing.assert_close(y, torch.fft.fft2(torch.view_as_complex(x), norm="ortho"))
    torch.testing.assert_close(A.adjoint(A(x)), x)


def test_refusals() -> None:
    with pytest.raises(DataError, match="boolean"):
        FourierMask(torch.ones(3, 3))
    with pytest.raises(ShapeError, match="end in"):
        FourierMask(torch.ones(3, 3, dtype=torch.bool), (4, 3))
    with pytest.raises(DataError, match="nothing"):
        FourierMask(torch.zeros(3, 3, dtype=torch.bool))


def test_hartley_by_definition() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    i, j = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)[None, :]
    angle = 2 * math.pi * (2 * i / 3 + 1 * j / 4)
    torch.testing.assert_close(hartley(x)[2, 1], (x * (angle.cos() + angle.sin())).sum() / math.sqrt(12))

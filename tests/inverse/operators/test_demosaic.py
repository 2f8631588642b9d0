"""Colour filter arrays by their definition."""

from __future__ import annotations

import pytest
import torch

from inverse.operators import ColourMosaic
from ppl.errors import DataError, OptionError, ShapeError


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_every_pixel_shows_its_letter(pattern: str) -> None:
    x = torch.arange(3.0)[:, None, None].expand(3, 5, 4)
    y = ColourMosaic((3, 5, 4), pattern)(x)
    for i in range(5):
        for j in range(4):
            assert "RGB"[int(y[i, j])] == pattern[2 * (i % 2) + j % 2]


def test_any_cell_and_number_of_colours() -> None:
    cell = torch.tensor([[0, 1, 2], [3, 0, 1]])
    x = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    y = ColourMosaic((2, 4, 4, 5), cell)(x)
    for i in range(4):
        for j in range(5):
            torch.testing.assert_close(y[:, i, j], x[:, cell[i % 2, j % 3], i, j])


def test_the_adjoint_fills_one_colour_and_inverts() -> None:
    A = ColourMosaic((3, 4, 4))
    y = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) + 1
    back = A.adjoint(y)
    assert ((back != 0).sum(0) == 1).all()
    assert (back != 0).sum((1, 2)).tolist() == [4, 8, 4]
    torch.testing.assert_close(A(back), y)
    assert torch.equal(A.pinv(y), back)
    assert {"diagonal", "fast_svd"} <= A.capabilities


def test_what_is_not_measured_does_not_matter() -> None:
    A = ColourMosaic((3, 2, 2))
    x = A.adjoint(torch.ones(2, 2))
    x[x == 0] = torch.inf
    assert torch.equal(A(x), torch.ones(2, 2))


def test_refuses_what_is_no_pattern() -> None:
    with pytest.raises(OptionError, match="four letters"):
        ColourMosaic((3, 4, 4), "RGB")
    with pytest.raises(ShapeError, match="three colours"):
        ColourMosaic((4, 4, 4))
    with pytest.raises(ShapeError, match="colours, height"):
        ColourMosaic((4, 4))
    with pytest.raises(DataError, match="0 to 2"):
        ColourMosaic((3, 4, 4), torch.tensor([[3]]))
    with pytest.raises(DataError, match="integer"):
        ColourMosaic((3, 4, 4), torch.tensor([[0.5]]))

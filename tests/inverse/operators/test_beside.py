"""The row [A B]: the contract of operators, and the decomposition of multiples of one operator."""

from __future__ import annotations

import pytest
import torch

from inverse.operators import Beside, Dense, GaussianBlur, Identity, LinearOperator, Mask, Zero, beside
from inverse.operators.testing import check_operator
from ppl.errors import OptionError, ShapeError

F64 = torch.float64


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MASK = Mask(torch.rand(3, 4, generator=generator()) > 0.4)
MATRIX = Dense(torch.randn(MASK.out_shape[0], 5, generator=generator(), dtype=F64))
BLUR = GaussianBlur(1.0, (1, 6, 6))

MEMBERS: dict[str, LinearOperator] = {
    "multiples of a mask": beside(MASK, -2 * MASK),
    "multiples of a blur": beside(BLUR, 0.5 * BLUR, 3 * (2 * BLUR)),
    "two identities": beside(Identity((3,)), Identity((3,))),
    "mask and matrix": beside(MASK, MATRIX),
    "matrices": beside(MATRIX, MATRIX),
    "nothing": Zero((4,), (3,)),
    "one that is not seen": beside(Zero((4,), (3,)), Identity((3,))),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_contract(name: str) -> None:
    check_operator(MEMBERS[name], generator())


def test_it_is_the_sum_over_the_parts() -> None:
    a, b = torch.randn(7, 3, 4, generator=generator(), dtype=F64), torch.randn(7, 5, dtype=F64)
    row = beside(MASK, MATRIX)
    torch.testing.assert_close(row(torch.cat([a.flatten(1), b], 1)), MASK(a) + MATRIX(b))
    assert isinstance(beside(MATRIX, MATRIX), Dense)


def test_multiples_of_one_operator_keep_its_decomposition() -> None:
    row = beside(3 * BLUR, 4 * BLUR)
    assert isinstance(row, Beside)
    assert "fast_svd" in row.capabilities
    torch.testing.assert_close(row.svd().s, 5 * BLUR.svd().s)
    assert "fast_svd" not in MEMBERS["mask and matrix"].capabilities
    scale = beside(MASK, -2 * MASK).gram_scale
    assert float(scale) == 5.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match="return one shape"):
        beside(MASK, BLUR)
    with pytest.raises(OptionError, match="one operator or more"):
        beside()

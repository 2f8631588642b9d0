"""Operators that differ from row to row do to every row what its own operator does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inverse.guides.spectrum import GramSpectrum
from inverse.operators import Compose, Dense, Diagonal, Downsample, Identity, LinearOperator, Mask
from inverse.operators.algebra import Scaled
from inverse.operators.per_lane import PerLane, UnlikeError, per_lane_operator

F64 = torch.float64
WHICH = torch.tensor([0, 2, 1, 1, 0])


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def masks(*rows: list[int]) -> list[LinearOperator]:
    return [Mask(torch.tensor(row).bool()) for row in rows]


EVEN = masks([1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1])
RAGGED = masks([1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0])

KINDS: dict[str, Callable[[], list[LinearOperator]]] = {
    "masks": lambda: EVEN,
    "scaled masks": lambda: [Scaled(m, 2.0 + i) for i, m in enumerate(EVEN)],
    "composed masks": lambda: [Compose(m, Diagonal(rand(4))) for m in EVEN],
    "noise behind masks": lambda: [Compose(Diagonal(rand(3, 2)[i].abs() + 0.1), m) for i, m in enumerate(EVEN)],
    "masks of the identity": lambda: [Compose(m, Identity((4,))) for m in EVEN],
    "diagonals": lambda: [Diagonal(w) for w in rand(3, 4)],
    "matrices": lambda: [Dense(w) for w in rand(3, 2, 4)],
    "scales": lambda: [Scaled(Dense(rand(2, 4)), c) for c in (1.0, -2.0, 0.5)],
}


def merged(name: str) -> tuple[list[LinearOperator], LinearOperator]:
    members = KINDS[name]()
    return members, per_lane_operator(members, WHICH, F64)


@pytest.mark.parametrize("name", KINDS)
def test_rows_go_through_their_own_operator(name: str) -> None:
    """Forward, adjoint, gram solve, pseudo-inverse and norm, with an axis more in front too."""
    members, operator = merged(name)
    assert isinstance(operator, PerLane)
    x, y = rand(3, 5, 4), rand(3, 5, *operator.out_shape)
    noise, prior = 0.5 + rand(5).abs(), rand(5).square()
    solved, back = operator.solve_gram(y, noise, prior), operator.adjoint(y)
    for lane, i in enumerate(WHICH.tolist()):
        own = members[i]
        torch.testing.assert_close(operator(x)[:, lane], own(x[:, lane]))
        torch.testing.assert_close(back[:, lane], own.adjoint(y[:, lane]))
        expected = own.solve_gram(y[:, lane], float(noise[lane]), float(prior[lane]))
        torch.testing.assert_close(solved[:, lane], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(operator.pinv(y)[:, lane], own.pinv(y[:, lane]), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(operator.norm()[lane], own.norm().double())
        spectrum = GramSpectrum.of(operator).log_det(0.7)[lane]
        torch.testing.assert_close(spectrum, GramSpectrum.of(own).log_det(0.7))


@pytest.mark.parametrize("name", ["masks", "scaled masks", "matrices", "scales"])
def test_decompositions_are_those_of_the_rows(name: str) -> None:
    _, operator = merged(name)
    svd, x, y = operator.svd(), rand(5, 4), rand(5, *operator.out_shape)
    assert svd.s.shape == (5, svd.rank)
    rebuilt = svd.from_spectral_data(svd.s * svd.to_spectral(x))
    torch.testing.assert_close(rebuilt, operator(x))
    torch.testing.assert_close(svd.from_spectral(svd.s * svd.to_spectral_data(y)), operator.adjoint(y))
    torch.testing.assert_close(svd.to_spectral(svd.from_spectral(rand(5, svd.rank))), rand(5, svd.rank))


def test_masks_of_unlike_size_are_padded_with_zeros() -> None:
    operator = per_lane_operator(RAGGED, WHICH, F64)
    x, y = rand(5, 4), rand(5, 3)
    assert operator.out_shape == (3,)
    for lane, i in enumerate(WHICH.tolist()):
        count = RAGGED[i].out_shape[0]
        assert torch.equal(operator(x)[lane, :count], RAGGED[i](x[lane]))
        assert not operator(x)[lane, count:].any()
        assert torch.equal(operator.adjoint(y)[lane], RAGGED[i].adjoint(y[lane, :count]))
    svd = operator.svd()
    assert torch.equal(svd.from_spectral(svd.to_spectral_data(operator(x))), operator.adjoint(operator(x)))


def test_one_map_stays_one_operator() -> None:
    shared = Dense(rand(2, 4))
    copies: list[LinearOperator] = [shared, Dense(rand(2, 4)), Dense(rand(2, 4).clone())]
    assert per_lane_operator(copies, WHICH, F64) is shared


@pytest.mark.parametrize(
    ("operators", "why"),
    [
        ([Dense(rand(2, 4)), EVEN[0]], "several kinds"),
        ([Dense(rand(2, 4)), Dense(rand(3, 4))], "unlike numbers"),
        ([Mask(torch.ones(3).bool()), EVEN[0]], "unlike shapes"),
        ([Downsample(2, (4, 4)), 2 * Downsample(2, (4, 4))], "several kinds"),
        ([Compose(Diagonal(rand(3)), RAGGED[0]), Compose(Diagonal(rand(2)), RAGGED[1])], "unlike numbers"),
    ],
)
def test_operators_unlike_in_kind_are_refused(operators: list[LinearOperator], why: str) -> None:
    with pytest.raises(UnlikeError, match=why):
        per_lane_operator(operators, torch.tensor([0, 1]), F64)


def test_there_is_no_one_matrix() -> None:
    operator = per_lane_operator(KINDS["composed masks"](), WHICH, F64)
    with pytest.raises(UnlikeError, match="no one matrix"):
        operator.dense()
    with pytest.raises(UnlikeError, match="decomposition"):
        operator.compute_svd()

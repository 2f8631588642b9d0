"""The kernel Stein discrepancy against its definition, and its test on draws that are right and wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppl.diagnostics import ksd_test, stein_kernel
from ppl.errors import OptionError, ShapeError

F64 = torch.float64


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kernel_is_the_stein_operator_applied_twice() -> None:
    x = torch.randn(2, 3, generator=gen(), dtype=F64)
    s = torch.randn(2, 3, generator=gen(1), dtype=F64)

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (1 + (a - b).square().sum() / 1.7**2) ** -0.5

    first = torch.func.grad(k, 0)
    second = torch.func.grad(k, 1)
    mixed = torch.func.jacfwd(first, 1)(x[0], x[1])
    expected = (
        s[0] @ s[1] * k(x[0], x[1]) + s[0] @ second(x[0], x[1]) + s[1] @ first(x[0], x[1]) + mixed.diagonal().sum()
    )
    assert torch.allclose(stein_kernel(x, s, 1.7)[0, 1], expected, rtol=1e-12)


def test_exact_draws_have_mean_zero() -> None:
    """z over 200 sets of 50 draws; |z| < 4.5, false alarms 7e-6."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=F64)
    root, precision = torch.linalg.cholesky(covariance), torch.linalg.inv(covariance)
    x = torch.randn(200, 50, 2, generator=gen(), dtype=F64) @ root.T
    found = torch.stack([stein_kernel(one, -one @ precision, 1.0).fill_diagonal_(0).sum() for one in x])
    assert abs(float(found.mean() / (found.std() / 200**0.5))) < 4.5


@pytest.mark.parametrize(
    "change",
    [lambda x: 0.8 * x, lambda x: x + 0.3, lambda x: x.abs()],
    ids=["narrow", "shifted", "one side"],
)
def test_wrong_draws_are_rejected(change: object) -> None:
    x = torch.randn(400, 3, generator=gen(), dtype=F64)
    wrong = change(x)  # type: ignore[operator]
    assert ksd_test(wrong, -wrong, generator=gen(1)).p_value < 0.01


def test_p_values_of_exact_draws_are_not_small() -> None:
    """60 tests at level 0.05; more than 11 rejections have a chance of 4e-5."""
    rejected = 0
    for seed in range(60):
        x = torch.randn(100, 2, generator=gen(seed), dtype=F64)
        rejected += ksd_test(x, -x, generator=gen(1000 + seed), replicates=200).p_value <= 0.05
    assert rejected <= 11


def test_bad_input() -> None:
    x = torch.randn(5, 2, generator=gen())
    with pytest.raises(ShapeError, match="same shape"):
        ksd_test(x, x[:, :1], generator=gen())
    with pytest.raises(OptionError, match="lengthscale"):
        stein_kernel(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(OptionError, match="replicates"):
        ksd_test(x, -x, generator=gen(), replicates=0)

"""Fast transforms against their matrices; rows that are orthonormal, random and reproducible."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.operators import GaussianSensing, LinearOperator, SubsampledCosine, SubsampledHadamard
from inverse.operators.transforms import cosine, hadamard, inverse_cosine
from ppl.errors import OptionError, ShapeError

FAMILIES = [SubsampledHadamard, SubsampledCosine, GaussianSensing]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 15])
def test_cosine_transform_by_its_formula(n: int) -> None:
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * k / (2 * n))
    matrix[0] /= math.sqrt(2)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(cosine(eye).T, matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(inverse_cosine(eye).T, matrix.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_hadamard_transform_by_its_recursion(n: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    torch.testing.assert_close(hadamard(torch.eye(n, dtype=torch.float64)), matrix / math.sqrt(n), rtol=0, atol=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_orthonormal(family: type[LinearOperator]) -> None:
    A = family(5, (2, 8), generator=generator())
    matrix = A.dense()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert A.gram_scale == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_decides(family: type[LinearOperator]) -> None:
    first, again, other = (family(5, (4, 8), generator=generator(s)).dense() for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_energy_is_spread_evenly(family: type[LinearOperator]) -> None:
    """Over random operators, E A^T A = (m / d) I: each entry of the mean of 2000 is within 6 standard errors.

    With signs the off-diagonal mean is zero. 36 tests at 6 sigma: false alarm below 1e-6.
    """
    g, d, m, repeats = generator(3), 8, 3, 2000
    grams = torch.stack([(M := family(m, (d,), generator=g).dense()).T @ M for _ in range(repeats)])
    error = grams.std(0) / math.sqrt(repeats) + 1e-12
    z = (grams.mean(0) - m / d * torch.eye(d, dtype=torch.float64)) / error
    assert float(z.abs().max()) < 6


def test_large_operators_are_matrix_free() -> None:
    A = SubsampledHadamard(1000, (256, 256), generator=generator())
    y = torch.randn(2, 1000, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(A(A.adjoint(y)), y)
    torch.testing.assert_close(A.solve_gram(y, 0.5, 2.0), y / 2.5)
    assert "fast_svd" in A.capabilities
    assert A.svd().rank == 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_impossible_counts(family: type[LinearOperator]) -> None:
    for count in (0, 9):
        with pytest.raises(OptionError, match="between 1 and 8"):
            family(count, (8,), generator=generator())
    with pytest.raises(ShapeError, match="power of two"):
        SubsampledHadamard(2, (3, 4), generator=generator())
    with pytest.raises(ShapeError, match="power of two"):
        hadamard(torch.ones(6))

"""Covariances known through products: Krylov functions and low-rank sketches against exact matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Size, Tensor

from sde import (
    CovarianceCorrected,
    DiffusionPrior,
    GaussianMixture,
    KrylovCovariance,
    LowRankCovariance,
    NetworkCovariance,
    count_calls,
)
from sde.krylov import lanczos

F64 = torch.float64
LARGE = 300


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spectrum(d: int, seed: int = 0) -> Tensor:
    """A covariance with eigenvalues 1, 1/2, 1/3, ..., as those of images decay."""
    basis = torch.linalg.qr(normal(d, d, seed=seed)).Q
    return basis / torch.arange(1, d + 1, dtype=F64) @ basis.T


def mixture(d: int) -> GaussianMixture:
    """Two components of full covariance."""
    means = torch.stack([torch.zeros(d, dtype=F64), normal(d, seed=5) / math.sqrt(d)])
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=F64), means, torch.stack([spectrum(d), spectrum(d, 1)]))


def wrap(prior: GaussianMixture, d: int, **options: object) -> DiffusionPrior:
    """A prior that knows nothing but a function."""
    return DiffusionPrior(prior.denoise, (d,), **{"sigma_min": 0.1, "sigma_max": 10.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("fn", [torch.sqrt, lambda t: 1 / (t + 0.1)], ids=["root", "solve"])
def test_as_many_steps_as_entries_are_exact(fn: Callable[[Tensor], Tensor]) -> None:
    """Three lanes with matrices of their own."""
    matrices = torch.stack([spectrum(8, seed) for seed in range(3)])
    v = normal(3, 8, seed=9)
    values, vectors = torch.linalg.eigh(matrices)
    expected = (vectors * fn(values)[:, None] @ vectors.mT @ v[..., None])[..., 0]
    found = lanczos(lambda u: (matrices @ u[..., None])[..., 0], v, 8)
    torch.testing.assert_close(found.apply(fn), expected, rtol=1e-8, atol=1e-9)
    basis = found.basis.movedim(0, -2)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(8, dtype=F64).expand(3, 8, 8), rtol=0, atol=1e-12)


def test_solves_converge_as_fast_as_conjugate_gradients() -> None:
    """|x - x_k|_A <= 2 r^k |x|_A with r = (sqrt(k) - 1) / (sqrt(k) + 1) of the condition number, and not by luck."""
    C, v, shift = spectrum(60), normal(4, 60, seed=1), 0.02
    A = C + shift * torch.eye(60, dtype=F64)
    exact = torch.linalg.solve(A, v.T).T
    root = math.sqrt(float(torch.linalg.cond(A)))
    errors = []
    for steps in (2, 4, 8, 16):
        error = lanczos(lambda u: u @ C, v, steps).apply(lambda t: 1 / (t + shift)) - exact
        relative = ((error @ A * error).sum(1) / (exact @ A * exact).sum(1)).sqrt()
        assert float(relative.max()) <= 2 * ((root - 1) / (root + 1)) ** steps
        errors.append(float(relative.mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_draws_converge_with_the_number_of_steps() -> None:
    """Measured on eigenvalues 1/i, d = 60: relative error of C^(1/2) z at 2, 4, 8 and 16 products."""
    C, z = spectrum(60), normal(50, 60, seed=1)
    values, vectors = torch.linalg.eigh(C)
    exact = z @ (vectors * values.sqrt() @ vectors.T)
    errors = [
        float((lanczos(lambda u: u @ C, z, k).apply(torch.sqrt) - exact).norm() / exact.norm()) for k in (2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.3
    assert errors[2] < 0.06
    assert errors[3] < 0.02


def test_short_krylov_spaces_and_zero_vectors() -> None:
    """One step is enough for a multiple of the identity; what follows must not divide by what is left of it."""
    z = torch.cat([normal(2, 5), torch.zeros(1, 5, dtype=F64)])
    torch.testing.assert_close(lanczos(lambda u: 4 * u, z, 4).apply(torch.sqrt), 2 * z)
    rank_one = normal(5, seed=3)
    found = lanczos(lambda u: (u @ rank_one)[..., None] * rank_one, z, 5).apply(torch.sqrt)
    torch.testing.assert_close(found, (z @ rank_one)[:, None] * rank_one / rank_one.norm(), rtol=1e-6, atol=1e-7)


def test_large_network_draws_have_the_tweedie_covariance() -> None:
    """A mixture as a plain function of 300 entries: variances along 8 directions, |z| < 5: false alarm below 1e-5.

    Ten products leave 1 % of a draw, which is a tenth of the standard error.
    """
    n, prior = 2000, mixture(LARGE)
    x = prior.draw((1,), torch.Generator().manual_seed(0)) + 0.5 * normal(1, LARGE, seed=2)
    rows = x.expand(n, LARGE)
    operator = wrap(prior, LARGE).covariance(rows, 0.5)
    draws = operator.sample(normal(n, LARGE, seed=3))
    directions = torch.cat(
        [torch.linalg.eigh(prior.covariance(x, 0.5).dense()[0]).eigenvectors[:, -4:].T, normal(4, LARGE)]
    )
    exact = (prior.covariance(x, 0.5).matvec(directions[:, None])[:, 0] * directions).sum(1)
    squares = (draws @ directions.T).square()
    z = (squares.mean(0) / exact - 1) / math.sqrt(2 / n)
    assert float(z.abs().max()) < 5
    v = normal(2, LARGE, seed=4)[:, None].expand(2, n, LARGE)[:, :3]
    small = wrap(prior, LARGE).covariance(rows[:3], 0.5)
    reference = prior.covariance(rows[:3], 0.5)
    torch.testing.assert_close(small.solve(v, 0.1), reference.solve(v, 0.1), rtol=1e-3, atol=1e-2)
    moved, expected = small.affine(0.5, 0.2), reference.affine(0.5, 0.2)
    torch.testing.assert_close(moved.matvec(v), expected.matvec(v), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved.solve(v, 0.1), expected.solve(v, 0.1), rtol=1e-4, atol=1e-4)
    again = moved.affine(2.0, 0.1)
    torch.testing.assert_close(again.matvec(v), 2 * expected.matvec(v) + 0.1 * v, rtol=1e-9, atol=1e-10)


def test_the_average_of_both_jacobians_is_drawn_from_and_floored() -> None:
    """D = x A^T with an asymmetric, indefinite A: C = sigma^2 (A + A^T) / 2, negative eigenvalues as zero."""
    A = normal(5, 5)
    prior = DiffusionPrior(lambda x, sigma: x @ A.T, (5,), dtype=F64)
    products = prior.covariance(torch.zeros(5, 5, dtype=F64), 2.0)
    krylov = KrylovCovariance(products, Size([5]), steps=5)
    symmetric = 2 * (A + A.T)
    eye = torch.eye(5, dtype=F64)
    torch.testing.assert_close(krylov.matvec(eye), symmetric, rtol=1e-10, atol=1e-12)
    values, vectors = torch.linalg.eigh(symmetric)
    assert float(values[0]) < -0.1
    floored = vectors * values.clamp(min=0).sqrt() @ vectors.T
    torch.testing.assert_close(krylov.sample(eye), floored, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="one Krylov step or more"):
        KrylovCovariance(products, Size([5]), steps=0)


def test_three_corrected_steps_are_exact_for_a_large_gaussian() -> None:
    """d = 300 is beyond the dense limit; variances along 6 directions at |z| < 5: false alarm below 1e-5."""
    n, C = 1500, spectrum(LARGE)
    gaussian = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, LARGE, dtype=F64), C[None])
    prior = wrap(gaussian, LARGE, steps=3, solver=CovarianceCorrected())
    x = prior.draw((n,), torch.Generator().manual_seed(0))
    directions = torch.cat([torch.linalg.eigh(C).eigenvectors[:, [-1, -2, -10]].T, normal(3, LARGE)])
    ratio = (x @ directions.T).square().mean(0) / (directions @ C * directions).sum(1)
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / n) + 0.02


def test_selected_rows_are_the_same_operator_with_levels_and_labels_of_their_own() -> None:
    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return x / (1 + sigma.square())[:, None] + torch.sin(x) * label[:, None] / 10

    label, sigma = torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    prior = DiffusionPrior(denoise, (4,), dtype=F64)(label=label)
    x, v, index = normal(3, 4), normal(4, 4, seed=1), torch.tensor([2, 2, 0, 1])
    operator = prior.covariance(x, sigma)
    torch.testing.assert_close(operator.select(index).matvec(v), (operator.dense()[index] @ v[..., None])[..., 0])
    bare = NetworkCovariance(lambda x: torch.tanh(x), x, torch.tensor(1.0, dtype=F64), Size([4]))
    torch.testing.assert_close(bare.select(index).matvec(v), (bare.dense()[index] @ v[..., None])[..., 0])
    rows = NetworkCovariance(lambda x: x, x, sigma, Size([4]))
    with pytest.raises(ValueError, match="one noise level"):
        rows.select(index)


def test_products_are_counted() -> None:
    prior, x = wrap(mixture(LARGE), LARGE), normal(2, LARGE)
    with count_calls(prior) as count:
        operator = prior.covariance(x, 1.0)
        operator.sample(x)
    assert (count.vjps, count.evals) == (2 * 10 * 2, 2 + 10 * 2)
    with count_calls(prior) as count:
        operator.low_rank(normal(3, LARGE), random=2)
    assert (count.vjps, count.evals) == (5 * 2, 0)


def columns(C: Tensor, count: int, random: int = 2) -> LowRankCovariance:
    """A sketch of a matrix from random probes."""
    probes = torch.linalg.qr(normal(1, len(C), count, seed=7)).Q
    return LowRankCovariance.from_columns(lambda v: v @ C.T, normal(3, len(C)), Size([len(C)]), probes, random)


def test_low_rank_is_one_operator_whatever_is_asked() -> None:
    operator, d = columns(spectrum(20), 6), 20
    C = operator.dense()
    assert float(torch.linalg.eigvalsh(C).min()) > -1e-12
    eye = torch.eye(d, dtype=F64)
    v = normal(2, 3, d, seed=8)

    def act(matrix: Tensor) -> Tensor:
        return (matrix @ v[..., None])[..., 0]

    torch.testing.assert_close(operator.solve(v, 0.3), act(torch.linalg.inv(C + 0.3 * eye)))
    torch.testing.assert_close(operator.affine(0.5, 0.1).dense(), 0.5 * C + 0.1 * eye)
    root = operator.sample(eye[:, None].expand(d, 3, d)).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, C)
    index = torch.tensor([2, 0])
    torch.testing.assert_close(operator.select(index).matvec(v[:, index]), operator.matvec(v)[:, index])


def test_low_rank_is_exact_where_it_can_be() -> None:
    """With all probes; for a multiple of the identity; and nearly so along its probes, by 2 % of the largest value."""
    C = spectrum(20)
    torch.testing.assert_close(columns(C, 20).dense()[0], C)
    torch.testing.assert_close(columns(3 * torch.eye(20, dtype=F64), 4).dense()[0], 3 * torch.eye(20, dtype=F64))
    sketch = columns(C, 6)
    probes = torch.linalg.qr(normal(1, 20, 6, seed=7)).Q[0].T[:, None].expand(6, 3, 20)
    assert float((sketch.matvec(probes) - probes @ C).abs().max()) < 0.02
    errors = [float((columns(C, count).dense()[0] - C).norm()) for count in (2, 8, 16)]
    assert errors == sorted(errors, reverse=True)


def test_low_rank_trace_is_unbiased_enough() -> None:
    """Over 300 sets of probes the mean trace is that of C within 5 standard errors and the 5 % that the shift takes."""
    C = spectrum(20)
    probes = torch.linalg.qr(normal(300, 20, 4, seed=3)).Q
    mean = torch.zeros(300, 20, dtype=F64)
    sketches = LowRankCovariance.from_columns(lambda v: v @ C, mean, Size([20]), probes, 4)
    traces = sketches.dense().diagonal(dim1=1, dim2=2).sum(1) / C.trace()
    assert abs(float(traces.mean()) - 1) < 5 * float(traces.std()) / math.sqrt(300) + 0.05


def test_low_rank_of_a_poor_network_stays_a_covariance() -> None:
    """Columns that are asymmetric and partly negative: no eigenvalue below zero, and none far above what was seen."""
    noisy = spectrum(20) + 0.1 * normal(20, 20, seed=4) - 0.3 * torch.eye(20, dtype=F64)
    values = torch.linalg.eigvalsh(columns(noisy, 5).dense()[0])
    assert float(values.min()) > -1e-12
    assert float(values.max()) < 5 * float(torch.linalg.matrix_norm(noisy, 2))


def test_low_rank_with_plates_takes_directions_of_every_entry() -> None:
    """(rows, plate, *event): probes differ between plates, and more directions than entries are the dense matrix."""
    prior = wrap(mixture(6), 6)
    x = normal(4, 2, 6)
    exact = prior.covariance(x, 0.7).dense()
    full = prior.covariance(x, 0.7).low_rank(normal(8, 2, 6, seed=1))
    torch.testing.assert_close(full.dense(), exact)
    directions = torch.zeros(2, 2, 6, dtype=F64)
    directions[0, 0, 1] = directions[1, 1, 4] = 3.0
    sketch = prior.covariance(x, 0.7).low_rank(directions, random=2)
    for plate, entry in ((0, 1), (1, 4)):
        found = sketch.dense()[:, plate, :, entry]
        assert float((found - exact[:, plate, :, entry]).norm()) < 0.1 * float(exact[:, plate, :, entry].norm())
    with pytest.raises(ValueError, match="one direction or more"):
        prior.covariance(x, 0.7).low_rank(directions, random=0)

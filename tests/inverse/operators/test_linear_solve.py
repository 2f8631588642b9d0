"""Conjugate gradients against direct solves, and their refusals."""

from __future__ import annotations

import pytest
import torch

from inverse.operators import ConvergenceError, conjugate_gradient
from ppl.errors import OptionError


def systems(lanes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    L = torch.randn(lanes, size, size, generator=g, dtype=torch.float64)
    scale = torch.logspace(-3, 3, lanes, dtype=torch.float64)[:, None, None]
    M = scale * (L @ L.mT + torch.eye(size, dtype=torch.float64))
    return M, torch.randn(lanes, size, generator=g, dtype=torch.float64)


def product(M: torch.Tensor) -> object:
    return lambda x: torch.einsum("lij,lj->li", M, x)


def test_agrees_with_direct_solve() -> None:
    M, b = systems(4, 6)
    solution = conjugate_gradient(product(M), b)
    torch.testing.assert_close(solution.x, torch.linalg.solve(M, b), rtol=1e-7, atol=0)
    assert solution.residual.shape == (4,)
    assert float(solution.residual.max()) <= 1e-10


def test_finishes_in_as_many_steps_as_distinct_eigenvalues() -> None:
    """Exact arithmetic needs one step per distinct eigenvalue; a wrong direction update needs more."""
    d = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    assert conjugate_gradient(lambda x: d * x, torch.ones(6, dtype=torch.float64)).steps == 3


def test_neighbours_do_not_matter() -> None:
    M, b = systems(3, 5)
    together = conjugate_gradient(product(M), b, tolerance=1e-3).x
    for i in range(3):
        alone = conjugate_gradient(product(M[i : i + 1]), b[i : i + 1], tolerance=1e-3).x
        torch.testing.assert_close(together[i], alone[0], rtol=1e-12, atol=0)


def test_zero_right_hand_side_and_empty_batch() -> None:
    M, b = systems(2, 3)
    b[0] = 0
    solution = conjugate_gradient(product(M), b)
    assert solution.x[0].tolist() == [0, 0, 0]
    assert solution.residual[0] == 0
    assert conjugate_gradient(product(M[:0]), b[:0]).x.shape == (0, 3)


def test_preconditioner_and_start() -> None:
    M, b = systems(2, 6)
    exact = torch.linalg.solve(M, b)
    inverse = torch.linalg.inv(M)
    assert conjugate_gradient(product(M), b, preconditioner=product(inverse), tolerance=1e-8).steps == 1
    assert conjugate_gradient(product(M), b, start=exact, tolerance=1e-8).steps == 0
    diagonal = torch.diagonal(M, dim1=-2, dim2=-1)
    torch.testing.assert_close(conjugate_gradient(product(M), b, preconditioner=lambda r: r / diagonal).x, exact)


def test_the_image_of_the_solution_is_free() -> None:
    """L x is summed up from the images of the directions: no product more, and right from any start."""
    M, b = systems(3, 6)
    image = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = []

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(1)
        return torch.einsum("lij,lj->li", M, x), (x @ image.T)[:, :, None]

    for start in (None, torch.ones_like(b)):
        made.clear()
        found = conjugate_gradient(both, b, fixed_steps=4, start=start)
        assert len(made) == 4 + (start is not None)
        torch.testing.assert_close(found.image[..., 0], found.x @ image.T, rtol=1e-9, atol=0)


def test_events_of_several_axes() -> None:
    M, b = systems(2, 6)
    x = conjugate_gradient(lambda v: product(M)(v.reshape(2, 6)).reshape(2, 2, 3), b.reshape(2, 2, 3), event_ndim=2).x
    torch.testing.assert_close(x.reshape(2, 6), torch.linalg.solve(M, b))


def test_fixed_steps_run_under_vmap_and_stay_finite() -> None:
    M, b = systems(3, 4)
    solve = lambda m, r: conjugate_gradient(lambda x: m @ x, r, fixed_steps=12).x  # noqa: E731
    x = torch.func.vmap(solve)(M, b)
    assert torch.isfinite(x).all()
    torch.testing.assert_close(x, torch.linalg.solve(M, b), rtol=1e-6, atol=1e-9)


def test_says_when_it_did_not_converge() -> None:
    M, b = systems(2, 6)
    with pytest.raises(ConvergenceError, match="after 2 steps"):
        conjugate_gradient(product(M), b, max_steps=2)
    with pytest.raises(ConvergenceError):
        conjugate_gradient(lambda x: x * torch.nan, b)
    with pytest.raises(OptionError, match="fixed_steps"):
        conjugate_gradient(product(M), b, fixed_steps=0)


def test_stops_at_the_tolerance_and_not_far_beyond() -> None:
    d = torch.linspace(1, 1e4, 300, dtype=torch.float64)
    solution = conjugate_gradient(lambda x: d * x, torch.ones(300, dtype=torch.float64), tolerance=1e-3)
    assert 1e-4 < float(solution.residual) <= 1e-3
    true = (1 - d * solution.x).norm() / 300**0.5
    assert float(true) == pytest.approx(float(solution.residual), rel=1e-6)

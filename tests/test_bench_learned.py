"""Quick versions of the benchmarks on learned priors."""

from __future__ import annotations

import pytest
import torch

import inverse
import models
from benchmarks.learned import COSTLY, LINEAR, TASKS, backends, complete, problem, solve
from benchmarks.learned_reference import Side, compared

F64 = torch.float64


def side(seed: int, shift: float = 0.0, scale: float = 1.0) -> Side:
    """Moments of 40 chains of 500 draws of 6 normal features."""
    x = shift + scale * torch.randn(40, 500, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Side(x.mean(1), x.square().mean(1), torch.full((40,), 1 / 40, dtype=F64))


def test_sides_agree_within_their_errors_and_not_beyond() -> None:
    """The bound is a 99 % point for each of two: a false alarm in 2 % of seeds. Shifts are above 7 standard errors."""
    row = compared(side(0), side(1))
    assert row["agree"]
    # Two means of 20 000 draws.
    assert row["mean_error"] == pytest.approx((2 / 20_000) ** 0.5, rel=0.3)
    assert row["sd_error"] == pytest.approx((2 / 40_000) ** 0.5, rel=0.3)
    assert not compared(side(0), side(1, shift=0.07))["agree"]
    assert not compared(side(0), side(1, scale=1.05))["agree"]


def test_runs_of_larger_evidence_count_for_more() -> None:
    first = torch.tensor([[0.0], [1.0]], dtype=F64)
    both = Side(first, 1 + first.square(), torch.tensor([0.25, 0.75], dtype=F64))
    mean, log_sd = both.moments()
    assert float(mean) == pytest.approx(0.75)
    assert float(log_sd.exp()) == pytest.approx((1 + 0.75 * 0.25) ** 0.5)
    assert both.ess == pytest.approx(1.6)


def test_a_row_of_the_table() -> None:
    """One digit, restored from half of nothing: what a row holds, and that the same problem comes back."""
    backend = inverse.DDRM(steps=5)
    row = solve("digits8x8", "inpainting", "DDRM", backend, 20)
    assert row["finite"]
    assert row["evals"] == 5
    assert len(row["ranks"]) == 20
    assert "ksd" not in row
    assert 5 < row["psnr_draws"] < row["psnr_mean"] < 40
    prior = models.load("digits8x8")
    (a, first, _), (b, second, _) = problem(prior, "inpainting", 20), problem(prior, "inpainting", 20)
    assert torch.equal(a, b)
    assert torch.equal(first.observed_data()["y"], second.observed_data()["y"])


def test_cells_compare_on_the_problems_that_all_have_done() -> None:
    name = LINEAR[0]
    rows = [{"backend": label, "index": k} for label in backends(name) for k in range(3) if label not in COSTLY]
    rows.append({"backend": "DDRM", "index": 3})
    assert {row["index"] for row in complete(rows, name)} == {0, 1, 2}
    assert set(LINEAR) < set(TASKS)

"""Scores, coverage, ranks and effective sample sizes against exact values."""

from __future__ import annotations

import math

import pytest
import torch

from ppl.diagnostics import (
    central_coverage,
    chi_square_p_value,
    crps,
    ecdf_band,
    ecdf_p_value,
    energy_score,
    ess_of,
    inside_central,
    kish_ess,
    log_evidence_stderr,
    merge_root_ess,
    pareto_khat,
    projected_coverage,
    ranks,
    root_ess,
    root_weights,
    spread_skill,
    z_bound,
)
from ppl.errors import OptionError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crps_by_hand_for_each_entry() -> None:
    draws = torch.tensor([[0.0, 5.0], [1.0, 5.0], [4.0, 5.0]])
    truth = torch.tensor([2.0, 3.0])
    first = (2 + 1 + 2) / 3 - 0.5 * (1 + 4 + 3) * 2 / 6
    torch.testing.assert_close(crps(draws, truth), torch.tensor([first, 2.0], dtype=torch.float64))


def test_crps_is_fair_and_equals_the_energy_score_in_one_dimension() -> None:
    """N(0,1) forecasts of N(0,1): the mean is 1/sqrt(pi) at any number of draws. False alarm 1e-5."""
    g = generator()
    x = torch.randn(2, 20_000, generator=g, dtype=torch.float64)
    y = torch.randn(20_000, generator=g, dtype=torch.float64)
    score = crps(x, y)
    assert abs(float(score.mean()) - 1 / math.sqrt(math.pi)) < z_bound(1e-5) * float(score.std()) / math.sqrt(20_000)
    torch.testing.assert_close(energy_score(x[:, :1], y[:1]), score[0])
    with pytest.raises(ShapeError, match="truth"):
        crps(x, y[:3])


def test_energy_score_by_hand() -> None:
    draws = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert math.isclose(float(energy_score(draws, torch.tensor([0.0, 4.0]))), (4 + 3) / 2 - 5 / 2, rel_tol=1e-12)


def test_spread_skill_is_one_when_calibrated() -> None:
    """Draws and truth from one law give one; half the spread gives half. Delta-method error about 1 / sqrt(2 N)."""
    g = generator()
    x = torch.randn(20_000, 6, generator=g, dtype=torch.float64)
    bound = z_bound(1e-5) * math.sqrt((1 / 2 + 1 / 10) / 20_000)
    assert abs(spread_skill(x[:, 1:], x[:, 0]).ratio - 1) < bound
    centre = x[:, 1:].mean(1, keepdim=True)
    narrow = centre + 0.5 * (x[:, 1:] - centre)
    assert abs(spread_skill(narrow, x[:, 0]).ratio - 0.5) < bound


def test_ranks_count_below_and_break_ties_evenly() -> None:
    draws = torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]])
    assert ranks(draws, torch.tensor([2.5, 7.5]), dim=1).tolist() == [2, 1]
    assert ranks(draws.T, torch.tensor([2.5, 7.5])).tolist() == [2, 1]
    with pytest.raises(OptionError, match="generator"):
        ranks(draws, torch.tensor([2.0, 7.5]), dim=1)
    tied = ranks(torch.zeros(3, 40_000), torch.zeros(40_000), generator=generator())
    counts = torch.bincount(tied, minlength=4).double()
    assert (counts - 10_000).abs().max() < z_bound(1e-5, 4) * math.sqrt(40_000 * 3 / 16)
    with pytest.raises(OptionError, match="NaN"):
        ranks(torch.tensor([math.nan, 1.0]), torch.tensor(0.0))
    with pytest.raises(ShapeError):
        ranks(draws, torch.zeros(2))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("draws", [9, 19, 20, 99])
def test_interval_has_its_nominal_probability(level: float, draws: int) -> None:
    rank = torch.arange(draws + 1)
    cover = central_coverage(rank, draws, (level,))
    assert float(cover.observed[0]) == pytest.approx(float(cover.nominal[0]), abs=1e-12)
    assert abs(float(cover.nominal[0]) - level) <= 1 / (draws + 1) + 1e-12
    assert torch.equal(inside_central(rank, draws, level), inside_central(rank, draws, level).flip(0))


def test_projected_coverage_of_right_and_narrow_posteriors() -> None:
    g = generator()
    x = torch.randn(400, 100, 2, 3, generator=g)
    right = projected_coverage(x[:, 1:], x[:, 0], generator=g, projections=5)
    assert float(right.z.abs().max()) < z_bound(1e-5, 20)
    narrow = projected_coverage(0.5 * x[:, 1:], x[:, 0], generator=g, projections=5)
    # Half the spread: the 90 % interval holds P(|N| < 0.5 1.645) = 0.589 of the truths.
    i = 2
    assert abs(float(narrow.observed[i].mean()) - 0.589) < 0.06
    assert float(narrow.z[i].max()) < -5


def test_kish_and_root_ess_by_hand() -> None:
    lw = torch.tensor([0.5, 0.25, 0.25, 0.0]).log() - 3
    torch.testing.assert_close(kish_ess(lw), torch.tensor(1 / 0.375, dtype=torch.float64))
    root = torch.tensor([2, 0, 2, 1])
    torch.testing.assert_close(root_weights(lw, root, 4), torch.tensor([0.25, 0.0, 0.75, 0.0], dtype=torch.float64))
    torch.testing.assert_close(root_ess(lw, root, 4), torch.tensor(1 / (0.0625 + 0.5625), dtype=torch.float64))
    torch.testing.assert_close(
        log_evidence_stderr(lw, root, 4), torch.tensor(math.sqrt(0.625 - 0.25), dtype=torch.float64)
    )
    batch = root_ess(torch.stack([lw, torch.zeros(4)]), torch.stack([root, torch.arange(4)]), 4)
    torch.testing.assert_close(batch, torch.tensor([1.6, 4.0], dtype=torch.float64))
    assert float(log_evidence_stderr(torch.zeros(4), torch.arange(4), 4)) == 0
    with pytest.raises(ShapeError, match="root"):
        root_weights(lw, root[:2], 4)


def test_merged_runs_weigh_by_evidence() -> None:
    log_z = torch.tensor([0.0, math.log(3.0)])
    merged = merge_root_ess(log_z, torch.tensor([10.0, 20.0]))
    assert math.isclose(float(merged), 1 / (0.25**2 / 10 + 0.75**2 / 20), rel_tol=1e-6)


def test_log_evidence_error_is_what_repeats_show() -> None:
    """Importance sampling, no resampling: sd of log Z over repeats against the mean estimate, within 4 sd of a sd."""
    g, particles, repeats = generator(), 500, 400
    lw = 0.5 * torch.randn(repeats, particles, generator=g, dtype=torch.float64)
    log_z = lw.logsumexp(1) - math.log(particles)
    claimed = log_evidence_stderr(lw, torch.arange(particles).expand(repeats, -1), particles).mean()
    assert abs(float(log_z.std() / claimed) - 1) < z_bound(1e-4) / math.sqrt(2 * repeats) + 0.03


def test_ess_of_an_autoregression() -> None:
    """AR(1) with rho has ESS n (1 - rho) / (1 + rho): the formula within the noise of ArviZ's estimate, 15 %."""
    g = generator()
    for rho in (0.6, -0.4):
        noise = torch.randn(4, 20_000, generator=g, dtype=torch.float64)
        x = torch.zeros_like(noise)
        x[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
        for t in range(1, noise.shape[1]):
            x[:, t] = rho * x[:, t - 1] + noise[:, t]
        found = ess_of(torch.stack([x, -2 * x], -1))
        expected = 80_000 * (1 - rho) / (1 + rho)
        assert found.shape == (2,)
        torch.testing.assert_close(found, torch.full((2,), expected, dtype=torch.float64), rtol=0.15, atol=0)


def test_pareto_khat_of_pareto_weights() -> None:
    """Weights u^(-k) have shape k. With 20 000 draws the fit has sd about (1 + k) / sqrt(tail) = 0.08."""
    u = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    found = pareto_khat(torch.stack([-0.3 * u.log(), -0.9 * u.log(), torch.zeros_like(u)]))
    assert abs(float(found[0]) - 0.3) < 0.25
    assert abs(float(found[1]) - 0.9) < 0.35
    assert float(found[2]) == -math.inf


def test_z_bound_is_the_normal_quantile() -> None:
    assert math.isclose(z_bound(0.05), 1.959963984540054, rel_tol=1e-12)
    for alpha, tests in ((1e-3, 1), (1e-5, 7), (1e-12, 100)):
        assert math.isclose(tests * math.erfc(z_bound(alpha, tests) / math.sqrt(2)), alpha, rel_tol=1e-6)
    with pytest.raises(OptionError):
        z_bound(0.0)


def test_chi_square_by_hand_and_against_scipy() -> None:
    from scipy.stats import chisquare

    rank = torch.tensor([0] * 12 + [1] * 8 + [2] * 10)
    assert math.isclose(chi_square_p_value(rank, 2, bins=3), chisquare([12, 8, 10]).pvalue, rel_tol=1e-12)
    # Eight ranks in three bins: widths 3, 3, 2.
    rank = torch.arange(8).repeat(10)
    assert chi_square_p_value(rank, 7, bins=3) == 1.0
    with pytest.raises(OptionError, match="ranks"):
        chi_square_p_value(torch.tensor([5]), 4)


def uniform(rows: int, n: int, draws: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(draws + 1, (rows, n), generator=g)


def test_rank_tests_have_their_size() -> None:
    """P(p <= 0.1) is 0.1 under uniform ranks: binomial bound at 1e-5. Discreteness may only lower the ECDF's."""
    g, repeats = generator(), 400
    rows = uniform(repeats, 100, 19, g)
    limit = z_bound(1e-5) * math.sqrt(0.1 * 0.9 / repeats)
    ecdf = torch.tensor([ecdf_p_value(row, 19, generator=g, replicates=300) for row in rows])
    assert -limit - 0.05 < float((ecdf <= 0.1).double().mean()) - 0.1 < limit
    chi = torch.tensor([chi_square_p_value(row, 19, bins=10) for row in rows])
    assert abs(float((chi <= 0.1).double().mean()) - 0.1) < limit + 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        lambda u: u.pow(1.5),  # biased
        lambda u: 0.5 + (u - 0.5) * 0.7,  # too wide posterior: ranks in the middle
        lambda u: torch.where(u < 0.5, 0.5 * (2 * u).pow(2), 1 - 0.5 * (2 - 2 * u).pow(2)),  # too narrow: at the ends
    ],
)
def test_rank_tests_find_what_is_wrong(wrong: object) -> None:
    assert callable(wrong)
    g = generator()
    rank = (wrong(torch.rand(500, generator=g, dtype=torch.float64)) * 100).long().clamp_max(99)
    assert ecdf_p_value(rank, 99, generator=g) < 0.01
    assert chi_square_p_value(rank, 99) < 1e-3


def test_band_holds_uniform_ranks_as_often_as_promised() -> None:
    g, n, draws, repeats = generator(), 50, 19, 1000
    z, low, high = ecdf_band(n, draws, generator=g, level=0.9, replicates=4000)
    assert torch.equal(z, torch.arange(1, 20).double() / 20)
    rows = uniform(repeats, n, draws, g)
    ecdf = torch.stack([(rows < j).double().mean(1) for j in range(1, 20)], 1)
    share = float(((ecdf >= low - 1e-9) & (ecdf <= high + 1e-9)).all(1).double().mean())
    # Discrete counts can only make the band wider than asked.
    assert -z_bound(1e-5) * math.sqrt(0.09 / repeats) - 0.02 < share - 0.9 < 0.07


def test_ecdf_counts_both_tails_with_their_own_point() -> None:
    """One rank among one draw: both outcomes have probability one half, so neither is evidence of anything."""
    for rank in (0, 1):
        assert ecdf_p_value(torch.tensor([rank]), 1, generator=generator(), replicates=50) == 1.0

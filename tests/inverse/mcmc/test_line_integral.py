"""Line integrals against densities that are known: polynomials, where rules have a degree, and mixtures."""

from __future__ import annotations

import pytest
import torch
from exact_levels import mixture, seeded
from torch import Tensor

from inverse.mcmc import LineRule, adaptive_log_ratio, log_ratio
from ppl.errors import OptionError
from sde import GaussianMixture

F64 = torch.float64
A, B = torch.tensor([[0.3], [-1.0]], dtype=F64), torch.tensor([[1.1], [0.4]], dtype=F64)


def polynomial(degree: int) -> tuple[Tensor, Tensor]:
    """log p = x^degree: the exact ratio, and the error of nothing else than the rule."""
    return (B**degree - A**degree)[:, 0], torch.tensor(degree)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_gauss_legendre_has_its_degree_and_no_more(nodes: int) -> None:
    for degree, exact in ((2 * nodes, True), (2 * nodes + 2, False)):
        wanted, _ = polynomial(degree)
        found = log_ratio(lambda x, n=degree: n * x ** (n - 1), A, B, nodes)
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13) == exact


@pytest.mark.parametrize("interior", [0, 1, 2, 4])
def test_gauss_lobatto_has_the_same_degree_with_the_ends_for_free(interior: int) -> None:
    rule = LineRule.lobatto(interior)
    assert sum(rule.weights) + 2 * rule.end == pytest.approx(1.0, abs=1e-14)
    for degree, exact in ((2 * interior + 2, True), (2 * interior + 4, False)):

        def score(x: Tensor, n: int = degree) -> Tensor:
            return n * x ** (n - 1)

        found = rule.integrate(A, B, score(rule.points(A, B)), score(A), score(B))
        assert torch.allclose(found, polynomial(degree)[0], rtol=1e-12, atol=1e-13) == exact


@pytest.mark.parametrize("rule", [LineRule.legendre(3), LineRule.lobatto(2)], ids=["legendre", "lobatto"])
def test_the_way_back_is_minus_the_way(rule: LineRule) -> None:
    """Else a Metropolis test with the rule would not be reversible even between two points."""

    def score(x: Tensor) -> Tensor:
        return torch.sin(3 * x)

    there = rule.integrate(A, B, score(rule.points(A, B)), score(A), score(B))
    back = rule.integrate(B, A, score(rule.points(B, A)), score(B), score(A))
    torch.testing.assert_close(there, -back, rtol=1e-13, atol=1e-14)


def test_short_lines_in_a_mixture() -> None:
    """Steps of a tenth of a standard deviation: five nodes are exact to rounding, two inner ones of Lobatto nearly."""
    prior, s = mixture(), 0.2
    x = prior.draw((50,), seeded(1)) + s * torch.randn(50, 2, generator=seeded(2), dtype=F64)
    to = x + 0.05 * torch.randn(50, 2, generator=seeded(3), dtype=F64)
    exact = prior.log_prob_at(to, s) - prior.log_prob_at(x, s)
    torch.testing.assert_close(log_ratio(lambda v: prior.score(v, s), x, to, 5), exact, rtol=0, atol=1e-9)
    rule = LineRule.lobatto(2)
    inner = torch.stack([prior.score(v, s) for v in rule.points(x, to)])
    found = rule.integrate(x, to, inner, prior.score(x, s), prior.score(to, s))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert float(exact.abs().max()) > 0.1


@pytest.mark.parametrize("gap", [2.0, 10.0, 30.0])
def test_far_lines_keep_their_tolerance(gap: float) -> None:
    """Between modes five nodes are off by nats; halved panels are within a hundredth, at a level of each lane's own.

    The largest error of 1,500 lines: rules without ends miss jumps next to the end of a panel in a third of the lines.
    """
    prior, n = mixture(gap), 500
    a, b = prior.draw((n,), seeded(1)), prior.draw((n,), seeded(2))
    levels = torch.linspace(0.1, 3.0, n, dtype=F64)
    exact = prior.log_prob_at(b, levels) - prior.log_prob_at(a, levels)
    rows = []

    def score(x: Tensor, lane: Tensor) -> Tensor:
        rows.append(len(x))
        return prior.score(x, levels[lane])

    found, error = adaptive_log_ratio(score, a, b, (prior.score(a, levels), prior.score(b, levels)), tolerance=0.01)
    assert float((found - exact).abs().max()) < 0.01
    assert float(error.max()) < 0.1
    plain = log_ratio(lambda x: prior.score(x, levels.repeat(5)), a, b, 5)
    assert float((plain - exact).abs().max()) > 0.5
    assert rows[0] == 5 * n
    assert rows[0] > rows[-1]  # lanes that are done are not looked at again


def test_one_panel_is_enough_for_a_normal() -> None:
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64))
    calls = []

    def score(x: Tensor, lane: Tensor) -> Tensor:
        calls.append(len(x))
        return prior.score(x, 1.0)

    a, b = 5 * torch.randn(2, 8, 2, generator=seeded(4), dtype=F64)
    found, _ = adaptive_log_ratio(score, a, b, (prior.score(a, 1.0), prior.score(b, 1.0)))
    torch.testing.assert_close(found, prior.log_prob_at(b, 1.0) - prior.log_prob_at(a, 1.0), rtol=1e-12, atol=1e-12)
    assert calls == [40]


def test_no_point_is_evaluated_twice() -> None:
    seen = []

    def score(x: Tensor, lane: Tensor) -> Tensor:
        seen.append(torch.cat([x, lane[:, None].to(x)], 1))
        return torch.cos(9 * x)

    adaptive_log_ratio(score, A, B, (torch.cos(9 * A), torch.cos(9 * B)), tolerance=1e-6)
    points = torch.cat(
        [*seen, torch.stack([A[:, 0], torch.arange(2.0)], 1), torch.stack([B[:, 0], torch.arange(2.0)], 1)]
    )
    assert len(seen) > 3
    assert len((points / 1e-9).round().unique(dim=0)) == len(points)


def test_what_is_left_after_all_halvings_is_in_the_error() -> None:
    """A jump of the score of 100 at 0.7 (in u), seen with two halvings only."""

    def score(x: Tensor, lane: Tensor) -> Tensor:
        return torch.where(x > 0.7, 100.0, 0.0)

    a, b = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    ends = score(a, a), score(b, b)
    rough = adaptive_log_ratio(score, a, b, ends, halvings=2)
    fine = adaptive_log_ratio(score, a, b, ends)
    assert abs(float(fine.value) - 30.0) < 0.01
    assert 0.1 < abs(float(rough.value) - 30.0) < float(rough.stderr)
    assert float(fine.stderr) < 0.01


def test_a_score_that_is_not_finite_ends_the_halving() -> None:
    found, _ = adaptive_log_ratio(lambda x, lane: torch.where(x > 1, torch.nan, -x), A, B, (-A, -B))
    assert found.isnan().tolist() == [True, False]


def test_bad_rules() -> None:
    with pytest.raises(OptionError, match="nodes"):
        LineRule.legendre(0)
    with pytest.raises(OptionError, match="interior"):
        LineRule.lobatto(-1)

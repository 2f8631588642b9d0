"""Censored and quantised readings: normalised, right in the tails, and drawn from the law they state."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

from inverse.sensor import Censored, Quantised, log_normal_cdf, log_normal_mass
from ppl import Program
from ppl.errors import DataError

F64 = torch.float64


def test_log_cdf_over_both_tails() -> None:
    x = torch.cat([torch.linspace(-60, 9, 500, dtype=F64), torch.tensor([-1.0, 0.0, -1e4], dtype=F64)])
    torch.testing.assert_close(
        log_normal_cdf(x), torch.from_numpy(special.log_ndtr(x.numpy())), rtol=1e-12, atol=1e-300
    )
    slope = torch.func.vmap(torch.func.grad(log_normal_cdf))(x)
    ratio = torch.exp(torch.from_numpy(stats.norm.logpdf(x.numpy()) - special.log_ndtr(x.numpy())))
    torch.testing.assert_close(slope, ratio, rtol=1e-8, atol=0)


def test_log_mass_against_quadrature_in_the_far_tail() -> None:
    """Phi(b) - Phi(a) by 2,000-point Simpson sums of the density, scaled so that nothing underflows."""
    from scipy.integrate import simpson

    for a, b in ((-1.0, 2.0), (-38.0, -37.9), (37.9, 38.0), (-3.0, 50.0), (-50.0, 3.0), (20.0, 20.5)):
        t = torch.linspace(max(a, -12) if a * b < 0 else a, min(b, 12) if a * b < 0 else b, 2001, dtype=F64)
        shift = float((-0.5 * t.square()).max())
        exact = shift + math.log(
            simpson(torch.exp(-0.5 * t.square() - shift).numpy(), x=t.numpy()) / math.sqrt(2 * math.pi)
        )
        low, high = torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)
        assert math.isclose(float(log_normal_mass(low, high)), exact, rel_tol=1e-9, abs_tol=1e-9)
        for slope in torch.func.grad(log_normal_mass, argnums=(0, 1))(low, high):
            assert math.isfinite(float(slope))


def test_censored_is_a_density_between_two_masses() -> None:
    d = Censored(torch.tensor(0.4, dtype=F64), 0.7, -0.5, 1.0)
    inside = torch.linspace(-0.5, 1.0, 20001, dtype=F64)[1:-1]
    ends = torch.tensor([-0.5, 1.0], dtype=F64)
    torch.testing.assert_close(d.log_prob(inside), torch.from_numpy(stats.norm.logpdf(inside.numpy(), 0.4, 0.7)))
    expected = torch.tensor([stats.norm.cdf(-0.5, 0.4, 0.7), stats.norm.sf(1.0, 0.4, 0.7)], dtype=F64)
    torch.testing.assert_close(d.log_prob(ends).exp(), expected)
    total = float(d.log_prob(inside).exp().sum() * 1.5 / 20000 + expected.sum())
    assert math.isclose(total, 1.0, rel_tol=1e-4)
    open_ended = Censored(torch.tensor(0.4, dtype=F64), 0.7)
    torch.testing.assert_close(open_ended.log_prob(inside), d.log_prob(inside))


def test_quantised_sums_to_one() -> None:
    codes = torch.arange(-40, 41, dtype=F64) * 0.25
    d = Quantised(torch.tensor([0.4, -3.0], dtype=F64)[:, None], 0.3, 0.25)
    torch.testing.assert_close(d.log_prob(codes).exp().sum(-1), torch.ones(2, dtype=F64))
    short = Quantised(torch.tensor(0.4, dtype=F64), 0.3, 0.25, -0.5, 0.75)
    torch.testing.assert_close(short.log_prob(codes[38:44]).exp().sum(), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(
        short.log_prob(torch.tensor(0.75, dtype=F64)).exp(), torch.tensor(stats.norm.sf(0.625, 0.4, 0.3), dtype=F64)
    )


@pytest.mark.parametrize("kind", ["censored", "quantised"])
def test_draws_follow_the_stated_law(kind: str) -> None:
    """Frequencies of the end masses, or of all codes, in 100,000 draws: 5 counts at 5 sigma, false alarm 3e-6."""
    loc = torch.tensor([0.4, 0.4], dtype=F64)
    d = Censored(loc, 0.7, -0.5, 1.0) if kind == "censored" else Quantised(loc, 0.7, 0.5, -0.5, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = d.sample((50_000,)).reshape(-1)
    assert y.shape == (100_000,)
    for value in (-0.5, 1.0) if kind == "censored" else (-0.5, 0.0, 0.5, 1.0):
        p = float(d.log_prob(torch.full((2,), value, dtype=F64))[0].exp())
        assert abs(float((y == value).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / 100_000)
    assert float(y.min()) == -0.5
    assert float(y.max()) == 1.0


def test_they_expand_and_refuse() -> None:
    d = Quantised(torch.zeros(2, 1), 1.0, 0.5, low=-1.0).expand((2, 3))
    assert d.batch_shape == (2, 3)
    assert isinstance(d, Quantised)
    assert d.step == 0.5
    assert d.to_event(1).log_prob(torch.zeros(2, 3)).shape == (2,)
    assert Censored(0.0, 1.0, high=2.0).expand((4,)).sample().shape == (4,)
    with pytest.raises(ValueError, match="low < high"):
        Censored(0.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="multiple of step"):
        Quantised(0.0, 1.0, 0.5, low=-0.7)
    with pytest.raises(ValueError, match="step"):
        Quantised(0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="support"):
        Censored(0.0, 1.0, high=2.0, validate_args=True).expand((1,)).log_prob(torch.tensor([3.0]))


def test_data_that_are_no_codes_are_refused() -> None:
    """Between two steps, or beyond the last code: such data come from another sensor, or from another unit."""

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", Quantised(mu, 1.0, 0.25, low=-1.0, high=1.0), obs=y)

    assert Program(model, torch.tensor([0.25, -1.0, 1.0 + 1e-7])).data["y"].shape == (3,)
    for y in (0.3, 1.25, -1.5):
        with pytest.raises(DataError, match=r"support of Quantised \(multiples of 0\.25 in \[-1, 1\]\)"):
            Program(model, torch.tensor([0.25, y]))

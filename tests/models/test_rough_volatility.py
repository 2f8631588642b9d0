"""Rough volatility: the model's law against exact fractional noise, and the Hurst index of simulated records."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from arviz import rhat

import ppl
from models.market import DAY
from models.rough_volatility import MONTH, RoughVolatility, _statistics, posterior_predictive_check
from ppl.diagnostics.ess import ess_of
from ppl.errors import OptionError
from ppl.transport import _Moved
from sde import fbm_covariance
from sde.mean_reversion import linear_scan

DOUBLE = torch.float64
FIXED = {"level": -1.8, "rate": 3.0, "swing": 0.3, "tails": 10.0, "drift": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hurst", [0.07, 0.3, 0.6])
def test_path_has_the_covariance_of_exact_noise(hurst: float) -> None:
    """60 days of log volatility against exact noise through the same recursion: 0.05 nat between the two laws."""
    days, value = 60, {n: torch.tensor(FIXED[n], dtype=DOUBLE) for n in ("level", "rate", "swing")}
    path = RoughVolatility().path(
        days, hurst=torch.tensor(hurst, dtype=DOUBLE), initial=torch.tensor(-1.8, dtype=DOUBLE), **value
    )
    found = path.gaussian().covariances[0].reshape(days, days)
    times = DAY * torch.arange(1, days + 1, dtype=DOUBLE)
    root = torch.linalg.cholesky(fbm_covariance(times[:, None], times, hurst, "II"))
    move = 0.3 * MONTH**-hurst * root.diff(dim=0, prepend=torch.zeros(1, days, dtype=DOUBLE))
    exact = linear_scan(torch.full((days,), 1 - 3 * DAY, dtype=DOUBLE), move.mT).mT
    exact = exact @ exact.mT
    ratio = torch.linalg.solve(exact, found)
    assert 0.5 * float(ratio.trace() - days - torch.logdet(ratio)) < 0.05


def test_simulated_log_volatility_swings_as_it_says() -> None:
    """Standard deviation after a month without reversion, over 400 records: five standard errors of 1/28."""
    model, g = RoughVolatility(), generator(1)
    records = [model.simulate(21, g, hurst=0.2, rate=1e-6, swing=0.3) for _ in range(400)]
    v = torch.stack([r.log_volatility for r in records])
    assert float(v[:, -1].std()) == pytest.approx(0.3, rel=5 / math.sqrt(800))
    noise = torch.stack([r.proxy - r.log_volatility for r in records])
    assert float(noise.std()) == pytest.approx(0.2, rel=0.05)
    z = torch.stack([r.returns for r in records]) / v.exp() / math.sqrt(DAY)
    assert float(z.var()) == pytest.approx(1.0, rel=0.08)
    assert float((z**4).mean()) > 3.2  # tails of twelve degrees of freedom: 3.75


@pytest.mark.parametrize("tails", [3.0, math.inf])
def test_variance_of_returns_is_that_of_the_volatility(tails: float) -> None:
    model = RoughVolatility(tails=tails)
    law = model._returns(torch.tensor([-1.0, -2.0], dtype=DOUBLE), torch.tensor(tails, dtype=DOUBLE), torch.zeros(()))
    torch.testing.assert_close(law.variance, torch.tensor([-2.0, -4.0], dtype=DOUBLE).exp() * DAY)


def test_engines_run_and_returns_are_replicated() -> None:
    record = RoughVolatility().simulate(30, generator(2), hurst=0.2)
    model = RoughVolatility(tails=math.inf, **{k: v for k, v in FIXED.items() if k not in ("tails", "level")})
    program = model.program(record.returns, record.proxy)
    assert sorted(program.latents) == ["error", "hurst", "initial", "level", "offset", "v"]
    engine = ppl.NoiseSpace(ppl.HMC(warmup=20, max_steps=8))
    posterior = ppl.infer(program, engine, draws=10, chains=4, progress=False)
    assert posterior.draws["v"].shape == (4, 10, 30, 1)
    checks = posterior_predictive_check(program, posterior, generator(), lags=(1, 5))
    assert list(checks) == ["kurtosis", "acf 1", "acf 5"]
    for check in checks.values():
        assert check.low <= check.median <= check.high
        assert 0 <= check.above <= 1


def test_statistics_of_returns() -> None:
    up_and_down = torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    found = _statistics(up_and_down, (1,))
    assert found["kurtosis"].tolist() == pytest.approx([1.0, (2 * 16 + 2) / 4 / 2.5**2])
    assert float(found["acf 1"][1]) == pytest.approx((1.5**2 - 1.5**2 + 1.5**2) / (4 * 1.5**2))


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="swing must be positive"):
        RoughVolatility(swing=0.0)
    with pytest.raises(OptionError, match="hurst must lie in"):
        RoughVolatility(hurst=1.2)
    with pytest.raises(OptionError, match="proxy must be"):
        RoughVolatility().program(torch.zeros(5), torch.zeros(4))
    with pytest.raises(OptionError, match="day 2 is not"):
        RoughVolatility().program(torch.tensor([0.0, 0.1, math.nan]))


def chains(warmup: int, steps: int, **options: Any) -> ppl.NoiseSpace:
    """HMC around the conditional mode of the path: in plain noise space it does not mix."""
    guide = ppl.SVI(guide=ppl.Hierarchical(), steps=steps, lr=0.05)
    engine = ppl.HMC(warmup=warmup, adaptation="quarter_turn", max_steps=32, **options)
    return ppl.NoiseSpace(ppl.Transport(engine, guide))


def test_paths_start_from_their_conditional_mode() -> None:
    """60 days at parameters as far apart as the fit is wide: two steps leave a tenth of the line's miss, or less.

    The gradient in the path's coordinates at zero is that miss, in units of the conditional sd.
    """
    record = RoughVolatility().simulate(60, generator(4), hurst=0.3)
    program = RoughVolatility(error=0.2, tails=10.0, drift=0.0).program(record.returns, record.proxy).noise_space()
    fitted = ppl.SVI(guide=ppl.Hierarchical(), steps=300, lr=0.05).fit(program, seed=0)
    places = list(fitted.guide.places)  # type: ignore[attr-defined]
    e = torch.randn(8, 66, dtype=DOUBLE, generator=generator(5))
    e[:, places] = 0.0
    miss = []
    for ascent in (0, 2):
        guide = replace(fitted.guide, ascent=ascent)  # type: ignore[type-var]
        flat = _Moved(program, replace(fitted, guide=guide)).flat()
        miss.append(float(flat.log_density_and_grad(e)[1][:, places].square().mean().sqrt()))
    assert miss[1] < miss[0] / 10, miss


@pytest.mark.slow
@pytest.mark.parametrize("hurst", [0.1, 0.3])
def test_index_of_a_simulated_record_is_recovered(hurst: float) -> None:
    """300 days with exact noise, the proxy's error known: the truth within 3.5 posterior sd, false alarm about 1e-3."""
    record = RoughVolatility().simulate(300, generator(3), hurst=hurst)
    program = RoughVolatility(error=0.2).program(record.returns, record.proxy)
    posterior = ppl.infer(program, chains(150, 2500, target_accept=0.9), draws=200, chains=16, seed=0)
    for name in ("hurst", "level", "rate", "swing", "tails", "drift", "initial", "offset"):
        value = posterior.draws[name]
        size, spread = float(ess_of(value)), float(rhat(value.numpy()))
        print(
            f"H = {hurst}, {name}: {float(value.mean()):.3f} +- {float(value.std()):.3f}, ESS {size:.0f}, {spread:.4f}"
        )
    h = posterior.draws["hurst"]
    assert float(ess_of(h)) >= 400
    assert float(rhat(h.numpy())) <= 1.01
    assert abs(float(h.mean()) - hurst) < 3.5 * float(h.std())
    assert float(h.std()) < 0.12  # the record speaks: the prior's is 0.28

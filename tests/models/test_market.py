"""Market data as they come with arch, and the structure function on series of known roughness."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from models.market import market, structure_function
from ppl.errors import OptionError
from sde import FractionalGaussianNoise


def test_days_of_the_market() -> None:
    days = market("2008-10-01", "2008-10-31")
    assert days.dates[0] == np.datetime64("2008-10-01")
    assert days.dates[-1] == np.datetime64("2008-10-31")
    assert len(days.returns) == len(days.log_range) == 23
    assert days.log_vix is None
    crash = float(days.returns[list(days.dates).index(np.datetime64("2008-10-15"))])
    assert crash == pytest.approx(math.log(907.84 / 998.01), abs=1e-4)
    assert 0.4 < float(days.log_range.exp().mean()) < 1.2  # a year's standard deviation, in that month


def test_vix_is_joined_by_day() -> None:
    days = market("2014-01-01", "2014-01-08", vix=True)
    assert days.log_vix is not None
    assert days.log_vix.exp()[:3].mul(100).tolist() == pytest.approx([13.76, 13.55, 12.92])
    assert len(days.returns) == len(days.log_vix) == 4


def test_days_without_data_are_refused() -> None:
    with pytest.raises(OptionError, match="the data go from 2014-01-03"):
        market("2008-01-01", "2008-12-31", vix=True)
    with pytest.raises(OptionError, match="1999-01-05 to 2018-12-31"):
        market("2030-01-01", "2030-12-31")


def test_without_arch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arch.data", None)
    with pytest.raises(ImportError, match=r"pilotlight\[finance\]"):
        market()


@pytest.mark.parametrize("hurst", [0.1, 0.3, 0.7])
def test_structure_function_finds_the_index_of_exact_noise(hurst: float) -> None:
    """Mean of 20 series of 2000 within five standard errors of the truth and a bias of 0.02 of log moments."""
    noise = FractionalGaussianNoise(hurst, 2000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = [structure_function(noise.sample().double().cumsum(0)) for _ in range(20)]
    h = torch.tensor([f.hurst for f in found], dtype=torch.float64)
    assert abs(float(h.mean()) - hurst) < 5 * float(h.std()) / math.sqrt(20) + 0.02
    claimed = sum(f.stderr for f in found) / 20
    assert 0.4 < claimed / float(h.std()) < 2.5


def test_noise_pulls_the_estimate_down() -> None:
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(3000, generator=g, dtype=torch.float64).cumsum(0)
    noisy = walk + 3 * torch.randn(3000, generator=g, dtype=torch.float64)
    assert structure_function(noisy).hurst < structure_function(walk).hurst - 0.15


def test_short_records_are_refused() -> None:
    with pytest.raises(OptionError, match="are few for lags"):
        structure_function(torch.zeros(50))

"""Schedules against their own definitions: the noise rate by finite differences, inverses, limits, grids."""

from __future__ import annotations

import math

import pytest
import torch

from sde.schedule import (
    Cosine,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
    edm_grid,
    log_grid,
)

SCHEDULES = [VariancePreserving(), VariancePreserving(0.5, 4.0), Cosine(), VarianceExploding(), RectifiedFlow()]
TIMES = torch.linspace(0.01, 0.98, 50, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_inverts_noise_to_signal(schedule: Schedule) -> None:
    s = schedule.noise_to_signal(TIMES)
    torch.testing.assert_close(schedule.time(s), TIMES, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(s, schedule.sigma(TIMES) / schedule.alpha(TIMES), rtol=1e-12, atol=0)
    assert (s.diff() > 0).all()


@pytest.mark.parametrize("schedule", [VariancePreserving(), Cosine()], ids=repr)
def test_variance_is_preserved(schedule: Schedule) -> None:
    total = schedule.alpha(TIMES).square() + schedule.sigma(TIMES).square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-13, atol=0)


def test_vp_rate_is_linear_in_time() -> None:
    """-2 d log alpha / dt = beta(t) = beta_min + t (beta_max - beta_min), by central differences."""
    schedule, h = VariancePreserving(0.1, 20.0), 1e-5
    rate = -2 * (schedule.alpha(TIMES + h).log() - schedule.alpha(TIMES - h).log()) / (2 * h)
    torch.testing.assert_close(rate, 0.1 + TIMES * 19.9, rtol=1e-6, atol=0)


def test_vp_variance_solves_its_sde() -> None:
    """d sigma^2 / dt = beta (1 - sigma^2), which a factor 2 in beta would break."""
    schedule, h = VariancePreserving(), 1e-5
    slope = (schedule.sigma(TIMES + h).square() - schedule.sigma(TIMES - h).square()) / (2 * h)
    beta = 0.1 + TIMES * 19.9
    torch.testing.assert_close(slope, beta * (1 - schedule.sigma(TIMES).square()), rtol=1e-5, atol=1e-9)


def test_cosine_is_a_cosine_with_its_offset() -> None:
    t, start = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64), math.cos(0.008 / 1.008 * math.pi / 2)
    expected = torch.cos((t + 0.008) / 1.008 * math.pi / 2) / start
    torch.testing.assert_close(Cosine().alpha(t), expected, rtol=1e-14, atol=0)


def test_ve_is_geometric_and_flow_is_a_line() -> None:
    ends = VarianceExploding(0.01, 50.0).sigma(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.01, math.sqrt(0.5), 50.0], dtype=torch.float64))
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.alpha(TIMES) + flow.sigma(TIMES), torch.ones_like(TIMES))


@pytest.mark.parametrize("schedule", [VariancePreserving(), Cosine()], ids=repr)
def test_small_times_keep_their_digits(schedule: Schedule) -> None:
    """At t = 1e-9 in float64, 1 - alpha^2 has lost all digits; sigma and the inverse have not."""
    t = torch.tensor(1e-9, dtype=torch.float64)
    assert float(schedule.sigma(t)) > 0
    torch.testing.assert_close(schedule.time(schedule.noise_to_signal(t)), t, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_schedule_grid_contract(schedule: Schedule, steps: int) -> None:
    grid = schedule.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[-1] == 0
    assert grid.isfinite().all()


@pytest.mark.parametrize("make", [edm_grid, log_grid])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_grid_ends_are_exact(make: type, steps: int) -> None:
    grid = make(80.0, 0.002, steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[0] == 80.0
    assert grid[-1] == 0
    assert steps == 1 or grid[-2] == 0.002


def test_grids_are_regular_in_their_own_scale() -> None:
    logs = log_grid(80.0, 0.002, 30)[:-1].log().diff()
    torch.testing.assert_close(logs, logs[0].expand(29))
    powers = (edm_grid(80.0, 0.002, 30)[:-1] ** (1 / 7)).diff()
    torch.testing.assert_close(powers, powers[0].expand(29))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_grid(1.0, 0.1, 0), "steps must be a positive integer"),
        (lambda: edm_grid(0.1, 1.0, 5), "0 < sigma_min < sigma_max"),
        (lambda: edm_grid(1.0, 0.0, 5), "0 < sigma_min < sigma_max"),
        (lambda: edm_grid(1.0, 0.1, 5, rho=0.0), "rho must be positive"),
        (lambda: VariancePreserving(beta_min=3.0, beta_max=1.0), "beta_min < beta_max"),
        (lambda: VariancePreserving(t_min=0.0), "t_min"),
        (lambda: Cosine(t_max=1.0), "t_max"),
        (lambda: Cosine(offset=-1.0), "offset"),
        (lambda: RectifiedFlow(t_min=0.5, t_max=0.4), "t_min"),
        (lambda: VarianceExploding(1.0, 0.5), "sigma_min"),
    ],
)
def test_options_are_checked(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]

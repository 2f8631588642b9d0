"""What is wrong with a path before a control is fitted: no noise where it is needed, and steps too coarse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inverse.paths.path_checks import coarse_steps, discretisation_bias, refuse_unmoved
from ppl.errors import CapabilityError
from sde import MarkovNoise, Path, Process

DOUBLE = torch.float64


def ou(dt: float) -> Path:
    one = torch.ones(1, dtype=DOUBLE)
    return Path(Process(lambda x, t: -2.0 * x, 1.0), one, one, dt=dt)


ROW, DATUM, VARIANCE = (
    torch.ones(1, 1, 1, dtype=DOUBLE),
    torch.ones(1, dtype=DOUBLE),
    torch.full((1,), 0.01, dtype=DOUBLE),
)


def test_bias_is_that_of_the_process_in_continuous_time() -> None:
    """log N(1; e^-2, (1 - e^-4) / 4 + 0.01) is the limit; the estimate is right to second order in the step."""
    mean, variance = math.exp(-2), (1 - math.exp(-4)) / 4 + 0.01
    exact = -0.5 * ((1 - mean) ** 2 / variance + math.log(2 * math.pi * variance))
    from inverse.paths import linear_control

    for dt, left in ((0.1, 0.2), (0.02, 0.04)):
        bias = float(linear_control(ou(dt), ROW, DATUM, VARIANCE).log_evidence) - exact
        assert abs(discretisation_bias(ou(dt), ROW, DATUM, VARIANCE) - bias) < left * abs(bias)


def test_a_remark_names_the_bias_and_a_step_that_will_do() -> None:
    remark = coarse_steps(ou(0.5), ROW, DATUM, VARIANCE)
    assert remark is not None
    assert "steps of 0.5" in remark
    advised = float(remark.split("dt=")[1].split()[0])
    assert abs(discretisation_bias(ou(advised), ROW, DATUM, VARIANCE)) < 0.1
    assert coarse_steps(ou(0.005), ROW, DATUM, VARIANCE) is None


def test_a_curved_path_is_judged_along_its_mean() -> None:
    path = Path(Process(lambda x, t: x - x**3, 0.3, MarkovNoise(0.7, 1.0, "I", 3)), DATUM, 2 * DATUM, dt=0.2)
    assert 0.001 < abs(discretisation_bias(path, ROW, DATUM, VARIANCE)) < 5


def test_diffusion_that_vanishes_is_named_with_time_and_state() -> None:
    times = torch.linspace(0.25, 1, 4, dtype=DOUBLE)

    def path(diffusion: object, start: float = 1.0) -> Path:
        process = Process(lambda x, t: -x, diffusion)  # type: ignore[arg-type]
        return Path(process, times, start * torch.ones(1, dtype=DOUBLE))

    late, rows = path(lambda x, t: torch.where(t < 0.5, 0.0, 1.0) * torch.ones_like(x)), torch.eye(4, dtype=DOUBLE)
    with pytest.raises(
        CapabilityError, match=r"vanishes at time 0 and state \[1.0\], and no noise reaches .* at time 0.25"
    ):
        refuse_unmoved(late, rows[:1, :, None])
    refuse_unmoved(late, rows[3:, :, None])  # noise comes in time for the last datum
    refuse_unmoved(late)
    with pytest.raises(CapabilityError, match=r"vanishes at time 0.75 and state \[0.0\]"):
        refuse_unmoved(path(lambda x, t: x, 0.0))  # stuck at zero
    refuse_unmoved(path(lambda x, t: x))


def test_noise_may_reach_a_coordinate_through_the_drift() -> None:
    """A position driven by a noisy velocity is moved, two steps on; a third coordinate is not."""
    times = torch.linspace(0.25, 1, 4, dtype=DOUBLE)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x[..., 1], -x[..., 1], -x[..., 2]], -1)

    process = Process(drift, torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE))
    path = Path(process, times, torch.zeros(3, dtype=DOUBLE))
    rows = torch.zeros(1, 4, 3, dtype=DOUBLE)
    rows[0, 3, 0] = 1.0
    refuse_unmoved(path, rows)
    with pytest.raises(CapabilityError, match="the diffusion of those coordinates is zero along the path"):
        refuse_unmoved(path, rows.roll(2, -1))

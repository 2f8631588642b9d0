"""A `pyro.factor` counts as data: alone, beside observed sites, and for every engine that takes any density."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from ppl import Program
from ppl.errors import CapabilityError, ProgramError
from sde import GaussianMixture

F64 = torch.float64
PRIOR = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64))


def alone() -> None:
    """N(0, I) times exp(-2 (x_0 - 1)^2): x_0 ~ N(0.8, 1 / 5)."""
    x = pyro.sample("x", PRIOR)
    pyro.factor("loss", -2 * (x[..., 0] - 1).square())


def beside(y: Tensor) -> None:
    """And y ~ N(x_1, 1 / 2): x_1 ~ N(0.8 y, 1 / 5)."""
    x = pyro.sample("x", PRIOR)
    pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y)
    pyro.factor("loss", -2 * (x[..., 0] - 1).square())


def neither() -> None:
    pyro.sample("x", PRIOR)


def test_a_program_knows_its_factors() -> None:
    y = torch.tensor(1.0, dtype=F64)
    assert Program(alone).factors == ("loss",)
    assert Program(beside, y).factors == ("loss",)
    assert not Program(neither).factors
    assert [p.has_data for p in (Program(alone), Program(beside, y), Program(neither))] == [True, True, False]
    x = torch.tensor([[0.0, 0.5], [2.0, 0.5]], dtype=F64)
    torch.testing.assert_close(Program(alone).log_likelihood({"x": x}), torch.full((2,), -2.0, dtype=F64))
    normal = -0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(Program(beside, y).log_likelihood({"x": x}), torch.full((2,), normal - 2.0, dtype=F64))


def test_without_data_a_program_lives_where_its_prior_does() -> None:
    program = Program(alone)
    assert program.dtype == F64
    assert program.device == torch.device("cpu")
    assert program.to(dtype=torch.float32).dtype == torch.float32
    assert Program(alone).log_joint({"x": torch.zeros(3, 2, dtype=F64)}).dtype == F64


ENGINES: list[Any] = [
    ppl.NoiseSpace(ppl.EllipticalSlice(warmup=100)),
    inverse.TwistedSMC(guide=inverse.LGDGuide(samples=20), steps=30),
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside"])
def test_engines_condition_on_it(engine: Any, both: bool) -> None:
    """1000 draws; at an effective 100, ten standard errors of a mean with sd 0.45 are 0.45 (false alarm 1e-23); without
    the factor the mean would be 0."""
    program = Program(beside, torch.tensor(1.0, dtype=F64)) if both else Program(alone)
    posterior = ppl.infer(program, engine, draws=1000, chains=1)
    mean = posterior.mean("x")
    assert abs(float(mean[0]) - 0.8) < 0.3
    assert abs(float(mean[1]) - (0.8 if both else 0.0)) < 0.4


def test_nothing_to_condition_on_is_still_an_error() -> None:
    with pytest.raises(ProgramError, match=r"or a pyro\.factor"):
        ppl.infer(Program(neither), ppl.NoiseSpace(ppl.EllipticalSlice()), draws=2)


def test_what_cannot_use_a_factor_says_so_and_does_not_drop_it() -> None:
    for program in (Program(alone), Program(beside, torch.tensor(1.0, dtype=F64))):
        for backend in (inverse.PiGDM(), inverse.Exact(), inverse.DPS(steps=2), inverse.REDDiff(steps=2)):
            with pytest.raises(CapabilityError, match=r"pyro\.factor"):
                ppl.infer(program, backend, draws=2)

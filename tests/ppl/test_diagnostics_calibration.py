"""Calibration of a conjugate model: exact backends pass, each kind of wrong one is found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.diagnostics import default_test_functions, sbc
from ppl.errors import OptionError, ShapeError


def model(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def program() -> ppl.Program:
    return ppl.Program(model, torch.zeros(3, dtype=torch.float64))


@dataclass(frozen=True)
class Conjugate:
    """Draws from N(mean + shift sd, (scale sd)^2), mean and sd those of the posterior, or of the prior."""

    scale: float = 1.0
    shift: float = 0.0
    ignore_data: bool = False
    weighted: bool = False
    exact: ClassVar[str] = "always"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 2
    batches_problems: ClassVar[bool] = False

    def run(
        self, program: ppl.Program, *, draws: int, chains: int, generator: torch.Generator, monitor: ppl.Monitor
    ) -> ppl.Posterior:
        y = program.data["y"]
        z = torch.randn(chains, draws, generator=generator, dtype=torch.float64)
        mean, sd = (0.0, 1.0) if self.ignore_data else (float(y.sum()) / 4, 0.5)
        if self.weighted:  # importance sampling from the prior
            return ppl.Posterior({"mu": z}, log_weight=-0.5 * (y - z[..., None]).square().sum(-1))
        return ppl.Posterior({"mu": mean + sd * (self.shift + self.scale * z)})


def test_an_exact_backend_passes() -> None:
    result = sbc(program(), Conjugate(), simulations=300, draws=60, ranks=19, seed=1)
    assert result.names == ("log_likelihood", "mu")
    assert result.ranks.shape == (300, 2)
    assert result.passes(1e-3), str(result)
    assert result.thin_enough
    assert float(result.coverage().z.abs().max()) < 4.5
    again = sbc(program(), Conjugate(), simulations=3, draws=60, ranks=19, seed=1)
    assert torch.equal(again.ranks, result.ranks[:3])


def test_weighted_draws_are_resampled() -> None:
    result = sbc(program(), Conjugate(weighted=True), simulations=300, draws=400, chains=1, ranks=19)
    assert result.passes(1e-3), str(result)
    assert 19 < float(result.ess.median()) < 400


@pytest.mark.parametrize(
    ("wrong", "found_by"),
    [
        (Conjugate(scale=0.6), "mu"),
        (Conjugate(scale=1.6), "mu"),
        (Conjugate(shift=0.5), "mu"),
        (Conjugate(ignore_data=True), "log_likelihood"),
    ],
    ids=["narrow", "wide", "shifted", "prior"],
)
def test_each_wrong_backend_is_found(wrong: Conjugate, found_by: str) -> None:
    result = sbc(program(), wrong, simulations=300, draws=60, ranks=19)
    assert not result.passes(1e-2), str(result)
    assert float(result.ecdf[result.names.index(found_by)]) < 1e-2
    if wrong.ignore_data:  # the prior is calibrated on average, and no function of mu alone can tell
        assert float(result.ecdf[result.names.index("mu")]) > 1e-4


def test_functions_of_large_latents_are_projections() -> None:
    def wide(y: torch.Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    p = ppl.Program(wide, torch.tensor(0.0))
    functions = default_test_functions(p, torch.Generator().manual_seed(0))
    assert list(functions) == ["log_likelihood", "x along 0", "x along 1"]
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    one = functions["x along 0"]({"x": x}, p)
    assert one.shape == (5,)
    torch.testing.assert_close(functions["x along 0"]({"x": 2 * x}, p), 2 * one)
    lik = functions["log_likelihood"]({"x": x}, p)
    expected = -0.5 * x.sum((1, 2)).square() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(lik, expected)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="need as many"):
        sbc(program(), Conjugate(), simulations=2, draws=4, chains=1, ranks=19)
    with pytest.raises(OptionError, match="simulations"):
        sbc(program(), Conjugate(), simulations=1, draws=4)
    with pytest.raises(ShapeError, match="must return"):
        sbc(program(), Conjugate(), {"bad": lambda v, p: v["mu"][:2]}, simulations=2, draws=60, ranks=19)

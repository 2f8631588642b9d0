"""Calibration over program, prior and posterior: truths drawn from the model, their ranks among the draws uniform.

Simulation-based calibration of the exact backends on small problems, in the log likelihood as well, which finds
posteriors that ignore the data. Fast with the backends that need milliseconds, slow with chains; and the coverage of a
trained prior, where truths are drawn with the sampler's own discretisation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.operators import Dense
from ppl.diagnostics import sbc
from sde import GaussianMixture

F64 = torch.float64


def mixture() -> ppl.Program:
    """Two dimensions, two overlapping components of unequal weight, one measurement that leaves both in play."""
    prior = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=F64),
        torch.tensor([0.4, 1.0], dtype=F64),
        noise_steps=10,
    )
    operator = Dense(torch.tensor([[1.0, 0.7]], dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), 0.6).to_event(1), obs=y)

    return ppl.Program(model, torch.zeros(1, dtype=F64), compile="never")


def hierarchy() -> ppl.Program:
    """A scale, a mean and three data: no Gaussian anywhere in the posterior."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    return ppl.Program(model, torch.zeros(3, dtype=F64), compile="never")


def check(program: ppl.Program, backend: Any, simulations: int, draws: int, chains: int, ranks: int = 19) -> None:
    result = sbc(program, backend, simulations=simulations, draws=draws, chains=chains, ranks=ranks, seed=0)
    assert result.passes(1e-3), str(result)
    assert float(result.ess.median()) >= ranks, str(result)


PARTICLES = {
    "Exact": (inverse.Exact(), 19, 1),
    "TwistedSMC": (inverse.TwistedSMC(steps=10, particles=100, runs=2), 100, 1),
}


@pytest.mark.parametrize("name", PARTICLES)
def test_calibrated_on_a_mixture(name: str) -> None:
    """False alarm 1e-3 over the log likelihood and both coordinates, at 150 simulations.

    Power: a posterior that is 0.7 times as wide as it should be, or that ignores the data, is found nearly always.
    """
    backend, draws, chains = PARTICLES[name]
    check(mixture(), backend, 150, draws, chains)


def test_a_guide_without_weights_is_found_out() -> None:
    """What the test can see: PiGDM on the same problem, at the same number of simulations."""
    result = sbc(mixture(), inverse.PiGDM(steps=20), simulations=150, draws=19, chains=1, ranks=19, seed=0)
    assert not result.passes(1e-3), str(result)


SLOW: dict[str, tuple[Callable[[], ppl.Program], Any, int, int]] = {
    "Exact": (mixture, inverse.Exact(), 99, 1),
    "TwistedSMC": (mixture, inverse.TwistedSMC(steps=25, particles=400, runs=2), 400, 1),
    "NUTS": (hierarchy, ppl.NUTS(warmup=200), 200, 2),
    "HMC": (hierarchy, ppl.HMC(warmup=150), 60, 16),
    "Gibbs": (hierarchy, ppl.Gibbs({("mu",): ppl.HMCKernel(), ("scale",): ppl.SliceKernel()}, warmup=100), 150, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_calibrated_at_length(name: str) -> None:
    """False alarm 1e-3 for each backend, at 400 simulations with 99 ranks."""
    program, backend, draws, chains = SLOW[name]
    check(program(), backend, 400, draws, chains, ranks=99)


@pytest.mark.slow
def test_coverage_of_a_trained_prior(tmp_path: Path) -> None:
    """The share of truths inside 90 % intervals is 90 +- 3 %: 200 problems, 20 projections of hidden pixels each.

    The standard error is about 0.6 %, projections of one problem counted as one: a calibrated sampler fails one time in
    a million, one whose intervals hold 85 % fails nearly always. About half an hour.
    """
    from benchmarks import coverage

    path = tmp_path / "coverage.jsonl"
    for _ in coverage.run(path, "prior", 200):
        pass
    found = coverage.summary(coverage.stored(path))
    assert found["problems"] == 200
    assert abs(found["observed"] - 0.9) < 0.03, found


def test_coverage_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that are stored are not solved again; a line cut short by a kill is; other settings do not count."""
    from benchmarks import coverage

    for name, value in (("STEPS", 2), ("PARTICLES", 4), ("RUNS", 1), ("DRAWS", 9)):
        monkeypatch.setattr(coverage, name, value)
    path = tmp_path / "deep" / "coverage.jsonl"
    assert [row["index"] for row in coverage.run(path, "prior", 2)] == [0, 1]
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [row["index"] for row in coverage.run(path, "prior", 3)] == [1, 2]
    rows = coverage.stored(path)
    assert sorted(row["index"] for row in rows) == [0, 1, 2]
    assert [len(row["ranks"]) for row in rows] == [20] * 3
    again = next(row for row in rows if row["index"] == 1)
    assert again["ranks"] == coverage.solve(1, "prior", coverage.prior())["ranks"]
    monkeypatch.setattr(coverage, "SIGMA", 0.9)
    assert coverage.stored(path) == []

"""Chains that begin at draws of a fit: far posteriors, one fit for each problem, what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError
from ppl.mcmc.starts import StartingPoints

F64 = torch.float64


def far(y):
    """A posterior at y with sd 0.01, a thousand of them away from where uniform points begin."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 100.0))
    pyro.sample("y", dist.Normal(mu, 0.01), obs=y)


@pytest.mark.parametrize(
    "init", [ppl.Pathfinder(paths=2), ppl.Laplace(starts=2), ppl.SVI(steps=400, lr=0.3)], ids=["P", "L", "S"]
)
def test_points_are_draws_of_the_fit(init):
    flat = ppl.Program(far, torch.tensor(12.0, dtype=F64)).flat()
    generator = torch.Generator().manual_seed(0)
    z = StartingPoints(flat, init, 2.0, ppl.Monitor(), generator)(200, generator)
    assert z.shape == (200, 1)
    assert abs(float(z.mean()) - 12) < 0.02
    assert 0.005 < float(z.std()) < 0.03


def test_every_problem_has_its_own_fit():
    ys = torch.tensor([5.0, -7.0, 30.0], dtype=F64)
    flat = ppl.Program(far, ys[0]).over(y=ys).flat()
    generator = torch.Generator().manual_seed(0)
    begin = StartingPoints(flat, ppl.Laplace(starts=2), 2.0, ppl.Monitor(), generator)
    z = begin(12, generator).reshape(3, 4)
    torch.testing.assert_close(z.mean(1), ys, atol=0.03, rtol=0)  # six standard errors


@pytest.mark.parametrize("backend", [ppl.NUTS(warmup=50, init=ppl.Laplace()), ppl.HMC(warmup=200, init=ppl.Laplace())])
def test_chains_from_a_fit(backend):
    """From the posterior itself: mean within 5 errors of the draws' bulk ESS."""
    posterior = ppl.infer(ppl.Program(far, torch.tensor(12.0, dtype=F64)), backend, draws=200, chains=4, seed=0)
    assert abs(float(posterior.mean("mu")) - 12) < 5 * 0.01 / math.sqrt(float(posterior.ess("mu")))
    assert abs(float(posterior.sd("mu")) / 0.01 - 1) < 0.25
    assert posterior.cost.gradient_evals > 0


def test_no_fit_no_change():
    """Without init, chains begin where they always did."""
    program = ppl.Program(far, torch.tensor(1.0, dtype=F64))
    flat = program.flat()
    ours = StartingPoints(flat, None, 2.0, ppl.Monitor(), torch.Generator())(3, torch.Generator().manual_seed(1))
    assert torch.equal(ours, flat.initial(3, torch.Generator().manual_seed(1), 2.0))


@pytest.mark.parametrize("init", ["pathfinder", ppl.Pathfinder, ppl.HMC()])
def test_bad_init(init):
    for engine in (ppl.HMC, ppl.NUTS):
        with pytest.raises(OptionError, match="init must be None"):
            engine(init=init)

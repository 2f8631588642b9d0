"""Runs killed by a real SIGKILL half-way go on to the draws of a run that nobody touched; SIGINT returns what there is.

Each case runs in a process of its own, which kills itself from the callback after the checkpoint of that step. NUTS
keeps its finished chains; the others resume in the middle.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
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
import sde
from models.meta import Gaussian, GaussNewton, Hierarchy, LinearRegressions, NIWMeta, NormalInverseGamma, mlp
from models.references import gaussian_problem

F64 = torch.float64
DRAWS, CHAINS, SEED = 8, 2, 3


def linear() -> ppl.Program:
    return gaussian_problem(0.3, dim=3, observations=2).program


def many() -> ppl.Program:
    program = linear()
    y = program.data["y"]
    return program.over(y=torch.stack([y, y + 0.5, -y]))


def plain() -> ppl.Program:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, scale).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def switched() -> ppl.Program:
    """A coin decides the mean; its guide's score needs a baseline, whose running average is state as well."""

    def model(y: Tensor) -> None:
        coin = pyro.sample("coin", dist.Bernoulli(torch.tensor(0.4, dtype=F64)))
        mu = pyro.sample("mu", dist.Normal(2 * coin - 1, 0.5))
        pyro.sample("y", dist.Normal(mu[..., None].expand(*mu.shape, 2), 0.7).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def coins(y: Tensor) -> None:
    """A guide for `switched`."""
    logit = pyro.param("logit", torch.zeros((), dtype=F64))
    pyro.sample("coin", dist.Bernoulli(logits=logit), infer={"estimator": "decaying_average"})
    loc = pyro.param("loc", torch.zeros((), dtype=F64))
    scale = pyro.param("scale", torch.ones((), dtype=F64), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc + 0 * y[0], scale))


def path() -> ppl.Program:
    process = sde.Process(lambda x, t: torch.sin(x), 1.0, sde.MarkovNoise(0.7, 1.0, "I", 2))
    law = sde.Path(process, torch.tensor([0.3, 0.6, 1.0], dtype=F64), torch.zeros(1, dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0, 0.4], dtype=F64), compile="never")


def brownian_path() -> ppl.Program:
    law = sde.Path(
        sde.Process(lambda x, t: torch.sin(x)), torch.tensor([0.5, 1.0], dtype=F64), torch.zeros(1, dtype=F64)
    )

    def model(y: Tensor) -> None:
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def regressions() -> ppl.Program:
    """Six lines of four points each."""
    network = mlp([1, 1])
    network.module.double()
    prior = NormalInverseGamma.around(network.start, 1.0, 3.0, 1.0)
    lines = LinearRegressions(torch.ones(2, dtype=F64), torch.full((2,), 0.3, dtype=F64), shots=4, queries=0)
    return Hierarchy(network, Gaussian(0.3), prior).program(lines(6, torch.Generator().manual_seed(0)), batch=3)


# Name -> (backend, program).
CASES: dict[str, tuple[Callable[[], Any], Callable[[], ppl.Program]]] = {
    "AmortisedDenoiser": (lambda: inverse.AmortisedDenoiser(steps=40, batch=4, width=8, levels=4), plain),
    "DPS": (lambda: inverse.DPS(steps=10), linear),
    "DPS on many problems": (lambda: inverse.DPS(steps=10), many),
    "DistributionTransformer": (lambda: ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=40, batch=4), plain),
    "EllipticalSlice": (lambda: ppl.NoiseSpace(ppl.EllipticalSlice(warmup=4)), linear),
    "Gibbs": (lambda: ppl.Gibbs({("mu",): ppl.HMCKernel(), ("scale",): ppl.SliceKernel()}, warmup=4), plain),
    "GuidedParticleFilter": (lambda: inverse.GuidedParticleFilter(particles=8, runs=2, threshold=1.0), path),
    "HMC": (lambda: ppl.HMC(warmup=20, max_steps=8), plain),
    "MomentMatching": (lambda: inverse.MomentMatching(steps=6), linear),
    "NIWMeta": (lambda: NIWMeta(GaussNewton(1), steps=12), regressions),
    "NUTS": (lambda: ppl.NUTS(warmup=10), plain),
    "ParticleGibbs": (lambda: inverse.ParticleGibbs(particles=3, warmup=4), path),
    "SDEMatching": (lambda: inverse.SDEMatching(steps=12, particles=4, times=4, knots=2), brownian_path),
    "SVI": (lambda: ppl.SVI(guide=ppl.FullRank(), steps=12), plain),
    "SVI of an objective, traced": (lambda: ppl.SVI(guide=coins, steps=240, particles=4), switched),
    "SVI of an objective, by handlers": (
        lambda: ppl.SVI(guide=coins, objective=ppl.objectives.IWELBO(3), steps=12, estimators={"coin": "reinforce"}),
        switched,
    ),
    "Transport": (
        lambda: ppl.Transport(ppl.HMC(warmup=20, max_steps=8), ppl.SVI(guide=ppl.MeanField(), steps=12)),
        plain,
    ),
    "TwistedSMC": (lambda: inverse.TwistedSMC(steps=5, particles=8, runs=2, threshold=1.0), linear),
    "TwistedSMC on many problems": (lambda: inverse.TwistedSMC(steps=5, particles=8, runs=2, threshold=1.0), many),
}


def run(name: str, **options: Any) -> ppl.Posterior:
    make, program = CASES[name]
    return ppl.infer(program(), make(), DRAWS, CHAINS, SEED, **options)


def _child(name: str, folder: str, after: int, how: int) -> None:
    """The run, in a process that sends itself a signal in its `after`-th event."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, or a server, may have it ignored
    seen = 0

    def strike(event: ppl.Event) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            os.kill(os.getpid(), how)

    run(name, callback=strike, checkpoint=folder, checkpoint_every=0).save(f"{folder}.posterior")


def killed(name: str, folder: Path, after: int, how: signal.Signals) -> int | None:
    """Exit code of the run in a process of its own; a server imports torch once and forks the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_child, args=(name, str(folder), after, int(how)))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


@pytest.mark.parametrize("name", CASES)
def test_killed_run_resumes_to_the_same_draws(name: str, tmp_path: Path) -> None:
    events: list[ppl.Event] = []
    whole = run(name, callback=lambda event: events.append(event))
    folder = tmp_path / "run"
    done = killed(name, folder, len(events) // 2 + 1, signal.SIGKILL)
    assert done == -signal.SIGKILL
    assert any(path.is_file() for path in folder.rglob("*")), "nothing was stored before the kill"
    again: list[ppl.Event] = []
    resumed = run(name, callback=lambda event: again.append(event), checkpoint=folder, checkpoint_every=0)
    assert len(again) < len(events), "the run began anew"
    assert resumed.complete
    for site, values in whole.draws.items():
        torch.testing.assert_close(resumed.draws[site], values, rtol=1e-9, atol=1e-12)
    assert resumed.cost.seconds > 0
    work = ("denoiser_evals", "density_evals", "gradient_evals")
    spent = sum(getattr(resumed.cost, n) for n in work)
    assert spent >= sum(getattr(whole.cost, n) for n in work), "what was spent before the kill is missing in the cost"


@pytest.mark.parametrize("name", ["HMC", "TwistedSMC"])
def test_ctrl_c_returns_what_there_is(name: str, tmp_path: Path) -> None:
    """SIGINT three quarters in: the process ends well, with a posterior that says it is incomplete."""
    events: list[ppl.Event] = []
    whole = run(name, callback=lambda event: events.append(event))
    folder = tmp_path / "run"
    done = killed(name, folder, 3 * len(events) // 4, signal.SIGINT)
    assert done == 0
    part = ppl.Posterior.load(Path(str(folder) + ".posterior"))
    assert not part.complete
    assert "Ctrl-C" in part.attrs["stopped"]
    assert 0 < len(part) < len(whole)
    for site, values in part.draws.items():
        chains, length = values.shape[:2]
        torch.testing.assert_close(values, whole.draws[site][:chains, :length], rtol=1e-9, atol=1e-12)
    resumed = run(name, checkpoint=folder, checkpoint_every=0)
    for site, values in whole.draws.items():
        torch.testing.assert_close(resumed.draws[site], values, rtol=1e-9, atol=1e-12)

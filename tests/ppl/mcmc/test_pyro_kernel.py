"""Pyro's kernels and guides through our door: shapes, seeds, the global state untouched, the right answers."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import ppl
from ppl.errors import OptionError
from ppl.mcmc import Pyro
from ppl.program import Program

Y = torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64)
VARIANCE = 1 / (1 / 4 + 3)
MEAN = VARIANCE * float(Y.sum())


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("double", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_a_kernel_is_exact_in_the_limit():
    """Mean within 4.5 standard errors; false alarm below 1e-5."""
    backend = Pyro(pyro.infer.NUTS, warmup=100)
    assert backend.exact == "in_the_limit"
    posterior = ppl.infer(Program(model, Y), backend, draws=250, chains=2, seed=3)
    mu = posterior["mu"]
    assert mu.shape == (2, 250)
    assert mu.dtype == torch.float64
    assert abs(float(mu.mean()) - MEAN) < 4.5 * math.sqrt(VARIANCE / float(arviz.ess(mu.numpy())))
    torch.testing.assert_close(posterior["double"], 2 * mu)
    assert posterior.info["diverging"].shape == (2, 250)
    assert posterior.info["r_hat"].shape == (2,)
    assert posterior.cost.density_evals > 700


def test_positive_sites_come_back_constrained():
    def scale(y):
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        pyro.sample("y", dist.Normal(torch.zeros_like(y), sigma).to_event(1), obs=y)

    posterior = ppl.infer(
        Program(scale, Y), Pyro(lambda model: pyro.infer.HMC(model, step_size=0.3), warmup=20), draws=20, chains=1
    )
    assert bool((posterior["sigma"] > 0).all())


def test_seeds_and_global_state():
    """Same seed, same draws; the global generator and the parameter store stay as they were."""
    pyro.param("mine", torch.tensor(1.0))
    before = torch.random.get_rng_state()
    program, backend = Program(model, Y), Pyro(AutoNormal, steps=20)
    one, two = (ppl.infer(program, backend, draws=5, chains=2, seed=1) for _ in range(2))
    other = ppl.infer(program, backend, draws=5, chains=2, seed=2)
    assert torch.equal(one["mu"], two["mu"])
    assert not torch.equal(one["mu"], other["mu"])
    assert not torch.equal(one["mu"][0], one["mu"][1])
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_guide_in_the_family_of_the_posterior_finds_it():
    """The posterior is Gaussian, so a full Gaussian guide is right up to optimisation: a tenth of an sd."""
    backend = Pyro(AutoMultivariateNormal, steps=600, learning_rate=0.02, particles=2)
    assert backend.exact == "never"
    posterior = ppl.infer(Program(model, Y), backend, draws=500, chains=1, seed=0)
    sd = math.sqrt(VARIANCE)
    assert abs(float(posterior["mu"].mean()) - MEAN) < 0.2 * sd
    assert abs(float(posterior["mu"].std()) / sd - 1) < 0.2
    assert posterior.info["elbo"].shape == (1,)


def test_a_guide_written_by_hand_gets_the_model_arguments():
    def guide(y):
        loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
        pyro.sample("mu", dist.Normal(loc, 0.5))

    posterior = ppl.infer(Program(model, Y), Pyro(guide, steps=400, learning_rate=0.02), draws=300, chains=1)
    assert abs(float(posterior["mu"].mean()) - MEAN) < 0.3

    def incomplete(y):
        pyro.param("loc", torch.zeros(()))

    with pytest.raises(OptionError, match="mu"):
        ppl.infer(Program(model, Y), Pyro(incomplete, steps=2), draws=2, chains=1)


def test_parameters_of_the_model_are_learned_by_a_guide_and_held_by_a_kernel():
    """Maximum likelihood of a scale, about the root mean square of the data, 5."""

    def scaled(y):
        scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 0.01))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    y = 5.0 * torch.tensor([1.0, -1.0, 1.0, -1.0] * 5, dtype=torch.float64)
    program = Program(scaled, y)
    fitted = ppl.infer(program, Pyro(AutoNormal, steps=800, learning_rate=0.02), draws=2, chains=1)
    assert abs(float(fitted.parameters["scale"]) - 5.0) < 0.5
    held = ppl.infer(program, Pyro(pyro.infer.NUTS, warmup=5), draws=5, chains=1)
    assert float(held.parameters["scale"]) == 1.0
    assert any("held" in note for note in held.attrs["notes"])


def test_checkpoint_keeps_finished_chains_and_stop_keeps_draws(tmp_path):
    program, backend = Program(model, Y), Pyro(pyro.infer.NUTS, warmup=5)
    whole = ppl.infer(program, backend, draws=8, chains=2, seed=1)

    class Killed(BaseException):
        pass

    def kill(event):
        if event.label == "chain 1":
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program, backend, 8, 2, 1, callback=kill, checkpoint=tmp_path / "run", checkpoint_every=0)
    labels = set()
    resumed = ppl.infer(
        program,
        backend,
        8,
        2,
        1,
        callback=lambda e: labels.add(e.label),
        checkpoint=tmp_path / "run",
        checkpoint_every=0,
    )
    assert labels == {"chain 1"}
    assert torch.equal(resumed["mu"], whole["mu"])
    stopped = ppl.infer(program, backend, 8, 2, 1, callback=lambda e: e.step == 8)
    assert stopped["mu"].shape == (1, 4)
    assert torch.equal(stopped["mu"][0], whole["mu"][0, :4])
    assert not stopped.complete


def test_bad_options():
    with pytest.raises(OptionError, match="bound to a model"):
        Pyro(pyro.infer.NUTS(model))
    with pytest.raises(OptionError, match="expected a Pyro kernel"):
        Pyro("NUTS")
    with pytest.raises(OptionError, match="learning_rate"):
        Pyro(AutoNormal, learning_rate=0)
    with pytest.raises(OptionError, match="returned 3"):
        ppl.infer(Program(model, Y), Pyro(lambda model: 3), draws=2)

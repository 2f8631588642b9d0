"""NUTS: exact on a Gaussian, resumable, interruptible, honest about errors."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError, ProgramError
from ppl.mcmc import NUTS
from ppl.program import Program

Y = torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64)


def gaussian(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("double", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


VARIANCE = 1 / (1 / 4 + 3)
MEAN = VARIANCE * float(Y.sum())


def test_gaussian_posterior_is_exact():
    """Mean and variance within 4.5 standard errors from the ESS of x and of its square; false alarm about 1e-5."""
    posterior = ppl.infer(Program(gaussian, Y), NUTS(warmup=300), draws=1000, chains=2, seed=1)
    mu = posterior["mu"]
    assert mu.dtype == torch.float64
    assert mu.shape == (2, 1000)
    square = (mu - MEAN) ** 2
    z_mean = (mu.mean() - MEAN) / math.sqrt(VARIANCE / arviz.ess(mu.numpy()))
    z_variance = (square.mean() / VARIANCE - 1) * math.sqrt(arviz.ess(square.numpy()) / 2)
    assert abs(z_mean) < 4.5
    assert abs(z_variance) < 4.5
    torch.testing.assert_close(posterior["double"], 2 * mu)
    assert posterior.complete
    assert posterior.cost.gradient_evals > 2000
    for name in ("diverging", "lp", "energy", "acceptance_rate", "tree_depth", "n_steps", "step_size"):
        assert posterior.info[name].shape == (2, 1000)
    assert posterior.info["r_hat"].shape == (2,)


def test_same_seed_same_draws_whatever_the_cores():
    program = Program(gaussian, Y)
    one = ppl.infer(program, NUTS(warmup=50), draws=20, chains=3, seed=4)
    two = ppl.infer(program, NUTS(warmup=50, cores=3), draws=20, chains=3, seed=4)
    other = ppl.infer(program, NUTS(warmup=50), draws=20, chains=3, seed=5)
    assert torch.equal(one["mu"], two["mu"])
    assert not torch.equal(one["mu"], other["mu"])
    assert len({float(c[0]) for c in one["mu"]}) == 3  # chains differ


def test_float32_program_gives_float32_draws():
    posterior = ppl.infer(Program(gaussian, Y.float()), NUTS(warmup=50), draws=20, chains=1)
    assert posterior["mu"].dtype == torch.float32


def test_error_of_the_model_reaches_the_user():
    """A Python error inside the density comes out as itself, not as the sampler's panic."""
    calls = []

    def broken(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        calls.append(1)
        if len(calls) > 60:
            raise KeyError("lost file")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    program = Program(broken, torch.tensor(0.5), batching="loop")
    with pytest.raises(KeyError, match="lost file"):
        ppl.infer(program, NUTS(warmup=50), draws=50, chains=1)


def test_failing_cholesky_is_a_divergence():
    """A matrix that is not positive definite somewhere ends a trajectory, not the run."""

    def model(y):
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        one = torch.ones((), dtype=rho.dtype)
        covariance = torch.stack([torch.stack([one, rho]), torch.stack([rho, one])])
        factor = torch.linalg.cholesky(covariance)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=rho.dtype), scale_tril=factor), obs=y)

    program = Program(model, torch.tensor([1.0, 1.2], dtype=torch.float64), batching="loop")
    posterior = ppl.infer(program, NUTS(warmup=100, radius=0.5), draws=100, chains=1)
    assert posterior["rho"].abs().max() < 1


def test_density_without_finite_point_is_one_clear_error():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.log(0 * mu.square()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError, match="finite"):
        ppl.infer(Program(model, torch.tensor(0.0)), NUTS(), draws=10)


def test_killed_run_keeps_finished_chains(tmp_path):
    """After a kill in the third chain, the first two are read back and the result is that of one run."""
    program = Program(gaussian, Y)
    backend = NUTS(warmup=50)
    whole = ppl.infer(program, backend, draws=30, chains=3, seed=2)

    class Killed(BaseException):
        pass

    def kill(event):
        if event.label == "chain 2" and event.step == 10:
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program, backend, 30, 3, 2, callback=kill, checkpoint=tmp_path / "run", checkpoint_every=0)
    labels = set()
    resumed = ppl.infer(
        program,
        backend,
        30,
        3,
        2,
        callback=lambda e: labels.add(e.label),
        checkpoint=tmp_path / "run",
        checkpoint_every=0,
    )
    assert labels == {"chain 2"}
    assert torch.equal(resumed["mu"], whole["mu"])
    assert not (tmp_path / "run").exists()


def test_interrupted_run_returns_what_there_is():
    program = Program(gaussian, Y)
    whole = ppl.infer(program, NUTS(warmup=50), draws=30, chains=2, seed=2)
    stopped = ppl.infer(program, NUTS(warmup=50), 30, 2, 2, callback=lambda e: e.step == 59)
    assert not stopped.complete
    assert stopped["mu"].shape == (1, 10)
    assert torch.equal(stopped["mu"][0], whole["mu"][0, :10])
    in_second = ppl.infer(program, NUTS(warmup=50), 30, 2, 2, callback=lambda e: e.label == "chain 1" and e.step == 59)
    assert torch.equal(in_second["mu"], whole["mu"][:1])  # more draws than two chains of ten
    in_warmup = ppl.infer(program, NUTS(warmup=50), 30, 2, 2, callback=lambda e: e.step == 5)
    assert in_warmup["mu"].shape == (1, 0)


def test_chains_in_two_modes_are_reported():
    """Two far modes: R-hat is large and the note names the site."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(x**2, 0.5), obs=y)

    posterior = ppl.infer(Program(model, torch.tensor(16.0)), NUTS(warmup=200), draws=200, chains=4, seed=0)
    assert posterior.info["r_hat"][0] > 1.5
    assert any("'x'" in note and "disagree" in note for note in posterior.attrs["notes"])


def test_many_problems_run_in_turn():
    posterior = ppl.infer(Program(gaussian, Y).over(y=torch.stack([Y, Y + 5])), NUTS(warmup=100), draws=200, chains=2)
    assert posterior["mu"].shape == (2, 2, 200)
    assert posterior.mean("mu")[1] - posterior.mean("mu")[0] > 4  # 5 * 12/13


def test_subsampled_plate_is_refused_by_name():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.raises(ProgramError, match=r"'rows'.*shows 2 of 3"):
        ppl.infer(Program(model, Y), NUTS(), draws=10)


@pytest.mark.parametrize(
    "options",
    [{"warmup": 0}, {"target_accept": 1.0}, {"max_depth": 0}, {"cores": 0}, {"radius": -1.0}, {"warmup": 1.5}],
)
def test_bad_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        NUTS(**options)


def test_low_rank_runs():
    posterior = ppl.infer(Program(gaussian, Y), NUTS(warmup=100, low_rank=True), draws=100, chains=1)
    assert abs(float(posterior.mean("mu")) - MEAN) < 0.5

"""HMC: exact on Gaussians even with coarse steps, the same after a kill, many problems at once."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError, ProgramError
from ppl.mcmc import HMC
from ppl.program import Program

PRECISION = torch.tensor([[2.0, 1.5, 0.0], [1.5, 3.0, 0.5], [0.0, 0.5, 40.0]], dtype=torch.float64)
Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def linear(y):
    """x ~ N(0, I), y ~ N(x, P^{-1}): posterior precision I + P, mean (I + P)^{-1} P y."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    pyro.deterministic("total", x.sum())
    pyro.sample("y", dist.MultivariateNormal(x, precision_matrix=PRECISION), obs=y)


def exact(y):
    covariance = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + PRECISION)
    return covariance @ PRECISION @ y, covariance.diagonal()


def z_scores(x, mean, variance):
    """Standardised errors of mean and variance of (chain, draw, d), each with its own ESS."""
    square = (x - mean) ** 2
    out = []
    for i in range(x.shape[-1]):
        n = arviz.ess(x[..., i].numpy(), method="mean")
        n_square = arviz.ess(square[..., i].numpy(), method="mean")
        out.append((x[..., i].mean() - mean[i]) / (variance[i] / n).sqrt())
        out.append((square[..., i].mean() / variance[i] - 1) * math.sqrt(n_square / 2))
    return torch.stack(out).abs()


@pytest.mark.parametrize("backend", [HMC(warmup=200), HMC(warmup=200, target_accept=0.5, length=1.0)], ids=repr)
def test_gaussian_posterior_is_exact(backend):
    """Six statistics within 5 standard errors: false alarm below 1e-5. Coarse steps show an error in the energy."""
    posterior = ppl.infer(Program(linear, Y), backend, draws=1000, seed=3)
    x = posterior["x"]
    assert x.shape == (16, 1000, 3)
    assert z_scores(x, *exact(Y)).max() < 5
    assert 0.4 < float(posterior.info["acceptance_rate"].mean()) < 0.95
    torch.testing.assert_close(posterior["total"], x.sum(-1))
    assert posterior.info["r_hat"].shape == (2,)
    assert not posterior.info["diverging"].any()
    energy, lp = posterior.info["energy"], posterior.info["lp"]
    assert bool((energy >= -lp - 1e-9).all())  # kinetic energy is positive
    assert abs(float((energy + lp).mean()) - 1.5) < 0.1 * 1.5  # and dim / 2 on average, up to the rejected ones


def test_few_chains_are_enough():
    posterior = ppl.infer(Program(linear, Y), HMC(warmup=300), draws=2000, chains=1, seed=0)
    assert z_scores(posterior["x"], *exact(Y)).max() < 5


def test_bounded_support_and_jacobian():
    """Gamma prior on a positive site, no data of note: mean and variance as the prior says (5 standard errors)."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=torch.float64), 2.0))
        pyro.sample("y", dist.Poisson(rate), obs=y)

    posterior = ppl.infer(Program(model, torch.tensor(4.0, dtype=torch.float64)), HMC(warmup=200), draws=500, seed=1)
    shape, rate = 7.0, 3.0
    x = posterior["rate"]
    n = arviz.ess(x.numpy(), method="mean")
    assert abs(float(x.mean()) - shape / rate) < 5 * math.sqrt(shape / rate**2 / n)
    n_square = arviz.ess((x**2).numpy(), method="mean")
    second, fourth = shape * (shape + 1) / rate**2, shape * (shape + 1) * (shape + 2) * (shape + 3) / rate**4
    assert abs(float((x**2).mean()) - second) < 5 * math.sqrt((fourth - second**2) / n_square)


def test_many_problems_at_once():
    """Each problem has its own data and its own scale of step; means agree with the exact ones."""
    ys = torch.stack([Y, -Y, 3 * Y])
    posterior = ppl.infer(Program(linear, Y).over(y=ys), HMC(warmup=200), draws=400, chains=8, seed=5)
    assert posterior["x"].shape == (3, 8, 400, 3)
    assert posterior.info["r_hat"].shape == (3, 2)
    assert posterior.info["step_size"].shape == (3, 8, 400)
    for i, y in enumerate(ys):
        assert z_scores(posterior["x"][i], *exact(y)).max() < 5


def test_problems_of_different_scale_take_different_steps():
    """Lanes of the problem with the shorter trajectory wait; both remain exact."""

    def model(y, s):
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(x + w, s), obs=y)

    scales = torch.tensor([1.0, 0.1], dtype=torch.float64)
    program = Program(model, torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    over = program.over(y=torch.tensor([1.0, 1.0], dtype=torch.float64), s=scales)
    posterior = ppl.infer(over, HMC(warmup=150), draws=200, chains=8, seed=1)
    steps = posterior.info["n_steps"].double().mean((1, 2))
    assert steps[1] > 1.5 * steps[0]
    for i, s in enumerate(scales):
        total = posterior["x"][i] + posterior["w"][i]
        variance = 2 * s**2 / (2 + s**2)
        assert z_scores(total[..., None], torch.stack([2 / (2 + s**2)]), torch.stack([variance])).max() < 5


def test_a_killed_run_resumes_to_the_same_draws(tmp_path):
    program, backend = Program(linear, Y), HMC(warmup=60)
    whole = ppl.infer(program, backend, draws=40, chains=4, seed=7)

    class Killed(BaseException):
        pass

    for at in (30, 80):  # in warmup, among the draws
        folder = tmp_path / str(at)

        def kill(event, at=at):
            if event.step == at:
                raise Killed

        with pytest.raises(Killed):
            ppl.infer(program, backend, 40, 4, 7, callback=kill, checkpoint=folder, checkpoint_every=0)
        steps = []
        resumed = ppl.infer(
            program,
            backend,
            40,
            4,
            7,
            callback=lambda e, steps=steps: steps.append(e.step),
            checkpoint=folder,
            checkpoint_every=0,
        )
        assert steps[0] in (at, at + 1)
        assert torch.equal(resumed["x"], whole["x"])
        assert torch.equal(resumed.info["energy"], whole.info["energy"])
        assert resumed.cost.gradient_evals >= whole.cost.gradient_evals


def test_interrupted_run_keeps_its_draws():
    program = Program(linear, Y)
    whole = ppl.infer(program, HMC(warmup=60), draws=40, chains=4, seed=7)
    stopped = ppl.infer(program, HMC(warmup=60), 40, 4, 7, callback=lambda e: e.step == 69)
    assert not stopped.complete
    assert torch.equal(stopped["x"], whole["x"][:, :10])


def test_divergences_are_counted():
    """A funnel with a step that is too long for its neck: divergences are flagged, not hidden."""

    def funnel(y):
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
        with pyro.plate("n", 9):
            x = pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))
        pyro.sample("y", dist.Normal(x.sum(), 100.0), obs=y)

    posterior = ppl.infer(
        Program(funnel, torch.tensor(0.0, dtype=torch.float64)), HMC(warmup=100, target_accept=0.4), draws=300
    )
    assert posterior.info["diverging"].any()


def test_subsampled_plate_is_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.raises(ProgramError, match="rows"):
        ppl.infer(Program(model, Y), HMC(), draws=10)


@pytest.mark.parametrize(
    "options", [{"warmup": 1}, {"target_accept": 0.0}, {"length": -1.0}, {"max_steps": 0}, {"radius": float("nan")}]
)
def test_bad_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        HMC(**options)


def test_float32_and_same_seed():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    program = Program(model, torch.tensor(1.0))
    one, two = (ppl.infer(program, HMC(warmup=30), draws=20, chains=3, seed=9)["x"] for _ in range(2))
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    assert not torch.equal(one, ppl.infer(program, HMC(warmup=30), draws=20, chains=3, seed=10)["x"])

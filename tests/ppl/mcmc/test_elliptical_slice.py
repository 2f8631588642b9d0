"""Elliptical slices: exact on conjugate Gaussians, refuse what is not Gaussian, count what they evaluate."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import CapabilityError, OptionError, ProgramError
from ppl.mcmc import EllipticalSlice
from ppl.program import Program

FACTOR = torch.tensor([[1.0, 0.0], [0.8, 0.5]], dtype=torch.float64)
LOC = torch.tensor([1.0, -1.0], dtype=torch.float64)
Y = torch.tensor([2.0, 0.5], dtype=torch.float64)


def model(y):
    """x ~ MVN(LOC, F F'), w ~ N(3, 2) in a plate of two, y ~ N(x + w, 1)."""
    x = pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=FACTOR))
    with pyro.plate("two", 2):
        w = pyro.sample("w", dist.Normal(torch.tensor(3.0, dtype=torch.float64), 2.0))
        pyro.sample("y", dist.Normal(x + w, 1.0), obs=y)


def exact(y):
    """Moments of x and w given y, from the joint Gaussian."""
    eye = torch.eye(2, dtype=torch.float64)
    prior = torch.block_diag(FACTOR @ FACTOR.T, 4 * eye)
    mean = torch.cat([LOC, torch.full((2,), 3.0, dtype=torch.float64)])
    a = torch.cat([eye, eye], dim=1)
    gain = prior @ a.T @ torch.linalg.inv(a @ prior @ a.T + eye)
    return mean + gain @ (y - a @ mean), (prior - gain @ a @ prior).diagonal()


def z_scores(x, mean, variance):
    square = (x - mean) ** 2
    out = []
    for i in range(x.shape[-1]):
        n = arviz.ess(x[..., i].numpy(), method="mean")
        n_square = arviz.ess(square[..., i].numpy(), method="mean")
        out.append((x[..., i].mean() - mean[i]) / (variance[i] / n).sqrt())
        out.append((square[..., i].mean() / variance[i] - 1) * math.sqrt(n_square / 2))
    return torch.stack(out).abs()


def test_conjugate_gaussian_is_exact():
    """Eight statistics within 5 standard errors: false alarm below 1e-5."""
    posterior = ppl.infer(Program(model, Y), EllipticalSlice(warmup=50), draws=600, seed=2)
    both = torch.cat([posterior["x"], posterior["w"]], dim=-1)
    assert both.shape == (16, 600, 4)
    assert z_scores(both, *exact(Y)).max() < 5
    evaluations = posterior.info["n_steps"].double()
    assert evaluations.min() >= 1
    assert posterior.cost.likelihood_evals >= evaluations.sum()
    program = Program(model, Y)
    joint = program.log_joint({"x": posterior["x"][0, :3], "w": posterior["w"][0, :3]})
    torch.testing.assert_close(posterior.info["lp"][0, :3], joint)


def test_many_problems_with_their_own_priors():
    """Prior locations are data and differ between problems."""

    def shifted(loc, y):
        x = pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def number(*v):
        return torch.tensor(v, dtype=torch.float64)

    program = Program(shifted, number(0.0)[0], number(0.0)[0]).over(
        loc=number(-5.0, 0.0, 5.0), y=number(-6.0, 2.0, 9.0)
    )
    posterior = ppl.infer(program, EllipticalSlice(warmup=20), draws=400, chains=8, seed=0)
    assert posterior["x"].shape == (3, 8, 400)
    for i, mean in enumerate((-5.5, 1.0, 7.0)):
        assert z_scores(posterior["x"][i][..., None], number(mean), number(0.5)).max() < 5


def test_resumes_to_the_same_draws(tmp_path):
    program, backend = Program(model, Y), EllipticalSlice(warmup=10, thin=2)
    whole = ppl.infer(program, backend, draws=20, chains=3, seed=4)

    class Killed(BaseException):
        pass

    def kill(event):
        if event.step == 25:
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program, backend, 20, 3, 4, callback=kill, checkpoint=tmp_path / "run", checkpoint_every=0)
    resumed = ppl.infer(program, backend, 20, 3, 4, checkpoint=tmp_path / "run", checkpoint_every=0)
    assert torch.equal(resumed["x"], whole["x"])
    stopped = ppl.infer(program, backend, 20, 3, 4, callback=lambda e: e.step == 15)
    assert not stopped.complete
    assert torch.equal(stopped["x"], whole["x"][:, :3])


def test_refuses_what_is_not_gaussian_by_name():
    def positive(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    with pytest.raises(CapabilityError, match="'scale' is a HalfNormal"):
        ppl.infer(Program(positive, Y[0]), EllipticalSlice(), draws=5)

    def hierarchy(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(CapabilityError, match="'x' has parameters that depend on another latent"):
        ppl.infer(Program(hierarchy, Y[0]), EllipticalSlice(), draws=5)


def test_no_finite_likelihood():
    def never(y):
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("never", torch.log(0 * x.square()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(ProgramError, match="finite likelihood"):
        ppl.infer(Program(never, Y[0]), EllipticalSlice(), draws=5)


@pytest.mark.parametrize("options", [{"warmup": -1}, {"thin": 0}])
def test_bad_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        EllipticalSlice(**options)


@pytest.mark.parametrize("problems", [False, True])
def test_learned_ellipse_is_exact_and_survives_a_kill(problems, tmp_path):
    """Data 200 times as precise as the prior along a turned axis: the prior's ellipse takes 1e4 transitions."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)

    def narrow(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ direction, 0.005), obs=y)

    program = Program(narrow, torch.tensor(1.0, dtype=torch.float64))
    if problems:
        program = program.over(y=torch.tensor([1.0, -0.5], dtype=torch.float64))
    backend = EllipticalSlice(warmup=200)
    run = {"draws": 100, "chains": 16, "seed": 1}
    posterior = ppl.infer(program, backend, **run)
    for i, y in enumerate((1.0, -0.5) if problems else (1.0,)):
        x = posterior["x"][i] if problems else posterior["x"]
        along, across = x @ direction, x @ torch.tensor([-0.8, 0.6], dtype=torch.float64)
        shrunk = 1 / (1 + 0.005**2)
        both = torch.stack([(along - y * shrunk) / (0.005 * shrunk**0.5), across], -1)
        assert z_scores(both, torch.zeros(2).double(), torch.ones(2).double()).max() < 5

    class Killed(BaseException):
        pass

    def kill(event):
        if event.step == 210:
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program, backend, **run, callback=kill, checkpoint=tmp_path / "run", checkpoint_every=0)
    resumed = ppl.infer(program, backend, **run, checkpoint=tmp_path / "run", checkpoint_every=0)
    assert torch.equal(resumed["x"], posterior["x"])

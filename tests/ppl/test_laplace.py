"""Laplace: the exact normal where the posterior is one, the formula where it is not, clear words without a mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError, ProgramError
from ppl.laplace import hessian

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, dtype=F64, generator=GENERATOR) * tensor([1.0, 10.0, 0.1, 1.0])
Y = X @ tensor([1.0, -0.2, 5.0, 0.0]) + 0.5 * torch.randn(30, dtype=F64, generator=GENERATOR)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4, dtype=F64), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def coin(k):
    p = pyro.sample("p", dist.Beta(tensor(2.0), 3.0))
    pyro.sample("k", dist.Binomial(tensor(20.0), p), obs=k)


def answer():
    covariance = torch.linalg.inv(torch.eye(4, dtype=F64) / 4 + 4 * X.T @ X)
    return 4 * covariance @ X.T @ Y, covariance


def test_gaussian_posterior():
    """Mode, covariance and evidence to rounding, for columns whose scales differ a hundredfold."""
    mean, covariance = answer()
    posterior = ppl.infer(ppl.Program(regression, X, Y), ppl.Laplace(), draws=4000, seed=0)
    guide = posterior.guide
    torch.testing.assert_close(guide.params["loc"], mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(guide.guide.covariance(guide.params), covariance, rtol=1e-8, atol=1e-10)
    marginal = dist.MultivariateNormal(torch.zeros(30, dtype=F64), 4 * X @ X.T + 0.25 * torch.eye(30, dtype=F64))
    assert abs(float(posterior.info["laplace_log_evidence"] - marginal.log_prob(Y))) < 1e-8
    assert abs(float(posterior.info["elbo"] - marginal.log_prob(Y))) < 1e-8
    assert posterior.log_evidence is None  # an approximation without an error is not reported as an estimate
    z = (posterior.mean("w") - mean) / (covariance.diagonal() / 4000).sqrt()
    assert float(z.abs().max()) < 4.5  # false alarm below 1e-4
    ratio = (posterior["w"][0] - mean).square().mean(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / 4000)
    assert posterior.attrs["backend"] == "Laplace"
    assert posterior.cost.gradient_evals > 0


def test_formula_on_the_logit_scale():
    """Beta-binomial: p (1 - p) weights the density of z = logit p, whose mode is 17/25 and curvature 25 p (1 - p)."""
    posterior = ppl.infer(ppl.Program(coin, tensor(15.0)), ppl.Laplace(), draws=100)
    p = 17 / 25
    assert abs(float(torch.sigmoid(posterior.guide.params["loc"])) - p) < 1e-8
    assert abs(float(posterior.guide.params["log_scale"].exp()) - (25 * p * (1 - p)) ** -0.5) < 1e-8
    choose = math.lgamma(21) - math.lgamma(16) - math.lgamma(6)
    log_beta = math.lgamma(2) + math.lgamma(3) - math.lgamma(5)
    height = choose - log_beta + 17 * math.log(p) + 8 * math.log(1 - p)
    expected = height + 0.5 * math.log(2 * math.pi) - 0.5 * math.log(25 * p * (1 - p))
    assert abs(float(posterior.info["laplace_log_evidence"]) - expected) < 1e-7  # Pyro rounds binomials to 1e-9


def test_hessian_by_both_ways(monkeypatch):
    """Differentiated twice and by differences of gradients: the same, symmetric, at a point that is no mode."""

    def model(y):
        s = pyro.sample("s", dist.LogNormal(tensor(0.0), 0.5))
        x = pyro.sample("x", dist.StudentT(tensor(3.0), 0.0, s))
        pyro.sample("y", dist.Normal(x.sin(), 1.0), obs=y)

    flat = ppl.Program(model, tensor(1.0)).flat()
    z = tensor([0.3, -0.7])
    full = hessian(flat, z)
    steps = 1e-5 * torch.eye(2, dtype=F64)
    ahead, behind = (flat.log_density_and_grad(z + side * steps)[1] for side in (1, -1))
    torch.testing.assert_close(full, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)

    once = torch.autograd.grad

    def refuse(outputs, *args, **kwargs):
        if isinstance(outputs, torch.Tensor) and kwargs.get("create_graph"):
            raise RuntimeError("no second derivative")
        return once(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    torch.testing.assert_close(hessian(flat, z), full, rtol=1e-6, atol=1e-7)


def test_the_highest_of_two_modes_with_a_note():
    def model(y):
        x = pyro.sample("x", dist.Normal(tensor(0.0), 3.0))
        parts = dist.Normal(torch.stack([x - 3, x + 3]), 0.2)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(tensor([0.3, 0.7])), parts), obs=y)

    posterior = ppl.infer(ppl.Program(model, tensor(0.0)), ppl.Laplace(starts=16), draws=100, seed=0)
    assert abs(float(posterior.guide.params["loc"]) + 3 * 9 / 9.04) < 1e-6
    assert any("2 different log densities" in note for note in posterior.attrs["notes"])
    assert posterior.info["mode_log_density"].shape == (16,)


def test_unbounded_density_is_refused():
    """The centred hierarchy rises without bound as tau falls to zero."""
    y = tensor([28.0, 8, -3, 7, -1, 1, 18, 12])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(tensor(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(tensor(5.0)))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    with pytest.raises(ProgramError, match=r"not positive definite.*along .*(mu|tau|theta).*non-centred"):
        ppl.infer(ppl.Program(model, y), ppl.Laplace(), draws=10)


def test_flat_direction_is_refused():
    def model(y):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    with pytest.raises(ProgramError, match="1 of 2 eigenvalues are zero or below"):
        ppl.infer(ppl.Program(model, tensor(1.0)), ppl.Laplace(), draws=10)


def test_save_load_and_go_on(tmp_path):
    """The file is that of any fitted guide, and SVI can go on from it."""
    program = ppl.Program(coin, tensor(15.0))
    fitted = ppl.Laplace().fit(program)
    fitted.save(tmp_path / "laplace.safetensors")
    loaded = ppl.FittedGuide.load(tmp_path / "laplace.safetensors", program)
    assert torch.equal(loaded.params["loc"], fitted.params["loc"])
    z = torch.zeros(2, 1, dtype=F64)
    assert torch.equal(loaded.log_prob(z), fitted.log_prob(z))
    better = ppl.SVI(guide=ppl.FullRank(), steps=200, particles=64).fit(program, start=fitted, seed=0)
    assert float(better.elbo(20000).value) > float(fitted.elbo(20000).value)


def test_float32():
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), torch.tensor([1.0, 10.0, 0.1])).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    posterior = ppl.infer(ppl.Program(model, torch.ones(3)), ppl.Laplace(), draws=10)
    expected = torch.tensor([0.5, 100 / 101, 0.01 / 1.01])
    torch.testing.assert_close(posterior.guide.params["loc"], expected, rtol=1e-4, atol=1e-4)
    assert posterior["x"].dtype == torch.float32


def test_interrupted_on_the_way():
    posterior = ppl.infer(ppl.Program(regression, X, Y), ppl.Laplace(), draws=20, callback=lambda e: True)
    assert not posterior.complete
    assert posterior["w"].shape == (1, 20, 4)
    assert any("on the way to the mode" in note for note in posterior.attrs["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": 0}, "starts"),
        ({"steps": 1.5}, "steps"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"radius": -1.0}, "rad"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        ppl.Laplace(**options)

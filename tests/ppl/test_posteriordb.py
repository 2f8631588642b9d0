"""Posteriors agree with Stan's references: |mean - mean_ref| <= 4 sqrt(mcse^2 + mcse_ref^2), sd within ten per cent.

Four combined standard errors for each of up to 26 means: a correct program fails one model in about 600 to 16000 runs.
An sd has a relative standard error of sqrt((kurtosis - 1) / (4 ess of the squares)). Nearly Gaussian posteriors are
known to 0.025 by 2000 draws; tau of the eight schools (kurtosis 8, ess 0.17 of the draws, measured) needs 20000.
"""

from __future__ import annotations

import json
import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam

import ppl
from ppl.mcmc import HMC, NUTS
from ppl.program import Program


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def flat_prior(name, support=constraints.real, shape=()):
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


def eight_schools(data):
    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    non_centred = pyro.poutine.reparam(model, {"theta": LocScaleReparam(0.0)})
    return Program(non_centred, tensor(data["y"]), tensor(data["sigma"])), ["theta", "mu", "tau"]


def kidiq(data):
    def model(score, iq):
        beta = flat_prior("beta", shape=(2,))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        with pyro.plate("child", len(score)):
            pyro.sample("score", dist.Normal(beta[0] + beta[1] * iq, sigma), obs=score)

    return Program(model, tensor(data["kid_score"]), tensor(data["mom_iq"])), ["beta", "sigma"]


def ark(data):
    order = data["K"]

    def model(lags, y):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)

    y = tensor(data["y"])
    lags = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], dim=1)
    return Program(model, lags, y[order:]), ["alpha", "beta", "sigma"]


def garch(data):
    first = float(data["sigma1"])

    def model(y):
        mu = flat_prior("mu")
        alpha0 = flat_prior("alpha0", constraints.positive)
        alpha1 = flat_prior("alpha1", constraints.unit_interval)
        beta1 = flat_prior("beta1", constraints.interval(0.0, 1 - alpha1))  # a support that depends on another site
        variance = [torch.full_like(mu, first**2)]
        for value in y[:-1]:
            variance.append(alpha0 + alpha1 * (value - mu) ** 2 + beta1 * variance[-1])
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(mu, torch.stack(variance).sqrt()), obs=y)

    return Program(model, tensor(data["y"])), ["mu", "alpha0", "alpha1", "beta1"]


def gp_regression(data):
    def model(x, y):
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        distance = (x[:, None] - x[None, :]) ** 2
        kernel = alpha**2 * torch.exp(-distance / (2 * rho**2)) + sigma * torch.eye(len(x), dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance_matrix=kernel), obs=y)

    return Program(model, tensor(data["x"]), tensor(data["y"])), ["rho", "alpha", "sigma"]


def mixture(data):
    def model(y):
        mu = flat_prior("mu", constraints.ordered_vector, (2,))
        pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        weights = dist.Categorical(torch.stack([theta, 1 - theta]))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)

    return Program(model, tensor(data["y"])), ["mu", "sigma", "theta"]


def hidden_markov(data):
    """The forward recursion by hand: a hundred enumerated sites are a graph of thousands of nodes."""

    def model(y):
        rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(torch.ones(2, dtype=y.dtype))) for k in range(2)]
        log_transition = torch.stack(rows).log()
        mu = flat_prior("mu", constraints.positive_ordered_vector, (2,))
        pyro.factor("mu_prior", dist.Normal(tensor([3.0, 10.0]), 1.0).log_prob(mu).sum())
        emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
        forward = emission[0]
        for row in emission[1:]:
            forward = torch.logsumexp(forward[:, None] + log_transition, dim=0) + row
        pyro.sample("y", dist.Normal(0.0, 1.0).expand(y.shape).mask(False).to_event(1), obs=y)
        pyro.factor("likelihood", torch.logsumexp(forward, dim=0))

    return Program(model, tensor(data["y"])), ["theta1", "theta2", "mu"]


def diamonds(data):
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
        sigma = flat_prior("sigma", constraints.positive)
        pyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)

    x = tensor(data["X"])[:, 1:]
    return Program(model, x - x.mean(0), tensor(data["Y"])), ["b", "Intercept", "sigma"]


MODELS = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidiq,
    "arK-arK": ark,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gp_regression,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "hmm_example-hmm_example": hidden_markov,
    "diamonds-diamonds": diamonds,
}


def build(folder, name):
    return MODELS[name](json.loads((folder / f"{name}.data.json").read_text()))


def compare(folder, name, posterior, sites):
    """Rows (parameter, mean error in combined standard errors, sd ratio)."""
    reference = json.loads((folder / f"{name}.reference.json").read_text())
    columns = [posterior[s].flatten(2) if posterior[s].ndim > 2 else posterior[s][..., None] for s in sites]
    draws = torch.cat(columns, dim=-1)
    assert draws.shape[-1] == len(reference["parameter_order"])
    rows = []
    for i, parameter in enumerate(reference["parameter_order"]):
        x, expected = draws[..., i].numpy(), reference["summary"][parameter]
        error = float(arviz.mcse(x, method="mean"))
        z = (x.mean() - expected["mean"]) / math.hypot(error, expected["mcse_mean"])
        rows.append((parameter, z, x.std(ddof=1) / expected["sd"]))
    return rows


def agree(rows):
    print(*(f"{p:12s} {z:6.2f} {ratio:6.3f}" for p, z, ratio in rows), sep="\n")
    assert max(abs(z) for _, z, _ in rows) <= 4, rows
    assert all(0.9 <= ratio <= 1.1 for *_, ratio in rows), rows


@pytest.mark.parametrize("name", ["kidiq-kidscore_momiq", "gp_pois_regr-gp_regr"])
def test_nuts_agrees_with_the_reference(posteriordb, name):
    program, sites = build(posteriordb, name)
    posterior = ppl.infer(program, NUTS(warmup=300), draws=500, chains=4, seed=1)
    agree(compare(posteriordb, name, posterior, sites))
    assert float(posterior.info["r_hat"].max()) < 1.03
    assert posterior.info["diverging"].float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_nuts_agrees_with_every_reference(posteriordb, name):
    program, sites = build(posteriordb, name)
    draws = 5000 if name.startswith("eight") else 1000
    posterior = ppl.infer(program, NUTS(warmup=500), draws=draws, chains=4, seed=1)
    agree(compare(posteriordb, name, posterior, sites))
    assert float(posterior.info["r_hat"].max()) < 1.03
    assert posterior.info["diverging"].float().mean() < 0.01


@pytest.mark.parametrize("name", list(MODELS))
def test_density_in_c_is_that_of_the_graph(posteriordb, name):
    """Value and gradient at three points, within 1e-10 of their size."""
    program, _ = build(posteriordb, name)
    flat = program.flat()
    density = flat.native(flat.initial(1, torch.Generator().manual_seed(0)), 10**9)
    assert density is not None, program.notes
    state = density.state()
    for seed in range(3):
        z = flat.initial(1, torch.Generator().manual_seed(seed))
        value, gradient = flat.log_density_and_grad(z)
        ours, slope = state(z[0].numpy())
        assert ours == pytest.approx(value.item(), rel=1e-10, abs=1e-10)
        assert (torch.from_numpy(slope) - gradient[0]).abs().max() <= 1e-10 * gradient.abs().max()


def test_hmc_agrees_on_eight_schools(posteriordb):
    name = "eight_schools-eight_schools_noncentered"
    program, sites = build(posteriordb, name)
    posterior = ppl.infer(program, HMC(), draws=1500, seed=1)
    agree(compare(posteriordb, name, posterior, sites))
    assert float(posterior.info["r_hat"].max()) < 1.02


@pytest.mark.slow
def test_hmc_agrees_on_regression(posteriordb):
    name = "kidiq-kidscore_momiq"
    program, sites = build(posteriordb, name)
    agree(compare(posteriordb, name, ppl.infer(program, HMC(), draws=500, seed=1), sites))

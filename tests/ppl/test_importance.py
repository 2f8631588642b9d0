"""Importance: exact evidence from the prior and from fits, guides corrected, smoothing, k-hat, all data of a plate."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import NotFiniteError, OptionError, ProgramError, ShapeError

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


def coin(k):
    p = pyro.sample("p", dist.Beta(tensor(2.0), 3.0))
    pyro.sample("k", dist.Binomial(tensor(20.0), p), obs=k)


def log_beta(a, b):
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


COIN_EVIDENCE = math.lgamma(21) - math.lgamma(16) - math.lgamma(6) + log_beta(17, 8) - log_beta(2, 3)


def pair(y):
    """x ~ N(0, I), the sum seen with sd 1.5: evidence N(y; 0, 4.25), each x correlated with the other by -0.31."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.5), obs=y)


PAIR_MEAN = 1.5 / 4.25
PAIR_VARIANCE = 1 - 1 / 4.25
PAIR_EVIDENCE = -0.5 * 1.5**2 / 4.25 - 0.5 * math.log(2 * math.pi * 4.25)


def score(posterior, exact):
    value, stderr = posterior.log_evidence
    return abs(float(value) - exact) / float(stderr)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    "proposal",
    [None, ppl.SVI(steps=300, lr=0.05), ppl.Pathfinder(), ppl.Laplace()],
    ids=["prior", "SVI", "Pathfinder", "Laplace"],
)
def test_beta_binomial(proposal, smooth):
    """Evidence and mean within 4.5 errors: false alarm 1e-5 each. The power is in the error, 0.03 nats at most."""
    posterior = ppl.infer(ppl.Program(coin, tensor(15.0)), ppl.Importance(proposal, smooth), draws=4000, seed=1)
    assert posterior.log_weight.shape == (1, 4000)
    assert score(posterior, COIN_EVIDENCE) < 4.5
    assert float(posterior.log_evidence.stderr) < 0.035
    worth = float(posterior.ess("p"))
    assert abs(float(posterior.mean("p")) - 17 / 25) < 4.5 * math.sqrt(17 * 8 / (25**2 * 26) / worth)
    assert posterior.cost.density_evals >= 4000


def test_the_error_of_the_evidence_is_honest():
    """Fifty runs: mean squared standardised error within chi-squared at 1e-4 on both sides, [0.37, 1.96]."""
    program = ppl.Program(coin, tensor(15.0))
    z = []
    for seed in range(50):
        value, stderr = ppl.infer(program, ppl.Importance(), draws=500, seed=seed).log_evidence
        z.append((float(value) - COIN_EVIDENCE) / float(stderr))
    assert 0.37 < float(tensor(z).square().mean()) < 1.96


def test_a_fit_is_corrected():
    """Mean-field has 0.905 of the variance, its weighted draws all of it: within 4.5 errors, false alarm 1e-5 each."""
    fitted = ppl.SVI(steps=600, lr=0.05).fit(ppl.Program(pair, tensor(1.5)), seed=0)
    plain, corrected = fitted.posterior(20000, seed=1), fitted.corrected(20000, seed=1)
    assert torch.equal(plain["x"], corrected["x"])
    assert float((plain.sd("x")[0] ** 2) / PAIR_VARIANCE) < 0.95
    worth = float(corrected.ess("x")[0])
    assert worth < 19500
    assert float((corrected.mean("x") - PAIR_MEAN).abs().max()) < 4.5 * math.sqrt(PAIR_VARIANCE / worth)
    weights = corrected.weights.reshape(-1, 1)
    square = (corrected["x"][0] - PAIR_MEAN).square()
    estimate = (weights * square).sum(0)
    error = (weights.square() * (square - estimate).square()).sum(0).sqrt()  # of a weighted mean
    assert float(((estimate - PAIR_VARIANCE) / error).abs().max()) < 4.5
    assert float(error.max()) < 0.02 * PAIR_VARIANCE
    assert score(corrected, PAIR_EVIDENCE) < 4.5
    assert corrected.attrs["backend"] == "Importance"
    assert corrected.attrs["exact"] == "in_the_limit"
    assert corrected.cost.density_evals == 20000
    assert fitted.elbo().value < PAIR_EVIDENCE < float(fitted.elbo().value) + 1


def test_a_fit_for_other_data():
    """A guide of one program weighs draws of another with the same latents: the evidence is that of the other data."""
    wide = ppl.Laplace().fit(ppl.Program(pair, tensor(1.0)))
    posterior = ppl.infer(ppl.Program(pair, tensor(1.5)), ppl.Importance(wide), draws=4000, seed=0)
    assert score(posterior, PAIR_EVIDENCE) < 4.5
    assert float(posterior.log_evidence.stderr) > 1e-4


def test_other_latents_are_refused():
    fitted = ppl.Laplace().fit(ppl.Program(coin, tensor(15.0)))
    with pytest.raises(ShapeError, match="fitted to the sites"):
        ppl.infer(ppl.Program(pair, tensor(1.5)), ppl.Importance(fitted), draws=10)


def test_smoothing_keeps_the_evidence_and_tames_the_tail():
    """From a prior that is too wide the largest smoothed weight is smaller; the evidence is of the raw ones."""
    program = ppl.Program(pair, tensor(4.0))
    fitted = ppl.SVI(steps=300, lr=0.05).fit(program, seed=0)
    raw, smooth = (fitted.corrected(2000, seed=3, smooth=s) for s in (False, True))
    assert raw.log_evidence == smooth.log_evidence
    assert float((raw.weights - smooth.weights).abs().max()) > 0
    assert int((raw.weights != smooth.weights).sum()) > 100
    order = raw.log_weight.reshape(-1).argsort()
    assert bool((smooth.log_weight.reshape(-1)[order].diff() >= -1e-9).all())


def test_k_hat_says_so():
    """A prior a hundred times wider than the posterior in ten dimensions is no proposal."""

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(10, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 0.05).to_event(1), obs=y)

    posterior = ppl.infer(ppl.Program(model, torch.ones(10, dtype=F64)), ppl.Importance(), draws=1000)
    assert float(posterior.info["pareto_k"]) > 0.7
    assert any("k-hat" in note and "the prior is too far" in note for note in posterior.attrs["notes"])
    fine = ppl.infer(ppl.Program(coin, tensor(15.0)), ppl.Importance(), draws=1000)
    assert float(fine.info["pareto_k"]) < 0.7
    assert not any("k-hat" in note for note in fine.attrs["notes"])


def test_dead_draws_count_as_zero():
    """P(x > 1) = 0.158655 from draws of which most are dead; 4.5 errors."""

    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("cut", torch.where(x > 1, 0.0, -math.inf))

    posterior = ppl.infer(ppl.Program(model), ppl.Importance(), draws=4000)
    assert score(posterior, math.log(0.158655)) < 4.5
    assert abs(float(posterior.log_evidence.stderr) - math.sqrt((1 / 0.158655 - 1) / 4000)) < 0.004
    assert abs(float(posterior.mean("x")) - 1.52514) < 4.5 * 0.4463 / math.sqrt(float(posterior.ess("x")))


def test_all_dead():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("cut", torch.where(x > 100, 0.0, -math.inf))

    with pytest.raises(NotFiniteError, match="all 50 draws of the proposal have weight zero"):
        ppl.infer(ppl.Program(model), ppl.Importance(), draws=50)


def plate(y, shown):
    mu = pyro.sample("mu", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("n", 12, subsample_size=shown) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def test_subsampled_plates_are_weighed_on_all_data():
    """Batches that divide the plate: evidence of all twelve data. Others would be noise, and the prior has no fit."""
    y = torch.linspace(-1, 2, 12, dtype=F64)
    exact = float(
        dist.MultivariateNormal(torch.zeros(12, dtype=F64), torch.eye(12, dtype=F64) + torch.ones(12, 12)).log_prob(y)
    )
    fit = ppl.SVI(steps=400, lr=0.05)
    posterior = ppl.infer(ppl.Program(plate, y, 4), ppl.Importance(fit), draws=2000)
    assert score(posterior, exact) < 4.5
    assert float(posterior.log_evidence.stderr) < 0.05
    with pytest.raises(ProgramError, match="do not divide"):
        ppl.infer(ppl.Program(plate, y, 5), ppl.Importance(fit), draws=10)
    with pytest.raises(ProgramError, match="subsampled"):
        ppl.infer(ppl.Program(plate, y, 4), ppl.Importance(), draws=10)


def test_chains_and_interruption_keep_what_was_weighed():
    program = ppl.Program(coin, tensor(15.0))
    whole = ppl.infer(program, ppl.Importance(), draws=700, chains=2, seed=4)
    part = ppl.infer(program, ppl.Importance(), draws=700, chains=2, seed=4, callback=lambda e: True)
    kept = part["p"].shape[1]
    assert 0 < kept < 700
    assert not part.complete
    assert torch.equal(part["p"], whole["p"][:, :kept])
    assert torch.equal(part.log_weight, whole.log_weight[:, :kept])


@pytest.mark.parametrize("proposal", [3, ppl.HMC(), ppl.SVI, "prior"])
def test_bad_proposals(proposal):
    with pytest.raises(OptionError, match="proposal must be None"):
        ppl.Importance(proposal)


def test_bad_smooth():
    with pytest.raises(OptionError, match="smooth"):
        ppl.Importance(smooth=2)
    with pytest.raises(OptionError, match="draws"):
        ppl.Laplace().fit(ppl.Program(coin, tensor(15.0))).corrected(0)

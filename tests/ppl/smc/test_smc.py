"""SMC: evidence and posteriors known in closed form, weights of modes, the errors that ancestry shows, the dead."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from models.references import gaussian_problem
from ppl.diagnostics import z_bound
from ppl.errors import NotFiniteError, OptionError, ProgramError
from ppl.smc.moves import Moves, Whitening
from ppl.smc.smc import next_power, worst_ess
from ppl.smc.tempered import PriorDraws, TemperedDensity

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, dtype=F64, generator=GENERATOR)
Y = X @ tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(20, dtype=F64, generator=GENERATOR)


def regression(x, y):
    """w ~ N(0, 4 I), y ~ N(x w, 1/4)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1))
    pyro.deterministic("total", w.sum())
    pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def regression_answer():
    covariance = torch.linalg.inv(torch.eye(3, dtype=F64) / 4 + 4 * X.T @ X)
    marginal = dist.MultivariateNormal(torch.zeros(20, dtype=F64), 4 * X @ X.T + 0.25 * torch.eye(20, dtype=F64))
    return covariance @ X.T @ Y * 4, covariance.diagonal(), float(marginal.log_prob(Y))


def coin(k):
    p = pyro.sample("p", dist.Beta(tensor(2.0), 3.0))
    pyro.sample("k", dist.Binomial(tensor(20.0), p), obs=k)


def log_beta(a, b):
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


COIN_EVIDENCE = math.lgamma(21) - math.lgamma(16) - math.lgamma(6) + log_beta(17, 8) - log_beta(2, 3)


def two_sides(y):
    """Modes at 3 and -3, thirty of their sd apart, with weights 0.3 and 0.7: x + 3 ~ y or x - 3 ~ y."""
    x = pyro.sample("x", dist.Normal(tensor(0.0), 3.0))
    parts = dist.Normal(torch.stack([x - 3, x + 3]), 0.2)
    pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(tensor([0.3, 0.7])), parts), obs=y)


TWO_EVIDENCE = float(dist.Normal(tensor(3.0), math.sqrt(9.04)).log_prob(tensor(0.0)))


def switches(y):
    """A discrete site for each datum, summed out."""
    mu = pyro.sample("mu", dist.Normal(tensor(0.0), 3.0))
    with pyro.plate("n", 4):
        k = pyro.sample("k", dist.Bernoulli(tensor(0.3)))
        pyro.sample("y", dist.Normal(mu + 2 * k, 1.0), obs=y)


SWITCH_DATA = tensor([0.1, 2.2, -0.3, 0.4])


def switches_evidence():
    covariance = 9 * torch.ones(4, 4, dtype=F64) + torch.eye(4, dtype=F64)
    terms = []
    for ks in itertools.product([0.0, 1.0], repeat=4):
        prior = math.prod(0.3 if k else 0.7 for k in ks)
        terms.append(math.log(prior) + float(dist.MultivariateNormal(2 * tensor(ks), covariance).log_prob(SWITCH_DATA)))
    return float(tensor(terms).logsumexp(0))


def score(posterior, exact):
    """Standardised error of the log evidence, an error of the error included: runs of few roots."""
    value, stderr = posterior.log_evidence
    return abs(float(value) - exact) / float(stderr)


CASES = {
    "regression": (lambda: ppl.Program(regression, X, Y), regression_answer()[2]),
    "coin": (lambda: ppl.Program(coin, tensor(15.0)), COIN_EVIDENCE),
    "two sides": (lambda: ppl.Program(two_sides, tensor(0.0)), TWO_EVIDENCE),
    "switches": (lambda: ppl.Program(switches, SWITCH_DATA), switches_evidence()),
}


@pytest.mark.parametrize("name", CASES)
def test_evidence(name):
    """Within 4.5 standard errors, whose own error is below a fifth: false alarm 1e-4 each. Power: 0.2 to 0.4 nats."""
    make, exact = CASES[name]
    posterior = ppl.infer(make(), ppl.SMC(runs=1), draws=1000, seed=1)
    assert score(posterior, exact) < 4.5
    assert 0.005 < float(posterior.log_evidence.stderr) < 0.1
    betas = posterior.info["betas"][0]
    assert float(betas[-1]) == 1
    assert bool((betas.diff() > 0).all())
    # Every step but the last keeps what it was asked to.
    assert torch.allclose(posterior.info["ess"][0, :-1], torch.full_like(betas[:-1], 700.0), rtol=1e-3)


@pytest.mark.parametrize("backend", [ppl.SMC(), ppl.SMC(kernel="random_walk")], ids=["hmc", "random walk"])
def test_linear_regression(backend):
    """Means and variances of three coordinates, within the errors that the root ESS gives: false alarm 1e-4."""
    mean, variance, _ = regression_answer()
    posterior = ppl.infer(ppl.Program(regression, X, Y), backend, draws=2000, seed=3)
    worth = float(posterior.info["root_ess"])
    assert worth > 1000
    bound = z_bound(1e-4, 6)
    z_mean = (posterior.mean("w") - mean) * (worth / variance).sqrt()
    second = (posterior["w"][0] - mean).square().mean(0) / variance
    z_variance = (second - 1) * math.sqrt(worth / 2)
    assert float(z_mean.abs().max()) < bound
    assert float(z_variance.abs().max()) < bound
    torch.testing.assert_close(posterior["total"], posterior["w"].sum(-1))


def test_weights_of_modes():
    """0.7 of the draws on the left, within 4.5 errors of the roots' making: false alarm 1e-5. HMC chains cannot."""
    posterior = ppl.infer(ppl.Program(two_sides, tensor(0.0)), ppl.SMC(runs=1), draws=2000, seed=0)
    worth = float(posterior.info["root_ess"])
    assert 100 < worth < 1800  # no move crosses: the roots are what there is
    left = float((posterior["x"] < 0).double().mean())
    assert abs(left - 0.7) < 4.5 * math.sqrt(0.21 / worth)
    assert abs(left - 0.5) > 0.1


def test_errors_are_honest():
    """Forty small runs: the errors of evidence and of two means are what each run said.

    The mean of forty squared standardised errors, of errors known to about a quarter, lies within [0.45, 2.2]:
    chi-squared with 40 degrees at 1e-4 on both sides is [0.32, 2.05]/1, widened for the noise of the errors above and
    narrowed below, where that noise only adds: false alarm 1e-3. Power: an error without the roots is three times off.
    """
    program = ppl.Program(two_sides, tensor(0.0))
    z, left = [], []
    for seed in range(40):
        posterior = ppl.infer(program, ppl.SMC(runs=1, particles=200, moves=1), draws=200, seed=seed)
        z.append((float(posterior.log_evidence.value) - TWO_EVIDENCE) / float(posterior.log_evidence.stderr))
        share = float((posterior["x"] < 0).double().mean())
        left.append((share - 0.7) * math.sqrt(float(posterior.info["root_ess"]) / 0.21))
    for scores in (tensor(z), tensor(left)):
        assert 0.45 < float(scores.square().mean()) < 2.2


@pytest.mark.slow
def test_learning_the_metric_does_not_bias_the_evidence():
    """Sixteen dimensions, 500 particles, 48 runs: mean error within 4 standard errors of zero, false alarm 1e-4.

    Particles that learn their metric from themselves are 0.18 nats low, eight standard errors.
    """
    problem = gaussian_problem(0.05)
    backend = ppl.NoiseSpace(ppl.SMC(particles=500, runs=1))
    runs = [ppl.infer(problem.program, backend, draws=10, seed=seed) for seed in range(48)]
    error = torch.stack([run.log_evidence.value for run in runs]) - problem.log_evidence
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(48)
    assert float(error.std()) < 0.25


def test_runs_are_merged_by_evidence():
    """Few particles, eight runs: the merge knows the weights better than a run does. False alarm 1e-4."""
    backend = ppl.SMC(particles=200, runs=8)
    posterior = ppl.infer(ppl.Program(two_sides, tensor(0.0)), backend, draws=1600, seed=5)
    assert int(posterior.info["runs"]) > 1
    assert posterior.info["betas"].shape[0] == int(posterior.info["runs"])
    value, stderr = posterior.log_evidence
    assert abs(float(value) - TWO_EVIDENCE) < 4 * float(stderr)
    each = posterior.info["run_log_evidence"]
    assert abs(float(value - (each.logsumexp(0) - math.log(len(each))))) < 1e-12
    left = float((posterior["x"] < 0).double().mean())
    assert abs(left - 0.7) < 4 * math.sqrt(0.21 / float(posterior.info["root_ess"]))


def test_two_chains_are_independent():
    posterior = ppl.infer(ppl.Program(coin, tensor(15.0)), ppl.SMC(runs=1), draws=300, chains=2, seed=0)
    assert posterior["p"].shape == (2, 300)
    assert posterior.info["root_ess"].shape == (2,)
    assert not torch.equal(posterior["p"][0], posterior["p"][1])
    assert score(posterior, COIN_EVIDENCE) < 4.5


@pytest.mark.parametrize("start", [ppl.Laplace(), ppl.Pathfinder(), ppl.SVI(steps=300, lr=0.05)], ids=repr)
def test_from_a_fit(start):
    """The same evidence from where a fit ends, with a smaller error: false alarm 1e-4 each."""
    posterior = ppl.infer(ppl.Program(coin, tensor(15.0)), ppl.SMC(start=start), draws=1000, seed=2)
    assert score(posterior, COIN_EVIDENCE) < 4.5
    assert float(posterior.log_evidence.stderr) < 0.03  # 0.04 from the prior
    assert isinstance(posterior.guide, ppl.FittedGuide)
    worth = float(posterior.info["root_ess"])
    assert abs(float(posterior.mean("p")) - 17 / 25) < 4 * math.sqrt(17 * 8 / (25**2 * 26) / worth)


def test_improper_prior_needs_a_fit():
    """A flat prior cannot be drawn from; from a fit, its evidence is the integral of the likelihood: one."""

    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    program = ppl.Program(model, tensor(2.0))
    with pytest.raises(ProgramError, match=r"'mu' is improper.*ppl\.Laplace"):
        ppl.infer(program, ppl.SMC(), draws=10)
    posterior = ppl.infer(program, ppl.SMC(start=ppl.SVI(steps=200, lr=0.05)), draws=1000, seed=0)
    value, stderr = posterior.log_evidence
    assert abs(float(value)) < 4 * float(stderr)
    assert 0 < float(stderr) < 0.05  # also where no particle is lost


@pytest.mark.parametrize("kind", ["mask", "scale"])
def test_a_prior_that_is_not_what_the_model_draws(kind):
    def model(y):
        context = pyro.poutine.mask(mask=torch.tensor(False)) if kind == "mask" else pyro.poutine.scale(scale=0.5)
        with context:
            mu = pyro.sample("mu", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError, match=kind):
        ppl.infer(ppl.Program(model, tensor(2.0)), ppl.SMC(), draws=10)


def test_dead_particles():
    """A likelihood that is zero below one: the evidence is P(x > 1) = 0.1587, dead particles never come back."""

    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("cut", torch.where(x > 1, 0.0, -math.inf))

    posterior = ppl.infer(ppl.Program(model), ppl.SMC(), draws=2000, seed=0)
    assert score(posterior, math.log(0.158655)) < 4.5
    assert float(posterior["x"].min()) > 1
    assert abs(float(posterior.mean("x")) - 1.52514) < 4.5 * 0.4463 / math.sqrt(float(posterior.info["root_ess"]))


def test_all_dead():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("cut", torch.where(x > 100, 0.0, -math.inf))

    with pytest.raises(NotFiniteError, match="impossible for all 200 particles"):
        ppl.infer(ppl.Program(model), ppl.SMC(), draws=10)


def test_a_likelihood_that_is_no_number():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("odd", x.log())

    with pytest.raises(NotFiniteError, match="log likelihood"):
        ppl.infer(ppl.Program(model), ppl.SMC(), draws=10)


@pytest.mark.parametrize("sigma", [0.3, 0.05])
def test_noise_space(sigma):
    """Evidence and means of a diffusion site in five dimensions, by its noise: false alarm 1e-4."""
    problem = gaussian_problem(sigma, dim=5, observations=2)
    posterior = ppl.infer(problem.program, ppl.NoiseSpace(ppl.SMC(runs=1)), draws=1000, seed=0)
    assert score(posterior, float(problem.log_evidence)) < 4.5
    worth = float(posterior.info["root_ess"])
    variance = problem.posterior.covariance_matrix.diagonal()
    z = (posterior.mean("x") - problem.posterior.mean) * (worth / variance).sqrt()
    assert float(z.abs().max()) < z_bound(1e-4, 5)


def test_eight_schools():
    """Means of mu and tau against long runs of NUTS (4.36 and 3.6 with sds 3.3 and 3.2, Stan's): within 4 errors."""
    y, s = tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(tensor(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(tensor(5.0)))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, s), obs=y)

    posterior = ppl.infer(ppl.Program(model, y, s), ppl.SMC(), draws=1000, seed=0)
    worth = float(posterior.info["root_ess"])
    assert worth > 400
    assert abs(float(posterior.mean("mu")) - 4.36) < 4 * 3.3 / math.sqrt(worth)
    assert abs(float(posterior.mean("tau")) - 3.6) < 4 * 3.2 / math.sqrt(worth)


def test_chunks_change_nothing():
    program = ppl.Program(coin, tensor(15.0))
    whole, parts = (
        ppl.infer(program, ppl.SMC(particles=64, runs=1, moves=1, chunk=chunk), draws=64) for chunk in (None, 10)
    )
    torch.testing.assert_close(parts["p"], whole["p"], rtol=1e-8, atol=0)


def test_interrupted_run_has_no_draws_and_goes_on(tmp_path):
    program, backend = ppl.Program(regression, X, Y), ppl.SMC(particles=50, moves=1, runs=1)
    whole = ppl.infer(program, backend, draws=20, seed=1)
    part = ppl.infer(
        program, backend, 20, seed=1, callback=lambda e: e.step == 3, checkpoint=tmp_path, checkpoint_every=0
    )
    assert part["w"].shape == (1, 0, 3)
    assert not part.complete
    assert any("no draws" in note for note in part.attrs["notes"])
    again = ppl.infer(program, backend, 20, seed=1, checkpoint=tmp_path, checkpoint_every=0)
    torch.testing.assert_close(again["w"], whole["w"], rtol=1e-9, atol=1e-12)
    assert again.log_evidence == whole.log_evidence


def test_too_few_stages():
    with pytest.raises(ProgramError, match="after 2 powers"):
        ppl.infer(ppl.Program(regression, X, Y), ppl.SMC(stages=2), draws=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 1}, "particles"),
        ({"share": 1.0}, "share"),
        ({"kernel": "gibbs"}, "kernel"),
        ({"moves": 0}, "moves"),
        ({"runs": 0}, "runs"),
        ({"stages": True}, "stages"),
        ({"start": ppl.HMC()}, "start must be None"),
        ({"start": ppl.Laplace}, "start must be None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        ppl.SMC(**options)


# Parts -----------------------------------------------------------------------------------------------------------


def test_tempered_density_has_both_parts():
    """Prior and likelihood against the program's own, for scales, discrete sites and lifted ones."""
    generator = torch.Generator().manual_seed(0)

    def scaled(y):
        s = pyro.sample("s", dist.LogNormal(tensor(0.0), 0.5))
        pyro.sample("y", dist.Normal(tensor(0.0), s), obs=y)

    lifted = gaussian_problem(0.3, dim=3, observations=2).program.noise_space()
    for program in (ppl.Program(scaled, tensor(1.0)), ppl.Program(switches, SWITCH_DATA), lifted):
        flat, density = program.flat(), TemperedDensity(program)
        z = torch.randn(6, flat.dim, dtype=F64, generator=generator)
        prior, likelihood = density.split(z)
        torch.testing.assert_close(prior + likelihood, flat.log_density(z))
        expected = {"s": dist.Normal(tensor(0.0), 0.5), "mu": dist.Normal(tensor(0.0), 3.0)}
        base = expected.get(next(iter(program.latents)), dist.Normal(tensor(0.0), 1.0))
        torch.testing.assert_close(prior, base.log_prob(z).sum(1))
        value, gradient = density.tempered(z, 0.3)
        torch.testing.assert_close(value, prior + 0.3 * likelihood)
        step = 1e-6 * torch.eye(flat.dim, dtype=F64)[0]
        ahead, behind = (density.split(z + side * step) for side in (1, -1))
        slope = (ahead[0] - behind[0] + 0.3 * (ahead[1] - behind[1])) / 2e-6
        torch.testing.assert_close(gradient[:, 0], slope, rtol=1e-5, atol=1e-6)


def test_prior_draws_of_a_hierarchy():
    """Moments of dependent sites on R^n, 4000 draws, false alarm 1e-5 each; a site that vmap cannot draw as well."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(tensor(1.0), 0.5))
        x = pyro.sample("x", dist.Normal(mu, 2.0))
        p = pyro.sample("p", dist.Beta(tensor(2.0), 2.0))
        pyro.sample("y", dist.Normal(x + p, 1.0), obs=y)

    draws = PriorDraws(ppl.Program(model, tensor(0.0)).flat())
    z = draws.draw(4000, torch.Generator().manual_seed(0))
    assert torch.isfinite(z).all()
    assert abs(float(z[:, 1].mean()) - 1) < 4.5 * math.sqrt(4.25 / 4000)
    assert abs(float(z[:, 1].var()) / 4.25 - 1) < 4.5 * math.sqrt(2 / 4000)
    covariance = float(((z[:, 0] - z[:, 0].mean()) * (z[:, 1] - z[:, 1].mean())).mean())
    assert abs(covariance - 0.25) < 4.5 * math.sqrt((0.25 * 4.25 + 0.25**2) / 4000)
    assert abs(float(torch.sigmoid(z[:, 2]).var()) - 0.05) < 0.006
    again = draws.draw(4000, torch.Generator().manual_seed(0))
    assert torch.equal(z, again)


def test_next_power_is_where_the_ess_is():
    ratio = 7 * torch.randn(500, dtype=F64, generator=torch.Generator().manual_seed(1))
    ratio[:100] = -math.inf
    beta = next_power(ratio, 0.0, 0.6)
    weight = torch.softmax(beta * ratio[100:], 0)
    assert abs(float(1 / weight.square().sum()) - 0.6 * 400) < 1e-6
    assert next_power(1e-3 * ratio, 0.4, 0.6) == 1
    assert next_power(1e18 * ratio, 0.5, 0.6) > 0.5  # below rounding, and still a step


def test_worst_ess_of_copies_and_of_what_moved_apart():
    """400 roots of ten copies are worth 400; once the copies have moved apart, 4000; one root is worth one."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.arange(400).repeat_interleave(10)
    copies = torch.randn(400, 2, dtype=F64, generator=generator)[roots]
    apart = torch.randn(4000, 2, dtype=F64, generator=generator)
    assert 300 < float(worst_ess(copies, roots)) < 410
    assert 3000 < float(worst_ess(apart, roots)) <= 4000
    mixed = torch.cat([apart[:, :1], copies[:, :1]], 1)  # the worst coordinate counts
    assert float(worst_ess(mixed, roots)) < 460
    assert float(worst_ess(apart, torch.zeros(4000, dtype=torch.long))) == 1


@pytest.mark.parametrize("kind", ["hmc", "random_walk"])
def test_moves_keep_the_target(kind):
    """Draws of a correlated normal stay draws of it: four moments of 20000 within 4.5 errors, false alarm 1e-4.

    Without the Metropolis test the coarse steps of HMC widen the normal by more than that.
    """
    generator = torch.Generator().manual_seed(0)
    factor = tensor([[1.0, 0.0], [0.9, 0.3]])
    precision = torch.linalg.inv(factor @ factor.T)
    z = torch.randn(20000, 2, dtype=F64, generator=generator) @ factor.T

    def evaluate(z):
        return -0.5 * ((z @ precision) * z).sum(1), -z @ precision

    moves = Moves(kind, 5, 8, log_step=math.log(1.3))
    moved = moves(z, Whitening(tensor([1.5, 0.5])), evaluate, generator)
    assert not torch.equal(moved, z)
    white = torch.linalg.solve_triangular(factor, moved.T, upper=False).T
    assert float(white.mean(0).abs().max()) < 4.5 / math.sqrt(20000)
    assert float((white.square().mean(0) - 1).abs().max()) < 4.5 * math.sqrt(2 / 20000)
    assert 0.2 < moves.accepted[-1] < 0.95

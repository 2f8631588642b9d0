"""`posterior.discrete`: draws of summed-out sites have the frequencies that enumeration of the joint gives."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError, ProgramError
from ppl.posterior import Posterior
from ppl.program import Program

F64 = torch.float64
Y = torch.tensor([-1.5, 0.2, 0.9, 2.5], dtype=F64)
DRAWS = 4000
# A frequency of n draws has sd sqrt(p (1 - p) / n); 4.5 of them over at most 60 numbers: false alarm below 5e-4.
SIGMAS = 4.5


def t(*values):
    return torch.tensor(values, dtype=F64)


def held(values, draws=DRAWS):
    """A posterior in which the continuous sites sit at one point."""
    return Posterior({n: v.expand(2, draws // 2, *v.shape) for n, v in values.items()})


def agree(found, expected, draws=DRAWS):
    sd = (expected * (1 - expected) / draws).sqrt()
    assert bool(((found - expected).abs() <= SIGMAS * sd + 1e-12).all()), (found, expected)


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.deterministic("centre", mu[k])
        pyro.sample("y", dist.Normal(mu[k], 0.8), obs=y)


def test_mixture_responsibilities():
    """Each datum by itself: p(k | y) = w_k N(y; mu_k) / sum; and data are independent of each other."""
    weights, mu = t(0.2, 0.5, 0.3), t(-1.0, 0.5, 2.0)
    posterior = held({"weights": weights, "mu": mu}).discrete(Program(mixture, Y))
    logits = weights.log() + dist.Normal(mu, 0.8).log_prob(Y[:, None])
    expected = logits.softmax(-1)
    k = posterior.flatten("k")
    assert posterior["k"].shape == (2, DRAWS // 2, 4)
    assert posterior.dims["k"] == ("n",)
    agree(torch.stack([(k == j).double().mean(0) for j in range(3)], 1), expected)
    agree(((k[:, 1] == 1) & (k[:, 2] == 1)).double().mean(), expected[1, 1] * expected[2, 1])
    assert torch.equal(posterior["centre"], mu[posterior["k"]])


def test_mixture_follows_its_own_row():
    """Rows with other continuous values have other responsibilities."""
    mu = torch.stack([t(-1.0, 0.5, 2.0), t(2.0, 0.5, -1.0)])
    rows = mu.repeat_interleave(DRAWS // 2, 0)[None]
    posterior = Posterior({"weights": t(0.2, 0.5, 0.3).expand(1, DRAWS, 3), "mu": rows})
    k = posterior.discrete(Program(mixture, Y))["k"][0].reshape(2, -1, 4)
    for i in range(2):
        expected = (t(0.2, 0.5, 0.3).log() + dist.Normal(mu[i], 0.8).log_prob(Y[:, None])).softmax(-1)
        agree(torch.stack([(k[i] == j).double().mean(0) for j in range(3)], 1), expected, DRAWS // 2)


TRANSITION = t(0.8, 0.2, 0.4, 0.6).reshape(2, 2)


def hmm(y):
    gap = pyro.sample("gap", dist.LogNormal(t(0.0)[0], 1.0))
    state = 0
    for i in pyro.markov(range(len(y))):
        state = pyro.sample(f"s{i}", dist.Categorical(TRANSITION[state]))
        pyro.sample(f"y{i}", dist.Normal(gap * state, 1.0), obs=y[i])


def test_hidden_markov_paths():
    """All 16 paths of four states have their joint posterior frequencies, which marginals alone would not show."""
    program, gap = Program(hmm, Y), t(1.5)[0]
    posterior = held({"gap": gap}).discrete(program)
    paths = list(itertools.product(range(2), repeat=4))
    log_joint = []
    for path in paths:
        before, total = 0, t(0.0)[0]
        for i, s in enumerate(path):
            total = total + TRANSITION[before, s].log() + dist.Normal(gap * s, 1.0).log_prob(Y[i])
            before = s
        log_joint.append(total)
    expected = torch.stack(log_joint).softmax(0)
    states = torch.stack([posterior.flatten(f"s{i}") for i in range(4)], -1)
    found = torch.stack([(states == torch.tensor(path)).all(-1).double().mean() for path in paths])
    agree(found, expected)
    assert abs(float(expected.sum()) - 1) < 1e-12


def test_nested_plates_and_a_global_choice():
    """One global switch beside local ones: their joint law by enumeration of all 2^5 states."""

    def model(y):
        shift = pyro.sample("shift", dist.Normal(t(0.0)[0], 1.0))
        g = pyro.sample("g", dist.Bernoulli(t(0.4)[0]))
        with pyro.plate("n", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3 + 0.4 * g))
            pyro.sample("y", dist.Normal(shift + k * (1 + g), 1.0), obs=y)

    shift = t(0.2)[0]
    posterior = held({"shift": shift}).discrete(Program(model, Y))
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)), dtype=F64)
    g, k = states[:, :1], states[:, 1:]
    rest = dist.Bernoulli(0.3 + 0.4 * g).log_prob(k) + dist.Normal(shift + k * (1 + g), 1.0).log_prob(Y)
    expected = (dist.Bernoulli(t(0.4)[0]).log_prob(g[:, 0]) + rest.sum(1)).softmax(0)
    drawn = torch.cat([posterior.flatten("g")[:, None], posterior.flatten("k")], 1)
    found = torch.stack([(drawn == s).all(1).double().mean() for s in states])
    agree(found, expected)


def test_scaled_likelihoods_count_as_in_the_density():
    """poutine.scale tempers the likelihood of what was sampled, and of its discrete sites."""

    def model(y):
        shift = pyro.sample("shift", dist.Normal(t(0.0)[0], 1.0))
        k = pyro.sample("k", dist.Bernoulli(t(0.3)[0]))
        with pyro.poutine.scale(scale=0.25), pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(shift + 2 * k, 1.0), obs=y)

    program = Program(model, Y)
    k = held({"shift": t(0.0)[0]}).discrete(program).flatten("k")
    values = program.log_joint({"shift": t(0.0, 0.0), "k": t(0.0, 1.0)})
    agree(k.mean(), values.softmax(0)[1])


def test_end_to_end_with_seeds_and_problems():
    program = Program(mixture, Y)
    posterior = ppl.infer(program, ppl.HMC(warmup=60), draws=20, chains=2)
    assert "k" not in posterior
    one, two, other = (posterior.discrete(program, seed=s) for s in (1, 1, 2))
    assert torch.equal(one["k"], two["k"])
    assert not torch.equal(one["k"], other["k"])
    assert torch.equal(one["mu"], posterior["mu"])
    assert one.discrete(program) is one  # nothing is left to draw
    assert one.log_weight is None
    assert bool(torch.isfinite(program.log_joint({n: one[n] for n in ("weights", "mu", "k")})).all())

    over = program.over(y=torch.stack([Y, Y + 100]))
    weights, mu = t(0.2, 0.5, 0.3), t(-1.0, 0.5, 60.0)
    many = Posterior({"weights": weights.expand(2, 1, 8, 3), "mu": mu.expand(2, 1, 8, 3)}, attrs={"problems": 2})
    k = many.discrete(over)["k"]
    assert k.shape == (2, 1, 8, 4)
    assert bool((k[1] == 2).all())
    assert not bool((k[0] == 2).any())


def test_draws_in_a_loop():
    def model(y):
        shift = pyro.sample("shift", dist.Normal(t(0.0)[0], 1.0))
        k = pyro.sample("k", dist.Bernoulli(t(0.5)[0]))
        width = 1.0 if shift > 0 else 2.0
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(3 * k, width), obs=y)

    program = Program(model, Y, batching="loop")
    shift = t(1.0, -1.0).repeat_interleave(500)[None]
    k = Posterior({"shift": shift}).discrete(program)["k"].reshape(2, 500)
    for i, width in enumerate((1.0, 2.0)):
        each = torch.stack([dist.Normal(m, width).log_prob(Y).sum() for m in t(0.0, 3.0)])
        agree(k[i].mean(), each.softmax(0)[1], 500)


def test_bad_input():
    program = Program(mixture, Y)
    with pytest.raises(OptionError, match=r"no draws of \['weights'\]"):
        Posterior({"mu": torch.zeros(1, 2, 3, dtype=F64)}).discrete(program)

    def counts(y):
        n = pyro.sample("n", dist.Poisson(t(3.0)[0]))
        pyro.sample("y", dist.Normal(n, 1.0).expand([4]).to_event(1), obs=y)

    with pytest.raises(ProgramError, match="'n'"):
        Posterior({"other": torch.zeros(1, 2)}).discrete(Program(counts, Y))

    def part(y):
        mu = pyro.sample("mu", dist.Normal(t(0.0)[0], 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            k = pyro.sample("k", dist.Bernoulli(t(0.5)[0]))
            pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y[rows])

    with pytest.raises(ProgramError, match="rows"):
        Posterior({"mu": torch.zeros(1, 2, dtype=F64)}).discrete(Program(part, Y))
    with pytest.raises(OptionError, match="problems"):
        held({"weights": t(0.2, 0.5, 0.3), "mu": t(0.0, 1.0, 2.0)}).discrete(program.over(y=torch.stack([Y, Y])))

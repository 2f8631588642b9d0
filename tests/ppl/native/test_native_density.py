"""Densities of programs in C: equal to the graph on reference models and many supports; NUTS walks the same way."""

from __future__ import annotations

import subprocess
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.graph import LaneFunction
from ppl.mcmc import NUTS
from ppl.native import library, native_density
from ppl.native.expressions import POINTWISE
from ppl.program import Program

F64 = torch.float64
N = 40
Y = torch.linspace(-1.0, 2.0, N, dtype=F64)
COUNTS = (torch.arange(N) % 7).double()
GROUP = torch.arange(N) % 8


def lkj(y):
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3, dtype=F64)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    mean = torch.zeros(3, dtype=F64)
    x = pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=scale[:, None] * corr))
    pyro.sample("y", dist.Normal(x.sum(), 1.0).expand([N]).to_event(1), obs=y)


def gammas(y):
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    rate = pyro.sample("rate", dist.InverseGamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    pyro.sample("y", dist.Gamma(shape, rate).expand([N]).to_event(1), obs=y.exp())
    pyro.sample("part", dist.Beta(shape, 1 + share).expand([N]).to_event(1), obs=torch.sigmoid(y))


def students(y):
    nu, mu = pyro.sample("nu", dist.Gamma(2.0, 0.1)), pyro.sample("mu", dist.Cauchy(0.0, 1.0))
    pyro.sample("y", dist.StudentT(nu, mu, pyro.sample("s", dist.HalfNormal(1.0))).expand([N]).to_event(1), obs=y)


def poisson(y):
    mu, sigma = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.Exponential(1.0))
    with pyro.plate("group", 8):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
    with pyro.plate("case", N):
        pyro.sample("y", dist.Poisson((mu + u[GROUP]).exp()), obs=COUNTS)


def ordered(y):
    base = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    with pyro.plate("case", N):
        pyro.sample("y", dist.OrderedLogistic(y, cuts), obs=torch.arange(N) % 4)


def mixture(y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("component", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("case", N):
        z = pyro.sample("z", dist.Categorical(share))
        pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)


def logits(y):
    p = pyro.sample("p", dist.Uniform(0.0, 1.0))
    w = pyro.sample("w", dist.Laplace(0.0, 1.0).expand([3]).to_event(1))
    x = torch.stack([y, y**2, torch.sin(y)], 1)
    with pyro.plate("case", N):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + torch.logit(p)), obs=(torch.arange(N) % 3 == 0).double())


def classes(y):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    with pyro.plate("case", N):
        pyro.sample("y", dist.Categorical(logits=torch.stack([y, y**2], 1) @ weights.T), obs=torch.arange(N) % 3)


def process(y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    kernel = torch.exp(-((y[:, None] - y) ** 2) / length**2) + 0.1 * torch.eye(N, dtype=F64)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N, dtype=F64), covariance_matrix=kernel), obs=y)


def walk(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand([N]).to_event(1))
    pyro.sample("y", dist.Normal((scale * steps).cumsum(0), 1.0).to_event(1), obs=y)


def network(y):
    first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([10, 1]).to_event(2))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    last = pyro.sample("last", dist.Normal(0.0, 1.0).expand([1, 10]).to_event(2))
    hidden = torch.tanh(torch.nn.functional.linear(y[:, None], first, bias))
    with pyro.plate("case", N):
        pyro.sample("y", dist.Normal(torch.nn.functional.linear(hidden, last)[:, 0], 0.5), obs=y)


def rest(y):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Binomial(10, p).expand([N]).to_event(1), obs=COUNTS)
    pyro.sample("w", dist.Weibull(1.0, 2.0))
    pyro.sample("g", dist.Gumbel(0.0, 1.0))
    pyro.sample("far", dist.Pareto(1.0, 3.0))
    pyro.sample("angle", dist.VonMises(0.0, 2.0))
    pyro.sample("many", dist.NegativeBinomial(pyro.sample("n", dist.Exponential(1.0)), logits=p), obs=COUNTS[3])


MODELS = (lkj, gammas, students, poisson, ordered, mixture, logits, classes, process, walk, network, rest)


def compared(program, points=3):
    """Largest relative differences of value and gradient from those of the graph."""
    flat = program.flat()
    start = flat.initial(1, torch.Generator().manual_seed(0))
    density = flat.native(start, 10**9)
    assert density is not None, program.notes
    state = density.state()
    value_error = slope_error = 0.0
    for seed in range(points):
        z = flat.initial(1, torch.Generator().manual_seed(seed))
        value, gradient = flat.log_density_and_grad(z)
        ours, slope = state(z[0].numpy())
        value_error = max(value_error, abs(ours - float(value)) / (1 + abs(float(value))))
        worst = (torch.from_numpy(slope) - gradient[0]).abs().max() / gradient.abs().max()
        slope_error = max(slope_error, float(worst))
    return value_error, slope_error


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_supports(model):
    assert max(compared(Program(model, Y))) < 1e-10


def test_nuts_walks_as_it_does_on_the_graph(monkeypatch):
    """The same seed gives the same draws until rounding has grown, which takes dozens of trajectories."""
    monkeypatch.setattr("ppl.flat.CALL_SECONDS", 1.0)
    runs = {
        compile: ppl.infer(Program(poisson, Y, compile=compile), NUTS(warmup=10), draws=5, chains=2, seed=3)
        for compile in ("auto", "never")
    }
    assert {n: p.attrs["density"] for n, p in runs.items()} == {"auto": "native", "never": "graph"}
    torch.testing.assert_close(runs["auto"]["u"], runs["never"]["u"], rtol=1e-6, atol=1e-6)
    assert torch.equal(runs["auto"].info["n_steps"], runs["never"].info["n_steps"])
    assert runs["auto"].cost.gradient_evals == runs["never"].cost.gradient_evals
    again = ppl.infer(Program(poisson, Y), NUTS(warmup=10), draws=5, chains=2, seed=3)
    assert torch.equal(again["u"], runs["auto"]["u"])


def test_chains_at_the_same_time_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr("ppl.flat.CALL_SECONDS", 1.0)
    program = Program(process, Y)
    one, many = (ppl.infer(program, NUTS(warmup=50, cores=c), draws=50, chains=4, seed=1) for c in (1, 4))
    assert many.attrs["density"] == "native"
    assert torch.equal(one["length"], many["length"])


def test_threads_with_their_own_state_agree():
    flat = Program(walk, Y).flat()
    points = [flat.initial(1, torch.Generator().manual_seed(i)) for i in range(4)]
    density = flat.native(points[0], 10**9)
    values = np.zeros((4, 200))

    def work(i):
        state = density.state()
        for j in range(200):
            values[i, j], _ = state(points[i][0].numpy())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = np.array([flat.log_density(z).item() for z in points])
    np.testing.assert_allclose(values, np.repeat(expected[:, None], 200, axis=1), rtol=1e-12)


def test_long_run_stops_when_told():
    """Chains of a million draws end with the step at which the callback asks for it."""
    program = Program(poisson, Y)
    posterior = ppl.infer(program, NUTS(warmup=20), 10**6, 1, 0, callback=lambda event: event.step == 60)
    assert posterior.attrs["density"] == "native"
    assert not posterior.complete
    assert posterior["mu"].shape == (1, 41)


def test_new_data_on_the_same_function():
    program = Program(walk, Y)
    compared(program)
    other = program.with_data(y=Y + 1)
    assert max(compared(other)) < 1e-10
    z = torch.zeros(1, N + 1, dtype=F64)
    values = [p.flat().native(z, 10**9).state()(z[0].numpy())[0] for p in (program, other)]
    assert values[0] - values[1] == pytest.approx(float(((Y + 1) ** 2 - Y**2).sum()) / 2)


def test_few_calls_do_not_repay_the_compiler():
    flat = Program(walk, Y).flat()
    assert flat.native(torch.zeros(1, N + 1, dtype=F64), 10) is None


def test_without_a_compiler_nuts_runs_on_the_graph(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "compiler", lambda: None)
    posterior = ppl.infer(Program(poisson, Y), NUTS(warmup=100), draws=100, chains=2)
    assert posterior.attrs["density"] == "graph"
    assert any("no C compiler" in note for note in posterior.attrs["notes"])


def test_compiler_that_fails_is_quoted(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "compiler", lambda: "cc")
    failed = subprocess.CompletedProcess([], 1, "", "out of registers")
    monkeypatch.setattr(library.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match="out of registers"):
        library.load("int wrong;")


def test_nutpie_with_another_door_runs_on_the_graph(monkeypatch):
    from nutpie import _lib

    def other(*args):
        raise TypeError("PyMcModel.__new__() missing 1 required positional argument")

    monkeypatch.setattr(_lib, "PyMcModel", other)
    posterior = ppl.infer(Program(poisson, Y), NUTS(warmup=100), draws=100, chains=2)
    assert posterior.attrs["density"] == "graph"
    assert any("nutpie" in note for note in posterior.attrs["notes"])


def test_wrong_code_is_found_before_its_first_use(monkeypatch):
    """A mutant of one expression is refused by the comparison with the graph."""
    monkeypatch.setitem(POINTWISE, "exp", lambda a: f"exp({a} * 1.0001)")
    program = Program(poisson, Y)
    flat = program.flat()
    assert flat.native(flat.initial(1, torch.Generator().manual_seed(0)), 10**9) is None
    assert any("disagreed" in note for note in program.notes)


def test_index_out_of_range_is_no_access_to_memory():
    """An index is data; one that does not fit ends the call."""
    index = torch.arange(30) % 20

    def pick(lane, shared):
        return (lane["z"][shared["index"]] ** 2).sum()

    z = torch.ones(1, 20, dtype=F64)
    function = LaneFunction(pick, {"z": z[0]}, {"index": index})
    graph, inputs = function.captured({"z": z}, {"index": index}, ("z",), 10)
    density, reason = native_density(graph, inputs)
    assert density is not None, reason
    assert density.state()(z[0].numpy())[0] == 30.0
    other = density.with_inputs([z, index + 5, *inputs[2:]])
    with pytest.raises(IndexError, match="out of range"):
        other.state()(z[0].numpy())

"""Programs: what they read from a model, what they refuse and in which words, and the programs they turn into."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample

from ppl.errors import DataError, OptionError, ProgramError, ShapeError, TraceError
from ppl.posterior import Posterior
from ppl.program import Program

F64 = torch.float64
Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)


def t(*values):
    return torch.tensor(values, dtype=F64)


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def joint(mu, y):
    return dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[..., None], 2.0).log_prob(y).sum(-1)


# What is read --------------------------------------------------------------------------------------------------------


def test_sites_carry_what_engines_ask_for():
    def model(y, labels):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64)))
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1):
            x = pyro.sample("x", dist.Normal(torch.zeros(5, dtype=F64), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(p))
            pyro.sample("y", dist.Normal(x.sum(-1) + k, 1.0), obs=y)

    program = Program(model, Y.expand(2, 4), ["not", "a", "tensor"])
    assert list(program.latents) == ["p", "x", "k"]
    assert list(program.observed) == ["y"]
    x = program.sites["x"]
    assert (x.shape, x.event_dim, x.plates) == ((2, 4, 5), 1, ("outer", "inner"))
    assert program.discrete == ("k",)
    assert program.sites["k"].capabilities == {"enumerable"}
    assert program.sites["p"].static
    assert program.sites["x"].static
    assert not program.sites["k"].static
    assert torch.equal(program.data["y"], Y.expand(2, 4))
    assert program.dtype == F64
    assert "latents=['p', 'x', 'k']" in repr(program)


def test_densities():
    """log joint = prior + likelihood, over any leading axes; pointwise terms sum to the likelihood."""
    program = Program(normal, Y)
    mu = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    torch.testing.assert_close(program.log_joint({"mu": mu}), joint(mu, Y))
    likelihood = program.log_likelihood({"mu": mu})
    torch.testing.assert_close(likelihood, joint(mu, Y) - dist.Normal(0.0, 1.0).log_prob(mu))
    pointwise = program.pointwise_log_likelihood({"mu": mu})["y"]
    assert pointwise.shape == (2, 3, 4)
    torch.testing.assert_close(pointwise.sum(-1), likelihood)
    torch.testing.assert_close(program.log_joint({"mu": mu[0, 0]}), joint(mu, Y)[0, 0])


def test_batched_reads_anything_from_the_trace_with_gradients():
    program = Program(normal, Y)
    mean = program.batched(lambda trace: {"mean": trace.nodes["y"]["fn"].mean})
    mu = t(1.0, 2.0).requires_grad_()
    out = mean({"mu": mu})["mean"]
    assert out.shape == (2, 4)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), mu)[0], t(4.0, 4.0))


def test_global_state_is_left_alone():
    """Default type, generator, validation and parameter store are the same before and after."""
    pyro.param("mine", torch.tensor(1.0))
    before = torch.random.get_rng_state()
    program = Program(normal, Y)
    program.flat().log_density(torch.zeros(1, 1, dtype=F64))
    program.simulate(torch.Generator().manual_seed(0), 3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.get_default_dtype() == torch.float32


def test_fingerprint_is_that_of_problem_and_data():
    assert Program(normal, Y).fingerprint() == Program(normal, Y.clone()).fingerprint()
    assert Program(normal, Y).fingerprint() != Program(normal, Y + 1).fingerprint()


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (t(0.0, math.nan, 1.0, 2.0), DataError, "'y' has 1 of 4 values that are NaN"),
        (t(0.0, math.inf, 1.0, 2.0), DataError, "NaN or infinite"),
    ],
)
def test_bad_data(data, error, words):
    with pytest.raises(error, match=words):
        Program(normal, data)


def test_data_of_the_wrong_shape():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises((ShapeError, ProgramError), match=r"'y'|shape"):
        Program(model, Y)


def test_data_outside_the_support():
    def model(y):
        rate = pyro.sample("rate", dist.Exponential(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    with pytest.raises((DataError, ProgramError), match="support"):
        Program(model, t(1.0, -2.0))
    with pytest.raises(DataError, match="type list"):
        Program(
            lambda y: (pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)), ["1"]
        )


def test_data_whose_support_depends_on_a_latent():
    """The first prior draw need not hold the data: uniform on (0, width), pareto above its scale."""

    def model(y):
        width = pyro.sample("width", dist.LogNormal(0.0, 0.1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Uniform(0.0, width), obs=y)

    program = Program(model, t(0.1, 5.0))
    log_p = program.log_joint({"width": t(4.9, 5.1)})
    assert log_p[0] == -torch.inf
    prior = torch.distributions.LogNormal(0.0, 0.1).log_prob(t(5.1))
    torch.testing.assert_close(log_p[1:], prior - 2 * t(5.1).log(), rtol=1e-4, atol=1e-4)

    def fixed(y):
        width = pyro.sample("width", dist.LogNormal(0.0, 0.1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Uniform(0.0, torch.ones(2)).mask(width > -1), obs=y)

    with pytest.raises(DataError, match="outside the support of Uniform"):
        Program(fixed, t(0.1, 5.0))


def test_nothing_to_infer():
    with pytest.raises(ProgramError, match="no latent site"):
        Program(lambda y: pyro.sample("y", dist.Normal(0.0, 1.0).expand([4]).to_event(1), obs=y), Y)
    with pytest.raises(ProgramError, match="expected a Pyro model"):
        Program(3, Y)
    with pytest.raises(ProgramError, match="cannot be called with the arguments"):
        Program(normal)


def test_unknown_options_and_data():
    with pytest.raises(OptionError, match="batching"):
        Program(normal, Y, batching="magic")
    with pytest.raises(OptionError, match="compile"):
        Program(normal, Y, compile="gcc")
    program = Program(normal, Y)
    with pytest.raises(DataError, match="no data named 'z'"):
        program.with_data(z=Y)
    with pytest.raises(ProgramError, match="no site 'nu'"):
        program.log_joint({"mu": t(0.0), "nu": t(0.0)})
    with pytest.raises(ProgramError, match=r"\['mu'\] are missing"):
        program.log_joint({})
    with pytest.raises(ShapeError, match="'mu' has shape"):
        Program(two_sites, Y).log_joint({"mu": torch.zeros(3, dtype=F64), "s": torch.zeros(2, dtype=F64)})


def two_sites(y):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, s).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(mu.sum(), s).expand([4]).to_event(1), obs=y)


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 3.0
    pyro.sample("y", dist.Normal(mu, scale).expand([4]).to_event(1), obs=y)


def test_branching_on_a_value_is_named_and_works_in_a_loop():
    with pytest.raises(TraceError, match=r"'mu'.*batching=\"loop\""):
        Program(branching, Y).log_joint({"mu": t(0.5, -0.5)})
    program = Program(branching, Y, batching="loop")
    mu = t(0.5, -0.5)
    scale = t(1.0, 3.0)[:, None]
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[:, None], scale).log_prob(Y).sum(1)
    torch.testing.assert_close(program.log_joint({"mu": mu}), expected)
    value, grad = program.flat().log_density_and_grad(mu[:, None])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[:, 0], -mu + ((Y - mu[:, None]) / scale**2).sum(1))


def test_randomness_outside_sites_is_caught():
    def hidden(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + torch.randn(()), 1.0).expand([4]).to_event(1), obs=y)

    with pytest.raises(TraceError, match="random"):
        Program(hidden, Y).log_joint({"mu": t(0.0)})


def test_numpy_inside_the_model_is_caught():
    def baked(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.as_tensor(mu.detach().numpy() * 2), 1.0).expand([4]).to_event(1), obs=y)

    with pytest.raises(TraceError):
        Program(baked, Y).log_joint({"mu": t(0.0, 1.0)})


# Other programs ------------------------------------------------------------------------------------------------------


def test_new_data_do_not_trace_again():
    program = Program(normal, Y)
    program.log_joint({"mu": t(0.0)})
    functions = dict(program._functions)
    other = program.with_data(y=Y + 1)
    torch.testing.assert_close(other.log_joint({"mu": t(0.5)}), joint(t(0.5), Y + 1))
    assert other._functions is program._functions
    assert dict(other._functions) == functions
    torch.testing.assert_close(program.log_joint({"mu": t(0.5)}), joint(t(0.5), Y))  # the first keeps its own
    longer = program.with_data(y=torch.cat([Y, Y]))
    torch.testing.assert_close(longer.log_joint({"mu": t(0.5)}), joint(t(0.5), torch.cat([Y, Y])))
    with pytest.raises(DataError, match="NaN"):
        program.with_data(y=Y * math.nan)


def test_data_of_an_observed_site_by_its_name():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("obs", dist.Normal(mu, 2.0), obs=Y)

    program = Program(model).with_data(obs=Y + 1)
    torch.testing.assert_close(program.log_joint({"mu": t(0.5)}), joint(t(0.5), Y + 1))


def test_many_problems_at_once():
    """Lanes are problem-major; each sees its own data."""
    ys = torch.stack([Y, Y + 1, 2 * Y])
    over = Program(normal, Y).over(y=ys)
    assert over.problems == 3
    mu = t(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    torch.testing.assert_close(over.log_joint({"mu": mu}), joint(mu, ys.repeat_interleave(2, 0)))
    value, _ = over.flat().log_density_and_grad(mu[:, None])
    torch.testing.assert_close(value, joint(mu, ys.repeat_interleave(2, 0)))
    torch.testing.assert_close(over.problem(1).log_joint({"mu": t(0.3)}), joint(t(0.3), ys[1]))
    assert torch.equal(over.observed_data()["y"], ys)
    with pytest.raises(ShapeError, match="5 draws cannot be split over 3"):
        over.log_joint({"mu": mu[:5]})
    with pytest.raises(ShapeError, match="common"):
        Program(two_data, Y, Y).over(y=ys, x=ys[:2])
    with pytest.raises(ProgramError, match="already over many"):
        over.over(y=ys)


def two_data(y, x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)


def test_another_type():
    program = Program(normal, Y).to(dtype=torch.float32)
    value = program.log_joint({"mu": torch.tensor([0.5])})
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), joint(t(0.5), Y), rtol=1e-5, atol=1e-5)


# Subsampled plates ---------------------------------------------------------------------------------------------------


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def full(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_subsampled_density_is_unbiased():
    """Its average over all subsets, local latents included, is the density of the full plate; also on R^n."""
    program, whole = Program(subsampled, Y), Program(full, Y)
    assert program.subsampled == {"n": (2, 4)}
    assert program.sites["z"].shape == (4,)
    assert program.sites["z"].subsampled == ("n",)
    values = {"mu": t(0.3, -0.5), "z": torch.stack([Y - 1, Y + 0.5])}
    subsets = [torch.tensor(s) for s in itertools.combinations(range(4), 2)]
    each = [program.log_joint(values, subsample={"n": s}) for s in subsets]
    assert float((each[0] - each[1]).abs().max()) > 1e-3
    torch.testing.assert_close(torch.stack(each).mean(0), whole.log_joint(values))
    z = torch.cat([values["mu"][:, None], values["z"]], 1)
    flat = [program.flat().log_density(z, subsample={"n": s}) for s in subsets]
    torch.testing.assert_close(torch.stack(flat).mean(0), whole.flat().log_density(z))


# Parameters ----------------------------------------------------------------------------------------------------------


def test_parameters_are_inputs_with_their_own_scope():
    def model(y):
        scale = pyro.param("scale", t(2.0)[0], constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    program = Program(model, Y)
    assert list(program.parameters) == ["scale"]
    torch.testing.assert_close(program.log_joint({"mu": t(0.5)}), joint(t(0.5), Y))
    program.parameters["scale"] = t(1.0)[0]
    expected = dist.Normal(0.0, 1.0).log_prob(t(0.5)) + dist.Normal(0.5, t(1.0)[0]).log_prob(Y).sum()
    torch.testing.assert_close(program.log_joint({"mu": t(0.5)}), expected)
    assert len(pyro.get_param_store()) == 0


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(t(2.0)[0], constraint=dist.constraints.positive)
        self.weight = PyroSample(dist.Normal(t(0.0)[0], 1.0))

    def forward(self, y):
        weight = self.weight
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(weight, self.scale), obs=y)


def test_pyro_modules():
    program = Program(Regression(), Y)
    assert list(program.latents) == ["weight"]
    assert list(program.parameters) == ["scale"]
    torch.testing.assert_close(program.log_joint({"weight": t(0.5)}), joint(t(0.5), Y))
    _, _, grads = program.flat().value_and_grads(t(0.5)[:, None], params=program.parameters)
    scale = t(2.0)[0].requires_grad_()
    expected = torch.autograd.grad(dist.Normal(0.5, scale).log_prob(Y).sum(), scale)[0]
    torch.testing.assert_close(grads["scale"], expected)


def test_plain_modules_registered_with_pyro():
    """pyro.module: the weights are parameters of the program, and gradients reach them."""
    net = torch.nn.Linear(1, 1).to(F64)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}

    def model(y):
        pyro.module("net", net)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(net(mu[None])[0], 2.0), obs=y)

    program = Program(model, Y)
    assert list(program.parameters) == ["net$$$weight", "net$$$bias"]
    weight, bias = (program.parameters[n].reshape(()) for n in program.parameters)
    torch.testing.assert_close(
        program.log_joint({"mu": t(0.5)}),
        dist.Normal(0.0, 1.0).log_prob(t(0.5)) + dist.Normal(weight * 0.5 + bias, 2.0).log_prob(Y).sum(),
    )
    _, _, grads = program.flat().value_and_grads(t(0.5)[:, None], params=program.parameters)
    torch.testing.assert_close(grads["net$$$bias"], ((Y - weight * 0.5 - bias) / 4).sum()[None])
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])


# Simulation and checks -----------------------------------------------------------------------------------------------


def test_simulation_has_the_moments_of_the_joint():
    """Variance of y is 1 + 4; 2000 draws, five standard errors of a variance: false alarm below 1e-5."""
    program = Program(normal, Y)
    draws = program.simulate(torch.Generator().manual_seed(0), 2000)
    assert draws["y"].shape == (2000, 4)
    assert draws["mu"].shape == (2000,)
    torch.testing.assert_close(draws["twice"], 2 * draws["mu"])
    assert abs(float(draws["y"][:, 0].var()) / 5 - 1) < 5 * math.sqrt(2 / 2000)
    assert abs(float(torch.cov(torch.stack([draws["mu"], draws["y"][:, 1]]))[0, 1]) - 1) < 5 * math.sqrt(6 / 2000)
    again = program.simulate(torch.Generator().manual_seed(0), 2000)
    assert torch.equal(draws["y"], again["y"])
    assert program.simulate(torch.Generator().manual_seed(0))["y"].shape == (4,)


def test_prediction_follows_the_posterior_draws():
    program = Program(normal, Y)
    posterior = Posterior({"mu": torch.tensor([[-100.0, 0.0, 100.0]], dtype=F64)})
    predicted = program.predict(posterior)
    assert predicted["y"].shape == (1, 3, 4)
    assert bool(((predicted["y"] - posterior["mu"][..., None]).abs() < 15).all())
    torch.testing.assert_close(predicted["twice"], 2 * posterior["mu"])


def test_check_names_both_ranges():
    assert Program(normal, Y).check() == []
    (finding,) = Program(normal, 1000 + Y).check()
    assert "'y'" in finding
    assert "[998.8, 1002]" in finding
    assert "prior predictive in [" in finding


def test_check_finds_sites_that_are_never_used():
    def model(y):
        pyro.sample("idle", dist.Normal(0.0, 1.0))
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(top, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y)

    (finding,) = Program(model, Y).check()
    assert "'idle' is never used" in finding


def test_a_prior_draw_that_fails_is_drawn_again():
    """A scale that underflows in one prior draw must not refuse the model."""
    calls = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        calls.append(1)
        pyro.sample("y", dist.Normal(mu, -1.0 if len(calls) == 1 else 1.0).expand([4]).to_event(1), obs=y)

    assert list(Program(model, Y).latents) == ["mu"]
    with pytest.raises(ProgramError, match="failed when it was run once"):
        Program(lambda y: pyro.sample("mu", dist.Normal(0.0, -1.0)), Y)


def test_obs_mask_imputes_what_is_missing():
    """Sites with obs_mask become latent where nothing was observed."""

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y, obs_mask=seen)

    program = Program(model, Y, torch.tensor([True, True, False, True]))
    assert list(program.latents) == ["mu", "y_unobserved"]
    values = {"mu": t(0.5), "y_unobserved": torch.full((1, 4), 9.0, dtype=F64)}
    flat = program.flat()
    density = flat.log_density(flat.ravel(values))
    filled = torch.where(torch.tensor([True, True, False, True]), Y, 9.0)
    moved = flat.log_density(flat.ravel(values | {"mu": t(0.7)}))
    torch.testing.assert_close(moved - density, joint(t(0.7), filled) - joint(t(0.5), filled))

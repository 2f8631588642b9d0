"""The graph of an objective against the engine: the same gradient for the same noise, and the same laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import (
    Measured,
    agrees,
    normal_guide,
    normal_model,
    normal_program,
    one_draw_guide,
    one_draw_program,
    real,
    switch_exact,
    switch_guide,
    switch_program,
)
from torch import Tensor
from torch.distributions import transform_to

import ppl
from ppl.errors import NotFiniteError, TraceError
from ppl.objectives import (
    DIWHVI,
    ELBO,
    HVI,
    IWELBO,
    IWHVI,
    SIR,
    VIMCO,
    DReG,
    Engine,
    Enumerate,
    ForwardKL,
    Normalize,
    Rebar,
    Reinforce,
    Renyi,
    Sleep,
    StickingTheLanding,
    SymmetricKL,
    WakeModel,
    logmeanexp,
)
from ppl.objectives.compiled import Traced
from ppl.objectives.tape import Layout, Tape

D = torch.float64


def trace(engine: Engine, samples: int = 2, **options: Any) -> tuple[Traced, list[Tensor]]:
    """A traced objective and its unconstrained parameters."""
    transforms = {n: transform_to(engine.constraints[n]) for n in engine.parameters}
    values = {n: transforms[n].inv(p) for n, p in engine.parameters.items()}
    return Traced(engine, transforms, values, samples, **options), list(values.values())


def same_gradient(engine: Engine, samples: int = 2) -> Traced:
    """The graph gives the engine's value and gradient at three other parameters and noises, to rounding."""
    traced, pieces = trace(engine, samples)
    assert traced.kind == "graph"
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = [p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in pieces]
        noise = traced.layout.draw(generator)
        past = {a: v.clone() for a, v in engine.averages.items()}
        state = generator.get_state()
        value, grads = traced.eager(moved, noise, generator)
        kept = {a: v.clone() for a, v in engine.averages.items()}
        engine.averages = past
        generator.set_state(state)  # what draws by rejection are seeded from
        found, others = traced.at(moved, noise, generator)
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
        assert sum(float(g.abs().sum()) for g in grads) > 0
        torch.testing.assert_close(others, grads, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(engine.averages, kept, rtol=1e-10, atol=1e-10)
    return traced


# Every objective and estimator


@pytest.mark.parametrize("estimator", ["reparam", "reinforce", Reinforce("decaying_average"), Reinforce("none"), "mvd"])
@pytest.mark.parametrize(
    "objective", [ELBO(), IWELBO(2), VIMCO(2), Renyi(0.5, 2), ForwardKL(3), WakeModel(2), SymmetricKL()], ids=repr
)
def test_normal_guide(objective: Any, estimator: Any) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("t", real(0.1)), real(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    same_gradient(Engine(objective, ppl.Program(model, real(1.7)), normal_guide, policy={"z": estimator}))


@pytest.mark.parametrize("objective", [DReG(2), StickingTheLanding(), Sleep()], ids=repr)
def test_path_gradients_and_sleep(objective: Any) -> None:
    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", real(0.3))
        pyro.sample("z", dist.Normal(slope * x, pyro.param("s", real(0.8), constraint=dist.constraints.positive)))

    same_gradient(Engine(objective, normal_program(), guide))


@pytest.mark.parametrize("estimator", ["enum", "mvd", "reinforce", Reinforce("decaying_average"), Rebar(0.7)], ids=repr)
@pytest.mark.parametrize("objective", [ELBO(), IWELBO(2), VIMCO(2), Renyi(0.5, 2)], ids=repr)
def test_bernoulli_guide(objective: Any, estimator: Any) -> None:
    if isinstance(objective, VIMCO) and isinstance(estimator, Rebar):
        pytest.skip("a control of its own")
    same_gradient(Engine(objective, switch_program(), switch_guide, policy={"z": estimator}))


def hidden(x: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(real(0.0), 1.0))
    pyro.sample("z", dist.Normal(pyro.param("m", real(0.2)) + pyro.param("c", real(0.4)) * u, real(0.5)))


def reverse(kept: dict[str, Tensor], x: Tensor) -> None:
    pyro.sample("u", dist.Normal(pyro.param("r", real(0.3)) * kept["z"], 1.0))


@pytest.mark.parametrize("objective", [HVI(reverse), IWHVI(reverse, 3), DIWHVI(reverse, 2, 3)], ids=["1", "m", "nm"])
def test_marginal_guide(objective: Any) -> None:
    same_gradient(Engine(objective, normal_program(), hidden))


@pytest.mark.parametrize("index", [Enumerate(), Reinforce()], ids=["enum", "reinforce"])
def test_normalised_guide(index: Any) -> None:
    def proposal(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", real(0.2)), real(1.0)))

    same_gradient(Engine(ELBO(), normal_program(), Normalize(normal_model, SIR(3, proposal, index))))


def site(fn: Callable[[Tensor], Any], estimator: str, cost: Callable[[Tensor], Tensor]) -> Engine:
    def guide() -> None:
        eta = pyro.param("eta", torch.tensor([0.4, 0.7, 0.2], dtype=D))
        pyro.sample("v", fn(eta.exp()))

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        draw = ctx.sim(guide)
        return cost(draw["v"]) - 0.1 * draw.density.log

    return Engine(objective, None, guide, policy={"v": estimator}, dtype=D)


@pytest.mark.parametrize(
    ("fn", "estimator"),
    [
        (lambda e: dist.Categorical(e), "mvd"),
        (lambda e: dist.Categorical(e), "reinforce"),
        (lambda e: dist.Categorical(e), "enum"),
        (lambda e: dist.Poisson(e[0]), "mvd"),
        (lambda e: dist.Poisson(e[0]), "reinforce"),
        (lambda e: dist.Exponential(e[0]), "mvd"),
        (lambda e: dist.Exponential(e[0]), "reparam"),
        (lambda e: dist.Gamma(e[0].detach(), e[1]), "mvd"),
        (lambda e: dist.Gamma(e[0], e[1]), "reparam"),
        (lambda e: dist.Beta(e[0], e[1]), "reparam"),
        (lambda e: dist.Geometric(e[2] / 3), "mvd"),
        (lambda e: dist.Geometric(e[2] / 3), "reinforce"),
        (lambda e: dist.Laplace(e[0], e[1]), "reparam"),
        (lambda e: dist.Cauchy(e[0], e[1]), "reparam"),
        (lambda e: dist.StudentT(4.0, e[0], e[1]), "reparam"),
        (lambda e: dist.LogNormal(e[0], e[1]), "reparam"),
        (lambda e: dist.Uniform(-e[0], e[1]), "reparam"),
        (lambda e: dist.Gumbel(e[0], e[1]), "reparam"),
    ],
)
def test_distributions(fn: Any, estimator: str) -> None:
    same_gradient(site(fn, estimator, lambda v: 1 / (1 + v**2)), samples=3)


def test_event_sites() -> None:
    """A Dirichlet in one event, which torch draws by rejection."""
    same_gradient(site(lambda e: dist.Dirichlet(e), "reparam", lambda v: (v**2).sum(-1)), samples=3)


# Programs


def test_minibatches_networks_and_baselines() -> None:
    """Indices lie among the noise; weights of networks, in the guide and in its baseline, are inputs."""
    data = torch.linspace(-1, 2, 6, dtype=D)
    net, prediction = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=3) as i:
            z = pyro.sample("z", dist.Bernoulli(real(0.3)))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", 6, subsample_size=3) as i:
            given = x[i, None]
            estimator = Reinforce(lambda x: prediction(x)[:, 0], given=given)
            pyro.module("prediction", prediction)
            pyro.sample("z", dist.Bernoulli(logits=net(given)[:, 0]), infer={"estimator": estimator})

    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    traced = same_gradient(Engine(ELBO(), ppl.Program(model, data), guide))
    assert ("permutation", torch.int64, 6) in traced.layout.groups
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


def test_baseline_tensors_are_those_of_the_run() -> None:
    """A baseline that is a parameter gets the gradient of its squared error, by the engine and by the graph."""

    def guide(x: Tensor) -> None:
        estimator = Reinforce(pyro.param("b", real(0.5)))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", real(0.4))), infer={"estimator": estimator})

    engine = Engine(ELBO(), switch_program(), guide)
    assert float(engine.gradient().gradient["b"].abs()) > 0.1
    same_gradient(engine)


def test_programs_that_run_lane_by_lane() -> None:
    engine = Engine(ELBO(), one_draw_program(), one_draw_guide)
    assert engine.loop
    same_gradient(engine)


def test_families_on_the_unconstrained_vector() -> None:
    program = ppl.Program(normal_model, real(1.7))
    fit = ppl.SVI(guide=ppl.FullRank(), objective=IWELBO(3), steps=250, lr=0.05).fit(program)
    assert abs(float(fit.posterior(4000).mean("z")) - 0.85) < 0.1


# The law of the noise


@pytest.mark.parametrize("estimator", ["enum", "mvd", "reinforce"])
def test_unbiased_by_enumeration(estimator: str) -> None:
    """T4 with two particles: 0.03023583; false alarm 6e-5 for each number."""
    value, grad = switch_exact(2, logmeanexp)
    samples = 8000
    traced, pieces = trace(Engine(IWELBO(2), switch_program(), switch_guide, policy={"z": estimator}), samples)
    generator = torch.Generator().manual_seed(0)
    runs = [traced(pieces, generator) for _ in range(60)]
    rows = torch.stack([torch.stack([v, *g]) for v, g in runs])
    stderr = rows.std(0) / 60**0.5
    if estimator == "enum":
        torch.testing.assert_close(rows[0], torch.tensor([value, grad], dtype=D))
    else:
        agrees(Measured(rows.mean(0)[0], stderr[0]), value, 0.01)
        agrees(Measured(rows.mean(0)[1], stderr[1]), grad, 0.25)


@pytest.mark.parametrize("estimator", ["reparam", "reinforce", "mvd"])
def test_unbiased_in_closed_form(estimator: str) -> None:
    """T1: value -2.30708208, d/dm 1.1, d/dlog s -0.28; false alarm 6e-5 for each number."""
    traced, pieces = trace(Engine(ELBO(), normal_program(), normal_guide, policy={"z": estimator}), 4000)
    generator = torch.Generator().manual_seed(0)
    runs = [traced(pieces, generator) for _ in range(60)]
    rows = torch.stack([torch.stack([v, *g]) for v, g in runs])
    stderr = rows.std(0) / 60**0.5
    for i, truth in enumerate([-2.30708208, 1.1, -0.28]):
        agrees(Measured(rows.mean(0)[i], stderr[i]), truth, 0.3)


def test_draws_of_a_tape_have_their_laws() -> None:
    """Frequencies of a coin and of a choice, within four standard errors."""
    n = 40000
    probs = torch.tensor([0.1, 0.6, 0.3], dtype=D)
    layout = Layout(torch.device("cpu"))

    def draws(noise: Any) -> tuple[Tensor, Tensor]:
        with Tape(layout, noise) as tape:
            tape.at("coin")
            coin = torch.bernoulli(torch.full((n,), 0.3, dtype=D))
            tape.at("choice")
            return coin, dist.Categorical(probs.expand(n, 3)).sample()

    draws(None)
    coin, choice = draws(layout.draw(torch.Generator().manual_seed(0)))
    assert abs(float(coin.mean()) - 0.3) < 4 * (0.21 / n) ** 0.5
    for i, p in enumerate(probs.tolist()):
        assert abs(float((choice == i).double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5


# Fits


def fitted(**options: Any) -> Any:
    program = ppl.Program(normal_model, real(1.7))
    return ppl.SVI(guide=normal_guide, steps=250, lr=0.05, **options).fit(program, seed=options.pop("seed", 3))


def test_same_seed_same_fit() -> None:
    first, second = fitted(), fitted()
    assert torch.equal(first.params["m"], second.params["m"])
    assert torch.equal(first.history, second.history)
    other = ppl.SVI(guide=normal_guide, steps=250, lr=0.05).fit(normal_program(), seed=4)
    assert not torch.equal(first.params["m"], other.params["m"])


def test_a_fit_says_what_was_chosen() -> None:
    def notes(program: ppl.Program, guide: Any, steps: int = 250) -> str:
        return " ".join(ppl.infer(program, ppl.SVI(guide=guide, steps=steps), draws=2).attrs["notes"])

    assert "traced: a graph of" in notes(normal_program(), normal_guide)
    assert "traced" not in notes(normal_program(), normal_guide, steps=20)

    def branching(x: Tensor) -> None:
        m = pyro.param("m", real(0.3))
        pyro.sample("z", dist.Normal(m if float(m.detach()) > 0 else 2 * m, 1.0))

    found = notes(normal_program(), branching)
    assert "each step runs Pyro's handlers" in found
    assert "branches on a value" in found


def test_numpy_in_a_program_is_found_out() -> None:
    """Tracing would bake the value in."""

    def guide(x: Tensor) -> None:
        m = pyro.param("m", real(0.3))
        pyro.sample("z", dist.Normal(m, abs(float(m.detach().numpy())) + 0.5))

    with pytest.raises(TraceError, match="traced"):
        trace(Engine(ELBO(), normal_program(), guide))


def test_a_rejection_draw_that_must_be_repeated_is_refused() -> None:
    """A gamma after a measured coin is drawn again for its arms."""

    def guide(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", real(0.4))), infer={"estimator": "mvd"})
        pyro.sample("g", dist.Gamma(1.0 + z, real(1.0)), infer={"is_auxiliary": True})

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        draw = ctx.sim(guide)
        return ctx.density(model, draw.only(["z"])) - draw.density

    with pytest.raises(TraceError, match="by rejection"):
        trace(Engine(objective, switch_program(), guide))


def test_infinite_objective_names_the_site_and_the_compiled_graph_agrees() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(real(0.0), 1.0))
        pyro.factor("wall", torch.where(z > 50, -torch.inf, 0.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    traced, pieces = trace(Engine(ELBO(), ppl.Program(model, real(1.7)), normal_guide))
    generator = torch.Generator().manual_seed(0)
    assert torch.isfinite(traced(pieces, generator)[0])
    with pytest.raises(NotFiniteError, match="wall"):
        traced([pieces[0] + 100, *pieces[1:]], generator)


@pytest.mark.slow
def test_compiled_graph() -> None:
    """Inductor, by request and by count of steps."""
    engine = Engine(IWELBO(2), normal_program(), normal_guide, policy={"z": "reinforce"})
    plain, pieces = trace(engine)
    assert not plain._pays(1000, "auto")
    assert plain._pays(1_000_000, "auto")
    compiled, _ = trace(engine, compile="inductor")
    assert compiled.kind == "inductor"
    for seed in range(3):
        noise = plain.layout.draw(torch.Generator().manual_seed(seed))
        a, b = (t.at(pieces, noise, torch.Generator().manual_seed(0)) for t in (plain, compiled))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

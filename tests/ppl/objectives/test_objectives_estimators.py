"""Every estimator against closed forms: unbiased at stated power, and mutants that are not.

Each comparison allows four standard errors: false alarm 6e-5 each, below 5e-3 for the whole file, with fixed seeds.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import (
    agrees,
    differs,
    measure,
    normal_guide,
    normal_program,
    real,
    switch_exact,
    switch_guide,
    switch_program,
)
from torch import Tensor

import ppl
from ppl.errors import CapabilityError
from ppl.objectives import (
    ELBO,
    IWELBO,
    VIMCO,
    Engine,
    MeasureValued,
    Rebar,
    Reinforce,
    StickingTheLanding,
    logmeanexp,
)

D = torch.float64


def cost(fn: Any) -> Any:
    """E f(v) as an objective without a model."""
    return lambda ctx, model, guide: fn(ctx.sim(guide)["v"].double())


# T1


@pytest.mark.parametrize("estimator", ["reparam", "reinforce", Reinforce("decaying_average"), "mvd"])
def test_conjugate_normal(estimator: Any) -> None:
    """ELBO -2.30708208, d/dm = x - 2m, d/dlog s = 1 - 2 s^2."""
    engine = Engine(ELBO(), normal_program(), normal_guide, policy={"z": estimator})
    agrees(measure(engine, "value"), -2.30708208, 0.05)
    agrees(measure(engine, "m"), 1.1, 0.05)
    agrees(measure(engine, "log_s", 8000), -0.28, 0.2)


@pytest.mark.parametrize("estimator", ["reparam", "reinforce"])
def test_sticking_the_landing_is_unbiased_away_from_the_posterior(estimator: str) -> None:
    engine = Engine(StickingTheLanding(), normal_program(), normal_guide, policy={"z": estimator})
    agrees(measure(engine, "m"), 1.1, 0.05)
    agrees(measure(engine, "log_s"), -0.28, 0.2)


# T4

STRATEGIES = ["reinforce", Reinforce("none"), Reinforce("decaying_average"), "mvd"]


@pytest.mark.parametrize("particles", [1, 2, 3, 5])
def test_enumeration_is_exact(particles: int) -> None:
    """All 2^K joint states are summed: no noise, and the exact figures (0.03023583 at K = 2; Pyro's is zero there)."""
    value, grad = switch_exact(particles, lambda w: logmeanexp(w))
    published = {1: 0.06169407, 2: 0.03023583, 3: 0.01995270, 5: 0.01186186}[particles]
    assert abs(grad - published) < 2e-6  # printed figures, the last of them by simulation
    engine = Engine(IWELBO(particles), switch_program(), switch_guide, policy={"z": "enum"})
    found = engine.gradient(samples=1)
    assert abs(float(found.value) - value) < 1e-12
    assert abs(float(found.gradient["a"]) - grad) < 1e-12


@pytest.mark.parametrize("estimator", STRATEGIES, ids=repr)
@pytest.mark.parametrize("particles", [1, 2, 3])
def test_bernoulli_guide(estimator: Any, particles: int) -> None:
    """Truth 0.0617, 0.0302 and 0.01995; the standard error is below a twelfth of it."""
    _, grad = switch_exact(particles, lambda w: logmeanexp(w))
    engine = Engine(IWELBO(particles), switch_program(), switch_guide, policy={"z": estimator})
    agrees(measure(engine, "a", 8000 if estimator != "mvd" else 4000, 100), grad, 0.35)


@pytest.mark.parametrize("particles", [2, 3])
def test_vimco(particles: int) -> None:
    _, grad = switch_exact(particles, lambda w: logmeanexp(w))
    engine = Engine(VIMCO(particles), switch_program(), switch_guide, policy={"z": Reinforce("none")})
    agrees(measure(engine, "a", 8000, 100), grad, 0.1)


def test_spread_of_single_draws_is_that_of_theory() -> None:
    """Per-draw sd at K = 2: REINFORCE 0.983, VIMCO 0.357, MVD 0.342; at 20,000 draws the sd of an sd is below 1 %."""
    for objective, estimator, sd in [
        (IWELBO(2), Reinforce("none"), 0.983),
        (VIMCO(2), Reinforce("none"), 0.357),
        (IWELBO(2), "mvd", 0.342),
    ]:
        engine = Engine(objective, switch_program(), switch_guide, policy={"z": estimator})
        rows = torch.stack([engine.gradient(samples=50, seed=i).gradient["a"] for i in range(400)])
        assert abs(float(rows.std()) * math.sqrt(50) / sd - 1) < 0.16  # 4.5 sd of a standard deviation of 400 rows


def test_without_the_score_term_the_bernoulli_gradient_is_wrong() -> None:
    """The mutant every library has had: only the explicit dependence is differentiated."""

    def dropped(ctx: Any, model: Any, guide: Any) -> Tensor:
        with ctx.particles(2):
            z = ctx.sim(guide, detach=True)
            weight = ctx.density(model, z).log - ctx.density(guide, z).log
        return logmeanexp(weight)

    _, grad = switch_exact(2, lambda w: logmeanexp(w))
    differs(measure(Engine(dropped, switch_program(), switch_guide), "a"), grad)


def test_a_baseline_of_the_own_draw_biases() -> None:
    """Using the mean with the own sample shrinks the gradient by (S - 1) / S; leaving it out does not."""

    class Own:
        def __call__(self, ctx: Any, model: Any, guide: Any) -> Tensor:
            with ctx.particles(2) as particles:
                z = ctx.sim(guide)
                weight = ctx.density(model, z) - z.density
            bound = logmeanexp(weight)
            particles.baseline(bound.expand_as(weight))
            return bound

    _, grad = switch_exact(2, lambda w: logmeanexp(w))
    differs(measure(Engine(Own(), switch_program(), switch_guide, policy={"z": "reinforce"}), "a"), grad)


# T3


def test_implicit_gradients_of_a_beta() -> None:
    """Prior Beta(10, 10), 6 heads, 4 tails, q = Beta(15, 15): ELBO -7.13836737, d/da = 0.06893823 = -d/db."""

    def model(flips: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(real(10.0), real(10.0)))
        with pyro.plate("flips", 10):
            pyro.sample("x", dist.Bernoulli(p), obs=flips)

    def guide(flips: Tensor) -> None:
        pyro.sample(
            "p", dist.Beta(pyro.param("a", real(15.0)), pyro.param("b", real(15.0))), infer={"estimator": "implicit"}
        )

    flips = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=D)
    engine = Engine(ELBO(), ppl.Program(model, flips), guide)
    agrees(measure(engine, "value", 1000), -7.13836737, 0.01)
    agrees(measure(engine, "a", 2000), 0.06893823, 0.05)
    agrees(measure(engine, "b", 2000), -0.06893823, 0.05)


# T7: measure-valued derivatives of every row

ROWS = {
    "normal": (lambda m, s: dist.Normal(m, s), (0.4, 1.3), torch.sin, (0.39564853, -0.21746077)),
    "poisson": (lambda r: dist.Poisson(r), (2.3,), lambda k: 1 / (1 + k), (-0.12649259,)),
    "exponential": (lambda r: dist.Exponential(r), (1.7,), lambda x: (-x).exp(), (1 / 2.7**2,)),
    # E exp(-x) = (b / (b + 1))^a
    "gamma": (lambda b: dist.Gamma(real(2.5), b), (1.7,), lambda x: (-x).exp(), (2.5 * (1.7 / 2.7) ** 1.5 / 2.7**2,)),
    # E t^k = (1 - p + p t)^n
    "binomial": (lambda p: dist.Binomial(4, p), (0.3,), lambda k: 0.5**k, (-2.0 * 0.85**3,)),
    # E t^k = p / (1 - (1 - p) t)
    "geometric": (lambda p: dist.Geometric(p), (0.3,), lambda k: 0.5**k, (0.5 / 0.65**2,)),
    "bernoulli": (lambda p: dist.Bernoulli(p), (0.3,), lambda v: (1 + v).square(), (3.0,)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("estimator", ["mvd", "reinforce"])
def test_rows_of_the_measure_valued_table(name: str, estimator: str) -> None:
    make, start, f, truths = ROWS[name]

    def guide() -> None:
        pyro.sample("v", make(*(pyro.param(f"p{i}", real(x)) for i, x in enumerate(start))))

    engine = Engine(cost(f), None, guide, policy={"v": estimator}, dtype=D)
    for i, truth in enumerate(truths):
        agrees(measure(engine, f"p{i}"), truth, 0.25 if estimator == "reinforce" else 0.1)


def test_measure_valued_categorical_and_steps() -> None:
    """A categorical by its three arms, and d/dm Phi(m / s) = phi(m / s) / s for a step, which no path gradient sees."""
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=D)
    values = torch.tensor([1.0, -2.0, 5.0], dtype=D)

    def guide() -> None:
        pyro.sample("v", dist.Categorical(logits=pyro.param("logits", pi.log())))

    truth = pi * (values - (pi * values).sum())
    for estimator in ("mvd", "reinforce", "enum"):
        engine = Engine(cost(lambda v: values[v.long()]), None, guide, policy={"v": estimator}, dtype=D)
        found = measure(engine, "logits", 2000)
        assert bool(((found.mean - truth).abs() < 4 * found.stderr + 1e-12).all())
        assert float(found.stderr.max()) < 0.05

    def normal() -> None:
        pyro.sample("v", dist.Normal(pyro.param("m", real(0.4)), 1.3))

    step = float(dist.Normal(0.0, 1.3).log_prob(torch.tensor(0.4)).exp())
    agrees(
        measure(Engine(cost(lambda v: (v > 0).double()), None, normal, policy={"v": "mvd"}, dtype=D), "m"), step, 0.05
    )


def test_vector_sites_and_plates_are_moved_coordinate_by_coordinate() -> None:
    """f couples three coordinates, so that moving all at once would be wrong: d/dm_i of E (sum v)^2 = 2 sum m."""

    def guide() -> None:
        m = pyro.param("m", torch.tensor([0.3, -0.2, 0.5], dtype=D))
        pyro.sample("v", dist.Normal(m, 1.0).to_event(1))

    engine = Engine(cost(lambda v: v.sum(-1).square()), None, guide, policy={"v": "mvd"}, dtype=D)
    found = measure(engine, "m", 4000)
    assert bool(((found.mean - 1.2).abs() < 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.05


# T6: several estimators in one program


@pytest.mark.parametrize("index", ["enum", "mvd", "reinforce"])
@pytest.mark.parametrize("value", ["reparam", "reinforce", "mvd"])
def test_mixture_guide_with_any_pair_of_estimators(index: str, value: str) -> None:
    """A chain: the index of 0.3 N(-1, .5^2) + 0.7 N(2, 1) chooses the next site; E cos(v) in closed form."""
    means, sds = torch.tensor([-1.0, 2.0], dtype=D), torch.tensor([0.5, 1.0], dtype=D)

    def guide() -> None:
        w, m1 = pyro.param("w", real(0.3)), pyro.param("m1", real(-1.0))
        k = pyro.sample("k", dist.Categorical(torch.stack([w, 1 - w])), infer={"estimator": index})
        loc = torch.where(k == 0, m1, means[1])
        pyro.sample("v", dist.Normal(loc, sds[k.long()]), infer={"estimator": value})

    expected = means.cos() * (-0.5 * sds.square()).exp()
    engine = Engine(cost(torch.cos), None, guide, dtype=D)
    samples = 4000 if "reinforce" in (index, value) else 1500
    agrees(measure(engine, "w", samples), float(expected[0] - expected[1]), 0.1)
    agrees(measure(engine, "m1", samples), float(-0.3 * means[0].sin() * (-0.5 * sds[0] ** 2).exp()), 0.25)


# T10


def test_branch_of_a_coin_under_enumeration() -> None:
    """E[b ? 0 : -t/2], b ~ Bernoulli(t): the derivative is t - 1/2, exactly."""

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        b = ctx.sim(guide)["b"]
        return torch.where(b == 1, 0.0, -ctx.params["t"] / 2)

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("t", real(0.8))))

    engine = Engine(objective, None, guide, dtype=D)
    assert abs(float(engine.gradient().gradient["t"]) - 0.3) < 1e-12


# Baselines


def test_learned_baseline_is_unbiased_and_learns() -> None:
    """A module in the guide: its gradient is that of the squared error, and leaves that of the guide unbiased."""
    net = torch.nn.Linear(1, 1).double()

    def guide(x: Tensor) -> None:
        estimator = Reinforce(net, given=x.reshape(1))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", real(0.4))), infer={"estimator": estimator})

    engine = Engine(ELBO(), switch_program(), guide)
    names = [n for n in engine.parameters if "baseline" in n]
    assert len(names) == 2
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    value, grad = switch_exact(1, lambda w: w[0])
    agrees(measure(engine, "a", 4000), grad, 0.35)
    params = dict(engine.parameters)
    for i in range(200):
        found = engine.gradient(params, samples=100, seed=i).gradient
        params |= {n: params[n] + 0.2 * found[n] for n in names}
    out = sum(float(params[n].sum()) for n in names)  # weight + bias at x = 1
    assert abs(out - value) < 0.1
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


def test_default_policy() -> None:
    """Reparameterised where possible, a coin summed, many coins measured, many counts by their score."""

    def guide() -> None:
        pyro.sample("a", dist.Normal(pyro.param("m", real(0.0)), 1.0))
        pyro.sample("b", dist.Bernoulli(pyro.param("p", real(0.4))))
        pyro.sample("c", dist.Bernoulli(pyro.param("c", torch.full((20,), 0.5, dtype=D))).to_event(1))
        pyro.sample("d", dist.Poisson(pyro.param("r", torch.full((50,), 2.0, dtype=D))).to_event(1))

    def total(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return z["a"] + z["b"] + z["c"].sum(-1) + z["d"].sum(-1)

    engine = Engine(total, None, guide, dtype=D)
    kinds = {site: type(e).__name__ for (_, site), e in engine.plan.estimators.items()}
    assert kinds == {"a": "Reparam", "b": "Enumerate", "c": "MeasureValued", "d": "Reinforce"}
    found = engine.gradient(samples=3).gradient
    assert bool((found["c"] - 1).abs().max() < 1e-12)  # f(1) - f(0) = 1 for every draw
    assert isinstance(next(e for (_, s), e in engine.plan.estimators.items() if s == "c"), MeasureValued)


# Relaxed control variates


@pytest.mark.parametrize("estimator", [Rebar(), Rebar(1.0, 0.7)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
def test_rebar_is_unbiased_at_any_temperature(estimator: Any, particles: int) -> None:
    _, grad = switch_exact(particles, lambda w: logmeanexp(w))
    engine = Engine(IWELBO(particles), switch_program(), switch_guide, policy={"z": estimator})
    agrees(measure(engine, "a", 8000), grad, 0.2)


def test_rebar_of_a_one_hot_choice() -> None:
    """Three states, the draw given its largest by truncated Gumbels."""
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=D)
    values = torch.tensor([1.0, -2.0, 5.0], dtype=D)

    def guide() -> None:
        pyro.sample("v", dist.OneHotCategorical(logits=pyro.param("logits", pi.log())), infer={"estimator": "rebar"})

    f = values.sin()
    truth = pi * (f - (pi * f).sum())
    engine = Engine(cost(lambda v: (v * values).sum(-1).sin()), None, guide, dtype=D)
    found = measure(engine, "logits", 4000)
    assert bool(((found.mean - truth).abs() < 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.01


def test_rebar_beside_other_scores_is_refused() -> None:
    def guide() -> None:
        b = pyro.sample("b", dist.Bernoulli(pyro.param("p", real(0.4))), infer={"estimator": "rebar"})
        pyro.sample("v", dist.Bernoulli(0.2 + 0.5 * b), infer={"estimator": "reinforce"})

    with pytest.raises(CapabilityError, match="Rebar is unbiased for one site"):
        Engine(cost(lambda v: v), None, guide, dtype=D)


def test_enumerated_states_share_their_noise() -> None:
    """E[b + 100 v]: d/dp is one for every draw, since both states see the same v."""

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("p", real(0.4))), infer={"estimator": "enum"})
        pyro.sample("v", dist.Normal(pyro.param("m", real(1.0)), real(1.0)))

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        draw = ctx.sim(guide)
        return draw["b"] + 100 * draw["v"]

    engine = Engine(objective, None, guide, dtype=D)
    assert abs(float(engine.gradient(samples=4).gradient["p"]) - 1) < 1e-10
    agrees(measure(engine, "value", 2000), 100.4, 0.02)

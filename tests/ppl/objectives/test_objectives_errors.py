"""Bad input: one clear error each, at the door."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import normal_guide, normal_program, real, switch_guide, switch_program
from torch import Tensor

import ppl
from ppl.errors import CapabilityError, NotFiniteError, OptionError, ProgramError, ShapeError
from ppl.objectives import (
    DIWHVI,
    ELBO,
    IWELBO,
    VIMCO,
    DReG,
    Engine,
    Enumerate,
    ForwardKL,
    MeasureValued,
    Reinforce,
    Renyi,
    Sleep,
)

D = torch.float64


def test_guide_that_misses_a_site() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(real(0.0), 1.0))

    with pytest.raises(ProgramError, match="no site 'z', which is latent in the model"):
        Engine(ELBO(), normal_program(), guide)


def test_guide_with_one_site_too_many() -> None:
    def guide(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(real(0.0), 1.0))
        pyro.sample("z", dist.Normal(u, 1.0))

    with pytest.raises(ProgramError, match=r"'u', which is no site of the model.*Marginal"):
        Engine(ELBO(), normal_program(), guide)

    def marked(x: Tensor) -> None:
        pyro.sample("u", dist.Normal(pyro.param("m", real(0.0)), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(real(0.0), 1.0))

    Engine(ELBO(), normal_program(), marked)


@pytest.mark.parametrize(
    ("in_guide", "in_model"),
    [
        (dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0)),
        (dist.Gamma(2.0, 1.0), dist.Beta(2.0, 2.0)),
        (dist.Uniform(0.0, 2.0), dist.Uniform(0.0, 1.0)),
        (dist.Poisson(2.0), dist.Bernoulli(0.5)),
        (dist.Normal(0.0, 1.0), dist.Poisson(2.0)),
        (dist.Categorical(torch.ones(3)), dist.Categorical(torch.ones(2))),
    ],
)
def test_supports_that_do_not_match(in_guide: Any, in_model: Any) -> None:
    def model() -> None:
        pyro.sample("z", in_model)
        pyro.factor("data", torch.tensor(0.0))

    def guide() -> None:
        pyro.sample("z", in_guide)

    with pytest.raises(ProgramError, match="site 'z': supports do not match"):
        Engine(ELBO(), ppl.Program(model), guide)


def test_supports_that_do() -> None:
    for in_guide, in_model in [
        (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0)),
        (dist.LogNormal(0.0, 1.0), dist.Gamma(2.0, 1.0)),
        (dist.Gamma(2.0, 1.0), dist.Normal(0.0, 1.0)),
        (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(2 * torch.ones(3))),
        (dist.Binomial(1, torch.tensor(0.5)), dist.Bernoulli(0.5)),
    ]:

        def model(d: Any = in_model) -> None:
            pyro.sample("z", d)
            pyro.factor("data", torch.tensor(0.0))

        def guide(d: Any = in_guide) -> None:
            pyro.sample("z", d)

        Engine(ELBO(), ppl.Program(model), guide, policy={"z": "reinforce"})


def test_shapes_that_do_not_match() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3, dtype=D), 1.0).to_event(1))

    with pytest.raises(ShapeError, match="same to_event"):
        Engine(ELBO(), normal_program(), guide)


@pytest.mark.parametrize(
    ("fn", "estimator", "works"),
    [
        (dist.Bernoulli(0.5), "reparam", r'"enum", "mvd", "reinforce", "rebar"'),
        (dist.Poisson(2.0), "enum", r'"mvd", "reinforce"'),
        (dist.Beta(2.0, 2.0), "mvd", r'"reparam", "reinforce"'),
        (dist.Normal(0.0, 1.0), "enum", r'"reparam", "mvd", "reinforce"'),
        (dist.VonMises(0.0, 1.0), "implicit", r'"reinforce"'),
    ],
    ids=str,
)
def test_estimator_that_a_distribution_does_not_have(fn: Any, estimator: str, works: str) -> None:
    def guide() -> None:
        pyro.sample("v", fn, infer={"estimator": estimator})

    with pytest.raises(CapabilityError, match=rf"site 'v': .* estimators that would work: {works}"):
        Engine(lambda ctx, model, guide: ctx.sim(guide)["v"], None, guide)


def test_score_of_a_support_that_moves() -> None:
    def guide() -> None:
        pyro.sample("v", dist.Uniform(0.0, pyro.param("t", torch.tensor(2.0))), infer={"estimator": "reinforce"})

    with pytest.raises(CapabilityError, match="support may move"):
        Engine(lambda ctx, model, guide: ctx.sim(guide)["v"], None, guide)


def test_unknown_names_and_options() -> None:
    with pytest.raises(OptionError, match="unknown estimator 'straight_through'; the names are"):
        Engine(ELBO(), switch_program(), switch_guide, policy={"z": "straight_through"})
    for make in (
        lambda: IWELBO(0),
        lambda: VIMCO(1),
        lambda: Renyi(1.0),
        lambda: DIWHVI(None, 2, 0),
        lambda: ForwardKL(0),
        lambda: DReG(0),
        lambda: Reinforce("mean"),
        lambda: Reinforce(decay=1.0),
        lambda: Enumerate(1),
        lambda: MeasureValued(0),
        lambda: ppl.SVI(guide=3),
        lambda: ppl.SVI(objective=ELBO),
        lambda: Engine(ELBO, switch_program(), switch_guide),  # type: ignore[arg-type]
        lambda: Engine(ELBO(), switch_program(), switch_guide, batching="vmap"),
    ):
        with pytest.raises(OptionError):
            make()


def test_nested_expectation_without_samples() -> None:
    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        with ctx.particles(0):
            return ctx.sim(guide)["z"]

    with pytest.raises(OptionError, match="a nested expectation needs samples"):
        Engine(objective, switch_program(), switch_guide)


def test_infinite_objective_names_the_site() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(real(0.5)))
        pyro.factor("hole", torch.where(z == 0, -torch.inf, 0.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(pyro.param("a", real(0.5))))

    engine = Engine(ELBO(), ppl.Program(model, real(0.3)), guide, policy=lambda name, fn: "enum")
    with pytest.raises(NotFiniteError, match="log density of site 'hole' is not finite"):
        engine.gradient()


def test_enumeration_without_bound() -> None:
    def guide() -> None:
        pyro.sample("v", dist.Bernoulli(0.5 * torch.ones(30)).to_event(1), infer={"estimator": "enum"})

    with pytest.raises(CapabilityError, match=r"site 'v': enumeration without bound.*1\.07e\+09 joint states"):
        Engine(lambda ctx, model, guide: ctx.sim(guide)["v"].sum(-1), None, guide)

    def many() -> None:
        pyro.sample("v", dist.Normal(pyro.param("m", torch.zeros(600)), 1.0).to_event(1), infer={"estimator": "mvd"})

    engine = Engine(lambda ctx, model, guide: ctx.sim(guide)["v"].sum(-1), None, many)
    with pytest.raises(CapabilityError, match="600 coordinates"):
        engine.gradient()


def test_objective_of_the_wrong_shape() -> None:
    def forgotten(ctx: Any, model: Any, guide: Any) -> Tensor:
        with ctx.particles(3):
            z = ctx.sim(guide)
            return ctx.density(model, z) - z.density

    with pytest.raises(ShapeError, match="reduce the particle axes"):
        Engine(forgotten, normal_program(), normal_guide)


def test_path_gradient_of_a_discrete_site() -> None:
    with pytest.raises(OptionError, match="DReG is unbiased for reparameterised sites only, but site 'z'"):
        Engine(DReG(2), switch_program(), switch_guide).gradient()


def test_sleep_without_an_argument_for_the_data() -> None:
    data = real(0.4)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(real(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", real(0.0)), 1.0))

    with pytest.raises(ProgramError, match="no argument of the programs carries the data of site 'x'"):
        Engine(Sleep(), ppl.Program(model), guide)


def test_guide_that_fails() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(real(0.0), real(-1.0)))

    with pytest.raises(ProgramError, match="'guide' failed when it was run once"):
        Engine(ELBO(), normal_program(), guide)

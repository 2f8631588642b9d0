"""RELAX: exact by quadrature over its two noises, for any surrogate, and a surrogate that learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import (
    Z_BOUND,
    Measured,
    agrees,
    coins_agree,
    measure,
    real,
    switch_exact,
    switch_guide,
    switch_program,
)
from torch import Tensor

import ppl
from ppl.errors import OptionError, ShapeError
from ppl.objectives import ELBO, IWELBO, Engine, Rebar, Reinforce, Relax, learned_control, logmeanexp, relaxed

D = torch.float64
GRID = 400


def surrogate(z: Tensor) -> Tensor:
    return 1.5 * torch.tanh(0.7 * z.sum(-1, keepdim=True)) - 0.3 * z[..., :1]


def midpoints(size: int) -> tuple[Tensor, Tensor]:
    points = (torch.arange(size, dtype=D) + 0.5) / size
    u, v = torch.meshgrid(points, points, indexing="ij")
    return u.reshape(-1), v.reshape(-1)


def on_grid(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> float:
    """The mean of the estimator over both noises, by the midpoint rule: its expectation up to O(1 / GRID)."""
    noise = midpoints(GRID)
    for module in (learned_control, ppl.objectives.drawing):
        monkeypatch.setattr(module, "relaxed_noise", lambda fn: noise)
    return float(engine.gradient(samples=GRID**2).gradient[name])


@pytest.mark.parametrize(
    "estimator", [Relax(surrogate), Rebar(), Relax(lambda z: 0 * z)], ids=["relax", "rebar", "zero"]
)
def test_expectation_is_the_gradient_of_the_enumerated_bound(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinks in the integrand, at b = H(z): the rule errs by about |f| / GRID."""
    _, truth = switch_exact(1, lambda w: logmeanexp(w))
    engine = Engine(ELBO(), switch_program(), switch_guide, policy={"z": estimator})
    assert abs(on_grid(engine, monkeypatch, "a") - truth) < 2 / GRID


def mutant(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    original = relaxed.relaxed

    def changed(fn: Any, logits: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, z, given = original(fn, logits, u, v)
        return b, *change(z, given)

    return changed


@pytest.mark.parametrize(
    "change",
    [lambda z, g: (z, z), lambda z, g: (z.detach(), g), lambda z, g: (z, g.detach())],
    ids=["same", "z", "given"],
)
def test_mutants_are_seen(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not conditional on b, or without the path through either relaxed draw."""
    _, truth = switch_exact(1, lambda w: logmeanexp(w))
    monkeypatch.setattr(learned_control, "relaxed", mutant(change))
    engine = Engine(ELBO(), switch_program(), switch_guide, policy={"z": Relax(surrogate)})
    assert abs(on_grid(engine, monkeypatch, "a") - truth) > 0.02


@pytest.mark.parametrize("particles", [1, 2])
def test_several_particles(particles: int) -> None:
    _, grad = switch_exact(particles, lambda w: logmeanexp(w))
    engine = Engine(IWELBO(particles), switch_program(), switch_guide, policy={"z": Relax(surrogate)})
    agrees(measure(engine, "a", 8000), grad, 0.5)


def test_one_hot_choice_with_a_cost_that_jumps() -> None:
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=D)
    values = torch.tensor([1.0, -2.0, 5.0], dtype=D)

    def guide() -> None:
        fn = dist.OneHotCategorical(logits=pyro.param("logits", pi.log()))
        pyro.sample("v", fn, infer={"estimator": Relax(surrogate)})

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        return values[ctx.sim(guide)["v"].argmax(-1)]

    found = measure(Engine(objective, None, guide, dtype=D), "logits", 4000)
    truth = pi * (values - (pi * values).sum())
    assert bool(((found.mean - truth).abs() < Z_BOUND * found.stderr).all())
    assert float(found.stderr.max()) < 0.02


def test_beside_every_other_estimator() -> None:
    """A chain of four coins, one estimator each: the gradient of the enumerated cost."""

    def cost(z: Any) -> Tensor:
        return 3 * z["z0"] - 2 * z["z1"] * z["z2"] + z["z3"] * z["z0"] + z["z3"]

    policy = {"z0": Relax(surrogate), "z1": "mvd", "z2": Relax(surrogate), "z3": "reinforce"}
    coins_agree(cost, 0.3, policy, compared=4, power=0.5)


def test_surrogate_learns_and_lowers_the_variance() -> None:
    """The cost (b - 0.45)^2 of one coin: a fifth of the spread of the plain score, and still unbiased."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("a", real(0.4))))

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        return (ctx.sim(guide)["b"] - 0.45) ** 2

    engine = Engine(objective, None, guide, policy={"b": Relax(net)}, dtype=D)
    params = dict(engine.parameters)
    learned = [n for n in params if "surrogate" in n]
    assert len(learned) == 4
    for step in range(400):
        found = engine.gradient(params, samples=64, seed=step).gradient
        params |= {n: params[n] + 0.5 * found[n] for n in learned}

    def spread(engine: Engine, params: Any) -> Tensor:
        return torch.stack([engine.gradient(params, samples=8, seed=1000 + i).gradient["a"] for i in range(200)])

    score = Engine(objective, None, guide, policy={"b": Reinforce("none")}, dtype=D)
    ours = spread(engine, params)
    assert float(ours.std()) < 0.2 * float(spread(score, None).std())
    p = torch.sigmoid(real(0.4))
    agrees(Measured(ours.mean(), ours.std() / len(ours) ** 0.5), float(p * (1 - p) * (0.55**2 - 0.45**2)), 0.2)


def test_bad_surrogates() -> None:
    with pytest.raises(OptionError, match="Relax learns a surrogate of the cost and needs one"):
        Relax()
    engine = Engine(ELBO(), switch_program(), switch_guide, policy={"z": "reinforce"})
    with pytest.raises(ShapeError, match=r"surrogate of site 'z' must return one number for each row"):
        Engine(ELBO(), switch_program(), switch_guide, policy={"z": Relax(lambda z: z.sum())}).gradient()
    assert engine.gradient().value.isfinite()

"""Measure-valued arms in one batch: the same numbers as one run for each, and one run in place of many."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import coins_agree, real
from torch import Tensor

import ppl
from ppl.objectives import ELBO, IWELBO, Engine, Expectation
from ppl.objectives import engine as engine_module

D = torch.float64
RUNS: list[int] = []


def model(y: Tensor) -> None:
    RUNS.append(1)
    first = pyro.sample("first", dist.Normal(real(0.0), 1.0))
    coins = pyro.sample("coins", dist.Bernoulli(torch.full((6,), 0.3, dtype=D)).to_event(1))
    last = pyro.sample("last", dist.Normal(coins.sum(-1) - first, 1.0))
    pyro.sample("y", dist.Normal(last, 0.5), obs=y)


def guide(y: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(pyro.param("m", real(0.2)), pyro.param("s", real(0.8))))
    logits = pyro.param("a", torch.linspace(-1, 1, 6, dtype=D)) + 0.1 * first[..., None]
    coins = pyro.sample("coins", dist.Bernoulli(logits=logits).to_event(1))
    pyro.sample("last", dist.Normal(pyro.param("b", real(0.7)) * coins.sum(-1), 0.6))


def made(objective: Any, **policy: Any) -> Engine:
    chosen = {"first": "mvd", "coins": "mvd", "last": "reparam", **policy}
    return Engine(objective, ppl.Program(model, real(1.2)), guide, policy=chosen)


@pytest.mark.parametrize("objective", [ELBO(), IWELBO(2)], ids=repr)
def test_same_numbers_as_one_run_for_each_arm(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing random follows the coins but noise that is repeated; what follows `first` is forced or repeated."""
    together = made(objective, first="reparam").gradient(samples=5, seed=3)
    monkeypatch.setattr(engine_module, "can_stack", lambda ctx, address: False)
    apart = made(objective, first="reparam").gradient(samples=5, seed=3)
    for name, value in apart.gradient.items():
        torch.testing.assert_close(together.gradient[name], value, rtol=1e-10, atol=1e-10)


def test_runs_of_the_model_do_not_grow_with_the_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(ELBO(), first="reparam")
    RUNS.clear()
    engine.gradient(samples=4)
    assert len(RUNS) == 2
    monkeypatch.setattr(engine_module, "can_stack", lambda ctx, address: False)
    RUNS.clear()
    engine.gradient(samples=4)
    assert len(RUNS) == 7


def test_gradient_through_coins_that_follow_is_that_of_enumeration() -> None:
    """Coins after the site are drawn anew in every arm, from noise that all share; the gradient stays unbiased."""

    def cost(z: Any) -> Tensor:
        return 3 * z["z0"] - 2 * z["z1"] * z["z2"] + z["z2"]

    coins_agree(cost, 0.4, {"z0": "mvd", "z1": "mvd", "z2": "reinforce"}, compared=2, power=0.3)


def test_shapes_that_depend_on_draws_run_arm_by_arm() -> None:
    def square(ctx: Any, model: Any, guide: Any) -> Tensor:
        inner = ctx.expectation(lambda: ctx.sim(guide)["v"] + 0.0, 2)
        assert isinstance(inner, Expectation)
        return inner.exp()

    def coin() -> None:
        pyro.sample("v", dist.Bernoulli(pyro.param("p", real(0.4))), infer={"estimator": "mvd"})

    assert Engine(square, None, coin, dtype=D).gradient(samples=3).value.isfinite()

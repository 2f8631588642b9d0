"""Enumeration without the impossible states: coins in a row, each after the one before."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from ppl.errors import OptionError, ProgramError
from ppl.objectives import ELBO, IWELBO, Engine, Enumerate, Reinforce

D = torch.float64
AFTER = {"a": "enum", "b": Enumerate(after="a"), "c": Enumerate(after="b")}


def model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5, dtype=D)))
        b = pyro.sample("b", dist.Bernoulli(0.4 * a))
        c = pyro.sample("c", dist.Bernoulli(0.3 * b))
        pyro.sample("y", dist.Normal(a + 2 * b + 4 * c, 1.0), obs=y)


def guide(y: Tensor, waits: bool = True) -> None:
    logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5], dtype=D)[:, None].repeat(1, 3))
    before: Any = torch.ones((), dtype=D)
    with pyro.plate("data", len(y)):
        for logit, name in zip(logits, "abc", strict=True):
            value = pyro.sample(name, dist.Bernoulli(logit.sigmoid() * before))
            before = value if waits else before


def program() -> ppl.Program:
    return ppl.Program(model, torch.tensor([0.1, 3.2, 6.0], dtype=D))


def terms(policy: dict[str, Any], objective: Any = None, samples: int = 1) -> tuple[int, Tensor, Tensor]:
    engine = Engine(objective or ELBO(), program(), guide, policy=policy)
    params = {n: v.clone().requires_grad_() for n, v in engine.parameters.items()}
    value, surrogate = engine.surrogate(params, samples, torch.Generator().manual_seed(0))
    return engine.plan.joint, value, torch.autograd.grad(surrogate, params["logits"])[0]


@pytest.mark.parametrize("samples", [1, 3])
def test_possible_states_give_the_bound_and_gradient_of_all(samples: int) -> None:
    states, value, gradient = terms(dict.fromkeys("abc", "enum"), samples=samples)
    fewer, same, alike = terms(AFTER, samples=samples)
    assert (states, fewer) == (8, 4)
    torch.testing.assert_close(same, value, rtol=1e-9, atol=0)
    torch.testing.assert_close(alike, gradient, rtol=1e-9, atol=1e-12)


def test_every_particle_waits_for_its_own() -> None:
    states, value, gradient = terms(dict.fromkeys("abc", "enum"), IWELBO(2))
    fewer, same, alike = terms(AFTER, IWELBO(2))
    assert (states, fewer) == (64, 16)
    torch.testing.assert_close(same, value, rtol=1e-9, atol=0)
    torch.testing.assert_close(alike, gradient, rtol=1e-9, atol=1e-12)


def test_the_traced_step_agrees() -> None:
    """`fit` traces the objective, and refuses a graph that differs from the programs."""
    options: dict[str, Any] = {"guide": guide, "objective": ELBO(), "steps": 220, "particles": 1, "lr": 0.05}
    all_states = ppl.SVI(estimators=dict.fromkeys("abc", "enum"), **options).fit(program(), seed=0)
    possible = ppl.SVI(estimators=AFTER, **options).fit(program(), seed=0)
    torch.testing.assert_close(possible.history, all_states.history, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"a": Enumerate(after="b"), "b": "enum"}, r"no enumerated site before it; those are \[\]"),
        ({"a": Reinforce(), "b": Enumerate(after="a")}, "'b' is enumerated after 'a', which is no enumerated site"),
    ],
)
def test_a_site_waits_for_an_enumerated_one(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Engine(ELBO(), program(), guide, policy=policy)


def test_a_guide_that_does_not_wait_is_named() -> None:
    with pytest.raises(ProgramError, match=r"probability 0\.\d+: sites \['b', 'c'\] wait for others"):
        Engine(ELBO(), program(), lambda y: guide(y, waits=False), policy=AFTER)

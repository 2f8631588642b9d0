"""Scores that keep the costs downstream of their site: the same gradient, exactly, and less variance."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import real
from torch import Tensor

import ppl
from ppl.objectives import ELBO, Engine, Reinforce
from ppl.objectives import engine as engine_module
from ppl.objectives.downstream import downstream

D = torch.float64
DATA = torch.tensor([0.3, -1.1, 1.7], dtype=D)


def plated_model(y: Tensor) -> None:
    shared = pyro.sample("shared", dist.Bernoulli(real(0.4)))
    with pyro.plate("data", 3):
        local = pyro.sample("local", dist.Bernoulli(0.2 + 0.5 * shared))
        pyro.sample("y", dist.Normal(2 * local - shared, 0.8), obs=y)


def plated_guide(y: Tensor) -> None:
    shared = pyro.sample("shared", dist.Bernoulli(logits=pyro.param("a", real(0.3))))
    with pyro.plate("data", 3):
        logits = pyro.param("b", torch.tensor([0.2, -0.4, 0.9], dtype=D)) + pyro.param("c", real(0.5)) * shared
        pyro.sample("local", dist.Bernoulli(logits=logits))


def pooled_guide(y: Tensor) -> None:
    """The shared site is drawn last, from what all lanes drew: a lane then reaches the others through it."""
    with pyro.plate("data", 3):
        local = pyro.sample("local", dist.Bernoulli(logits=pyro.param("b", torch.tensor([0.2, -0.4, 0.9], dtype=D))))
    total = local.sum(-1, keepdim=True)
    pyro.sample("shared", dist.Bernoulli(logits=pyro.param("a", real(0.3)) + pyro.param("c", real(0.5)) * total))


def chain_model(y: Tensor) -> None:
    z = real(0.5)
    for t in range(4):
        z = pyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample(f"y{t}", dist.Normal(z, 0.7), obs=y[t % 3])


def chain_guide(y: Tensor) -> None:
    z = real(0.0)
    for t in range(4):
        z = pyro.sample(f"z{t}", dist.Bernoulli(logits=pyro.param(f"a{t}", real(0.1 * t)) + z))


def moments(engine: Engine) -> tuple[Tensor, Tensor]:
    """Mean and variance of the gradient of one draw, by running through all joint states of the guide."""
    found = {a[1]: a for a in engine.plan.estimators}
    sizes = {n: 3 if n == "local" else 1 for n in found}
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=sum(sizes.values()))), dtype=D)
    count = len(states)
    plates = engine.plan.plates
    forced, start = {}, 0
    for name, address in found.items():
        part = states[:, start : start + sizes[name]]
        forced[address] = part if plates else part[:, 0]
        start += sizes[name]
    engine.plan.assignments = lambda samples: forced  # type: ignore[method-assign]
    params = {n: p.clone().requires_grad_() for n, p in engine.parameters.items()}
    with torch.enable_grad(), ppl.trace.settings(D, validate=False):
        _, total, ctx = engine.terms(params, count, {})
        rows = []
        for row in total.reshape(count, -1).sum(1):
            grads = torch.autograd.grad(row, list(params.values()), retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                        for g, p in zip(grads, params.values(), strict=True)
                    ]
                )
            )
    log_q = sum(engine.plan.collect(node.raw, 1).reshape(count, -1).sum(1) for node, _ in ctx.sites.values())
    weight = log_q.detach().exp()
    torch.testing.assert_close(weight.sum(), real(1.0))
    gradient = torch.stack(rows)
    mean = weight @ gradient
    return mean, weight @ (gradient - mean).square()


def exact(model: Any, guide: Any) -> Tensor:
    engine = Engine(ELBO(), ppl.Program(model, DATA), guide, policy=lambda name, fn: "enum")
    return torch.cat([g.reshape(-1) for g in engine.gradient().gradient.values()])


def made(model: Any, guide: Any) -> Engine:
    return Engine(ELBO(), ppl.Program(model, DATA), guide, policy=lambda name, fn: Reinforce("none"))


CASES = [(plated_model, plated_guide), (plated_model, pooled_guide), (chain_model, chain_guide)]


@pytest.mark.parametrize(("model", "guide"), CASES, ids=lambda f: f.__name__)
def test_same_gradient_and_less_variance(
    model: Callable[..., None], guide: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = exact(model, guide)
    mean, variance = moments(made(model, guide))
    torch.testing.assert_close(mean, truth, rtol=1e-9, atol=1e-10)
    monkeypatch.setattr(engine_module, "downstream", lambda plan, terms, address: None)
    plain, spread = moments(made(model, guide))
    torch.testing.assert_close(plain, truth, rtol=1e-9, atol=1e-10)
    if guide is not pooled_guide:  # there all that follows is downstream of every lane
        assert float(variance.sum()) < 0.75 * float(spread.sum())


def test_a_lane_that_reaches_others_through_a_later_site_keeps_their_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that keeps each lane's own costs alone, as if no later site were shared, is off."""

    def own_lane(plan: Any, terms: Any, address: Any) -> Tensor | None:
        everywhere = dict.fromkeys(terms.order, terms.plates["local"])
        return downstream(plan, type(terms)(terms.call, terms.order, everywhere, terms.terms), address)

    monkeypatch.setattr(engine_module, "downstream", own_lane)
    mean, _ = moments(made(plated_model, pooled_guide))
    assert float((mean - exact(plated_model, pooled_guide)).abs().max()) > 1e-2


def test_costs_after_a_site_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that drops what later sites contribute is off."""

    def at_once(plan: Any, terms: Any, address: Any) -> Tensor | None:
        terms = type(terms)(
            terms.call,
            (address[1],),
            terms.plates,
            tuple(
                type(t)(t.value, t.plates, frozenset(list(t.sources)) if len(t.sources) < 3 else frozenset())
                for t in terms.terms
            ),
        )
        return downstream(plan, terms, address)

    monkeypatch.setattr(engine_module, "downstream", at_once)
    mean, _ = moments(made(chain_model, chain_guide))
    assert float((mean - exact(chain_model, chain_guide)).abs().max()) > 1e-2


def test_a_nonlinear_objective_keeps_its_whole_cost() -> None:
    """The square of the bound, which has no terms: the exact gradient still."""

    def square(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return (ctx.density(model, z) - z.density) ** 2

    program = ppl.Program(plated_model, DATA)
    engine = Engine(square, program, plated_guide, policy=lambda name, fn: Reinforce("none"))
    truth = Engine(square, program, plated_guide, policy=lambda name, fn: "enum").gradient().gradient
    mean, _ = moments(engine)
    torch.testing.assert_close(mean, torch.cat([g.reshape(-1) for g in truth.values()]), rtol=1e-9, atol=1e-10)


def test_values_that_were_changed_keep_the_whole_cost() -> None:
    """A draw whose values are replaced by functions of later ones has no known terms."""
    from dataclasses import replace

    def mixed(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        moved = replace(z, values={**z.values, "z0": (z.values["z0"] + z.values["z3"]) % 2})
        return ctx.density(model, moved) - z.density

    program = ppl.Program(chain_model, DATA)
    truth = Engine(mixed, program, chain_guide, policy=lambda name, fn: "enum").gradient().gradient
    mean, _ = moments(Engine(mixed, program, chain_guide, policy=lambda name, fn: Reinforce("none")))
    torch.testing.assert_close(mean, torch.cat([g.reshape(-1) for g in truth.values()]), rtol=1e-9, atol=1e-10)

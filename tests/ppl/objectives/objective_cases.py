"""Small problems with exact answers, and how a gradient is measured against them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl
from ppl.objectives import Engine

Z_BOUND = 4.0  # two-sided false alarm 6e-5 for each number compared


def real(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


class Measured(NamedTuple):
    mean: Tensor
    stderr: Tensor


def measure(engine: Engine, name: str, samples: int = 4000, batches: int = 50, **options: Any) -> Measured:
    """Mean of a gradient over independent batches, and its standard error; "value" is the objective itself."""
    runs = [engine.gradient(samples=samples, seed=i, **options) for i in range(batches)]
    rows = torch.stack([r.value if name == "value" else r.gradient[name] for r in runs])
    return Measured(rows.mean(0), rows.std(0) / math.sqrt(batches))


def agrees(found: Measured, truth: float, power: float) -> None:
    """Within four standard errors, and these small enough that a relative error of `power` would be seen."""
    error = abs(float(found.mean) - truth)
    assert error < Z_BOUND * float(found.stderr) + 1e-12, (float(found.mean), truth, float(found.stderr))
    assert Z_BOUND * float(found.stderr) < power * abs(truth), f"no power: standard error {float(found.stderr):.3g}"


def differs(found: Measured, truth: float) -> None:
    """What a mutant must show."""
    assert abs(float(found.mean) - truth) > 2 * Z_BOUND * float(found.stderr)


# T1: z ~ N(0, 1), x | z ~ N(z, 1), q = N(m, s^2) at x = 1.7, m = 0.3, s = 0.8.


def normal_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(real(0.0), real(1.0)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x: Tensor) -> None:
    m = pyro.param("m", real(0.3))
    log_s = pyro.param("log_s", real(0.8).log())
    pyro.sample("z", dist.Normal(m, log_s.exp()))


def normal_program() -> ppl.Program:
    return ppl.Program(normal_model, real(1.7))


# T4: P(z = 1) = 0.3, P(x = 1 | z) = 0.2, 0.9, q = sigmoid(a), a = 0.4.


def switch_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(real(0.3)))
    pyro.sample("x", dist.Bernoulli(0.2 + 0.7 * z), obs=x)


def switch_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", real(0.4))))


def switch_program() -> ppl.Program:
    return ppl.Program(switch_model, real(1.0))


def switch_exact(particles: int, bound: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Value and gradient in a of E bound(log w_1, ..., log w_K), by summing all joint states."""
    a = real(0.4).requires_grad_()
    log_q = torch.stack([torch.nn.functional.logsigmoid(-a), torch.nn.functional.logsigmoid(a)])
    log_p = torch.tensor([0.7 * 0.2, 0.3 * 0.9], dtype=torch.float64).log()
    states = torch.cartesian_prod(*[torch.arange(2)] * particles).reshape(-1, particles)
    log_w = (log_p - log_q)[states]
    value = (log_q[states].sum(1).exp() * bound(log_w.mT)).sum()
    (grad,) = torch.autograd.grad(value, a)
    return float(value.detach()), float(grad)


# A model that is right for one draw only: z[0] of a batch of draws is not the first entry.


def one_draw_model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0] + z.sum(), 1.0), obs=y)


def one_draw_guide(y: Tensor) -> None:
    m = pyro.param("m", torch.tensor([0.2, -0.1], dtype=torch.float64))
    pyro.sample("z", dist.Normal(m, 0.5).to_event(1))


def one_draw_program() -> ppl.Program:
    return ppl.Program(one_draw_model, real(1.0))


# Coins z0, z1, ..., each with odds that the one before raises.


def coins_agree(
    cost: Callable[[Any], Tensor], rise: float, policy: dict[str, Any], compared: int, power: float
) -> None:
    """The gradient of E cost(coins), one estimator for each coin, is the enumerated one for the first coins."""

    def coins() -> None:
        z = real(0.0)
        for t in range(len(policy)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=pyro.param(f"a{t}", real(rise * t - 0.5)) + 2 * z))

    def objective(ctx: Any, model: Any, guide: Any) -> Tensor:
        return cost(ctx.sim(guide))

    truth = Engine(objective, None, coins, policy=lambda name, fn: "enum", dtype=torch.float64).gradient().gradient
    engine = Engine(objective, None, coins, policy=policy, dtype=torch.float64)
    runs = [engine.gradient(samples=4000, seed=i).gradient for i in range(20)]
    for t in range(compared):
        rows = torch.stack([r[f"a{t}"] for r in runs])
        agrees(Measured(rows.mean(), rows.std() / len(rows) ** 0.5), float(truth[f"a{t}"]), power)

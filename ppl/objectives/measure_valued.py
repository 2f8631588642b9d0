"""Measure-valued derivatives: d/d eta E_D(eta) f = c (E f(v+) - E f(v-)), for every coordinate of a site.

f needs no derivative, and the variance is usually far below that of the score. Both arms use the same draws.
Source: Mohamed, Rosca, Figurnov & Mnih (2020), table 1 [inferred]; every row is tested against a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.sites import unwrap

__all__ = ["Arm", "arms", "has_arms"]


@dataclass(frozen=True)
class Arm:
    """One row: the derivative in one parameter, coordinate by coordinate.

    Args:
        parameter: eta, differentiable, broadcastable to the value.
        constant: c, without gradient.
        plus: v+, of the shape of the value; `None` stands for the draw itself.
        minus: v-, likewise.
    """

    parameter: Tensor
    constant: Tensor
    plus: Tensor | None
    minus: Tensor | None


def _normal(fn: Any, value: Tensor) -> list[Arm]:
    loc, scale = fn.loc.detach().expand_as(value), fn.scale.detach().expand_as(value)
    rayleigh = (-2 * torch.rand_like(value).clamp_min(1e-300).log()).sqrt()
    # A double-sided Maxwell is a chi of three degrees with a sign; U times it is exactly standard normal.
    sign = torch.where(torch.rand_like(value) < 0.5, -1.0, 1.0)
    maxwell = sign * torch.randn(3, *value.shape, dtype=value.dtype, device=value.device).square().sum(0).sqrt()
    shrunk = torch.rand_like(value) * maxwell
    return [
        Arm(fn.loc, 1 / (scale * math.sqrt(2 * math.pi)), loc + scale * rayleigh, loc - scale * rayleigh),
        Arm(fn.scale, 1 / scale, loc + scale * maxwell, loc + scale * shrunk),
    ]


def _bernoulli(fn: Any, value: Tensor) -> list[Arm]:
    # (-1)^v (f(1 - v) - f(v)): the draw is its own arm.
    return [Arm(fn.probs, 1 - 2 * value, 1 - value, None)]


def _categorical(fn: Any, value: Tensor) -> list[Arm]:
    # sum_i dp_i (f(i) - f(v)); those with i = v vanish, and sum_i dp_i = 0 makes the reference free.
    rows = range(fn.probs.shape[-1])
    return [
        Arm(fn.probs[..., i], torch.ones_like(value, dtype=fn.probs.dtype), torch.full_like(value, i), None)
        for i in rows
    ]


def _poisson(fn: Any, value: Tensor) -> list[Arm]:
    return [Arm(fn.rate, torch.ones_like(value), value + 1, None)]


def _exponential(fn: Any, value: Tensor) -> list[Arm]:
    rate = fn.rate.detach().expand_as(value)
    more = torch.empty_like(value).exponential_() / rate
    return [Arm(fn.rate, 1 / rate, None, value + more)]


def _gamma(fn: Any, value: Tensor) -> list[Arm]:
    if fn.concentration.requires_grad:
        raise ValueError("the shape of a gamma has no elementary split")
    rate = fn.rate.detach().expand_as(value)
    more = torch.empty_like(value).exponential_() / rate
    return [Arm(fn.rate, fn.concentration.detach() / rate, None, value + more)]


def _binomial(fn: Any, value: Tensor) -> list[Arm]:
    probs = fn.probs.detach().expand_as(value)
    count = fn.total_count.expand_as(value)
    fewer = torch.distributions.Binomial((count - 1).clamp_min(0), probs, validate_args=False).sample()
    return [Arm(fn.probs, count.to(probs.dtype), 1 + fewer, fewer)]


def _geometric(fn: Any, value: Tensor) -> list[Arm]:
    probs = fn.probs.detach().expand_as(value)
    more = torch.distributions.Geometric(probs, validate_args=False).sample()
    return [Arm(fn.probs, 1 / (probs * (1 - probs)), None, value + more)]


ROWS: dict[type, Callable[[Any, Tensor], list[Arm]]] = {
    dist.Normal: _normal,
    dist.Bernoulli: _bernoulli,
    dist.Categorical: _categorical,
    dist.Poisson: _poisson,
    dist.Exponential: _exponential,
    dist.Gamma: _gamma,
    dist.Binomial: _binomial,
    dist.Geometric: _geometric,
}


def has_arms(fn: Any) -> bool:
    """Whether a distribution has a measure-valued derivative here, for the parameters that are learned."""
    base = unwrap(fn)
    if isinstance(base, dist.Gamma) and base.concentration.requires_grad:
        return False
    return type(base) in ROWS


def arms(fn: Any, value: Tensor) -> list[Arm]:
    """The rows for a distribution at its draw, less those in parameters without gradient."""
    base = unwrap(fn)
    return [arm for arm in ROWS[type(base)](base, value) if arm.parameter.requires_grad]

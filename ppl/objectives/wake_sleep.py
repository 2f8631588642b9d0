"""Objectives that draw from the model, or hold the draws fixed: inclusive KL, wake and sleep, symmetric KL.

Each is maximised, so that divergences appear with a minus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.errors import ProgramError
from ppl.objectives.bounds import _some
from ppl.objectives.context import Context
from ppl.objectives.draw import logmeanexp

__all__ = ["ForwardKL", "Sleep", "SymmetricKL", "WakeModel"]


@dataclass(frozen=True)
class ForwardKL:
    """-KL(posterior || q) up to a constant, by self-normalised weights: sum_k w~_k log q(z_k).

    The wake phase of the guide. The weights and the draws are held, so that only log q is differentiated. Biased by
    O(1/K) in value and gradient.

    Args:
        particles: K.

    Raises:
        OptionError: there are no particles.

    Source: Bornschein & Bengio (2015) [inferred].
    """

    particles: int = 64

    def __post_init__(self) -> None:
        _some(self.particles)

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles):
            z = ctx.sim(guide, detach=True)
            weight = (ctx.density(model, z, frozen=True) - z.density).detach()
            fit = ctx.density(guide, z).log
        return (torch.softmax(weight, 0) * fit).sum(0)


@dataclass(frozen=True)
class WakeModel:
    """IWELBO in the model's parameters alone: gradient sum_k w~_k d log p(x, z_k). The wake phase of the model.

    Args:
        particles: K.

    Raises:
        OptionError: there are no particles.
    """

    particles: int = 5

    def __post_init__(self) -> None:
        _some(self.particles)

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles):
            z = ctx.sim(guide, detach=True)
            weight = ctx.density(model, z) - z.density
        return logmeanexp(weight)


@dataclass(frozen=True)
class Sleep:
    """E_p(x, z) log q(z | x), with data drawn from the model: -KL(p || q) averaged over data, up to a constant.

    The guide must take the data as an argument, for which drawn data are then put.

    Raises:
        ProgramError: no argument carries the data.
    """

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        joint = ctx.sim(model, observed=True, detach=True)
        data = joint.only(_observed(ctx, model))
        with ctx.observing(data):
            return ctx.density(guide, joint.only(ctx.latents(model))).log


@dataclass(frozen=True)
class SymmetricKL:
    """-E_{(x, z) ~ p, z' ~ q(. | x)}[log p(x, z) - log q(z | x) - log p(x, z') + log q(z' | x)].

    Zero for every draw once q is exact for all data; the unknown evidence cancels. The model is held: its draws and
    parameters carry no gradient.

    Raises:
        ProgramError: no argument carries the data.

    Source: Domke (2021) [inferred].
    """

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        joint = ctx.sim(model, observed=True, detach=True)
        data, true = joint.only(_observed(ctx, model)), joint.only(ctx.latents(model))
        with ctx.observing(data):
            drawn = ctx.sim(guide)
            inclusive = ctx.density(model, true, frozen=True).log - ctx.density(guide, true).log
            exclusive = ctx.density(model, drawn, frozen=True) - drawn.density
        return exclusive - inclusive


def _observed(ctx: Context, model: Any) -> list[str]:
    names = [n for n, node in ctx.engine.programs.nodes(model).items() if node.observed and node.is_data]
    for name in names:
        if not ctx.engine.programs.carries(name):
            raise ProgramError(
                f"no argument of the programs carries the data of site {name!r}, for which drawn data could be put; "
                "pass it to ppl.Program(model, data) and give the guide the same arguments"
            )
    return names

"""What `Marginal` and `Normalize` ask of an algorithm for an unnormalised target gamma(u) with normaliser Z.

    free        (u, Zhat) with E[Zhat h(u)] = sum_u gamma(u) h(u)        Zhat is unbiased for Z
    retaining   Zhat of a run that holds u*; for u* ~ gamma / Z,         1 / Zhat is unbiased for 1 / Z

The first makes direct densities, the second those of reciprocals; neither can stand for the other.
Source: Becker et al. (2024) [read in its code].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.objectives.density import Exact
from ppl.objectives.draw import Draw, Given, Stochastic
from ppl.objectives.estimators import Enumerate, Reinforce

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["Algorithm", "Population", "Target", "check_algorithm", "proposal_of", "together"]


@dataclass(frozen=True, eq=False)
class Population:
    """Weighted draws of a free run.

    Args:
        draw: values (particles, *lanes, *plates, *event) by site.
        log_weight: (particles, *lanes, *data); the chosen draw is proportional to them.
        log_target: (particles, *lanes, *data) log gamma of each.
        log_normaliser: (*lanes, *data) log Zhat.
    """

    draw: Draw
    log_weight: Tensor
    log_target: Tensor
    log_normaliser: Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """What an algorithm runs on.

    Args:
        program: its density at given values is the unnormalised target.
        kept: sites with given values; `None` where there are none.
        detach: draw without gradients.
        frozen: take the program's parameters as constants.
    """

    program: Any
    kept: Draw | None = None
    detach: bool = False
    frozen: bool = False


class Algorithm(Protocol):
    """An inference algorithm inside a program."""

    @property
    def proposal(self) -> Any:
        """What it draws from; `None` for the target itself."""
        ...

    @property
    def index(self) -> Any:
        """Estimator of the indices it draws."""
        ...

    def free(self, ctx: Context, target: Target) -> Population:
        """A run from scratch."""
        ...

    def retaining(self, ctx: Context, target: Target, star: Draw, joint: Draw | None = None) -> Tensor:
        """log Zhat of a run that holds a draw; `joint` is what that was drawn with, where it is at hand."""
        ...


def check_algorithm(particles: int, index: Any) -> None:
    """Raise for options that no algorithm can have."""
    if not isinstance(particles, int) or particles < 1:
        raise OptionError(f"a nested expectation needs samples: particles must be one or more, got {particles!r}")
    if not isinstance(index, Enumerate | Reinforce):
        raise OptionError(f"the index takes Enumerate() or Reinforce(), got {index!r}")


def proposal_of(proposal: Any, target: Target) -> Any:
    """What is drawn from: the target itself where no proposal is named; a program is called with the kept values."""
    if proposal is None:
        if isinstance(target.program, Stochastic):
            kind = type(target.program).__name__
            raise OptionError(f"a {kind} cannot be its own proposal; name a program to draw from")
        return target.program
    return proposal if target.kept is None or isinstance(proposal, Stochastic) else Given(proposal, target.kept.values)


def together(ctx: Context, kept: Draw | None, draw: Draw) -> Draw:
    """Given and drawn sites as one draw, on the lanes of this place."""
    if kept is None:
        return draw
    values = {**ctx._padded(kept), **draw.values}
    nodes = {**kept.nodes, **draw.nodes}
    return replace(draw, values=values, nodes=nodes, auxiliary=frozenset(), density=Exact(torch.zeros(())), call=0)

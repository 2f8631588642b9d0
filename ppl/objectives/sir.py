"""Sampling importance resampling, to integrate sites out or to normalise a target.

free        Zhat = 1/N sum_i gamma(u_i) / r(u_i),   u_i ~ r
retaining   the same with u_1 = u*
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.objectives.algorithm import Population, Target, check_algorithm, proposal_of, together
from ppl.objectives.density import Exact, direct
from ppl.objectives.draw import Draw, logmeanexp
from ppl.objectives.estimators import Enumerate

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["SIR"]


@dataclass(frozen=True)
class SIR:
    """Sampling importance resampling: weights gamma(u_i) / r(u_i) of `particles` draws of a proposal.

    Args:
        particles: draws; their mean weight estimates the normaliser.
        proposal: a Pyro program, `Marginal` or `Normalize` for the sites that are summed out; in a `Marginal` it takes
            the kept values, a dict, before the model's arguments. `None` proposes from the target program itself, its
            given sites set.
        index: estimator of the chosen index, `Enumerate()` or `Reinforce()`; only `Normalize` chooses one.

    Raises:
        OptionError: there are no particles, or the index has another estimator.
    """

    particles: int = 1
    proposal: Any = None
    index: Any = field(default_factory=Enumerate)

    def __post_init__(self) -> None:
        check_algorithm(self.particles, self.index)

    def free(self, ctx: Context, target: Target) -> Population:
        """New draws of the proposal, weighed."""
        return self._fresh(ctx, target, self.particles)

    def retaining(self, ctx: Context, target: Target, star: Draw, joint: Draw | None = None) -> Tensor:
        """log Zhat of a run in which one draw is given."""
        source, program = proposal_of(self.proposal, target), target.program
        both = together(ctx, target.kept, star)
        known = joint is not None and isinstance(joint.density, Exact)
        gamma = joint.density if known else ctx.density(program, both, frozen=target.frozen)  # type: ignore[union-attr]
        if self.proposal is not None:
            own = direct(ctx.density(source, star, frozen=target.frozen), "the proposal")
        elif known:
            own = ctx._total({n: star.nodes[n] for n in star.values})
        else:
            own = ctx.partial(program, both, set(star.values), frozen=target.frozen)
        weight = (direct(gamma, "the target") - own)[None]
        if self.particles > 1:
            weight = torch.cat([weight, self._fresh(ctx, target, self.particles - 1).log_weight])
        return logmeanexp(weight)

    def _fresh(self, ctx: Context, target: Target, size: int) -> Population:
        given = target.kept if self.proposal is None else None
        with ctx.particles(size):
            draw = ctx.sim(proposal_of(self.proposal, target), kept=given, detach=target.detach)
            gamma = ctx.density(target.program, together(ctx, target.kept, draw), frozen=target.frozen)
            weight = gamma - draw.density
        return Population(draw, weight, gamma.log, logmeanexp(weight))

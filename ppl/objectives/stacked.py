"""The cost at many values of one site, in one run: the values are extra samples of one batch.

Sites drawn before it keep their values, those after it their noise, so that costs differ by what the value does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.objectives.draw import Address
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["can_stack", "shares_noise", "stacked"]

ROWS = 8192  # samples of one batch
REJECTION = (dist.Gamma, dist.Beta, dist.Dirichlet, dist.StudentT, dist.Chi2, dist.InverseGamma)


def shares_noise(fn: Any) -> bool:
    """Whether draws of a distribution can repeat their noise; see `SharedNoise`."""
    base = unwrap(fn)
    return isinstance(base, dist.Bernoulli) or (bool(fn.has_rsample) and not isinstance(base, REJECTION))


def can_stack(ctx: Context, address: Address) -> bool:
    """Whether all that is drawn after a site repeats its noise, and no shape depends on a draw."""
    places = list(ctx.drawn)
    if ctx.engine.loop or ctx.ragged or address not in ctx.drawn:
        return False
    later = places[places.index(address) + 1 :]
    return all(p in ctx.forced or (p in ctx.seen and shares_noise(ctx.seen[p][0])) for p in later)


def stacked(ctx: Context, address: Address, rows: Sequence[Tensor]) -> Tensor:
    """(rows, samples, *data) the cost with each value at a site in turn.

    Args:
        ctx: the evaluation at the values that were drawn.
        address: of the site.
        rows: values of its shape.
    """
    size = max(1, ROWS // ctx.samples)
    return torch.cat([_one_run(ctx, address, rows[i : i + size]) for i in range(0, len(rows), size)])


def _one_run(ctx: Context, address: Address, rows: Sequence[Tensor]) -> Tensor:
    from ppl.objectives.context import Context as Again

    engine, count = ctx.engine, len(rows)
    places = list(ctx.drawn)
    before = places[: places.index(address)]
    kept = {p: ctx.drawn[p] for p in places if p in before or p in ctx.forced}
    forced = {p: torch.cat([value] * count, axis) for p, (value, axis) in kept.items()}
    forced[address] = torch.cat(list(rows), ctx.drawn[address][1])
    states = ctx.states * count
    many = Again(engine, ctx.params, ctx.samples * count, ctx.seeds, ctx.indices, forced, states, shared=True)
    return engine.cost(many).reshape(count, ctx.samples, *engine.plan.sizes)

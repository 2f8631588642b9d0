"""The guides of `ppl.vi` on the unconstrained vector of a program, as programs for objectives.

    q(z) on R^n,   p(z) = p(x, t(z)) |dt/dz|

All data share one weight here; for one per datum write a guide with the model's plates, or take Pyro's
AutoNormal(model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl.errors import ProgramError
from ppl.flat import FlatDensity
from ppl.objectives.context import Context
from ppl.objectives.density import Direct, Exact
from ppl.objectives.draw import Draw, Stochastic
from ppl.vi.full_data import draw_subsample
from ppl.vi.guides import Guide
from ppl.vi.guides.guide import detached, with_program

__all__ = ["FlatGuide", "FlatModel"]

SITE = "z"
GUIDE = "guide."


class FlatGuide(Stochastic):
    """A family of `ppl.vi.guides`, with one site "z".

    Args:
        guide: the family, bound to the program.
        dim: length of the vector.
    """

    def __init__(self, guide: Guide, dim: int) -> None:
        self.guide, self.dim = guide, dim

    def programs(self) -> list[Any]:
        """No Pyro program is inside."""
        return []

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """Reparameterised draws and their log density."""
        generator = torch.Generator(ctx.engine.device).manual_seed(ctx._seed((ctx._next(), SITE)))
        noise = self.guide.noise(math.prod(ctx.lead), self.dim, ctx.engine.dtype, generator)
        z, log_q = self.guide.rsample_and_log_prob(self._own(ctx.params, detach), noise)
        lead = ctx.lead
        return Draw({SITE: z.reshape(*lead, self.dim)}, Exact(log_q.reshape(lead)), lanes=len(lead))

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """Log density of vectors."""
        z = values.values[SITE]
        z = z.expand(*ctx.lead[: len(ctx.lead) + 1 - z.ndim], *z.shape)
        log_q = self.guide.log_prob(self._own(ctx.params, frozen), z.reshape(-1, self.dim))
        return Exact(log_q.reshape(z.shape[:-1]))

    def _own(self, params: Mapping[str, Tensor], frozen: bool) -> dict[str, Tensor]:
        own = {n.removeprefix(GUIDE): p for n, p in params.items() if n.startswith(GUIDE)}
        rest = {n: p for n, p in params.items() if not n.startswith(GUIDE)}
        return detached(with_program(self.guide, own, rest)) if frozen else with_program(self.guide, own, rest)


class FlatModel(Stochastic):
    """The density of a program on its unconstrained vector, with its Jacobians.

    Args:
        flat: the view on R^n.
    """

    def __init__(self, flat: FlatDensity) -> None:
        self.flat = flat

    def programs(self) -> list[Any]:
        """The Pyro program is traced by the view already."""
        return []

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """Not offered: this view has no data of its own to draw.

        Raises:
            ProgramError: always.
        """
        raise ProgramError(
            "this objective draws from the model and needs a guide that is a Pyro program with the model's arguments, "
            "not a family such as ppl.MeanField()"
        )

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """Log joint density of vectors and data."""
        flat = self.flat
        z = values.values[SITE]
        rows = z.reshape(-1, flat.dim)
        names = list(flat.program.parameters)
        subsample: dict[str, Tensor] | None = None
        if flat.program.subsampled:
            if not ctx.indices:
                generator = torch.Generator(ctx.engine.device).manual_seed(ctx._seed((ctx._next(), "rows")))
                ctx.indices.update(draw_subsample(flat.program, generator))
            subsample = ctx.indices
        if ctx.engine.tape is None and (not torch.is_grad_enabled() or not names):
            value, grad, _ = flat.value_and_grads(rows, params=_some(ctx.params, names), subsample=subsample)
            log_p = value + ((rows - rows.detach()) * grad).sum(1) if torch.is_grad_enabled() else value
        else:
            params = {n: ctx.params[n].detach() if frozen else ctx.params[n] for n in names}
            lane, log_noise = flat._lane(rows)
            log_p = flat._density(lane)(lane, flat._shared(subsample, params)) + log_noise
        ctx.scored.append(("the program", log_p))
        return Exact(log_p.reshape(z.shape[:-1]))


def _some(params: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor] | None:
    return {n: params[n].detach() for n in names} or None

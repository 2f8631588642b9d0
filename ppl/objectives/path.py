"""Path gradients: the score terms that have mean zero are left out, and with them their noise.

Both need reparameterised sites; the value is that of the bound, the gradient unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.objectives.bounds import _some
from ppl.objectives.context import Context
from ppl.objectives.draw import logmeanexp

__all__ = ["DReG", "StickingTheLanding"]


@dataclass(frozen=True)
class StickingTheLanding:
    """The ELBO with log q held at its parameters: no noise at all once q is the posterior.

    Score sites are allowed; they keep their own score term.

    Source: Roeder, Wu & Duvenaud (2017) [inferred].
    """

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        z = ctx.sim(guide)
        return ctx.density(model, z) - _as_reciprocal(ctx, guide, z)


@dataclass(frozen=True)
class DReG:
    """IWELBO with sum_k w~_k^2 d log w_k / dz_k dz_k / dphi for the guide and sum_k w~_k d log p for the model.

    Its signal does not drown in noise as particles are added, as that of the plain gradient does.

    Args:
        particles: K.

    Raises:
        OptionError: there are no particles, or a site is not reparameterised.

    Source: Tucker, Lawson, Gu & Maddison (2019) [inferred].
    """

    particles: int = 5

    def __post_init__(self) -> None:
        _some(self.particles)

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles):
            z = ctx.sim(guide)
            ctx.fully_reparameterised("DReG")
            weight = ctx.density(model, z, frozen=True) - _as_reciprocal(ctx, guide, z)
            learned = ctx.density(model, z.detached()).log
        share = torch.softmax(weight.detach(), 0)
        return ctx.with_gradient(logmeanexp(weight), (share.square() * weight + share * learned).sum(0))


def _as_reciprocal(ctx: Context, guide: Any, z: Any) -> Any:
    """log q(z) with its parameters held; exact guides only, where it keeps both contracts."""
    from ppl.errors import ContractError
    from ppl.objectives.density import Exact

    density = ctx.density(guide, z, frozen=True)
    if not isinstance(density, Exact):
        raise ContractError(
            "a path gradient evaluates log q again at the draw, which is a reciprocal density for exact guides only; "
            "use IWELBO with Marginal and Normalize"
        )
    return density

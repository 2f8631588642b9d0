"""RELAX: the score of a coin or a one-hot choice with a learned control variate.

    g = (f(b) - c(z~)) d log q(b) + d c(z) - d c(z~),   d = d/d logits

Unbiased for every c; c climbs -|g|^2, whose gradient is an unbiased one of the variance. f is evaluated once, at b.
Source: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018), algorithm 1 [inferred].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import ShapeError
from ppl.objectives.estimators import Relax
from ppl.objectives.relaxed import relaxed, relaxed_noise
from ppl.objectives.run import Node
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.objectives.plan import Plan

__all__ = ["Control", "control_term", "draw_with_control"]


@dataclass(frozen=True, eq=False)
class Control:
    """What one draw leaves for its gradient; all but `logits` is apart from the parameters of the program.

    Args:
        logits: (*lanes, *plates, *event) of the site, differentiable in the parameters.
        score: d log q(b), likewise shaped.
        given: (*lanes, *plates) c(z~).
        slope: d c(z) - d c(z~), of the shape of the logits.
    """

    logits: Tensor
    score: Tensor
    given: Tensor
    slope: Tensor


def draw_with_control(name: str, fn: Any, estimator: Relax) -> tuple[Tensor, Control | None]:
    """A draw of a site, and its control where gradients are on.

    Raises:
        ShapeError: the surrogate does not return one number for each row.
    """
    logits = unwrap(fn).logits.expand(fn.shape())
    u, v = relaxed_noise(fn)
    if not torch.is_grad_enabled():
        return relaxed(fn, logits, u, v)[0], None
    leaf = logits.detach().requires_grad_()
    b, z, z_given = relaxed(fn, leaf, u, v)
    batch = z.shape[: z.ndim - fn.event_dim]
    free, given = (_rows(name, estimator.surrogate, x.reshape(*batch, -1)) for x in (z, z_given))
    (slope,) = torch.autograd.grad((free - given).sum(), leaf, create_graph=True)
    log_q = type(unwrap(fn))(logits=leaf, validate_args=False).log_prob(b).sum()
    (score,) = torch.autograd.grad(log_q, leaf)
    return b, Control(logits, score, given, slope)


def control_term(plan: Plan, control: Control, node: Node, lanes: int, cost: Tensor, samples: int) -> Tensor:
    """(samples, *data) term of a surrogate, with value zero; its gradient in c lowers the variance.

    Args:
        plan: layout of tensors.
        control: of the draw.
        node: the draw.
        lanes: lane axes.
        cost: (samples, *plates) what the draw can change.
        samples: samples of each joint state of the enumerated sites.
    """
    events = (1,) * node.event_dim
    rest = (cost.detach() - control.given)[(..., *(None for _ in events))]
    gradient = rest * control.score + control.slope
    climb = gradient.detach() * (control.logits - control.logits.detach())
    spread = gradient.square()
    term = climb - (spread - spread.detach())
    if events:
        term = term.flatten(-node.event_dim).sum(-1)
    return plan.collect(term, lanes).reshape(-1, samples * plan.joint, *plan.sizes).sum(0)


def _rows(name: str, surrogate: Any, z: Tensor) -> Tensor:
    out = surrogate(z)
    if not isinstance(out, Tensor) or out.shape != (*z.shape[:-1], 1):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(
            f"the surrogate of site {name!r} must return one number for each row, {(*z.shape[:-1], 1)}, got {shape}"
        )
    return out[..., 0]

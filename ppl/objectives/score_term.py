"""The score of one site, as a term of a surrogate: sg(F - b) log q(v), with value zero.

b is a baseline: the other samples' mean, that of earlier steps, the particles' own, or a prediction that is fitted
along the way.
"""

from __future__ import annotations

import math

from torch import Tensor

from ppl.objectives.draw import Address, Particles
from ppl.objectives.estimators import Reinforce
from ppl.objectives.plan import Plan
from ppl.objectives.run import Node

__all__ = ["score_term"]


def score_term(
    plan: Plan,
    averages: dict[Address, Tensor],
    address: Address,
    node: Node,
    axes: tuple[Particles, ...],
    cost: Tensor,
    samples: int,
) -> Tensor:
    """(samples, *data) score term of a site.

    Args:
        plan: layout of tensors.
        averages: decaying averages by site, brought up to date.
        address: of the site.
        node: its draw.
        axes: particle axes around it.
        cost: (samples, *plates) what the draw can change, with axes of size one where it is shared.
        samples: samples of each joint state of the enumerated sites.
    """
    estimator = node.estimator if isinstance(node.estimator, Reinforce) else Reinforce("none")
    cost = cost.detach()
    lanes = len(axes) + 1
    data = (samples * plan.joint, *plan.sizes)
    control: Tensor | None = next((axis.control for axis in reversed(axes) if axis.control is not None), None)
    fit: Tensor | float = 0.0
    base: Tensor | float = 0.0
    if control is not None:
        missing = lanes + len(plan.dims) - control.ndim
        base = plan.spread(control.reshape(*(1,) * missing, *control.shape), lanes) / plan.joint
    elif node.baseline is not None:
        learned = node.baseline / plan.joint
        base = learned.detach()
        # With value zero: only its gradient, that of the squared error, is wanted.
        error = -(cost - learned).square().expand_as(node.raw)
        error = plan.collect(error, lanes)
        fit = (error - error.detach()).reshape(-1, *data).sum(0) * (0.5 * math.prod(data) / node.raw.numel())
    elif estimator.baseline == "leave_one_out" and samples > 1:
        rows = cost.reshape(plan.joint, samples, *cost.shape[1:])
        base = ((rows.sum(1, keepdim=True) - rows) / (samples - 1)).reshape(cost.shape)
    elif estimator.baseline != "none":
        now = cost.mean()
        past = averages.get(address)
        base = 0.0 if past is None else past
        averages[address] = now if past is None else estimator.decay * past + (1 - estimator.decay) * now
    score = plan.collect((cost - base) * (node.raw - node.raw.detach()), lanes)
    return score.reshape(-1, *data).sum(0) + fit

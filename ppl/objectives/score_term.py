"""The score of one site, as a term of a surrogate: sg(F - b) log q(v), with value zero.

b is a baseline: the other samples' mean, that of earlier steps, the particles' own, or a prediction that is fitted
along the way.
"""

from __future__ import annotations

import torch
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
    whole: Tensor,
    samples: int,
) -> Tensor:
    """(samples, *data) score term of a site.

    Args:
        plan: layout of tensors.
        averages: decaying averages by site, brought up to date.
        address: of the site.
        node: its draw.
        axes: particle axes around it.
        whole: (samples, *data) the cost.
        samples: samples of each joint state of the enumerated sites.
    """
    estimator = node.estimator if isinstance(node.estimator, Reinforce) else Reinforce("none")
    fixed = whole.detach()
    lanes = len(axes) + 1
    place = plan.spread(fixed.reshape(*(1,) * len(axes), *fixed.shape), lanes)
    control: Tensor | None = next((axis.control for axis in reversed(axes) if axis.control is not None), None)
    fit: Tensor | float = 0.0
    if control is not None:
        missing = len(axes) + fixed.ndim - control.ndim
        base = plan.spread(control.reshape(*(1,) * missing, *control.shape), lanes) / plan.joint
    elif node.baseline is not None:
        learned = node.baseline / plan.joint
        base = learned.detach()
        # With value zero: only its gradient, that of the squared error, is wanted.
        error = -(place - learned).square().expand_as(node.raw)
        error = plan.collect(error, lanes)
        fit = (error - error.detach()).reshape(-1, *fixed.shape).sum(0) * (0.5 / (node.raw.numel() / fixed.numel()))
    elif estimator.baseline == "none":
        base = torch.zeros(())
    elif estimator.baseline == "leave_one_out" and samples > 1:
        rows = fixed.reshape(plan.joint, samples, *fixed.shape[1:])
        others = ((rows.sum(1, keepdim=True) - rows) / (samples - 1)).reshape(fixed.shape)
        base = plan.spread(others.reshape(*(1,) * len(axes), *others.shape), lanes)
    else:
        now = fixed.mean()
        past = averages.get(address)
        base = torch.zeros(()) if past is None else past
        averages[address] = now if past is None else estimator.decay * past + (1 - estimator.decay) * now
    score = (place - base) * (node.raw - node.raw.detach())
    score = plan.collect(score, lanes)
    return score.reshape(-1, *fixed.shape).sum(0) + fit

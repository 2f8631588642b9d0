"""The measure-valued derivative of one site, as a term of a surrogate: sg(c (F(v+) - F(v-))) eta, with value zero.

Coordinates of one datum are moved one at a time, those of different samples and data all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl.errors import CapabilityError
from ppl.objectives.draw import Address
from ppl.objectives.estimators import MeasureValued
from ppl.objectives.plan import Plan
from ppl.objectives.run import Node

__all__ = ["measured_term"]


def measured_term(
    plan: Plan,
    address: Address,
    node: Node,
    whole: Tensor,
    cost: Callable[[Sequence[Tensor]], Sequence[Tensor] | Tensor],
) -> Tensor:
    """(samples, *data) term of a site.

    Args:
        plan: layout of tensors.
        address: of the site.
        node: its draw.
        whole: (samples, *data) the cost.
        cost: costs with other values at the site, one for each; with the draw itself among them.

    Raises:
        CapabilityError: a datum has more coordinates than the estimator's limit.
    """
    fixed = whole.detach()
    value = node.value
    rows, places = [value], []
    for lane in _coordinates(plan, node):
        for arm in node.arms:
            ends = []
            for side in (arm.plus, arm.minus):
                ends.append(0 if side is None else len(rows))
                if side is not None:
                    rows.append(torch.where(lane, side.to(value.dtype), value))
            places.append((lane, arm, ends))
    total: Tensor | float = 0.0
    with torch.no_grad():
        found = cost(rows)
        parts = [(lane, arm, found[plus] - found[minus]) for lane, arm, (plus, minus) in places]
    lanes = value.ndim - node.event_dim - plan.plates
    for lane, arm, difference in parts:
        place = plan.spread(difference.reshape(*(1,) * (lanes - 1), *difference.shape), lanes)
        place = place.reshape(*place.shape, *(1,) * node.event_dim)
        eta = arm.parameter.expand_as(value) if arm.parameter.shape != value.shape else arm.parameter
        term = torch.where(lane, place * arm.constant * (eta - eta.detach()), 0.0)
        if node.event_dim:
            term = term.flatten(-node.event_dim).sum(-1)
        term = plan.collect(term, lanes)
        total = total + term.reshape(-1, *fixed.shape).sum(0)
    return total  # type: ignore[return-value]


def _coordinates(plan: Plan, node: Node) -> list[Tensor]:
    """One mask for each coordinate of a datum: particles, inner plates and event axes in turn."""
    shape = list(node.value.shape)
    lanes = len(shape) - node.event_dim - plan.plates
    free = plan.free_axes(len(shape), lanes, node.event_dim)
    sizes = [shape[i] for i in free]
    count = math.prod(sizes)
    limit = node.estimator.limit if isinstance(node.estimator, MeasureValued) else count
    if count > limit:
        raise CapabilityError(
            f"a measure-valued derivative needs two evaluations for each of {count} coordinates, more than its "
            f'limit of {limit}; use "reinforce", or MeasureValued(limit={count})'
        )
    numbers = torch.arange(count, device=node.value.device).reshape(sizes)
    full = numbers.reshape([shape[i] if i in free else 1 for i in range(len(shape))])
    return [full == j for j in range(count)]

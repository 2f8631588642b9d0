"""Whether the values of a guide fit the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.distributions import constraints

from ppl.errors import ProgramError, ShapeError
from ppl.objectives.run import Node

if TYPE_CHECKING:
    from ppl.objectives.draw import Draw

__all__ = ["match"]


def match(what: str, nodes: Mapping[str, Node], draw: Draw) -> None:
    """Check that each latent site has a value in its support, and each value a site.

    Raises:
        ProgramError: a site is missing or superfluous, or supports do not match.
        ShapeError: a value has another shape than its site.
    """
    latents = {n: node for n, node in nodes.items() if node.latent}
    missing = [n for n in latents if n not in draw.values]
    if missing:
        raise ProgramError(
            f"the guide has no site {missing[0]!r}, which is latent in the {what}; it has {sorted(draw.values)}. Add "
            f'pyro.sample("{missing[0]}", ...) to the guide'
        )
    extra = [n for n in draw.values if n not in nodes and n not in draw.auxiliary]
    if extra:
        raise ProgramError(
            f"the guide has the site {extra[0]!r}, which is no site of the {what} (latent there: {sorted(latents)}). "
            'Mark it infer={"is_auxiliary": True}, or hide it: ppl.objectives.Marginal(guide, keep=...)'
        )
    for name, node in latents.items():
        own = draw.nodes.get(name)
        if own is None:
            continue
        if (
            own.event_dim != node.event_dim
            or own.value.shape[own.value.ndim - own.event_dim :]
            != (node.value.shape[node.value.ndim - node.event_dim :])
        ):
            raise ShapeError(
                f"site {name!r} has {own.event_dim} event axes, shape {tuple(own.value.shape)}, in the guide and "
                f"{node.event_dim} in the {what}, shape {tuple(node.value.shape)}; use the same to_event in both"
            )
        if own.support is None:
            continue
        if own.discrete != node.discrete or not _inside(own.support, node.support):
            raise ProgramError(
                f"site {name!r}: supports do not match: {_show(own.support)} in the guide, {_show(node.support)} in "
                f"the {what}. The guide must draw where the {what} has a density: choose another distribution, or "
                "transform it"
            )


def _inside(inner: Any, outer: Any) -> bool:
    """Whether one constraint implies another, as far as their bounds tell."""
    inner, outer = _base(inner), _base(outer)
    if type(inner) is type(outer) and not hasattr(inner, "lower_bound") and not hasattr(inner, "upper_bound"):
        return True
    if isinstance(outer, type(constraints.real)):
        return not inner.is_discrete
    low, high = _bounds(inner), _bounds(outer)
    if low is None or high is None:  # a simplex, a matrix: only the same kind will do
        return low is None and high is None and type(inner) is type(outer)
    return bool((low[0] >= high[0]).all() if hasattr(low[0] >= high[0], "all") else low[0] >= high[0]) and bool(
        (low[1] <= high[1]).all() if hasattr(low[1] <= high[1], "all") else low[1] <= high[1]
    )


def _base(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _bounds(constraint: Any) -> tuple[Any, Any] | None:
    infinity = float("inf")
    if isinstance(constraint, type(constraints.real)):
        return -infinity, infinity
    if isinstance(constraint, type(constraints.boolean)):
        return 0, 1
    low, high = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if low is None and high is None:
        return None
    return (-infinity if low is None else low), (infinity if high is None else high)


def _show(constraint: Any) -> str:
    return str(constraint).removesuffix("()")

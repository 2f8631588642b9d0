"""What the parts of a posterior must have in common: leading axes, one weight per draw, names for every axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import ShapeError

if TYPE_CHECKING:
    from ppl.posterior import Posterior

__all__ = ["axis_labels", "check_shapes"]


def check_shapes(posterior: Posterior) -> None:
    """Raise ShapeError where a site lacks the leading axes, or weights, dims or coords do not fit."""
    problems = posterior.problems
    if problems is not None and (not isinstance(problems, int) or isinstance(problems, bool) or problems < 1):
        raise ShapeError(f'attrs["problems"] must be a positive integer or absent, got {problems!r}')
    lead = posterior._lead
    axes = "(problem, chain, draw)" if problems is not None else "(chain, draw)"
    for site, values in posterior.draws.items():
        if not isinstance(values, Tensor):
            raise ShapeError(f"draws of {site!r} must be a tensor, got {type(values).__name__}")
        if values.ndim < lead or values.shape[:lead] != posterior.shape:
            raise ShapeError(
                f"draws of {site!r} have shape {tuple(values.shape)}, expected {axes} = {posterior.shape} in front; "
                "one chain is values[None]"
            )
        names = posterior.dims.get(site)
        if names is not None and len(names) != values.ndim - lead:
            raise ShapeError(
                f"{site!r} has {values.ndim - lead} axes behind {axes} but {len(names)} dims {tuple(names)}; "
                "name every plate and event axis"
            )
    if problems is not None and posterior.shape[0] != problems:
        raise ShapeError(f'attrs["problems"] is {problems} but the leading axis of the draws is {posterior.shape[0]}')
    if posterior.log_weight is not None and posterior.log_weight.shape != posterior.shape:
        raise ShapeError(
            f"log_weight has shape {tuple(posterior.log_weight.shape)}, expected {axes} = {posterior.shape}: "
            "one per draw"
        )
    if posterior.log_evidence is not None:
        expected = () if problems is None else (problems,)
        for name, part in zip(("value", "stderr"), posterior.log_evidence, strict=True):
            if part.shape not in (expected, ()):
                raise ShapeError(f"log_evidence {name} has shape {tuple(part.shape)}, expected {expected}")
    for site, sizes in [*((s, v.shape[lead:]) for s, v in posterior.draws.items()), *_observed_sizes(posterior)]:
        for dim, size in zip(posterior.dims.get(site, ()), sizes, strict=False):
            if dim in posterior.coords and len(posterior.coords[dim]) != size:
                raise ShapeError(
                    f"axis {dim!r} of {site!r} has {size} entries but {len(posterior.coords[dim])} labels in coords"
                )


def _observed_sizes(posterior: Posterior) -> list[tuple[str, torch.Size]]:
    """Observed sites whose dims can be matched with their axes."""
    return [(s, v.shape) for s, v in posterior.observed.items() if len(posterior.dims.get(s, ())) == v.ndim]


def axis_labels(labels: Sequence[Any]) -> tuple[Any, ...]:
    """Labels of an axis as plain numbers and texts."""
    plain = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    plain = [item.item() if hasattr(item, "item") else item for item in plain]
    return tuple(item if isinstance(item, bool | int | float | str) else str(item) for item in plain)

"""Events as flat vectors: sizes, flattening, places left out, and numbers per batch member."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ppl.errors import ShapeError

__all__ = ["event_shape", "flatten_event", "image_shape", "numel", "over_event", "scatter", "scatter_index"]


def event_shape(shape: int | Iterable[int], name: str = "in_shape") -> tuple[int, ...]:
    """A shape as a tuple; a plain n is (n,), a vector of n entries.

    Raises:
        ShapeError: it is neither a whole number nor a sequence of them.

    Example:
        >>> event_shape(6), event_shape([3, 28, 28])
        ((6,), (3, 28, 28))
    """
    entries: Any = shape
    if hasattr(shape, "__index__") and not isinstance(shape, Iterable):
        entries = (shape,)
    try:
        return tuple(operator.index(n) for n in entries)
    except TypeError:
        raise ShapeError(
            f"{name} must be a tuple of whole numbers such as (28, 28), or n for a vector of n entries, got {shape!r}"
        ) from None


def image_shape(shape: int | Iterable[int]) -> tuple[int, ...]:
    """A shape (*channels, height, width) as a tuple.

    Raises:
        ShapeError: it is none.
    """
    found = event_shape(shape)
    if len(found) < 2:
        raise ShapeError(f"in_shape must end in (height, width), got {found}")
    return found


def numel(shape: tuple[int, ...]) -> int:
    """Number of entries of one event; 1 for a scalar."""
    return math.prod(shape)


def flatten_event(x: Tensor, event_ndim: int) -> Tensor:
    """(*batch, *event) -> (*batch, size), also when the batch is empty."""
    batch = x.shape[: x.ndim - event_ndim]
    return x.reshape(*batch, math.prod(x.shape[x.ndim - event_ndim :]))


def scatter_index(keep: Tensor, size: int) -> Tensor:
    """For each of `size` places, its position in `keep`, or len(keep) where it is absent: adjoint of x[..., keep]."""
    index = torch.full((size,), len(keep), dtype=torch.long, device=keep.device)
    index[keep] = torch.arange(len(keep), device=keep.device)
    return index


def scatter(z: Tensor, index: Tensor) -> Tensor:
    """(*batch, kept) -> (*batch, size) with zeros at absent places; a gather, so it is safe under every transform."""
    kept = z.shape[-1]
    if kept == 0:
        return z.new_zeros(*z.shape[:-1], len(index))
    return torch.where(index < kept, z.index_select(-1, index.clamp(max=kept - 1)), 0.0)


def over_event(value: float | Tensor, like: Tensor, event_ndim: int) -> Tensor:
    """A number per batch member, with trailing axes to multiply an event."""
    v = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return v.reshape(*v.shape, *(1,) * event_ndim) if v.ndim else v

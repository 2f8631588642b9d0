"""Events as flat vectors: sizes, flattening, places left out, and numbers per batch member."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["flatten_event", "numel", "over_event", "scatter", "scatter_index"]


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

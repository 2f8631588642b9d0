"""Where the numbers of a tensor are while C code is written: in named scalars, or in memory with strides.

Small tensors are arrays of C names, so that taking one apart or putting several together costs nothing at run time.
Axes along which a tensor repeats itself have stride zero in both forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Memory",
    "Scalars",
    "Unsupported",
    "Value",
    "core",
    "dense",
    "inner_first",
    "piece",
    "reshaped",
    "restructured",
    "tensors",
    "viewed",
]


class Unsupported(Exception):
    """The graph holds something that is not written in C."""


@dataclass(frozen=True)
class Scalars:
    """A tensor whose numbers are C names or literals, by position; broadcast axes have stride zero."""

    names: np.ndarray
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, broadcast axes at full length."""
        return self.names.shape

    @property
    def kept(self) -> np.ndarray:
        """The names with broadcast axes cut to length one."""
        axes = zip(self.names.shape, self.names.strides, strict=True)
        return self.names[tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for n, s in axes)]


@dataclass(frozen=True)
class Memory:
    """A tensor in a buffer: number (i, j, ...) is at offset + i * strides[0] + j * strides[1] + ..."""

    buffer: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


Value = Scalars | Memory


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps, the last axis fastest.

    Example:
        >>> dense((2, 3, 4)), inner_first((1000, 2))
        ((12, 4, 1), (1, 1000))
    """
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def inner_first(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps with the longest axis fastest where the last one is short: loops run along it."""
    if not shape or max(shape) < 2 * shape[-1]:
        return dense(shape)
    longest = max(range(len(shape)), key=lambda i: shape[i])
    order = [i for i in range(len(shape)) if i != longest] + [longest]
    strides = [0] * len(shape)
    for position, axis in enumerate(order):
        strides[axis] = prod(shape[i] for i in order[position + 1 :])
    return tuple(strides)


def core(value: Value, shape: Sequence[int]) -> tuple[tuple[int, ...], Value]:
    """The value broadcast to a shape: its strides there (zero where it repeats itself), and itself in that shape."""
    if isinstance(value, Scalars):
        names = np.broadcast_to(value.names, tuple(shape))
        return tuple(0 if n == 1 else s for n, s in zip(names.shape, names.strides, strict=True)), Scalars(
            names, value.dtype
        )
    lead = len(shape) - len(value.shape)
    strides = [0] * lead
    for own, stride, wanted in zip(value.shape, value.strides, shape[lead:], strict=True):
        strides.append(0 if own == 1 or wanted == 1 else stride)
    return tuple(strides), Memory(value.buffer, value.offset, tuple(shape), tuple(strides), value.dtype)


def viewed(target: Any, value: Memory, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation that only looks at memory differently makes of a buffer; None where it would copy."""
    reach = value.offset + 1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
    base = torch.empty(reach, dtype=value.dtype, device="meta")
    seen = base.as_strided(value.shape, value.strides, value.offset)
    if "view" in str(target) or "reshape" in str(target):
        try:
            out: Any = torch.ops.aten.view.default(seen, *args, **kwargs)
        except RuntimeError:
            return None
    else:
        out = target(seen, *args, **kwargs)

    def back(x: Tensor) -> Memory:
        return Memory(value.buffer, int(x.storage_offset()), tuple(x.shape), x.stride(), value.dtype)

    return [back(x) for x in out] if isinstance(out, list | tuple) else back(out)


def restructured(target: Any, args: Any, kwargs: dict[str, Any], fill: str = "0.0") -> Any:
    """What an operation that only moves numbers makes of scalars: it is run on their places in a list.

    Example:
        >>> pair = Scalars(np.array(["a", "b"], dtype=object), torch.float64)
        >>> restructured(torch.ops.aten.flip.default, (pair, [0]), {}).names.tolist()
        ['b', 'a']
    """
    names: list[str] = [fill]
    dtype: list[torch.dtype] = []

    def places(x: Any) -> Any:
        if isinstance(x, Scalars):
            dtype.append(x.dtype)
            kept = x.kept
            index = torch.arange(len(names), len(names) + kept.size).reshape(kept.shape)
            names.extend(kept.reshape(-1).tolist())
            return index.expand(x.shape)
        if isinstance(x, list | tuple):
            return [places(y) for y in x]
        return x

    out = target(*(places(a) for a in args), **{k: v for k, v in kwargs.items() if k not in ("dtype", "device")})
    table = np.array(names, dtype=object)

    def back(x: Tensor) -> Scalars:
        kept = x[
            tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for n, s in zip(x.shape, x.stride(), strict=True))
        ]
        return Scalars(np.broadcast_to(table[kept.numpy()], tuple(x.shape)), dtype[0])

    return [back(x) for x in out] if isinstance(out, list | tuple) else back(out)


def tensors(args: Iterable[Any]) -> list[Value]:
    """All values among arguments, also those in lists."""
    found: list[Value] = []
    for a in args:
        if isinstance(a, Scalars | Memory):
            found.append(a)
        elif isinstance(a, list | tuple):
            found += tensors(a)
    return found


def piece(value: Value, index: tuple[int, ...], axes: set[int]) -> Value:
    """One slice along some axes, which keep length one."""
    if isinstance(value, Scalars):
        cut = tuple(
            slice(i, i + 1) if d in axes and n > 1 else slice(None)
            for d, (i, n) in enumerate(zip(index, value.shape, strict=True))
        )
        return Scalars(value.names[cut], value.dtype)
    shape = tuple(1 if d in axes else n for d, n in enumerate(value.shape))
    offset = value.offset + sum(index[d] * value.strides[d] for d in axes)
    return Memory(value.buffer, offset, shape, value.strides, value.dtype)


def reshaped(value: Value, shape: tuple[int, ...]) -> Value:
    """The same numbers with other axes of length one."""
    if isinstance(value, Scalars):
        return Scalars(value.names.reshape(shape), value.dtype)
    rest = iter([s for n, s in zip(value.shape, value.strides, strict=True) if n != 1])
    return Memory(value.buffer, value.offset, shape, tuple(0 if n == 1 else next(rest) for n in shape), value.dtype)

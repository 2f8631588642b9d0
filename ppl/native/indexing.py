"""Rows picked by an index tensor, and what is added up in such rows. An index out of range ends the call."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.native.values import Memory, Scalars, Unsupported, Value, core, restructured
from ppl.native.writer import SMALL, Call, Operation, Writer

__all__ = ["INDEXING"]

OUT_OF_RANGE = -3


def _one_index(write: Writer, call: Call) -> tuple[int, Value]:
    """The axis that is indexed and the index, where there is one of them."""
    found = [(d, i) for d, i in enumerate(call.args[1]) if i is not None]
    if len(found) != 1:
        raise Unsupported(f"{call.target} with several indices")
    axis, index = found[0]
    if index.dtype not in (torch.int64, torch.int32):
        raise Unsupported(f"{call.target} with an index of type {index.dtype}")
    return axis, index


def _constants(write: Writer, call: Call) -> list[Tensor | None] | None:
    """The indices, where all of them are known by now."""
    known = [None if i is None else write.constant(i) for i in call.args[1]]
    return known if all((k is None) == (i is None) for k, i in zip(known, call.args[1], strict=True)) else None


def _picked(write: Writer, call: Call) -> Value:
    """out[a, i, b] = x[a, index[i], b]."""
    indices, source = _constants(write, call), call.args[0]
    if indices is not None and prod(source.shape) <= SMALL and prod(call.shape) <= SMALL:
        return restructured(call.target, [Scalars(write.scalars(source), source.dtype), indices], {})
    axis, index = _one_index(write, call)
    return _gathered(write, call, source, axis, index, len(index.shape))


def _selected(write: Writer, call: Call) -> Value:
    source, axis, index = call.args[:3]
    return _gathered(write, call, source, axis % len(source.shape), index, 1)


def _gathered(write: Writer, call: Call, source: Value, axis: int, index: Value, rank: int) -> Value:
    place = write.code.buffer(call.shape, call.dtype)
    _walk(write, write.memory(source), place, place, axis, index, rank, "=")
    return place


def _taken(write: Writer, call: Call) -> Value:
    """gather: out[a, i, b] = x[a, index[a, i, b], b]."""
    source, axis, index = call.args[:3]
    place = write.code.buffer(call.shape, call.dtype)
    axis %= len(call.shape)
    _walk(write, write.memory(source), place, place, axis, index, 0, "=")
    return place


def _put(write: Writer, call: Call) -> Value:
    """index_put: a copy of x with values at x[a, index[i], b], in place of what was there or added to it."""
    adds = len(call.args) > 3 and call.args[3]
    indices = _constants(write, call)
    if indices is not None and prod(call.shape) <= SMALL:
        return _put_scalars(write, call, indices, adds)
    if not adds:
        raise Unsupported(f"{call.target} without accumulation")
    axis, index = _one_index(write, call)
    return _added(write, call, axis, index, call.args[2], len(index.shape))


def _put_scalars(write: Writer, call: Call, indices: list[Tensor | None], adds: bool) -> Value:
    places = torch.ops.aten.index.Tensor(torch.arange(prod(call.shape)).reshape(call.shape), indices)
    values = np.broadcast_to(write.scalars(call.args[2]), tuple(places.shape))
    out = np.broadcast_to(write.scalars(call.args[0]), call.shape).reshape(-1).copy()
    for at, value in zip(places.reshape(-1).tolist(), values.reshape(-1), strict=True):
        out[at] = write.code.let(f"{out[at]} + {value}", call.dtype) if adds else value
    return Scalars(out.reshape(call.shape), call.dtype)


def _index_added(write: Writer, call: Call) -> Value:
    if call.kwargs.get("alpha", 1) != 1:
        raise Unsupported(f"{call.target} with {call.kwargs}")
    axis, index, values = call.args[1:4]
    return _added(write, call, axis % len(call.shape), index, values, 1)


def _scatter_added(write: Writer, call: Call) -> Value:
    axis, index, values = call.args[1:4]
    return _added(write, call, axis % len(call.shape), index, values, 0)


def _added(write: Writer, call: Call, axis: int, index: Value, values: Value, rank: int) -> Value:
    place = write.code.buffer(call.shape, call.dtype)
    write.put(call.args[0], place)
    write.code.ready(place)
    shape = index.shape if rank == 0 else (*call.shape[:axis], *index.shape, *call.shape[axis + 1 :])
    spread = write.memory(core(_cropped(values, shape), shape)[1])
    _walk(write, place, spread, place, axis, index, rank, "+=")
    return place


def _cropped(values: Value, shape: tuple[int, ...]) -> Value:
    """scatter_add reads as much of the values as the index is long."""
    if len(values.shape) != len(shape) or not isinstance(values, Memory):
        return values
    less = tuple(min(n, m) for n, m in zip(values.shape, shape, strict=True))
    return Memory(values.buffer, values.offset, less, values.strides, values.dtype)


def _walk(
    write: Writer, table: Memory, rows: Memory, place: Memory, axis: int, index: Value, rank: int, sign: str
) -> None:
    """rows[a, i, b] = table[a, index[i], b], or table[...] += rows[...]; rank 0 has an index for each number."""
    at = write.memory(Scalars(write.scalars(index), index.dtype) if isinstance(index, Scalars) else index)
    size = table.shape[axis]
    loops = " ".join(f"for (int64_t i{d} = 0; i{d} < {n}; i{d}++)" for d, n in enumerate(rows.shape))
    own = range(rank) if rank else range(len(rows.shape))
    before = axis if rank else 0
    where = _sum([at.offset, *(f"i{before + d}*{at.strides[d]}" for d in own)])
    # The loops of the axes behind an indexed one have moved by the axes of the index.
    moved = {d: d + rank - 1 if rank and d > axis else d for d in range(len(table.shape)) if d != axis}
    terms = [table.offset, f"j*{table.strides[axis]}", *(f"i{i}*{table.strides[d]}" for d, i in moved.items())]
    ours = f"{rows.buffer}[{_sum([rows.offset, *(f'i{d}*{s}' for d, s in enumerate(rows.strides))])}]"
    theirs = f"{table.buffer}[{_sum(terms)}]"
    write.code.say(
        f"{loops} {{ int64_t j = {at.buffer}[{where}]; if (j < 0) j += {size}; "
        f"if (j < 0 || j >= {size}) return {OUT_OF_RANGE}; "
        + (f"{ours} = {theirs}; }}" if sign == "=" else f"{theirs} += {ours}; }}"),
        place.buffer,
    )


def _sum(terms: list[Any]) -> str:
    return " + ".join(str(t) for t in terms)


def _embedding_backward(write: Writer, call: Call) -> Value:
    """Rows of the gradient added up in the rows of a table."""
    grad, index, _, padding = call.args[:4]
    if padding >= 0 or (len(call.args) > 4 and call.args[4]):
        raise Unsupported(f"{call.target} with padding or scaling")
    place = write.code.buffer(call.shape, call.dtype)
    write.fill(place, "0")
    write.code.ready(place)
    _walk(write, place, write.memory(core(grad, grad.shape)[1]), place, 0, index, len(index.shape), "+=")
    return place


def _embedding(write: Writer, call: Call) -> Value:
    return _gathered(write, call, call.args[0], 0, call.args[1], len(call.args[1].shape))


INDEXING: dict[str, Operation] = {
    "index": _picked,
    "_unsafe_index": _picked,
    "index_select": _selected,
    "gather": _taken,
    "index_put": _put,
    "_unsafe_index_put": _put,
    "index_add": _index_added,
    "scatter_add": _scatter_added,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
}

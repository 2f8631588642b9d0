"""Operations that move numbers without changing them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch

from ppl.native.expressions import literal
from ppl.native.values import Memory, Scalars, Unsupported, Value, restructured, tensors, viewed
from ppl.native.writer import SMALL, Call, Operation, Writer, address

__all__ = ["MOVES"]

aten = torch.ops.aten
_VIEWS = (
    *("slice", "select", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze"),
    *("squeeze", "unbind", "split", "split_with_sizes", "diagonal", "narrow", "_reshape_alias"),
)
_SAME = ("alias", "detach", "lift_fresh_copy", "lift_fresh", "clone", "contiguous", "positive")
# Where the gradient of a view goes.
_INSIDE: dict[str, Any] = {
    "slice_backward": aten.slice.Tensor,
    "select_backward": aten.select.int,
    "diagonal_backward": aten.diagonal.default,
}


def _view(write: Writer, call: Call) -> Any:
    return write.view(call.target, call.args, call.kwargs)


def _small(write: Writer, call: Call) -> Any:
    """The result where it is scalars, None where it is larger."""
    if any(v.dtype != call.dtype for v in tensors(call.args)):
        raise Unsupported(f"{call.target} of several types")
    if prod(call.shape) > SMALL:
        return None
    fill, args = "0", call.args
    if call.name == "constant_pad_nd":
        fill, args = _padding(call), args[:2]

    def named(a: Any) -> Any:
        if isinstance(a, Scalars | Memory):
            return Scalars(write.scalars(a), a.dtype)
        return [named(x) for x in a] if isinstance(a, list | tuple) else a

    return restructured(call.target, [named(a) for a in args], call.kwargs, fill)


def _joined(write: Writer, call: Call) -> Value:
    """cat and stack: each part is put into its place."""
    done = _small(write, call)
    if done is not None:
        return done
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    return write.joined(call.args[0], dim % len(call.shape), call.shape, call.dtype, new_axis=call.name == "stack")


def _inside(write: Writer, call: Call) -> Value:
    """Zeros around what a view had shown."""
    done = _small(write, call)
    if done is not None:
        return done
    place = write.code.buffer(call.shape, call.dtype)
    write.fill(place, "0")
    write.put(call.args[0], viewed(_INSIDE[call.name], place, call.args[2:], {}))
    return place


def _padding(call: Call) -> str:
    return literal(call.args[2], call.dtype.is_floating_point) if len(call.args) > 2 else "0"


def _padded(write: Writer, call: Call) -> Value:
    done = _small(write, call)
    if done is not None:
        return done
    place = inside = write.code.buffer(call.shape, call.dtype)
    write.fill(place, _padding(call))
    source, widths = call.args[0], call.args[1]
    for i in range(len(widths) // 2):
        before, after = widths[2 * i : 2 * i + 2]
        axis = len(call.shape) - 1 - i
        inside = viewed(aten.slice.Tensor, inside, (axis, max(before, 0), call.shape[axis] - max(after, 0)), {})
        if before < 0 or after < 0:  # less than nothing is cut off
            end = source.shape[axis] + min(after, 0)
            source = write.view(aten.slice.Tensor, [source, axis, -min(before, 0), end], {})
    write.put(source, inside)
    return place


def _flipped(write: Writer, call: Call) -> Value:
    done = _small(write, call)
    if done is not None:
        return done
    source = write.memory(call.args[0])
    axes = {a % len(call.shape) for a in call.args[1]}
    offset = source.offset + sum((call.shape[a] - 1) * source.strides[a] for a in axes)
    strides = tuple(-s if i in axes else s for i, s in enumerate(source.strides))
    place = write.code.buffer(call.shape, call.dtype)
    write.put(Memory(source.buffer, offset, call.shape, strides, call.dtype), place)
    return place


def _triangle(write: Writer, call: Call) -> Value:
    done = _small(write, call)
    if done is not None:
        return done
    source, place = write.memory(call.args[0]), write.code.buffer(call.shape, call.dtype)
    diagonal = call.args[1] if len(call.args) > 1 else 0
    inside = "<=" if call.name == "tril" else ">="
    for index in np.ndindex(*place.shape[:-2]):
        ours, theirs = address(place, index), address(source, index)
        write.code.say(
            f"for (int64_t i = 0; i < {place.shape[-2]}; i++) for (int64_t j = 0; j < {place.shape[-1]}; j++) "
            f"{ours}[i*{place.strides[-2]} + j*{place.strides[-1]}] = j - i {inside} {diagonal} ? "
            f"{theirs}[i*{source.strides[-2]} + j*{source.strides[-1]}] : 0;",
            place.buffer,
        )
    return place


def _few(write: Writer, call: Call) -> Value:
    done = _small(write, call)
    if done is None:
        raise Unsupported(f"{call.target} of {prod(call.shape)} numbers")
    return done


MOVES: dict[str, Operation] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_SAME, lambda write, call: call.args[0]),
    **dict.fromkeys(_INSIDE, _inside),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("roll", "repeat", "diag_embed"), _few),
    "constant_pad_nd": _padded,
    "flip": _flipped,
}

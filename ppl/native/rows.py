"""Sums, and operations along one axis: written out where it is short, by a function of the row otherwise."""

from __future__ import annotations

from math import prod

import torch

from ppl.native.expressions import POINTWISE
from ppl.native.values import Unsupported, Value, core, piece, reshaped
from ppl.native.writer import SMALL, Call, Operation, Writer, index_text

__all__ = ["ROWS"]

_REDUCED = ("logsumexp", "amax", "amin", "prod")
_KEPT = ("cumsum", "cumprod", "_log_softmax", "_softmax")


def _sum(write: Writer, call: Call) -> Value:
    value: Value = call.args[0]
    rank = len(value.shape)
    axes = call.args[1] if len(call.args) > 1 and call.args[1] else range(rank)
    return write.sum([value], {a % rank for a in axes} if rank else set(), value.shape, call.shape, call.dtype)


def _mean(write: Writer, call: Call) -> Value:
    count = prod(call.args[0].shape) / prod(call.shape)
    return write.pointwise(POINTWISE["div"], [_sum(write, call), count], call.shape, call.dtype)


def _row(write: Writer, call: Call) -> Value:
    value: Value = call.args[0]
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if isinstance(axis, list | tuple) and len(axis) == 1:
        (axis,) = axis
    if not isinstance(axis, int) or not value.shape or not value.dtype.is_floating_point:
        raise Unsupported(f"{call.target} over {axis} of {value.dtype}")
    rank, reduced = len(value.shape), call.name in _REDUCED
    axis %= rank
    size = value.shape[axis]
    less = tuple(1 if d == axis else n for d, n in enumerate(value.shape))
    if size <= SMALL:
        whole = core(value, value.shape)[1]
        parts = [piece(whole, tuple(i if d == axis else 0 for d in range(rank)), {axis}) for i in range(size)]
        out = _columns(write, call.name, parts, less, call.dtype)
        return reshaped(out[0], call.shape) if reduced else write.joined(out, axis, call.shape, call.dtype)
    if call.dtype != torch.float64:
        raise Unsupported(f"{call.target} of {call.dtype}")
    source = write.memory(value)
    place = write.code.buffer(less if reduced else call.shape, call.dtype)
    others = [d for d in range(rank) if d != axis and value.shape[d] > 1]
    loops = " ".join(f"for (int64_t i{d} = 0; i{d} < {value.shape[d]}; i{d}++)" for d in others)
    theirs, ours = (index_text(m.offset, m.strides, others) for m in (source, place))
    write.code.say(
        f"{loops} {call.name}_({source.buffer} + {theirs}, {source.strides[axis]}, "
        f"{place.buffer} + {ours}, {0 if reduced else place.strides[axis]}, {size});",
        place.buffer,
    )
    return reshaped(place, call.shape) if reduced else place


def _columns(write: Writer, name: str, parts: list[Value], shape: tuple[int, ...], dtype: torch.dtype) -> list[Value]:
    """The same for the pieces along a short axis."""

    def pair(op: str, a: Value, b: Value) -> Value:
        return write.pointwise(POINTWISE[op], [a, b], shape, dtype)

    op = {"cumsum": "add", "cumprod": "mul", "prod": "mul", "amax": "maximum", "amin": "minimum"}.get(name)
    if op is not None:
        out = [parts[0]]
        for part in parts[1:]:
            out.append(pair(op, out[-1], part))
        return out[-1:] if name in _REDUCED else out
    (most,) = _columns(write, "amax", parts, shape, dtype)
    most = write.pointwise(lambda m: f"isinf({m}) ? 0 : {m}", [most], shape, dtype)
    exps = [write.pointwise(lambda a, m: f"exp({a} - {m})", [p, most], shape, dtype) for p in parts]
    total = write.pointwise(lambda *e: " + ".join(e), exps, shape, dtype)
    if name == "_softmax":
        return [pair("div", e, total) for e in exps]
    whole = write.pointwise(lambda t, m: f"log({t}) + {m}", [total, most], shape, dtype)
    return [whole] if name == "logsumexp" else [pair("sub", p, whole) for p in parts]


def _extreme(write: Writer, call: Call) -> tuple[Value, None]:
    """max and min along an axis; where they were found is not known."""
    if len(call.args) < 2:
        raise Unsupported(f"{call.target} over all axes")
    value, axis = call.args[0], call.args[1] % len(call.args[0].shape)
    keep = len(call.args) > 2 and call.args[2]
    shape = tuple(1 if d == axis else n for d, n in enumerate(value.shape) if keep or d != axis)
    return _row(write, Call(call.target, f"a{call.name}", [value, axis], {}, shape, value.dtype)), None


def _softmax_backward(write: Writer, call: Call) -> Value:
    grad, out, axis = call.args[:3]
    axis %= len(call.shape)
    less = tuple(1 if d == axis else n for d, n in enumerate(call.shape))
    if call.name == "_softmax_backward_data":
        total = write.sum([grad, out], {axis}, call.shape, less, call.dtype)
        return write.pointwise(lambda g, y, t: f"{y} * ({g} - {t})", [grad, out, total], call.shape, call.dtype)
    total = write.sum([grad], {axis}, call.shape, less, call.dtype)
    return write.pointwise(lambda g, y, t: f"{g} - exp({y}) * {t}", [grad, out, total], call.shape, call.dtype)


ROWS: dict[str, Operation] = {
    "sum": _sum,
    "mean": _mean,
    "max": _extreme,
    "min": _extreme,
    **dict.fromkeys((*_REDUCED, *_KEPT), _row),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _softmax_backward),
}

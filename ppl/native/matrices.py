"""Products, Cholesky factors and triangular systems of small matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ppl.native.expressions import POINTWISE
from ppl.native.values import Unsupported, Value, core
from ppl.native.writer import Call, Operation, Writer, address

__all__ = ["MATRICES"]

MANY_FLOPS = 2_000_000  # of one matrix product, where a tuned library is faster
LARGEST_FACTOR = 64  # rows of a matrix that is factorised here

aten = torch.ops.aten


def _product(write: Writer, call: Call) -> Value:
    """(..., i, k) times (..., k, j), as a sum over k of a product of tensors (..., i, k, j)."""
    a, b = call.args[-2:]
    batch, rows, inner, columns = a.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1]
    if min(rows, inner, columns) > 8 and rows * inner * columns > MANY_FLOPS:
        raise Unsupported(f"a product of matrices {rows} x {inner} and {inner} x {columns}")
    left = write.view(aten.unsqueeze.default, [a, len(a.shape)], {})
    right = write.view(aten.unsqueeze.default, [b, len(batch)], {})
    shape = (*batch, rows, columns)
    product = write.sum([left, right], {len(batch) + 1}, (*batch, rows, inner, columns), shape, call.dtype)
    if len(call.args) == 2:
        return product
    if any(v != 1 for v in call.kwargs.values()):
        raise Unsupported(f"{call.target} with {call.kwargs}")
    return write.pointwise(POINTWISE["add"], [call.args[0], product], call.shape, call.dtype)


def _times_vector(write: Writer, call: Call) -> Value:
    a, b = call.args[:2]
    return write.sum([a, b], {len(a.shape) - 1}, a.shape, call.shape, call.dtype)


def _cholesky(write: Writer, call: Call) -> Any:
    source = write.memory(call.args[0])
    rows = source.shape[-1]
    if call.kwargs.get("upper") or source.dtype != torch.float64 or rows > LARGEST_FACTOR:
        raise Unsupported(f"a Cholesky factor of {rows} rows, type {source.dtype}")
    batch = source.shape[:-2]
    place, info = write.code.buffer(source.shape, source.dtype), write.code.buffer(batch, torch.int32)
    for index in np.ndindex(*batch):
        target = address(place, index)
        write.code.say(
            f"cholesky_({address(source, index)}, {source.strides[-2]}, {source.strides[-1]}, "
            f"{target}, {place.strides[-2]}, {place.strides[-1]}, {rows}, {address(info, index)});"
        )
    write.code.keep(place)  # the statement writes both and stays where only one of them is read
    write.code.keep(info)
    return place, info


def _triangular(write: Writer, call: Call) -> Value:
    upper, left, unit = (call.kwargs.get(k, d) for k, d in (("upper", False), ("left", True), ("unitriangular", False)))
    rows = call.args[0].shape[-1]
    if call.dtype != torch.float64 or rows > LARGEST_FACTOR:
        raise Unsupported(f"a triangular system of {rows} rows, type {call.dtype}")
    batch = call.shape[:-2]
    a = write.memory(core(call.args[0], (*batch, rows, rows))[1])
    b = write.memory(core(call.args[1], call.shape)[1])
    place = write.code.buffer(call.shape, call.dtype)
    others = call.shape[-1] if left else call.shape[-2]
    for index in np.ndindex(*batch):
        parts = [(address(m, index), m.strides[-2], m.strides[-1]) for m in (a, b, place)]
        if not left:  # x a = b is a' x' = b'
            parts = [(at, column, row) for at, row, column in parts]
        texts = ", ".join(f"{at}, {row}, {column}" for at, row, column in parts)
        turned = bool(upper) == bool(left)
        write.code.say(f"solve_({texts}, {rows}, {others}, {int(turned)}, {int(unit)});", place.buffer)
    return place


MATRICES: dict[str, Operation] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(("mv", "dot"), _times_vector),
    "linalg_cholesky_ex": _cholesky,
    "linalg_solve_triangular": _triangular,
}

"""What operations are written with: expressions for each number of a tensor, sums, copies into a place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.native.expressions import CTYPES, literal
from ppl.native.loops import Code
from ppl.native.values import Memory, Scalars, Value, core, piece, reshaped, restructured, viewed

__all__ = ["SMALL", "Call", "Operation", "Writer", "address", "index_text"]

SMALL = 16  # numbers of a tensor that is kept in scalars
TERMS = 32  # of a sum that is written out


@dataclass(frozen=True)
class Call:
    """One operation of a graph: its arguments as values, the shape and type of its result."""

    target: Any
    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Writer:
    """Writes code for values."""

    def __init__(self) -> None:
        self.code = Code()
        self.constants: dict[str, Tensor] = {}

    def constant(self, value: Value) -> Tensor | None:
        """The whole numbers of a tensor that depends on no input; None for any other."""
        if isinstance(value, Memory):
            known = self.constants.get(value.buffer)
            return known if known is not None and tuple(known.shape) == value.shape else None
        names = [name.strip("()") for name in value.names.reshape(-1)]
        if value.dtype.is_floating_point or not all(n.lstrip("-").isdecimal() for n in names):
            return None
        return torch.tensor([int(n) for n in names]).reshape(value.shape).to(value.dtype)

    def pointwise(
        self,
        write: Callable[..., str],
        operands: Sequence[Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kwargs: dict[str, Any] | None = None,
        into: Memory | None = None,
    ) -> Value:
        """An expression for each number of a tensor; where all operands repeat themselves, so does the result."""
        floating = dtype.is_floating_point or any(
            isinstance(x, Scalars | Memory) and x.dtype.is_floating_point for x in operands
        )
        named = {k: literal(v, floating) for k, v in (kwargs or {}).items() if v is not None and (k, v) != ("alpha", 1)}
        values: list[Any] = [
            literal(x, floating)
            if isinstance(x, int | float)
            else x
            if x is None or isinstance(x, str)
            else core(x, shape)
            for x in operands
        ]
        broadcast = [v for v in values if isinstance(v, tuple)]
        repeats = [n > 1 and all(strides[d] == 0 for strides, _ in broadcast) for d, n in enumerate(shape)]
        if into is None and any(repeats):
            less = tuple(1 if again else n for again, n in zip(repeats, shape, strict=True))
            cut = tuple(slice(0, 1) if again else slice(None) for again in repeats)
            part = self.pointwise(write, [_cut(v, cut, less) for v in values], less, dtype, kwargs)
            return core(part, shape)[1]
        flat: list[Any] = [v[1] if isinstance(v, tuple) else v for v in values]
        if into is None and prod(shape) <= SMALL:
            columns: list[Any] = [self.scalars(v) if isinstance(v, Scalars | Memory) else v for v in flat]
            out = np.empty(shape, dtype=object)
            for index in np.ndindex(*shape):
                own = [c[index] if isinstance(c, np.ndarray) else c for c in columns]
                out[index] = self._let(write, self._promoted(own, flat, dtype), named, dtype)
            return Scalars(out, dtype)
        known = [v for v in flat if v is not None]
        loop, texts = self.code.loop(shape, known)
        found = iter(self._promoted(texts, known, dtype))
        expression = write(*(None if v is None else next(found) for v in flat), **named)
        name = expression
        if not expression.isidentifier() or (expression in texts and into is None):
            name = self.code.name("v")
            loop.lines.append(f"const {CTYPES[dtype]} {name} = {expression};")
        place = into if into is not None else self.code.buffer(shape, dtype)
        self.code.store(loop, name, place)
        return place

    def _let(self, write: Callable[..., str], texts: list[Any], named: dict[str, str], dtype: torch.dtype) -> str:
        expression = write(*texts, **named)
        return expression if expression in texts else self.code.let(expression, dtype)

    def _promoted(self, texts: list[Any], values: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """Whole numbers as floating ones where the result is."""
        if not dtype.is_floating_point:
            return texts
        whole = [isinstance(v, Scalars | Memory) and not v.dtype.is_floating_point for v in values]
        boolean = [isinstance(v, Scalars | Memory) and v.dtype == torch.bool for v in values]
        return [f"(double){t}" if w and not b else t for t, w, b in zip(texts, whole, boolean, strict=True)]

    def scalars(self, value: Value) -> np.ndarray:
        """The numbers of a small tensor as names that can be used now."""
        if isinstance(value, Scalars):
            for name in value.kept.reshape(-1):
                self.code.scalar(name)
            return value.names
        strides, _ = core(value, value.shape)
        kept = np.empty(tuple(1 if s == 0 else n for n, s in zip(value.shape, strides, strict=True)), dtype=object)
        for index in np.ndindex(*kept.shape):
            kept[index] = self.code.element(value, index)
        return np.broadcast_to(kept, value.shape)

    def memory(self, value: Value) -> Memory:
        """A tensor in memory, complete."""
        return self.code.ready(self.code.spill(value) if isinstance(value, Scalars) else value)

    def view(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A tensor looked at differently; copied where its memory does not allow that."""
        value: Value = args[0]
        if isinstance(value, Scalars):
            out = restructured(target, args, kwargs)
            if all(x.kept.size <= max(SMALL, value.kept.size) for x in (out if isinstance(out, list) else [out])):
                return out
            value = self.code.spill(value)
        found = viewed(target, value, args[1:], kwargs)
        if found is None:
            copy = self.code.buffer(value.shape, value.dtype, torch.empty(value.shape, device="meta").stride())
            self.put(value, copy)
            found = viewed(target, copy, args[1:], kwargs)
        return found

    def put(self, value: Value, place: Memory) -> None:
        """Put a tensor in its place, number by number where there are few."""
        if prod(place.shape) > SMALL:
            self.pointwise(lambda a: a, [value], place.shape, place.dtype, into=place)
            return
        names = np.broadcast_to(self.scalars(core(value, place.shape)[1]), place.shape)
        for index in np.ndindex(*place.shape):
            at = place.offset + sum(i * s for i, s in zip(index, place.strides, strict=True))
            self.code.say(f"{place.buffer}[{at}] = {names[index]};", place.buffer)

    def fill(self, place: Memory, number: str) -> None:
        """One number everywhere in a buffer."""
        size = prod(place.shape)
        if number in ("0", "0.0"):
            self.code.say(f"memset({place.buffer}, 0, {size} * sizeof({place.buffer}[0]));", place.buffer)
        else:
            self.code.say(f"for (int64_t i = 0; i < {size}; i++) {place.buffer}[i] = {number};", place.buffer)

    def sum(
        self, factors: list[Value], axes: set[int], shape: tuple[int, ...], out: tuple[int, ...], dtype: torch.dtype
    ) -> Value:
        """The sum over axes of a product of tensors that are broadcast to one shape."""
        kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
        spread = [core(f, shape) for f in factors]
        alike = {d for d in axes if shape[d] > 1 and all(strides[d] == 0 for strides, _ in spread)}
        times = prod(shape[d] for d in alike)
        cut = tuple(slice(0, 1) if d in alike else slice(None) for d in range(len(shape)))
        shape = tuple(1 if d in alike else n for d, n in enumerate(shape))
        values = [_cut(s, cut, shape) for s in spread]
        terms = prod(shape[d] for d in axes)
        write = _product(len(values)) if times == 1 else _times(_product(len(values)), times)
        if terms <= TERMS and (prod(kept) > SMALL or terms <= SMALL):
            places = np.ndindex(*(n if d in axes else 1 for d, n in enumerate(shape)))
            one = [[piece(v, at, axes) for v in values] for at in places]
            count = len(values)

            def total(*texts: str) -> str:
                return " + ".join(write(*texts[i : i + count]) for i in range(0, len(texts), count))

            found = self.pointwise(total, [v for pieces in one for v in pieces], kept, dtype)
        elif prod(kept) <= TERMS:
            names = np.empty(kept, dtype=object)
            inner = tuple(n if d in axes else 1 for d, n in enumerate(shape))
            for index in np.ndindex(*kept):
                loop, texts = self.code.loop(inner, [piece(v, index, set(range(len(shape))) - axes) for v in values])
                expression = write(*self._promoted(texts, values, dtype))
                name = self.code.name("v")
                loop.lines.append(f"const double {name} = {expression};")
                names[index] = self.code.total(loop, name)
            found = Scalars(names, dtype)
        else:
            found = self._summed([self.memory(v) for v in values], write, axes, shape, kept, dtype)
        return reshaped(found, out)

    def _summed(
        self,
        values: list[Memory],
        write: Callable[..., str],
        axes: set[int],
        shape: tuple[int, ...],
        kept: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Memory:
        """Nested loops, the innermost along the axis that is nearest in memory."""
        place = self.code.buffer(kept, dtype)
        self.fill(place, "0")
        into = tuple(0 if d in axes else s for d, s in enumerate(place.strides))
        score = [(sum(abs(v.strides[d]) > 1 for v in values) + (into[d] > 1), -n) for d, n in enumerate(shape)]
        inner = min((d for d in range(len(shape)) if shape[d] > 1), key=score.__getitem__)
        order = [d for d in range(len(shape)) if d != inner and shape[d] > 1] + [inner]
        loops = [f"for (int64_t i{d} = 0; i{d} < {shape[d]}; i{d}++)" for d in order]
        texts = [f"{v.buffer}[{index_text(v.offset, v.strides, order)}]" for v in values]
        target = f"{place.buffer}[{index_text(0, into, order)}]"
        term = write(*self._promoted(texts, values, dtype))
        if inner in axes:
            body = [*loops[:-1], "{ double s = 0;", "#pragma omp simd reduction(+:s)", loops[-1], f"s += {term};"]
            body.append(f"{target} += s; }}")
        else:
            body = [*loops[:-1], "{", "#pragma omp simd", loops[-1], f"{target} += {term}; }}"]
        self.code.say("\n".join(body), place.buffer)
        return place

    def joined(
        self, values: Sequence[Value], dim: int, shape: tuple[int, ...], dtype: torch.dtype, new_axis: bool = False
    ) -> Value:
        """Tensors one behind the other along an axis."""
        small = [v for v in values if isinstance(v, Scalars)]
        if not new_axis and len(small) == len(values) and sum(v.kept.size for v in small) <= SMALL:
            names = [np.broadcast_to(v.names, (*shape[:dim], v.shape[dim], *shape[dim + 1 :])) for v in small]
            return restructured(torch.ops.aten.cat.default, [[Scalars(n, dtype) for n in names], dim], {})
        place = self.code.buffer(shape, dtype)
        start = 0
        for value in values:
            width = 1 if new_axis else value.shape[dim]
            part = viewed(torch.ops.aten.slice.Tensor, place, (dim, start, start + width), {})
            self.put(value, viewed(torch.ops.aten.select.int, part, (dim, 0), {}) if new_axis else part)
            start += width
        return place


Operation = Callable[[Writer, Call], Any]


def address(value: Memory, index: tuple[int, ...]) -> str:
    """Where a matrix of a batch begins."""
    return f"({value.buffer} + {value.offset + sum(i * s for i, s in zip(index, value.strides, strict=False))})"


def _product(count: int) -> Callable[..., str]:
    return lambda *texts: " * ".join(texts)


def _times(write: Callable[..., str], number: int) -> Callable[..., str]:
    return lambda *texts: f"{number}.0 * {write(*texts)}"


def _cut(value: Any, cut: tuple[slice, ...], shape: tuple[int, ...]) -> Any:
    """The first of what repeats along some axes."""
    if not isinstance(value, tuple):
        return value
    inner = value[1]
    if isinstance(inner, Scalars):
        return Scalars(inner.names[cut], inner.dtype)
    return Memory(inner.buffer, inner.offset, shape, inner.strides, inner.dtype)


def index_text(offset: int, strides: Sequence[int], axes: Sequence[int]) -> str:
    """Where a number lies, by the loop variables of some axes."""
    return "+".join([str(offset), *(f"i{d}*{strides[d]}" for d in axes if strides[d])])

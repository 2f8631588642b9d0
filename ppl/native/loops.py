"""C code as it is written: single statements, and loops that take in operations of one shape until a result is needed.

Operations of one shape share a loop, as do sums of what it computes; what only that loop reads is never stored. An open
loop reads nothing that another open loop writes, so that they can be closed in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from ppl.native.expressions import CTYPES
from ppl.native.values import Memory, Scalars, Unsupported, Value, core, inner_first

__all__ = ["Code"]

Access = tuple[str, int, tuple[int, ...]]
LARGEST = 50_000_000  # numbers in one buffer


@dataclass(eq=False)
class _Loop:
    """Operations over one shape, axes of length one left out."""

    shape: tuple[int, ...]
    loads: dict[Access, tuple[str, str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    stores: list[tuple[Access, str]] = field(default_factory=list)
    sums: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False

    def write(self, read: set[str]) -> str:
        """The loop, without stores to buffers that nothing reads."""
        stores = [(a, v) for a, v in self.stores if a[0] in read]
        if not stores and not self.sums:
            return ""
        accesses = [*self.loads, *(a for a, _ in stores)]
        order = sorted(range(len(self.shape)), key=lambda d: -max([a[2][d] for a, _ in stores], default=0))
        if not stores:
            order = sorted(order, key=lambda d: -sum(a[2][d] for a in accesses))
        sizes = [self.shape[d] for d in order]
        strides = [[a[2][d] for d in order] for a in accesses]
        for d in range(len(sizes) - 2, -1, -1):
            if all(s[d] == s[d + 1] * sizes[d + 1] for s in strides):
                sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
                for s in strides:
                    s[d : d + 2] = [s[d + 1]]
        where = {
            a: "+".join([str(a[1]), *(f"i{d}*{s}" if s != 1 else f"i{d}" for d, s in enumerate(each) if s)])
            for a, each in zip(accesses, strides, strict=True)
        }
        out = [f"double {name} = 0;" for name, _ in self.sums]
        for d, size in enumerate(sizes):
            if d == len(sizes) - 1:
                sums = f" reduction(+:{','.join(name for name, _ in self.sums)})" if self.sums else ""
                out.append(f"#pragma omp simd{sums}")
            out.append(f"for (int64_t i{d} = 0; i{d} < {size}; i{d}++)" + (" {" if d == len(sizes) - 1 else ""))
        out += [f"const {ctype} {var} = {a[0]}[{where[a]}];" for a, (var, ctype) in self.loads.items()]
        out += self.lines
        out += [f"{a[0]}[{where[a]}] = {var};" for a, var in stores]
        out += [f"{name} += {var};" for name, var in self.sums]
        return "\n".join([*out, "}"])


class Code:
    """Statements in their order, buffers, and the loops that are still open."""

    def __init__(self) -> None:
        self.buffers: dict[str, tuple[int, torch.dtype]] = {}
        self.tables: list[str] = []
        self._statements: list[tuple[str | _Loop, str | None]] = []
        self._read: set[str] = set()
        self._open: dict[tuple[int, ...], _Loop] = {}
        self._writers: dict[str, list[_Loop]] = {}
        self._held: dict[Access, tuple[_Loop, str]] = {}
        self._totals: dict[str, _Loop] = {}
        self._spilled: dict[tuple[str, ...], str] = {}
        self._count = 0

    # Statements ------------------------------------------------------------------------------------------------------

    def name(self, letter: str) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"{letter}{self._count}"

    def say(self, text: str, writes: str | None = None) -> None:
        """A statement; left out at the end where it only writes a buffer that nothing reads."""
        self._statements.append((text, writes))

    def let(self, expression: str, dtype: torch.dtype) -> str:
        """A new scalar."""
        name = self.name("t")
        self.say(f"const {CTYPES[dtype]} {name} = {expression};")
        return name

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Memory:
        """A new place in memory."""
        if prod(shape) > LARGEST:
            raise Unsupported(f"a tensor of {prod(shape)} numbers")
        name = self.name("b")
        self.buffers[name] = (prod(shape), dtype)
        return Memory(name, 0, shape, inner_first(shape) if strides is None else strides, dtype)

    def write(self) -> str:
        """All statements in C."""
        for loop in list(self._open.values()):
            self._close(loop)
        out = []
        for text, writes in self._statements:
            if isinstance(text, _Loop):
                out.append(text.write(self._read))
            elif writes is None or writes in self._read:
                out.append(text)
        return "\n".join(out)

    @property
    def used(self) -> list[str]:
        """Buffers that something reads."""
        return [b for b in self.buffers if b in self._read]

    # Reading ---------------------------------------------------------------------------------------------------------

    def ready(self, value: Memory) -> Memory:
        """The same memory, after what writes to it; it counts as read."""
        for loop in self._writers.pop(value.buffer, []):
            self._close(loop)
        self._read.add(value.buffer)
        return value

    def scalar(self, name: str) -> str:
        """The same name, after the loop that computes it."""
        if name in self._totals:
            self._close(self._totals[name])
        return name

    def element(self, value: Memory, index: tuple[int, ...]) -> str:
        """One number out of memory, as a scalar."""
        at = value.offset + sum(i * s for i, s in zip(index, value.strides, strict=True))
        return self.let(f"{self.ready(value).buffer}[{at}]", value.dtype)

    def spill(self, value: Scalars) -> Memory:
        """Scalars put into memory, once each where they repeat themselves."""
        names = value.kept
        key = (str(value.dtype), str(names.shape), *names.reshape(-1))
        if key not in self._spilled:
            place = self.buffer(names.shape, value.dtype)
            self._spilled[key] = place.buffer
            for at, name in _places(place):
                self.say(f"{place.buffer}[{at}] = {self.scalar(names[name])};", place.buffer)
        inner = inner_first(names.shape)
        strides = tuple(0 if n != k else s for n, k, s in zip(value.shape, names.shape, inner, strict=True))
        return Memory(self._spilled[key], 0, value.shape, strides, value.dtype)

    # Loops -----------------------------------------------------------------------------------------------------------

    def loop(self, shape: tuple[int, ...], operands: list[Value | str]) -> tuple[_Loop, list[str]]:
        """An open loop over a shape and the names of operands of that shape in it."""
        axes = [i for i, n in enumerate(shape) if n != 1]
        sizes = tuple(shape[i] for i in axes)
        reads: list[Access | str] = []
        types: list[str] = []
        for value in operands:
            if isinstance(value, Scalars) and len(set(value.kept.reshape(-1).tolist())) == 1:
                value = str(value.kept.reshape(-1)[0])
            if isinstance(value, str):
                self.scalar(value)
                reads.append(value)
                types.append("")
                continue
            memory = self.spill(value) if isinstance(value, Scalars) else value
            strides, memory = core(memory, shape)  # type: ignore[assignment]
            reads.append((memory.buffer, memory.offset, tuple(strides[i] for i in axes)))
            types.append(CTYPES[memory.dtype])
        for access in reads:
            if not isinstance(access, str):
                held = self._held.get(access)
                here = self._open.get(sizes)
                # A number that the same loop has just computed needs no memory.
                if held is None or held[0] is not here or self._writers.get(access[0]) != [here]:
                    for writer in self._writers.pop(access[0], []):
                        self._close(writer)
        loop = self._open.get(sizes)
        if loop is None:
            loop = self._open[sizes] = _Loop(sizes)
        names = []
        for access, ctype in zip(reads, types, strict=True):
            if isinstance(access, str):
                names.append(access)
                continue
            held = self._held.get(access)
            if held is not None and held[0] is loop:
                names.append(held[1])
                continue
            for writer in self._writers.pop(access[0], []):  # the loop itself, closed for another operand
                self._close(writer)
            self._read.add(access[0])
            if access not in loop.loads:
                loop.loads[access] = (self.name("v"), ctype)
            names.append(loop.loads[access][0])
        return loop, names

    def store(self, loop: _Loop, name: str, place: Memory) -> None:
        """Keep what a loop computes."""
        axes = [i for i, n in enumerate(place.shape) if n != 1]
        access = (place.buffer, place.offset, tuple(place.strides[i] for i in axes))
        loop.stores.append((access, name))
        self._held[access] = (loop, name)
        writers = self._writers.setdefault(place.buffer, [])
        if loop not in writers:
            writers.append(loop)

    def total(self, loop: _Loop, name: str) -> str:
        """The sum over a loop of what it computes, a scalar."""
        total = self.name("s")
        loop.sums.append((total, name))
        self._totals[total] = loop
        return total

    def keep(self, place: Memory) -> None:
        """Count a buffer as read."""
        self._read.add(place.buffer)

    def _close(self, loop: _Loop) -> None:
        if loop.closed:
            return
        loop.closed = True
        del self._open[loop.shape]
        self._statements.append((loop, None))
        for name in [n for n, owner in self._totals.items() if owner is loop]:
            del self._totals[name]
        for writers in self._writers.values():
            if loop in writers:
                writers.remove(loop)


def _places(place: Memory) -> list[tuple[int, tuple[int, ...]]]:
    """Offset and index of each number."""
    import numpy as np

    return [
        (place.offset + sum(i * s for i, s in zip(index, place.strides, strict=True)), index)
        for index in np.ndindex(*place.shape)
    ]

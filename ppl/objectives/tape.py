"""Noise as an argument: inside a `Tape` every draw is a function of vectors of plain noise that are given.

    normal  m + s n,   Bernoulli  1{u < p},   categorical  argmax_i p_i / e_i,   permutations as they are

n, u, e are standard normal, uniform and exponential. Each draw has a place of its own, named by the address of its site
and its number there, so that a site which is drawn again, as for the arms of a measure-valued derivative, finds the
same noise. Draws by rejection (gamma, Poisson, Dirichlet) have no such form and stay with torch's own generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppl.errors import TraceError

__all__ = ["Layout", "Slot", "Tape"]

aten = torch.ops.aten
Key = tuple[Any, int]
KINDS: dict[str, Callable[..., Tensor]] = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "exponential": lambda n, *, generator, dtype, device: torch.empty(n, dtype=dtype, device=device).exponential_(
        generator=generator
    ),
    "permutation": lambda n, *, generator, dtype, device: torch.randperm(
        n, generator=generator, dtype=dtype, device=device
    ),
}


@dataclass(frozen=True)
class Slot:
    """The place of one draw.

    Args:
        group: number of the vector it lies in.
        start: its first entry there.
        shape: its shape.
        kind: law of its entries.
        dtype: their type.
    """

    group: int
    start: int
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype


@dataclass
class Layout:
    """Where every draw of a computation lies in a few vectors of noise.

    Args:
        device: of the noise.
        slots: by address and number of the draw.
        groups: law, type and length of each vector.
        rejection: draws that stay with torch's own generator.

    Example:
        >>> layout = Layout(torch.device("cpu"))
        >>> with Tape(layout) as tape:                      # the first run finds the draws
        ...     tape.at("z")
        ...     _ = torch.randn(3)
        >>> noise = layout.draw(torch.Generator().manual_seed(0))
        >>> with Tape(layout, noise) as tape:
        ...     tape.at("z")
        ...     bool((torch.randn(3) == noise[0]).all())
        True
    """

    device: torch.device
    slots: dict[Key, Slot] = field(default_factory=dict)
    groups: list[tuple[str, torch.dtype, int]] = field(default_factory=list)
    rejection: set[Key] = field(default_factory=set)

    def add(self, key: Key, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Slot:
        """A place for a draw that was not seen before."""
        size = math.prod(shape)
        group, start = len(self.groups), 0
        if kind != "permutation":
            known = [i for i, (k, d, _) in enumerate(self.groups) if (k, d) == (kind, dtype)]
            group, start = (known[0], self.groups[known[0]][2]) if known else (group, 0)
        if group == len(self.groups):
            self.groups.append((kind, dtype, 0))
        self.groups[group] = (kind, dtype, start + size)
        slot = self.slots[key] = Slot(group, start, tuple(shape), kind, dtype)
        return slot

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Fresh noise: one vector for each group."""
        return [KINDS[k](n, generator=generator, dtype=d, device=self.device) for k, d, n in self.groups]


class Tape(TorchDispatchMode):
    """Inside, draws are read from given noise.

    Args:
        layout: places of the draws; without noise it is filled by this run.
        noise: one vector for each of its groups.

    Raises:
        TraceError: draws differ from those of the run that filled the layout, or one by rejection would be repeated.
    """

    def __init__(self, layout: Layout, noise: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.layout, self.noise = layout, noise
        self.address: Any = None
        self.count = 0
        self.repeated: set[Key] = set()
        self._scratch = torch.Generator(layout.device).manual_seed(0)

    def at(self, address: Any) -> None:
        """What follows is drawn at this address."""
        self.address, self.count = address, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer draws from the noise; all else as it is."""
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        out = None if rule is None else rule(self, *args, **kwargs)
        if out is not None:
            return out
        key = self._next()
        if key in self.repeated:
            raise TraceError(f"{self._where()} draws by rejection ({func}) and would have to draw the same again")
        self.repeated.add(key)
        if self.noise is None:
            self.layout.rejection.add(key)
        elif key not in self.layout.rejection:
            raise TraceError(f"{self._where()} makes other draws than before ({func})")
        return func(*args, **kwargs)

    def plain(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Plain noise for the next draw."""
        key, layout = self._next(), self.layout
        slot = layout.slots.get(key)
        if slot is None and self.noise is None:
            slot = layout.add(key, kind, shape, dtype)
        if slot is None or (slot.kind, slot.shape, slot.dtype) != (kind, tuple(shape), dtype):
            raise TraceError(f"{self._where()} makes other draws than before ({kind} {tuple(shape)})")
        if self.noise is None:
            size = math.prod(shape)
            flat = KINDS[kind](size, generator=self._scratch, dtype=dtype, device=layout.device)
        else:
            flat = self.noise[slot.group]
            if flat.shape[0] != math.prod(shape):
                flat = flat.narrow(0, slot.start, math.prod(shape))
        return flat.view(tuple(shape))

    def _next(self) -> Key:
        self.count += 1
        return self.address, self.count

    def _where(self) -> str:
        site = self.address[1] if isinstance(self.address, tuple) and len(self.address) > 1 else self.address
        return f"site {site!r}" if site is not None else "the program, outside of its sites,"


def _fill(kind: str, shape_it: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """Rule of an operation that writes noise into a tensor."""

    def rule(tape: Tape, out: Tensor, *args: float, **kwargs: Any) -> Tensor:
        kwargs.pop("generator", None)
        noise = tape.plain(kind, out.shape, out.dtype)
        return out.copy_(noise if shape_it is None else shape_it(noise, *args, **kwargs))

    return rule


def _affine(noise: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return noise if (mean, std) == (0.0, 1.0) else noise * std + mean


def _between(noise: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
    """Uniform noise on an interval (`from` is no name that Python allows)."""
    return noise if (start, end) == (0.0, 1.0) else noise * (end - start) + start


def _new(kind: str) -> Callable[..., Tensor]:
    """Rule of an operation that makes a tensor of noise."""

    def rule(tape: Tape, size: Sequence[int], *rest: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        return tape.plain(kind, size, dtype or torch.get_default_dtype())

    return rule


def _like(kind: str) -> Callable[..., Tensor]:
    def rule(tape: Tape, like: Tensor, *rest: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        return tape.plain(kind, like.shape, dtype or like.dtype)

    return rule


def _normal(tape: Tape, mean: Any, std: Any = 1.0, *rest: Any, **kwargs: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    return tape.plain("normal", shape, like.dtype) * std + mean


def _bernoulli(tape: Tape, probs: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    return (tape.plain("uniform", probs.shape, probs.dtype) < probs).to(probs.dtype)


def _bernoulli_fill(tape: Tape, out: Tensor, probs: Any = 0.5, **kwargs: Any) -> Tensor:
    return out.copy_(tape.plain("uniform", out.shape, torch.get_default_dtype()) < probs)


def _multinomial(tape: Tape, probs: Tensor, count: int, *rest: Any, **kwargs: Any) -> Tensor | None:
    if count != 1:
        return None
    return (probs / tape.plain("exponential", probs.shape, probs.dtype)).argmax(-1, keepdim=True)


def _permutation(tape: Tape, size: int, *rest: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    return tape.plain("permutation", (size,), dtype or torch.int64)


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    aten.normal_.default: _fill("normal", _affine),
    aten.uniform_.default: _fill("uniform", _between),
    aten.exponential_.default: _fill("exponential", lambda noise, rate=1.0: noise / rate),
    aten.cauchy_.default: _fill("uniform", lambda u, at=0.0, scale=1.0: torch.tan(math.pi * (u - 0.5)) * scale + at),
    **{f: _new("normal") for f in (aten.randn.default, aten.randn.generator)},
    **{f: _new("uniform") for f in (aten.rand.default, aten.rand.generator)},
    aten.randn_like.default: _like("normal"),
    aten.rand_like.default: _like("uniform"),
    **dict.fromkeys((aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor), _normal),
    aten.bernoulli.default: _bernoulli,
    **dict.fromkeys((aten.bernoulli_.float, aten.bernoulli_.Tensor), _bernoulli_fill),
    aten.multinomial.default: _multinomial,
    **dict.fromkeys((aten.randperm.default, aten.randperm.generator), _permutation),
}

"""Many draws side by side: noise that does not depend on how they are grouped, and the loop over groups.

A lane is one draw of one chain. Lanes run together in groups of at most `chunk`; every lane has its own noise, so that
grouping, an interruption and a resumption leave the draws as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Size, Tensor

from inverse.problem import DiffusionProblem
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor

__all__ = ["Lanes", "Method", "Noise", "check_chunk", "run_lanes"]

BLOCK = 16
"""Lanes that share a random stream; groups may cut through a block."""

State = dict[str, Tensor]


class Noise(Protocol):
    """Standard normal noise for the lanes of one group."""

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        """(lanes, *shape)."""
        ...


class Lanes:
    """The noise of lanes start ... stop - 1.

    Args:
        seeds: (blocks,) int64, one seed per block of lanes of the whole run.
        start: first lane.
        stop: one past the last lane.
        problem: says dtype and device.
        kind: device of the generator of the run, where noise is drawn.
    """

    def __init__(self, seeds: Tensor, start: int, stop: int, problem: DiffusionProblem, kind: torch.device) -> None:
        first, last = start // BLOCK, math.ceil(stop / BLOCK)
        self._cut = slice(start - first * BLOCK, stop - first * BLOCK)
        self._problem = problem
        self._generators = [torch.Generator(kind).manual_seed(int(s)) for s in seeds[first:last]]

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        """(lanes, *shape) standard normal noise."""
        blocks = [
            torch.randn((BLOCK, *shape), generator=g, dtype=self._problem.dtype, device=g.device)
            for g in self._generators
        ]
        return torch.cat(blocks)[self._cut].to(self._problem.device)

    def pack(self) -> Tensor:
        """Where the streams stand, (blocks, bytes)."""
        return torch.stack([g.get_state() for g in self._generators])

    def unpack(self, states: Tensor) -> None:
        """Go on from `pack`."""
        for g, state in zip(self._generators, states.cpu(), strict=True):
            g.set_state(state.clone())  # it reads from the start of the storage, whatever the view


class Method(Protocol):
    """What a sampler does to the lanes of one group. States are dicts of tensors with a leading lane axis."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        ...

    def begin(self, lanes: int, noise: Noise) -> State:
        """The first state; "x" is its value (lanes, *shape)."""
        ...

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step."""
        ...

    def end(self, state: State, noise: Noise) -> Tensor:
        """The draws (lanes, *shape)."""
        ...


@dataclass(frozen=True)
class _Run:
    """What all groups share."""

    method: Method
    problem: DiffusionProblem
    monitor: Monitor
    device: torch.device
    label: str


def check_chunk(chunk: int | None) -> None:
    """Raise OptionError unless chunk is None or a positive number of draws."""
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise OptionError(f"chunk must be one or more draws at a time, or None for all at once, got {chunk!r}")


def run_lanes(
    method: Method,
    problem: DiffusionProblem,
    *,
    draws: int,
    chains: int,
    chunk: int | None,
    generator: torch.Generator,
    monitor: Monitor,
    label: str,
) -> tuple[Tensor, bool]:
    """Run a method for all draws of all chains.

    A group that runs out of memory is halved and begun again, down to one draw. After an interruption, or a value that
    is not finite in a later group, the draws of the finished groups are returned, equally many for every chain.

    Args:
        method: what to do in a step.
        problem: of the program.
        draws: draws per chain.
        chains: independent runs; here all lanes are independent.
        chunk: most lanes at a time; None is all of them.
        generator: source of the seeds of all lanes.
        monitor: of the run.
        label: name of the loop.

    Returns:
        (chain, draw, *shape) draws, and whether they are complete.

    Raises:
        NotFiniteError: if the first group meets a NaN.
    """
    total = draws * chains
    blocks = math.ceil(total / BLOCK)
    run = _Run(method, problem, monitor, generator.device, label)
    saved = monitor.resume()
    if saved is None:
        seeds = torch.randint(2**63 - 1, (blocks,), generator=generator, device=generator.device).cpu()
        done = torch.empty(0, *problem.shape, dtype=problem.dtype, device=problem.device)
        size = total if chunk is None else min(chunk, total)
    else:
        seeds, done, size = saved.pop("seeds"), saved.pop("done"), int(saved.pop("size"))
    shared = {"seeds": seeds, "done": done, "size": torch.tensor(size)}
    while len(done) < total:
        stop = min(len(done) + size, total)
        try:
            group = _run_group(run, shared, len(done), stop, saved)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, NotFiniteError) and len(done):
                monitor.note(f"stopped after {len(done)} of {total} draws: {error}")
                break
            if not _out_of_memory(error) or stop - len(done) == 1:
                raise
            size = math.ceil((stop - len(done)) / 2)
            monitor.note(f"{stop - len(done)} draws at a time did not fit into memory; went on with chunk={size}")
            group, saved = done[:0], None
        if group is None:
            break
        done, saved = torch.cat([done, group]), None
        shared |= {"done": done, "size": torch.tensor(size)}
    kept = len(done) // chains
    # Lanes go through the chains first, so that what is finished is the same number of draws of each.
    x = done[: kept * chains].reshape(kept, chains, *problem.shape).movedim(0, 1)
    return x.contiguous(), kept == draws


def _run_group(run: _Run, shared: Mapping[str, Tensor], start: int, stop: int, saved: State | None) -> Tensor | None:
    """Draws of lanes start ... stop - 1; None when interrupted."""
    noise = Lanes(shared["seeds"], start, stop, run.problem, run.device)
    if saved is None:
        first, state = 0, run.method.begin(stop - start, noise)
    else:
        first = int(saved.pop("step"))
        noise.unpack(saved.pop("noise"))
        state = {name.removeprefix("lane."): t for name, t in saved.items()}
    total = run.method.steps
    label = run.label if shared["size"] >= stop and not start else f"{run.label}, draws {start}-{stop - 1}"
    done = first
    for step in run.monitor.steps(total, label, start=first):
        state = run.method.advance(step, state, noise)
        run.monitor.check_finite("x", state["x"], f"step {step + 1} of {total}")
        done = step + 1
        now = state

        def pack() -> State:
            lanes = {f"lane.{name}": t for name, t in now.items()}  # noqa: B023
            return {**shared, **lanes, "noise": noise.pack()}

        run.monitor.checkpoint(done, pack)
    return run.method.end(state, noise) if done == total else None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

"""Many draws side by side: noise that does not depend on how they are grouped, and the loop over groups.

A lane is one draw of one chain. Lanes run together in groups of at most `chunk`; every lane has its own noise, so that
grouping, an interruption and a resumption leave the draws as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from inverse.problem import DiffusionProblem
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor

__all__ = ["Lanes", "Method", "Noise", "check_chunk", "run_lanes"]

BLOCK = 16
"""Lanes that share a random stream; groups may cut through a block."""

FAR = 1e6
"""Size of x, in units of the prior's largest noise level and mean, from which a lane has diverged."""

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

    A group that runs out of memory is halved and begun again, down to one draw. After an interruption the draws of the
    finished groups are returned. A lane that has diverged is left out, with a note of its step, and the others
    go on as if it were not there; what is left is dealt to the chains anew, equally many for each.

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
        NotFiniteError: if all lanes diverge, or all but fewer than there are chains.
    """
    total = draws * chains
    blocks = math.ceil(total / BLOCK)
    run = _Run(method, problem, monitor, generator.device, label)
    saved = monitor.resume()
    if saved is None:
        seeds = torch.randint(2**63 - 1, (blocks,), generator=generator, device=generator.device).cpu()
        done = torch.empty(0, *problem.shape, dtype=problem.dtype, device=problem.device)
        lost = torch.zeros(0, dtype=torch.long)
        size = total if chunk is None else min(chunk, total)
    else:
        seeds, done, size, lost = saved.pop("seeds"), saved.pop("done"), int(saved.pop("size")), saved.pop("lost")
    shared = {"seeds": seeds, "done": done, "lost": lost.cpu(), "size": torch.tensor(size)}
    while len(done) < total:
        stop = min(len(done) + size, total)
        try:
            group = _run_group(run, shared, len(done), stop, saved)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or stop - len(done) == 1:
                raise
            size = math.ceil((stop - len(done)) / 2)
            monitor.note(f"{stop - len(done)} draws at a time did not fit into memory; went on with chunk={size}")
            group, saved = (done[:0], shared["lost"][:0]), None
        if group is None:
            break
        done, saved = torch.cat([done, group[0]]), None
        shared |= {"done": done, "lost": torch.cat([shared["lost"], group[1]]), "size": torch.tensor(size)}
    done = _survivors(run, done, shared["lost"], chains)
    kept = len(done) // chains
    # Lanes go through the chains first, so that what is finished is the same number of draws of each.
    x = done[: kept * chains].reshape(kept, chains, *problem.shape).movedim(0, 1)
    return x.contiguous(), kept == draws


def _survivors(run: _Run, done: Tensor, lost: Tensor, chains: int) -> Tensor:
    """The draws that did not diverge; a note, or an error, says where the others were lost."""
    bad = lost[lost > 0]
    if not len(bad):
        return done
    total = run.method.steps
    steps = [
        f"{n} at step {s} of {total}"
        for s, n in zip(*(t.tolist() for t in bad.unique(return_counts=True)), strict=True)
    ]
    where = ", ".join(steps[:3]) + (" and others later" if len(steps) > 3 else "")
    kept = done[(lost == 0).to(done.device)]
    cure = "take more steps or weaker guidance, check the model there, or try float64"
    if len(kept) < chains:
        raise NotFiniteError(
            f"{run.problem.site!r} is not finite, or beyond all bounds, in {len(bad)} of {len(lost)} draws ({where}), "
            f"which leaves {len(kept)} for {chains} chains; {cure}"
        )
    run.monitor.note(
        f"{len(bad)} of {len(lost)} draws diverged ({where}) and are left out; the others are kept, though they are "
        f"draws of what did not diverge: {cure}"
    )
    return kept


def _run_group(
    run: _Run, shared: Mapping[str, Tensor], start: int, stop: int, saved: State | None
) -> tuple[Tensor, Tensor] | None:
    """Draws of lanes start ... stop - 1, and the steps at which lanes were lost, 0 for none; None when interrupted."""
    noise = Lanes(shared["seeds"], start, stop, run.problem, run.device)
    if saved is None:
        first, state = 0, run.method.begin(stop - start, noise)
        lost = torch.zeros(stop - start, dtype=torch.long)
    else:
        first, lost = int(saved.pop("step")), saved.pop("losing").cpu()
        noise.unpack(saved.pop("noise"))
        state = {name.removeprefix("lane."): t for name, t in saved.items()}
    total, bound = run.method.steps, _bound(run.problem.prior)
    label = run.label if shared["size"] >= stop and not start else f"{run.label}, draws {start}-{stop - 1}"
    done = first
    for step in run.monitor.steps(total, label, start=first):
        if bool((lost == 0).any()):
            with _unchecked(run.problem.prior):
                state = run.method.advance(step, state, noise)
            state, lost = _mark(state, lost, step + 1, bound)
        done = step + 1
        now, gone = state, lost

        def pack() -> State:
            lanes = {f"lane.{name}": t for name, t in now.items()}  # noqa: B023
            return {**shared, **lanes, "losing": gone, "noise": noise.pack()}  # noqa: B023

        run.monitor.checkpoint(done, pack)
    if done < total:
        return None
    x = run.method.end(state, noise)
    return x, torch.where((lost == 0) & ~_sound(x, bound).cpu(), total, lost)


@contextmanager
def _unchecked(prior: Any) -> Iterator[None]:
    """Let the prior take values that are not finite: a lane may diverge inside a step, and is found at its end."""
    parts = [prior, *getattr(prior, "priors", ())]  # of a joint prior, its members
    before = [part._validate_args for part in parts]
    for part in parts:
        part._validate_args = False
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part._validate_args = value


def _bound(prior: Any) -> float:
    """What no entry of x exceeds that has not diverged."""
    try:
        mean = float(prior.mean.abs().max())
    except NotImplementedError:  # of a network
        mean = 0.0
    return FAR * (prior.sigma_max + mean)


def _sound(x: Tensor, bound: float) -> Tensor:
    """(lanes,) whether all of a lane is finite, and no larger than the bound."""
    return (x.abs() <= bound).reshape(len(x), -1).all(1)


def _mark(state: State, lost: Tensor, step: int, bound: float) -> tuple[State, Tensor]:
    """Note the step of lanes that have diverged; copies of a good lane stand in for them from here on."""
    good = _sound(state["x"], bound)
    if bool(good.all()):
        return state, lost
    lost = torch.where((lost == 0) & ~good.cpu(), step, lost)
    kept = (lost == 0).nonzero()
    if len(kept):
        index = torch.where(lost == 0, torch.arange(len(lost)), kept[0])
        state = {name: t[index.to(t.device)] for name, t in state.items()}
    return state, lost


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

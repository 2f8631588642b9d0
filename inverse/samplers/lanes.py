"""Many draws side by side: noise that does not depend on how they are grouped, and the loop over groups.

A lane is one draw of one chain, of one problem where there are many. Lanes run together in groups of at most `chunk`;
every lane has its own noise, so that grouping, an interruption and a resumption leave the draws as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from inverse.chunks import out_of_memory
from inverse.many import ManyProblems, Streams, lanes_at_a_time
from inverse.problem import DiffusionProblem
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor

__all__ = ["Lanes", "Method", "Noise", "check_chunk", "run_lanes", "run_problem_lanes"]

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
    """The noise of lanes start ... stop - 1, problem after problem.

    Args:
        seeds: (problem, block) int64, one seed per block of lanes of a problem.
        start: first lane.
        stop: one past the last lane.
        each: lanes of a problem.
        problem: says dtype and device.
        kind: device of the generator of the run, where noise is drawn.
    """

    def __init__(
        self, seeds: Tensor, start: int, stop: int, each: int, problem: DiffusionProblem, kind: torch.device
    ) -> None:
        self._problem = problem
        self._generators: list[torch.Generator] = []
        kept = []  # of the lanes of whole blocks
        for i in range(start // each, math.ceil(stop / each)):
            low, high = max(start - i * each, 0), min(stop - i * each, each)
            first, last = low // BLOCK, math.ceil(high / BLOCK)
            here = BLOCK * len(self._generators)
            kept.append(torch.arange(low - first * BLOCK, high - first * BLOCK) + here)
            self._generators += [torch.Generator(kind).manual_seed(int(s)) for s in seeds[i, first:last]]
        index = torch.cat(kept)
        whole = len(index) == int(index[-1] - index[0]) + 1
        self._kept: Any = slice(int(index[0]), int(index[-1]) + 1) if whole else index.to(kind)

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        """(lanes, *shape) standard normal noise."""
        blocks = [
            torch.randn((BLOCK, *shape), generator=g, dtype=self._problem.dtype, device=g.device)
            for g in self._generators
        ]
        return torch.cat(blocks)[self._kept].to(self._problem.device)

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


@dataclass
class _Run:
    """What all groups share: `at` says what to do with lanes start ... stop - 1."""

    at: Callable[[int, int], tuple[Method, DiffusionProblem]]
    monitor: Monitor
    device: torch.device
    label: str
    total: int
    each: int
    steps: int = 0


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
    run = _Run(lambda start, stop: (method, problem), monitor, generator.device, label, draws * chains, draws * chains)
    done, lost = _walk(run, _seeds(run.each, generator)[None], run.total if chunk is None else chunk, problem)
    x = _by_chain(_survivors(run, done, lost, chains, problem.site), chains)
    return x, x.shape[1] == draws


def run_problem_lanes(
    make: Callable[[DiffusionProblem], Method],
    many: ManyProblems,
    *,
    draws: int,
    chains: int,
    chunk: int | None,
    streams: Streams,
    monitor: Monitor,
    label: str,
) -> list[Tensor | NotFiniteError]:
    """Run a method for all draws of all chains of many problems, as `run_lanes` does for one.

    Args:
        make: the method for a problem whose lanes have data of their own.
        many: the problems.
        draws: draws per chain.
        chains: independent runs.
        chunk: most lanes at a time; None is what a device gains from.
        streams: sources of the seeds, one for each problem.
        monitor: of the run.
        label: name of the loop.

    Returns:
        For each problem (chain, draw, *shape) draws, or why there are none. After an interruption the problems that
        were finished; if none was, what there is of the first.
    """
    each, first = draws * chains, many.singles[0]

    def at(start: int, stop: int) -> tuple[Method, DiffusionProblem]:
        lanes = many.lanes(torch.arange(start, stop) // each)
        return make(lanes), lanes

    run = _Run(at, monitor, streams.device, label, each * len(many.singles), each)
    seeds = torch.stack([_seeds(each, generator) for generator in streams.generators])
    done, lost = _walk(run, seeds, lanes_at_a_time(chunk, each, first.device), first)
    found: list[Tensor | NotFiniteError] = []
    for i in range(max(len(done) // each, 1)):
        own = slice(i * each, (i + 1) * each)
        try:
            kept = _survivors(run, done[own], lost[own], chains, f"{first.site} of problem {i}")
            found.append(_by_chain(kept, chains))
        except NotFiniteError as error:
            found.append(error)
    return found


def _seeds(lanes: int, generator: torch.Generator) -> Tensor:
    """(block,) seeds of the lanes of one problem."""
    blocks = math.ceil(lanes / BLOCK)
    return torch.randint(2**63 - 1, (blocks,), generator=generator, device=generator.device).cpu()


def _walk(run: _Run, seeds: Tensor, size: int, first: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Draws of all lanes that were finished, and the steps at which lanes were lost, 0 for none."""
    total, monitor = run.total, run.monitor
    saved = monitor.resume()
    if saved is None:
        done = torch.empty(0, *first.shape, dtype=first.dtype, device=first.device)
        lost = torch.zeros(0, dtype=torch.long)
        size = min(size, total)
    else:
        seeds, done, size, lost = saved.pop("seeds"), saved.pop("done"), int(saved.pop("size")), saved.pop("lost")
    shared = {"seeds": seeds, "done": done, "lost": lost.cpu(), "size": torch.tensor(size)}
    while len(done) < total:
        stop = min(len(done) + size, total)
        try:
            group = _run_group(run, shared, len(done), stop, saved)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or stop - len(done) == 1:
                raise
            size = math.ceil((stop - len(done)) / 2)
            monitor.note(f"{stop - len(done)} draws at a time did not fit into memory; went on with chunk={size}")
            group, saved = (done[:0], shared["lost"][:0]), None
        if group is None:
            break
        done, saved = torch.cat([done, group[0]]), None
        shared |= {"done": done, "lost": torch.cat([shared["lost"], group[1]]), "size": torch.tensor(size)}
    return done, shared["lost"]


def _by_chain(done: Tensor, chains: int) -> Tensor:
    """(chain, draw, *shape) from lanes, as many draws of each chain as there are of all.

    Lanes go through the chains first, so that what is finished is the same number of draws of each.
    """
    kept = len(done) // chains
    return done[: kept * chains].reshape(kept, chains, *done.shape[1:]).movedim(0, 1).contiguous()


def _survivors(run: _Run, done: Tensor, lost: Tensor, chains: int, site: str) -> Tensor:
    """The draws that did not diverge; a note, or an error, says where the others were lost."""
    bad = lost[lost > 0]
    if not len(bad):
        return done
    steps = [
        f"{n} at step {s} of {run.steps}"
        for s, n in zip(*(t.tolist() for t in bad.unique(return_counts=True)), strict=True)
    ]
    where = ", ".join(steps[:3]) + (" and others later" if len(steps) > 3 else "")
    kept = done[(lost == 0).to(done.device)]
    cure = "take more steps or weaker guidance, check the model there, or try float64"
    if len(kept) < chains:
        raise NotFiniteError(
            f"{site!r} is not finite, or beyond all bounds, in {len(bad)} of {len(lost)} draws ({where}), "
            f"which leaves {len(kept)} for {chains} chains; {cure}"
        )
    of = "" if run.each == run.total else f" of {site}"
    run.monitor.note(
        f"{len(bad)} of {len(lost)} draws{of} diverged ({where}) and are left out; the others are kept, though they "
        f"are draws of what did not diverge: {cure}"
    )
    return kept


def _run_group(
    run: _Run, shared: Mapping[str, Tensor], start: int, stop: int, saved: State | None
) -> tuple[Tensor, Tensor] | None:
    """Draws of lanes start ... stop - 1, and the steps at which lanes were lost, 0 for none; None when interrupted."""
    method, problem = run.at(start, stop)
    noise = Lanes(shared["seeds"], start, stop, run.each, problem, run.device)
    if saved is None:
        first, state = 0, method.begin(stop - start, noise)
        lost = torch.zeros(stop - start, dtype=torch.long)
    else:
        first, lost = int(saved.pop("step")), saved.pop("losing").cpu()
        noise.unpack(saved.pop("noise"))
        state = {name.removeprefix("lane."): t for name, t in saved.items()}
    owner = torch.arange(start, stop) // run.each
    total, bound = method.steps, _bound(problem.prior)
    run.steps = total
    label = run.label if shared["size"] >= stop and not start else f"{run.label}, draws {start}-{stop - 1}"
    done = first
    for step in run.monitor.steps(total, label, start=first):
        if bool((lost == 0).any()):
            with _unchecked(problem.prior):
                state = method.advance(step, state, noise)
            state, lost = _mark(state, lost, owner, step + 1, bound)
        done = step + 1
        now, gone = state, lost

        def pack() -> State:
            lanes = {f"lane.{name}": t for name, t in now.items()}  # noqa: B023
            return {**shared, **lanes, "losing": gone, "noise": noise.pack()}  # noqa: B023

        run.monitor.checkpoint(done, pack)
    if done < total:
        return None
    x = method.end(state, noise)
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


def _mark(state: State, lost: Tensor, owner: Tensor, step: int, bound: float) -> tuple[State, Tensor]:
    """Note the step of lanes that have diverged; copies of a good lane stand in for them from here on.

    It is one of the same problem (`owner`) where there is one.
    """
    good = _sound(state["x"], bound)
    if bool(good.all()):
        return state, lost
    lost = torch.where((lost == 0) & ~good.cpu(), step, lost)
    kept = (lost == 0).nonzero()[:, 0]
    if len(kept):
        alike = (owner[kept] == owner[:, None]).int().argmax(1)
        index = torch.where(lost == 0, torch.arange(len(lost)), kept[alike])
        state = {name: t[index.to(t.device)] for name, t in state.items()}
    return state, lost

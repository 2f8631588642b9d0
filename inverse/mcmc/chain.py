"""The loop that all chains with a diffusion prior share: warmup, draws, checkpoints, and chains that are lost.

A chain whose value is no longer finite is left where it was, reported with its step, and dropped; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from inverse.samplers.guided import residual_chi
from inverse.side_by_side import SideBySide
from ppl.errors import NotFiniteError, OptionError
from ppl.mcmc.convergence import note_disagreement
from ppl.monitor import Monitor
from ppl.posterior import Posterior

__all__ = ["Walk", "check_walk", "positive", "run_walk"]

State = dict[str, Tensor]

TOGETHER = 1024
"""Draws that are made from noised values in one batch."""


class Walk(Protocol):
    """Chains of one backend, side by side: rows are the chains of one problem after those of another.

    Attributes:
        statistics: names of what `advance` returns.
        finishes: whether draws are made from the values of the chains by `finish`, all together at the end.
    """

    statistics: tuple[str, ...]
    finishes: bool

    def begin(self) -> None:
        """Starting points."""

    def advance(self, step: int) -> State:
        """One transition of all chains; the statistics of each, (rows,)."""
        ...

    def value(self) -> Tensor:
        """Where the chains are, (rows, *shape)."""
        ...

    def finish(self, x: Tensor) -> Tensor:
        """The draws that belong to values (rows, *shape)."""
        ...

    def lost(self) -> Tensor:
        """(rows,) which chains have no finite value any more."""
        ...

    def state(self) -> State:
        """All that the next transition needs."""
        ...

    def restore(self, state: State, step: int) -> None:
        """Go on from `state()` after `step` transitions."""

    def summary(self, index: int) -> State:
        """What to say of the whole run of a problem, at its end."""
        ...


def positive(options: object, *names: str) -> None:
    """Raise OptionError unless the named options are positive and finite, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"{name} must be positive and finite, or None, got {value!r}")


def check_walk(warmup: int, thin: int, target_accept: float) -> None:
    """Raise OptionError unless the options that all chains share are in range."""
    if not isinstance(warmup, int) or not isinstance(thin, int) or warmup < 0 or thin < 1:
        raise OptionError(f"expected integers warmup >= 0 and thin >= 1, got {warmup!r} and {thin!r}")
    if not 0 < target_accept < 1:
        raise OptionError(f"target_accept must lie between 0 and 1, got {target_accept!r}")


def run_walk(
    make: Callable[[], Walk],
    side: SideBySide,
    *,
    draws: int,
    chains: int,
    warmup: int,
    thin: int,
    monitor: Monitor,
    label: str,
) -> list[Posterior | NotFiniteError]:
    """Warmup, then draws, of every problem; resumes from a checkpoint.

    Args:
        make: builds the walk; called inside, so that its denoiser calls are counted.
        side: the problems.
        draws: per chain.
        chains: of a problem, side by side.
        warmup: transitions before the first draw, annealing included.
        thin: transitions per draw.
        monitor: of the run.
        label: name of the loop.

    Returns:
        For each problem its posterior, or an error where no chain is left.
    """
    walking, rows, problem = warmup + draws * thin, len(side) * chains, side.first
    walk = make()
    names, shape = walk.statistics, (rows, draws, *problem.shape)
    block = max(1, TOGETHER // chains)
    total = walking + (math.ceil(draws / block) if walk.finishes else 0)
    stored = monitor.resume()
    if stored is None:
        first = 0
        walk.begin()
        kept = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
        table = torch.zeros(len(names), rows, draws, dtype=problem.dtype, device=problem.device)
        sums = torch.zeros(len(names), rows, dtype=problem.dtype, device=problem.device)
        gone = torch.full((rows,), -1, device=problem.device)
    else:
        first = int(stored["step"])
        kept, table, sums, gone = (stored[f"run.{n}"] for n in ("kept", "table", "sums", "gone"))
        side.streams.unpack(stored["run.streams"])
        walk.restore({n.removeprefix("walk."): t for n, t in stored.items() if n.startswith("walk.")}, first)

    def finish(start: int, stop: int) -> Tensor:
        """Make draws start ... stop - 1; which chains have one that is not finite."""
        x = walk.finish(kept[:, start:stop].flatten(0, 1)).reshape(rows, -1, *problem.shape)
        kept[:, start:stop] = x
        return ~x.flatten(1).isfinite().all(1)

    done = first
    for step in monitor.steps(total, label, start=first):
        if step < walking:
            found = walk.advance(step)
            lost = walk.lost()
            monitor.report(**{n: float(v.mean()) for n, v in found.items()})
        else:
            start = (step - walking) * block
            lost = finish(start, min(start + block, draws))
        done = step + 1
        if warmup < done <= walking:
            sums = sums + torch.stack([found[n] for n in names])
            place, rest = divmod(done - warmup, thin)
            if rest == 0:
                kept[:, place - 1], table[..., place - 1] = walk.value(), sums / thin
                sums = torch.zeros_like(sums)
        gone = torch.where(lost & (gone < 0), done, gone)
        now = {"kept": kept, "table": table, "sums": sums, "gone": gone}

        def pack() -> State:
            run = {f"run.{n}": t for n, t in (now | {"streams": side.streams.pack()}).items()}  # noqa: B023
            return run | {f"walk.{n}": t for n, t in walk.state().items()}

        monitor.checkpoint(done, pack)
        if bool((gone >= 0).all()):
            break
    length = max(min(done, walking) - warmup, 0) // thin
    if walk.finishes and done > walking:
        length = min((done - walking) * block, draws)
    elif walk.finishes and length:  # interrupted on the way: what there is, all at once
        for start in range(0, length, block):
            lost = finish(start, min(start + block, length))
            gone = torch.where(lost & (gone < 0), done, gone)
    parts: list[Posterior | NotFiniteError] = []
    for i, single in enumerate(side.singles):
        own = slice(i * chains, (i + 1) * chains)
        left = gone[own]
        alive = left < 0
        if not bool(alive.any()):
            parts.append(
                NotFiniteError(
                    f"all {chains} chains left the numbers, the first at transition {int(left.min())} of {total} "
                    f"({label}); lower step_size, or use metropolis=True, which refuses such moves"
                )
            )
            continue
        x, rates = kept[own][alive][:, :length], table[:, own][:, alive][..., :length]
        for chain in (~alive).nonzero()[:, 0].tolist():
            side.note(
                monitor, i, f"chain {chain} was dropped: not finite from transition {int(left[chain])} of {total} on"
            )
        results = single.results(x)
        info = {**dict(zip(names, rates, strict=True)), **walk.summary(i), **residual_chi(single, x)}
        r_hat = note_disagreement(results, monitor)
        if r_hat is not None:
            info["r_hat"] = r_hat
        parts.append(Posterior(draws=results, info=info, attrs={"complete": length == draws and bool(alive.all())}))
    return parts

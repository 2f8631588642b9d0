"""What every engine needs while it runs, once: progress, cost, NaN, Ctrl-C, checkpoints.

with monitor:
    for step in monitor.steps(total, "sampling", start=start):
        state = advance(state)
        monitor.checkpoint(step + 1, state)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ppl.checkpoint import Checkpoint
from ppl.cost import Cost
from ppl.errors import CheckpointError, NotFiniteError, OptionError
from ppl.interrupt import SignalHandler
from ppl.progress import Bar

__all__ = ["Event", "Monitor"]


@dataclass(frozen=True)
class Event:
    """What a callback sees after a step.

    Args:
        label: the loop, with its section in front: "chain 2/warmup".
        step: the step that was just finished, as the loop counts it, from 0.
        total: steps of the loop.
        cost: what the run has cost so far, as a copy.
        info: what the engine reported last, such as elbo or ess.
    """

    label: str
    step: int
    total: int
    cost: Cost
    info: Mapping[str, Any] = field(default_factory=dict)


class Monitor:
    """Watches one run; an engine loops over `monitor.steps` and keeps nothing else of this in its own code.

    After an interruption (Ctrl-C or a callback that returns True) the current step is finished, all loops of this
    monitor end, later loops yield nothing, and `interrupted` is true: the engine returns what it has. A second Ctrl-C
    raises KeyboardInterrupt at once.

    Args:
        progress: show a bar on a terminal or in a notebook; "force" shows it anywhere.
        callback: called with an `Event` after each step; returning True stops the run.
        checkpoint: folder to write checkpoints to (see `ppl.checkpoint`); None writes none.
        checkpoint_every: seconds between checkpoints; 0 writes at every call.
        generator: the generator of the run; its state is stored and restored.
        fingerprint: what the run is; a checkpoint with another fingerprint is refused. Named entries ("program",
            "data", "backend", "seed") let the error say what differs.

    Example:
        >>> monitor = Monitor(callback=lambda event: event.step == 1)
        >>> [step for step in monitor.steps(5, "sampling")], monitor.interrupted, monitor.stop_reason
        ([0, 1], True, 'stopped by callback')
    """

    def __init__(
        self,
        progress: bool | Literal["force"] = False,
        callback: Callable[[Event], bool | None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: float = 30.0,
        generator: torch.Generator | None = None,
        fingerprint: str | Mapping[str, str] = "",
    ) -> None:
        if not isinstance(checkpoint_every, int | float) or not checkpoint_every >= 0:
            raise OptionError(f"checkpoint_every must be zero or more seconds, got {checkpoint_every!r}")
        if callback is not None and not callable(callback):
            raise OptionError(f"callback must be a function of an Event, got {callback!r}")
        self.callback = callback
        self.generator = generator
        self._own = False
        self.checkpoint_every = float(checkpoint_every)
        self.cost = Cost()
        self.notes: list[str] = []
        self.info: dict[str, Any] = {}
        self.interrupted = False
        self.stop_reason: str | None = None
        self._store = None if checkpoint is None else Checkpoint(checkpoint, fingerprint)
        self._sections: list[str] = []
        self._bar = Bar(progress)
        self._signal = SignalHandler()
        self._depth = 0
        self._loops = 0
        self._clock = 0.0
        self._saved_time = time.monotonic()
        self._serial = 0
        self._restored_cost = Cost()

    # -- the run as a context: clock, Ctrl-C, bar

    def __enter__(self) -> Monitor:
        if self._depth == 0:
            self._clock = time.monotonic()
            self._signal.install(self._on_sigint)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tick()
        self._depth -= 1
        if self._depth == 0:
            self._measure_memory()
            self._signal.restore()
            self._bar.stop()

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.stop("interrupted by Ctrl-C")
        if sys.stderr is not None and sys.stderr.isatty():
            # Not print: the handler may run inside a write to the same stream.
            os.write(2, b"\nfinishing the current step; press Ctrl-C again to stop at once\n")

    def stop(self, reason: str) -> None:
        """End all loops after the current step, as Ctrl-C does; for engines that poll an outside sampler."""
        self.interrupted = True
        self.stop_reason = self.stop_reason or reason

    # -- loops

    def steps(self, total: int, label: str, start: int = 0) -> Iterator[int]:
        """Yield start, ..., total - 1; shows progress, calls the callback, ends early after an interruption.

        Args:
            total: steps of the whole loop, those before `start` included.
            label: name of the loop, shown to the user.
            start: steps that were done before, from `resume()`.
        """
        with self:
            task = self._bar.add([*self._sections, label], total, start)
            done = start
            self._loops += 1
            try:
                for step in range(start, total):
                    if self.interrupted:
                        return
                    yield step
                    done = step + 1
                    self._tick()
                    if self.callback is not None:
                        name = "/".join([*self._sections, label])
                        event = Event(name, step, total, self.cost.copy(), dict(self.info))
                        # An accidental truthy return value must not end a run of hours.
                        if self.callback(event) is True:
                            self.stop("stopped by callback")
                    self._bar.show(task, done, self.cost, self.info)
            finally:
                self._loops -= 1
                self._bar.close(task, done, self.cost, self.info, inner=self._loops > 0)

    def report(self, **info: Any) -> None:
        """Say numbers about the run (elbo=..., ess=...) to the bar and to callbacks; free until they are shown."""
        for name, value in info.items():
            self.info[name] = value.detach() if isinstance(value, Tensor) else value

    def note(self, message: str) -> None:
        """Keep a remark for `posterior.attrs["notes"]`; the same remark is kept once."""
        if message not in self.notes:
            self.notes.append(message)

    def check_finite(self, name: str, tensor: Tensor, where: str | int) -> None:
        """Raise if a tensor holds a NaN or an infinity.

        Args:
            name: the site or quantity.
            tensor: any shape.
            where: the step, or a few words: "level 12 of 50".

        Raises:
            NotFiniteError: with the site, the place and the number of bad values.
        """
        finite = torch.isfinite(tensor)
        if bool(finite.all()):
            return
        bad = int((~finite).sum())
        nans = int(torch.isnan(tensor).sum())
        place = f"step {where}" if isinstance(where, int) else where
        section = f" ({'/'.join(self._sections)})" if self._sections else ""
        raise NotFiniteError(
            f"{name!r} is not finite at {place}{section}: {bad} of {tensor.numel()} values are bad "
            f"({nans} NaN, {bad - nans} infinite); check the model at the last good draw, try float64 or smaller steps"
        )

    # -- checkpoints

    @contextmanager
    def section(self, name: str) -> Iterator[Monitor]:
        """Everything stored inside belongs to this part of the run ("chain 2"); sections nest."""
        self._sections.append(name)
        try:
            yield self
        finally:
            self._sections.pop()

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[Monitor]:
        """What is stored inside goes with the state of this generator, that of one part alone ("problem 2")."""
        before, self.generator, self._own = (self.generator, self._own), generator, True
        try:
            yield self
        finally:
            self.generator, self._own = before

    @property
    def due(self) -> bool:
        """Whether `checkpoint` would write now; lets an engine skip gathering its state."""
        if self._store is None:
            return False
        return self.interrupted or time.monotonic() - self._saved_time >= self.checkpoint_every

    def checkpoint(self, step: int, state: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        """Store where the run stands, if it is time to (and always after an interruption).

        Args:
            step: number of steps done: the `start` of the loop that continues.
            state: all that the next step needs and all draws so far; or a function that gathers it when needed.
        """
        if not self.due:
            return
        self._tick()
        tensors = state() if callable(state) else state
        if "step" in tensors:
            raise OptionError('"step" is stored by the monitor; give the tensor of this name another one')
        self._write("state", self._part(), {**tensors, "step": torch.tensor(int(step))})
        self._saved_time = time.monotonic()

    def resume(self) -> dict[str, Tensor] | None:
        """The last checkpoint of this section, with "step" as a 0-d integer tensor; None where there is none.

        The state of the run's generator and the cost so far are restored. Tensors come back on their kind of device.

        Raises:
            CheckpointError: if the checkpoint is damaged or belongs to another run.
        """
        return self._read("state", self._part())

    def finish(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a part that is complete (a chain) and drop its checkpoints; nothing is stored after an interruption."""
        if self._store is None or self.interrupted:
            return
        self._tick()
        self._write("finished", self._part(name), tensors)
        self._store.remove("state", self._part(name))
        self._saved_time = time.monotonic()

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a part that was complete before; None where it has to run."""
        return self._read("finished", self._part(name))

    def done(self) -> None:
        """The run is complete and its result is in hand: remove the checkpoint. After an interruption it stays."""
        if self._store is not None and not self.interrupted:
            self._store.clear()

    def _part(self, *names: str) -> str:
        return "/".join([*self._sections, *names])

    def _write(self, kind: str, part: str, tensors: Mapping[str, Tensor]) -> None:
        assert self._store is not None
        self._measure_memory()
        self._serial += 1
        pack = {f"state.{name}": tensor for name, tensor in tensors.items()}
        if self.generator is not None:
            pack["generator"] = self.generator.get_state()
        devices = {name: tensor.device.type for name, tensor in tensors.items() if tensor.device.type != "cpu"}
        meta = {"serial": self._serial, "cost": self.cost.to_dict(), "notes": self.notes, "devices": devices}
        self._store.write(kind, part, pack, meta)

    def _read(self, kind: str, part: str) -> dict[str, Tensor] | None:
        found = None if self._store is None else self._store.read(kind, part)
        if found is None:
            return None
        pack, meta = found
        device = None if self.generator is None else self.generator.device
        # A part written earlier than what this run already stands on must not turn generator and cost back.
        if meta["serial"] > self._serial:
            self._serial = meta["serial"]
            self._restore_cost(Cost.from_dict(meta["cost"]))
            self._restore_generator(pack)
        elif self._own and kind == "state":
            self._restore_generator(pack)
        for message in meta["notes"]:
            self.note(message)
        tensors = {name.removeprefix("state."): tensor for name, tensor in pack.items() if name != "generator"}
        for name, kind_of in meta["devices"].items():
            same_kind = device is not None and device.type == kind_of
            tensors[name] = tensors[name].to(device if same_kind else kind_of)
        return tensors

    def _restore_generator(self, pack: Mapping[str, Tensor]) -> None:
        """Go on where the stored part stood."""
        if self.generator is None or "generator" not in pack:
            return
        try:
            self.generator.set_state(pack["generator"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint holds the state of a generator of another device, this run's is on "
                f"{self.generator.device} ({error}); resume on the device where the run began"
            ) from error

    def _restore_cost(self, stored: Cost) -> None:
        """Cost so far = what was stored + what this process spent since it restored the last time."""
        now, base = self.cost.to_dict(), self._restored_cost.to_dict()
        spent = {name: now[name] - base[name] for name in now if name != "peak_memory"}
        self.cost.__dict__.update(stored.copy().__dict__)
        self.cost.add(**spent, peak_memory=now["peak_memory"])
        self._restored_cost = stored.copy()

    # -- clock and memory

    def _tick(self) -> None:
        """Add the wall time since the last call, while the run is open."""
        if self._depth > 0:
            now = time.monotonic()
            self.cost.seconds += now - self._clock
            self._clock = now

    def _measure_memory(self) -> None:
        """High-water mark: of this process, or of the device of the generator."""
        if self.generator is not None and self.generator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.generator.device)
        else:
            try:
                import resource
            except ImportError:  # not on Windows
                return
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        self.cost.add(peak_memory=int(peak))

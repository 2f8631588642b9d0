"""The bar of a run on a terminal or in a notebook: a line for every open loop, with its cost and numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ppl.cost import Cost

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bar"]

_REFRESH = 0.1  # seconds between updates
_LINES = 8  # finished outer loops that stay on the screen


class Bar:
    """Made when the first loop begins, if somebody is looking.

    Args:
        wanted: show it where somebody is looking; "force" shows it anywhere.
    """

    def __init__(self, wanted: bool | Literal["force"]) -> None:
        self.wanted = wanted
        self._shown: Progress | None = None
        self._time = -float("inf")

    def add(self, names: Sequence[str], total: int, start: int) -> Any:
        """A line, or None where no bar is shown."""
        if not self.wanted:
            return None
        if self.wanted != "force" and not _someone_is_looking():
            return None
        if self._shown is None:
            self._shown = _make_bar()
            self._shown.start()
        # The label is text, not markup: a "[0]" in it must be shown.
        label = " / ".join(names).replace("[", "\\[")
        return self._shown.add_task(label, total=total, completed=start, words="")

    def show(self, task: Any, done: int, cost: Cost, info: Mapping[str, Any]) -> None:
        """Where a loop stands, now and then."""
        if self._shown is None or task is None:
            return
        now = time.monotonic()
        if now - self._time < _REFRESH:
            return
        self._time = now
        self._shown.update(task, completed=done, words=_words(cost, info))
        self._shown.refresh()

    def close(self, task: Any, done: int, cost: Cost, info: Mapping[str, Any], inner: bool) -> None:
        """An outer loop's line stays on the screen, up to eight of them; an inner one makes room."""
        if self._shown is None or task is None:
            return
        self._shown.update(task, completed=done, words=_words(cost, info))
        if inner:
            self._shown.remove_task(task)
        elif len(self._shown.tasks) > _LINES:
            self._shown.remove_task(self._shown.task_ids[0])

    def stop(self) -> None:
        """The run is over."""
        if self._shown is not None:
            self._shown.refresh()
            self._shown.stop()
            self._shown = None


def _words(cost: Cost, info: Mapping[str, Any]) -> str:
    """Cost and reported numbers, short."""
    words = []
    if cost.denoiser_calls:
        words.append(f"{cost.denoiser_calls:,} denoiser calls, {cost.denoiser_evals:,} evals")
    elif cost.gradient_evals or cost.density_evals:
        words.append(f"{cost.gradient_evals:,} gradients, {cost.density_evals:,} densities")
    words += [f"{name} {_short(value)}" for name, value in info.items()]
    return "  ".join(words)


def _short(value: Any) -> str:
    """A number in four digits; anything else as it prints."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _someone_is_looking() -> bool:
    """A terminal or a notebook, decided without importing either's library."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _make_bar() -> Progress:
    """A bar that draws only when told to: no thread beside the engine."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False)

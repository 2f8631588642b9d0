"""Training a denoiser: min E[lambda(sigma) |D(x_0 + sigma n; sigma) - x_0|^2] with ln sigma ~ N(p_mean, p_std^2).

lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, so that every noise level starts with the same loss.
Source: Karras et al. (2022), table 1 and section 5 [read].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from models.data import ImageData
from models.denoisers.checkpoint import interrupts_deferred, read_checkpoint, write_checkpoint
from models.denoisers.config import TrainConfig
from models.denoisers.run import TrainedDenoiser, TrainRun
from models.denoisers.unet import UNet
from ppl.errors import OptionError, ShapeError

__all__ = ["TrainProgress", "train"]


class TrainProgress(NamedTuple):
    """What a callback sees after each step."""

    step: int
    loss: float  # mean training loss since the last report
    images_per_second: float
    held_out: float | None  # at this step, when it was evaluated
    averaged: UNet  # the averaged weights; read only


def train(
    dataset: ImageData,
    config: TrainConfig,
    *,
    initial: UNet | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    callback: Callable[[TrainProgress], None] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> TrainedDenoiser:
    """Train a U-Net as a denoiser of these images.

    All random numbers are drawn on the CPU from one generator, so a run is the same on every device up to rounding,
    and a run that was killed and started again from its checkpoint ends with the weights of an uninterrupted one.
    Ctrl-C finishes the step, writes the checkpoint and returns what there is, marked `interrupted`.

    Args:
        dataset: images in their data range.
        config: network, noise levels and optimiser.
        initial: network of the same config whose weights the run starts from; None draws them.
        checkpoint: a safetensors file, written atomically; if it exists the run goes on from it. `steps`, `cooldown`
            and `patience` may differ from those it was written with; all else must be equal.
        checkpoint_every: seconds between checkpoints; 0 writes one after every step.
        callback: called after every step.
        device: where the network runs; None is the CPU.
        progress: show a progress bar when the output is a terminal.

    Returns:
        The averaged weights: the last, or with `patience` those of the lowest held-out loss.

    Raises:
        ShapeError: if images and network disagree about the event shape, or `initial` has another config.
        OptionError: if the network knows fewer labels than the data have.
        CheckpointError: if the checkpoint is damaged or belongs to another run.
        NotFiniteError: if the loss is not finite.
    """
    if dataset.event_shape != config.network.event_shape:
        raise ShapeError(
            f"{dataset.name} has images of shape {dataset.event_shape}, the network takes {config.network.event_shape}"
        )
    if initial is not None and replace(initial.config, dropout=0.0) != replace(config.network, dropout=0.0):
        raise ShapeError(f"the initial network has config {initial.config}, this run has {config.network}")
    labels = config.network.labels
    if labels and int(dataset.train_label.max()) >= labels:
        raise OptionError(f"the network has {labels} labels, {dataset.name} has {int(dataset.train_label.max()) + 1}")
    run = TrainRun(dataset, config, torch.device(device or "cpu"), initial)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.restore(*read_checkpoint(path))
    last_saved = last_report = time.monotonic()
    reported, losses = run.step, []
    with _Bar(config.steps, run.step, progress) as advance, interrupts_deferred() as stop:
        while run.step < config.steps and not run.out_of_patience() and not stop.requested:
            losses.append(run.advance())
            due = run.step % config.evaluate_every == 0 or run.step == config.steps
            held_out = run.evaluate(sum(losses) / len(losses)) if due else None
            now = time.monotonic()
            rate = config.batch * (run.step - reported) / max(now - last_report, 1e-9)
            mean = sum(losses) / len(losses)
            if callback is not None:
                callback(TrainProgress(run.step, mean, rate, held_out, run.averaged))
            advance(run.step, mean, rate)
            if due:
                losses, reported, last_report = [], run.step, now
            if path is not None and now - last_saved >= checkpoint_every:
                write_checkpoint(path, *run.state())
                last_saved = now
    if path is not None:
        write_checkpoint(path, *run.state())
    return run.result(stop.requested)


class _Bar:
    """A progress bar of rich: loss, images per second, time left."""

    def __init__(self, total: int, done: int, wanted: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[facts]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), disable=not wanted, transient=True)
        self._task = self._progress.add_task("train", total=total, completed=done, facts="")

    def __enter__(self) -> Callable[[int, float, float], None]:
        self._progress.start()
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _advance(self, step: int, loss: float, rate: float) -> None:
        self._progress.update(self._task, completed=step, facts=f"loss {loss:.4f}, {rate:.0f} images/s")

"""Training a denoiser: min E[lambda(sigma) |D(x_0 + sigma n; sigma) - x_0|^2] with ln sigma ~ N(p_mean, p_std^2).

lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, so that every noise level starts with the same loss.
Source: Karras et al. (2022), table 1 and section 5; the averaged weights follow Karras et al. (2024), eq. 4 [inferred].
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.data import ImageData
from models.denoisers.checkpoint import interrupts_deferred, read_checkpoint, write_checkpoint
from models.denoisers.unet import UNet, UNetConfig
from ppl.errors import CheckpointError, NotFiniteError, OptionError, ShapeError
from sde.denoiser import EDMDenoiser

__all__ = ["TrainConfig", "TrainProgress", "TrainedDenoiser", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, apart from the data; goes to JSON and back.

    Args:
        network: the shape of the U-Net.
        sigma_data: scale of the data in the preconditioning, the root mean square of their pixels.
        p_mean: mean of ln sigma during training.
        p_std: standard deviation of ln sigma during training.
        steps: optimiser steps.
        batch: images per step, drawn with replacement.
        learning_rate: of Adam, between warm-up and cool-down.
        warmup: steps over which the learning rate rises from 0.
        cooldown: last steps, over which it falls linearly to 0.
        betas: of Adam.
        weight_decay: decoupled, on all weights; 0 is Adam.
        clip: largest norm of the gradient.
        ema: the averaged weights are a power-law mean over the past, sum_t t^ema w_t up to a constant: larger forgets
            faster. Their relative width in time is about 1 / ema.
        label_dropout: share of the labels replaced by the null label, so that one network serves both.
        flip_labels: classes whose images are mirrored left-right half of the time.
        shift: images are moved by up to this many pixels each way (filled with the lowest value).
        evaluate_every: steps between held-out losses.
        evaluate_images: held-out images used for them.
        patience: stop after this many held-out losses without a new best, and keep the best; None: run all steps and
            keep the last.
        seed: of initial weights, batches, noise, dropout.

    Raises:
        OptionError: if a value is out of range.
    """

    network: UNetConfig = field(default_factory=UNetConfig)
    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    steps: int = 10_000
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 500
    cooldown: int = 3_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 16.0
    label_dropout: float = 0.1
    flip_labels: tuple[int, ...] = ()
    shift: int = 0
    evaluate_every: int = 500
    evaluate_images: int = 256
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sigma_data", "p_std", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("steps", "batch", "evaluate_every", "evaluate_images"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("warmup", "cooldown", "shift", "ema", "weight_decay"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must be zero or more, got {getattr(self, name)}")
        if not 0 <= self.label_dropout <= 1:
            raise OptionError(f"label_dropout must be in [0, 1], got {self.label_dropout}")
        if self.patience is not None and self.patience < 1:
            raise OptionError(f"patience must be 1 or more, or None, got {self.patience}")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**plain, "network": self.network.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The config whose `to_json` gave these values.

        Raises:
            OptionError: if a field is unknown.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"unknown fields {sorted(unknown)} for TrainConfig; was it written by a newer version?")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        plain["network"] = UNetConfig.from_json(values["network"])
        return cls(**plain)


class TrainProgress(NamedTuple):
    """What a callback sees after each step."""

    step: int
    loss: float  # mean training loss since the last report
    images_per_second: float
    held_out: float | None  # at this step, when it was evaluated
    averaged: UNet  # the averaged weights; read only


@dataclass(frozen=True)
class TrainedDenoiser:
    """Averaged weights and how they came about."""

    network: UNet  # in evaluation mode, without gradients
    config: TrainConfig
    step: int  # of these weights
    history: tuple[dict[str, float], ...]  # step, loss, held_out
    seconds: float  # spent in training steps, over all resumptions
    interrupted: bool

    @property
    def denoiser(self) -> EDMDenoiser:
        """The network as E[x_0 | x_sigma]."""
        return EDMDenoiser(self.network, self.config.sigma_data)


def train(
    dataset: ImageData,
    config: TrainConfig,
    *,
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
        checkpoint: a safetensors file, written atomically; if it exists the run goes on from it. `steps`, `cooldown`
            and `patience` may differ from those it was written with; all else must be equal.
        checkpoint_every: seconds between checkpoints; 0 writes one after every step.
        callback: called after every step.
        device: where the network runs; None is the CPU.
        progress: show a progress bar when the output is a terminal.

    Returns:
        The averaged weights: the last, or with `patience` those of the lowest held-out loss.

    Raises:
        ShapeError: if images and network disagree about the event shape.
        OptionError: if the network knows fewer labels than the data have.
        CheckpointError: if the checkpoint is damaged or belongs to another run.
        NotFiniteError: if the loss is not finite.
    """
    if dataset.event_shape != config.network.event_shape:
        raise ShapeError(
            f"{dataset.name} has images of shape {dataset.event_shape}, the network takes {config.network.event_shape}"
        )
    labels = config.network.labels
    if labels and int(dataset.train_label.max()) >= labels:
        raise OptionError(f"the network has {labels} labels, {dataset.name} has {int(dataset.train_label.max()) + 1}")
    run = _Run(dataset, config, torch.device(device or "cpu"))
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


class _Run:
    """All that changes while training, and all that a checkpoint holds."""

    def __init__(self, dataset: ImageData, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.network = UNet(config.network, self.generator).to(device).train()
        self.averaged = UNet(config.network).to(device).eval().requires_grad_(False)
        self.averaged.load_state_dict(self.network.state_dict())
        self.best = {name: w.clone() for name, w in self.averaged.state_dict().items()}
        self.best_step, self.best_loss = 0, math.inf
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    def advance(self) -> float:
        """One optimiser step; returns its loss."""
        config, start = self.config, time.monotonic()
        x, label, sigma, noise, seed = self._batch()
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * self._schedule()
        self.optimiser.zero_grad(set_to_none=True)
        denoiser = EDMDenoiser(self.network, config.sigma_data)
        # Dropout can only draw from the global generator: give it a seed of ours and put the old state back.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            loss = denoiser.loss(x, sigma, noise, label).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the training loss is {value} at step {self.step}; lower learning_rate or check the data, then start "
                "again from the last checkpoint"
            )
        self.optimiser.step()
        self.step += 1
        self._average()
        self.seconds += time.monotonic() - start
        return value

    def _schedule(self) -> float:
        """Share of the learning rate at this step: up, flat, down."""
        config = self.config
        up = (self.step + 1) / config.warmup if self.step < config.warmup else 1.0
        left = config.steps - self.step
        return min(up, left / config.cooldown if left < config.cooldown else 1.0)

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, int]:
        config, generator, data = self.config, self.generator, self.dataset
        index = torch.randint(len(data.train), (config.batch,), generator=generator)
        x, label = data.train[index], data.train_label[index]
        if config.flip_labels:
            flip = torch.rand(config.batch, generator=generator) < 0.5
            flip &= torch.isin(label, torch.tensor(config.flip_labels))
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        if config.shift:
            x = _shifted(x, config.shift, data.data_range[0], generator)
        sigma = torch.exp(config.p_mean + config.p_std * torch.randn(config.batch, generator=generator))
        noise = torch.randn(x.shape, generator=generator)
        drop = torch.rand(config.batch, generator=generator) < config.label_dropout
        label = torch.where(drop, config.network.labels, label)
        seed = int(torch.randint(2**62, (), generator=generator))
        to = self.device
        return x.to(to), label.to(to) if config.network.labels else None, sigma.to(to), noise.to(to), seed

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights: (1 - 1/t)^(ema + 1) of the old ones stays after step t."""
        keep = (1 - 1 / self.step) ** (self.config.ema + 1)
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - keep)

    @torch.no_grad()
    def evaluate(self, loss: float) -> float:
        """Held-out loss of the averaged weights: fixed images and noise, noise levels at the quantiles trained on."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + 1)
        x = self.dataset.held_out[: config.evaluate_images]
        label = self.dataset.held_out_label[: len(x)].to(self.device) if config.network.labels else None
        rank = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        normal = torch.special.ndtri(rank[torch.randperm(len(x), generator=generator)])
        sigma = torch.exp(config.p_mean + config.p_std * normal).to(x.dtype)
        noise = torch.randn(x.shape, generator=generator)
        denoiser = EDMDenoiser(self.averaged, config.sigma_data)
        parts = []
        for i in range(0, len(x), 256):
            rows = slice(i, i + 256)
            clean, level, n = (t[rows].to(self.device) for t in (x, sigma, noise))
            parts.append(denoiser.loss(clean, level, n, None if label is None else label[rows]))
        value = float(torch.cat(parts).mean())
        self.history.append({"step": self.step, "loss": loss, "held_out": value})
        if value < self.best_loss:
            self.best = {name: w.clone() for name, w in self.averaged.state_dict().items()}
            self.best_step, self.best_loss = self.step, value
        return value

    def out_of_patience(self) -> bool:
        """Whether too many held-out losses have passed without a new best."""
        patience = self.config.patience
        return patience is not None and sum(h["step"] > self.best_step for h in self.history) >= patience

    def _fingerprint(self) -> str:
        values = self.config.to_json()
        for free in ("steps", "cooldown", "patience"):
            del values[free]
        return hashlib.sha256((json.dumps(values, sort_keys=True) + self.dataset.fingerprint()).encode()).hexdigest()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts of a checkpoint."""
        tensors = {"generator": self.generator.get_state()}
        for name, w in self.network.state_dict().items():
            tensors[f"network/{name}"] = w
        for name, w in self.averaged.state_dict().items():
            tensors[f"averaged/{name}"] = w
        for name, w in self.best.items():
            tensors[f"best/{name}"] = w
        for name, w in self.network.named_parameters():
            for moment, value in self.optimiser.state[w].items() if self.step else ():
                tensors[f"adam/{moment}/{name}"] = value
        facts = {
            "format": 1,
            "step": self.step,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "history": self.history,
            "fingerprint": self._fingerprint(),
            "config": self.config.to_json(),
        }
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        if facts.get("fingerprint") != self._fingerprint():
            raise CheckpointError(
                f"the checkpoint belongs to another run (its config: {json.dumps(facts.get('config'))}); "
                "use its config and data, or another checkpoint path"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: t.to(self.device) for name, t in tensors.items() if name.startswith(prefix)}

        self.generator.set_state(tensors["generator"])
        self.network.load_state_dict(part("network/"))
        self.averaged.load_state_dict(part("averaged/"))
        self.best = part("best/")
        self.step, self.seconds, self.history = facts["step"], facts["seconds"], list(facts["history"])
        self.best_step = facts["best_step"]
        self.best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
        moments = part("adam/")
        for name, w in self.network.named_parameters():
            found = {key.split("/", 1)[0]: t for key, t in moments.items() if key.split("/", 1)[1] == name}
            if found:
                # Moments take the layout of the weights, the step count stays where AdamW keeps it.
                self.optimiser.state[w] = {
                    k: t.cpu() if k == "step" else torch.empty_like(w).copy_(t) for k, t in found.items()
                }

    def result(self, interrupted: bool) -> TrainedDenoiser:
        """The averaged weights in a network of their own."""
        network = UNet(self.config.network)
        keep_best = self.config.patience is not None and math.isfinite(self.best_loss)
        network.load_state_dict(self.best if keep_best else self.averaged.state_dict())
        return TrainedDenoiser(
            network=network.eval().requires_grad_(False).to(self.device),
            config=self.config,
            step=self.best_step if keep_best else self.step,
            history=tuple(self.history),
            seconds=self.seconds,
            interrupted=interrupted,
        )


def _shifted(x: Tensor, shift: int, fill: float, generator: torch.Generator) -> Tensor:
    """Each image moved by its own offset of up to `shift` pixels along both axes."""
    batch, _, rows, columns = x.shape
    offset = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator)
    row, column = offset[0] + torch.arange(rows), offset[1] + torch.arange(columns)
    padded = nn.functional.pad(x, (shift,) * 4, value=fill)
    image = torch.arange(batch)
    return padded[image[:, None, None], :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2).contiguous()


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

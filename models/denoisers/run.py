"""One training run, step by step: all that changes while training, and all that a checkpoint holds.

Weights are averaged as in Karras et al. (2024), eq. 4 [inferred]: (1 - 1/t)^(ema + 1) of the old ones stays at step t.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.data import ImageData
from models.denoisers.config import TrainConfig
from models.denoisers.unet import UNet
from ppl.errors import CheckpointError, NotFiniteError
from sde.denoiser import EDMDenoiser

__all__ = ["TrainRun", "TrainedDenoiser"]


@dataclass(frozen=True)
class TrainedDenoiser:
    """Averaged weights and how they came about."""

    network: UNet  # in evaluation mode, without gradients
    config: TrainConfig
    step: int  # of these weights
    history: tuple[dict[str, float], ...]  # step, loss, held_out
    seconds: float  # spent in training steps, over all resumptions
    interrupted: bool

    def summary(self) -> dict[str, Any]:
        """How the weights came about, as JSON values."""
        return {
            **{key: value for key, value in self.config.to_json().items() if key != "network"},
            "step_of_weights": self.step,
            "images_seen": self.step * self.config.batch,
            "seconds": round(self.seconds),
        }

    @property
    def denoiser(self) -> EDMDenoiser:
        """The network as E[x_0 | x_sigma]."""
        return EDMDenoiser(self.network, self.config.sigma_data)


class TrainRun:
    """All that changes while training, and all that a checkpoint holds."""

    def __init__(
        self, dataset: ImageData, config: TrainConfig, device: torch.device, initial: UNet | None = None
    ) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.network = UNet(config.network, self.generator).to(device).train()
        self.initial = ""
        if initial is not None:
            weights = initial.state_dict()
            self.network.load_state_dict(weights)
            raw = b"".join(w.detach().cpu().contiguous().numpy().tobytes() for w in weights.values())
            self.initial = hashlib.sha256(raw).hexdigest()
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
        text = json.dumps(values, sort_keys=True) + self.dataset.fingerprint() + self.initial
        return hashlib.sha256(text.encode()).hexdigest()

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

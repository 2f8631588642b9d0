"""What decides the weights of a trained denoiser, apart from the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from models.denoisers.unet import UNetConfig
from ppl.errors import OptionError

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Network, noise levels and optimiser of a training run; goes to JSON and back.

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

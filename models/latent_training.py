"""Training of latent stochastic differential equations: one object for all that changes, which a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.denoisers.checkpoint import interrupts_deferred, read_checkpoint, write_checkpoint
from models.latent_sde import LatentSDE
from ppl.errors import CheckpointError, NotFiniteError, OptionError

__all__ = ["FitConfig", "LatentFit"]


@dataclass(frozen=True)
class FitConfig:
    """How a latent process is fitted.

    Args:
        steps: of Adam.
        lr: learning rate.
        hurst_lr: learning rate of the Hurst index, one number that would be slow otherwise.
        cooldown: share of the steps, the last ones, over which the rates fall to 0.
        clip: largest norm of the gradient of the bound for one observed number.
        pathwise: see `LatentSDE.bound`.
        seed: of batches and driving numbers.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 2000
    lr: float = 2e-3
    hurst_lr: float = 1e-2
    cooldown: float = 0.5
    clip: float = 5.0
    pathwise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.lr, self.hurst_lr, self.clip) <= 0 or not 0 < self.cooldown <= 1:
            raise OptionError(
                f"steps, rates and clip must be positive and cooldown in (0, 1], got {self.steps}, {self.lr}, "
                f"{self.hurst_lr}, {self.clip} and {self.cooldown}"
            )


class LatentFit:
    """Prior, posterior and decoder raise the mean bound of random batches together.

    Args:
        model: changed in place.
        batches: a batch of series, (batch, frames, *frame), from a generator.
        config: options.

    Example:
        >>> from models.latent_encoding import SeriesEncoder
        >>> model = LatentSDE(SeriesEncoder(1, 1), lambda x, w: x, latent=1, horizon=1.0, hurst=None)
        >>> fit = LatentFit(model, lambda g: torch.randn(4, 5, 1, generator=g), FitConfig(steps=3))
        >>> fit.run().shape
        torch.Size([3])
    """

    def __init__(self, model: LatentSDE, batches: Callable[[torch.Generator], Tensor], config: FitConfig) -> None:
        self.model, self.batches, self.config = model, batches, config
        self.generator = torch.Generator().manual_seed(config.seed)
        index = [] if model.hurst_logit is None else [model.hurst_logit]
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in index)]
        groups = [{"params": rest, "base": config.lr}, {"params": index, "base": config.hurst_lr}]
        self.optimiser = torch.optim.Adam([g for g in groups if g["params"]], lr=config.lr)
        self.step, self.seconds = 0, 0.0
        self.history: list[float] = []
        self.hurst: list[float] = []

    def advance(self) -> float:
        """One step of Adam; the mean bound of a frame.

        Raises:
            NotFiniteError: a bound that is not finite.
        """
        start, config = time.monotonic(), self.config
        y = self.batches(self.generator)
        left = (config.steps - self.step) / (config.cooldown * config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * min(1.0, left)
        self.optimiser.zero_grad(set_to_none=True)
        bound = self.model.bound(y, self.generator, pathwise=config.pathwise).value.mean()
        value = float(bound.detach()) / y.shape[1]
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the bound is {value} at step {self.step}; lower lr or take more substeps, then start again from the "
                "last checkpoint"
            )
        (-bound / y[0].numel()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        self.step += 1
        self.history.append(value)
        self.hurst.append(float(torch.as_tensor(self.model.hurst).detach()))
        self.seconds += time.monotonic() - start
        return value

    def run(self, until: int | None = None, checkpoint: Path | None = None, every: int = 200) -> Tensor:
        """Advance to a step, from the checkpoint where there is one; Ctrl-C ends after the step at hand.

        Args:
            until: last step; None is all of them.
            checkpoint: file to resume from and to write.
            every: steps between two checkpoints.

        Returns:
            (steps,) mean bound of a frame at every step so far.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        if checkpoint is not None and checkpoint.exists() and self.step == 0:
            self.restore(*read_checkpoint(checkpoint))
        with interrupts_deferred() as stop:
            while self.step < until and not stop.requested:
                self.advance()
                if checkpoint is not None and (self.step % every == 0 or self.step == until or stop.requested):
                    write_checkpoint(checkpoint, *self.state())
        return torch.tensor(self.history)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts of a checkpoint."""
        tensors = {"generator": self.generator.get_state()}
        for name, w in self.model.named_parameters():
            tensors[f"model/{name}"] = w
            for moment, value in self.optimiser.state[w].items():
                tensors[f"adam/{moment}/{name}"] = value
        facts = {"step": self.step, "seconds": self.seconds, "history": self.history, "hurst": self.hurst}
        return tensors, {**facts, "config": asdict(self.config)}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` gave.

        Raises:
            CheckpointError: the checkpoint of another run.
        """
        parameters = dict(self.model.named_parameters())
        names = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
        if facts.get("config") != asdict(self.config) or names != set(parameters):
            raise CheckpointError(
                f"the checkpoint belongs to another run (its options: {facts.get('config')}); use those and the same "
                "model, or another path"
            )
        with torch.no_grad():
            for name, w in parameters.items():
                w.copy_(tensors[f"model/{name}"])
        for key, value in tensors.items():
            kind, moment, name = (*key.split("/", 2), "", "")[:3]
            if kind == "adam":
                self.optimiser.state[parameters[name]][moment] = value.clone()
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.history, self.hurst = list(facts["history"]), list(facts["hurst"])

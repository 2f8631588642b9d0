"""Training on simulations of a program: every step sees pairs that no step saw before.

min E_{p(z, y)} loss(network; z, y), by Adam with a warm-up, a cosine, clipped gradients and averaged weights.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppl.amortised.pairs import Pairs
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor

__all__ = ["Scales", "Training", "TrainingOptions", "dtype_of", "judged_rows"]

BLOCK = 2**22  # numbers simulated at once, at most
BATCHES_AT_ONCE = 16
WARMUP = 0.05  # share of the steps in which the learning rate rises
CLIP = 1.0
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-8  # of Adam, Kingma & Ba (2015)
JUDGED = 2048  # fresh pairs behind the held-out loss, at most


class TrainingOptions(Protocol):
    """What training reads of a backend's options."""

    @property
    def steps(self) -> int:
        """Steps of Adam."""
        ...

    @property
    def batch(self) -> int:
        """Pairs of one step."""
        ...

    @property
    def lr(self) -> float:
        """Largest learning rate."""
        ...

    @property
    def ema(self) -> float:
        """Width of the averaging of weights."""
        ...


@dataclass(frozen=True)
class Scales:
    """Mean and standard deviation of simulated latents and data, and the range of the data.

    Args:
        z_mean: (dim,).
        z_sd: (dim,).
        y_mean: (data_dim,).
        y_sd: (data_dim,).
        y_low: (data_dim,) smallest simulated.
        y_high: (data_dim,) largest.
        marks: (9, dim + data_dim) deciles of latents and data.
        shares: (9, dim + data_dim) share of the simulations at or below each mark.
        rows: 0-d, simulations behind all this.
    """

    z_mean: Tensor
    z_sd: Tensor
    y_mean: Tensor
    y_sd: Tensor
    y_low: Tensor
    y_high: Tensor
    marks: Tensor
    shares: Tensor
    rows: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor, pairs: Pairs, entrywise: bool) -> Scales:
        """Measured on simulated pairs; one mean and one standard deviation per site unless entrywise."""
        z_mean, z_sd = _moments(z, [math.prod(s) for s in pairs.latent_shapes.values()], entrywise)
        y_mean, y_sd = _moments(y, [math.prod(s) for s in pairs.data_shapes.values()], entrywise)
        both = torch.cat([z, y], 1)
        marks = both.sort(0).values[[len(z) * k // 10 for k in range(1, 10)]]
        return cls(
            z_mean, z_sd, y_mean, y_sd, y.amin(0), y.amax(0), marks, _at_or_below(both, marks), torch.tensor(len(z))
        )

    def standard(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and data in units of their spread."""
        return (z - self.z_mean) / self.z_sd, self.standard_data(y)

    def standard_data(self, y: Tensor) -> Tensor:
        """Data in units of their spread."""
        return (y - self.y_mean) / self.y_sd

    def outside(self, y: Tensor) -> int:
        """How many of the data (data_dim,) lie outside all that was simulated."""
        return int(((y < self.y_low) | (y > self.y_high)).sum())

    def distance(self, z: Tensor, y: Tensor) -> float:
        """How far other simulations are from these: the largest difference of shares, in standard errors."""
        both = torch.cat([z, y], 1)
        gap = (_at_or_below(both, self.marks) - self.shares).abs()
        # No share is so close to 0 or 1 that a single row decides.
        spread = (self.shares * (1 - self.shares)).clamp(min=0.01).sqrt()
        return float((gap / spread).max() / math.sqrt(1 / len(z) + 1 / int(self.rows)))


def _at_or_below(values: Tensor, marks: Tensor) -> Tensor:
    """Share of the rows (rows, n) at or below each mark (marks, n)."""
    return torch.stack([(values <= mark).to(marks.dtype).mean(0) for mark in marks])


class Training(ABC):
    """All that changes while training, and all that a checkpoint holds.

    Args:
        options: of the backend.
        pairs: simulates the program.
        generator: source of all randomness.
        start: network and scales to go on from.
    """

    def __init__(
        self,
        options: TrainingOptions,
        pairs: Pairs,
        generator: torch.Generator,
        start: tuple[nn.Module, Scales] | None = None,
    ) -> None:
        self.options, self.pairs, self.generator = options, pairs, generator
        rows = max(1, BLOCK // ((pairs.dim + pairs.data_dim) * options.batch))
        self.per_block = min(BATCHES_AT_ONCE, rows)
        if start is None:
            self.scales = self.measure(*self._simulate(_seed(generator)))
            self.network = self.build(generator)
        else:
            self.network, self.scales = copy.deepcopy(start[0]), start[1]
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.network.train().requires_grad_(True)
        self.weights: list[Tensor] = list(self.network.parameters())
        self.first, self.second = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.history = torch.full((options.steps,), math.nan, dtype=torch.float64)
        self.step, self.block_seed = 0, 0
        self._block: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def measure(self, z: Tensor, y: Tensor) -> Scales:
        """Scales of simulated latents (rows, dim) and data (rows, data_dim)."""

    @abstractmethod
    def build(self, generator: torch.Generator) -> nn.Module:
        """A new network."""

    @abstractmethod
    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of `self.network` on standardised latents and data, 0-d; noise comes from `self.generator`."""

    def run(self, monitor: Monitor, **cost: float) -> None:
        """All steps that are left, with checkpoints, after what a checkpoint holds.

        Args:
            monitor: progress, checkpoints, Ctrl-C.
            **cost: what one step adds to the cost.
        """
        finished = monitor.finished("training")
        saved = finished if finished is not None else monitor.resume()
        if saved is not None:
            self.load(saved)
        if finished is not None:
            return
        for _ in monitor.steps(self.options.steps, "training", start=self.step):
            loss = self.advance()
            monitor.cost.add(**cost)
            monitor.report(loss=loss)
            monitor.checkpoint(self.step, self.state)
        if monitor.interrupted:
            monitor.checkpoint(self.step, self.state)
        monitor.finish("training", self.state())

    def advance(self) -> float:
        """One step of Adam on fresh pairs; returns its loss."""
        place = self.step % self.per_block
        if place == 0:
            self.block_seed, self._block = _seed(self.generator), None
        if self._block is None:
            z, y = self.scales.standard(*self._simulate(self.block_seed))
            self._block = (z.to(dtype_of(self.network)), y.to(dtype_of(self.network)))
        rows = slice(place * self.options.batch, (place + 1) * self.options.batch)
        z, y = (v[rows] for v in self._block)
        with torch.enable_grad():
            loss = self.loss(z, y)
            gradient = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the training loss is {value} at step {self.step}; lower lr, or check the priors' tails"
            )
        self.history[self.step] = value
        self.step += 1
        self._adam(list(gradient))
        self._average()
        return value

    def _simulate(self, seed: int) -> tuple[Tensor, Tensor]:
        own = torch.Generator(self.pairs.program.device).manual_seed(seed)
        return self.pairs.draw(self.per_block * self.options.batch, own)

    @torch.no_grad()
    def _adam(self, gradient: list[Tensor]) -> None:
        """One step downhill, with the norm of the gradient clipped."""
        norm = torch.stack(torch._foreach_norm(gradient)).norm()
        torch._foreach_mul_(gradient, (CLIP / norm.clamp(min=CLIP)).to(gradient[0].dtype))
        torch._foreach_lerp_(self.first, gradient, 1 - BETA_1)
        torch._foreach_lerp_(self.second, torch._foreach_mul(gradient, gradient), 1 - BETA_2)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_div_(scale, math.sqrt(1 - BETA_2**self.step))
        torch._foreach_add_(scale, EPSILON)
        rate = self.options.lr * self._schedule() / (1 - BETA_1**self.step)
        torch._foreach_addcdiv_(self.weights, self.first, scale, -rate)

    def _schedule(self) -> float:
        """Share of the learning rate: a line up, half a cosine down."""
        part = self.step / self.options.steps
        return part / WARMUP if part < WARMUP else 0.5 * (1 + math.cos(math.pi * (part - WARMUP) / (1 - WARMUP)))

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights: (1 - 1/t)^(ema + 1) of the old ones stays after step t."""
        keep = (1 - 1 / self.step) ** (self.options.ema + 1)
        torch._foreach_lerp_(list(self.averaged.parameters()), self.weights, 1 - keep)
        for mine, theirs in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs, beside the generator."""
        tensors = {
            "history": self.history,
            "block_seed": torch.tensor(self.block_seed),
            "done": torch.tensor(self.step),
            **{f"scales.{n}": v for n, v in vars(self.scales).items()},
        }
        for part, module in (("network", self.network), ("averaged", self.averaged)):
            tensors |= {f"{part}.{n}": v for n, v in module.state_dict().items()}
        for i, pair in enumerate(zip(self.first, self.second, strict=True)):
            tensors |= {f"adam.{i}.{moment}": v for moment, v in zip(("first", "second"), pair, strict=True)}
        return {n: v.detach().clone() for n, v in tensors.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

        def part(prefix: str) -> dict[str, Any]:
            return {n.removeprefix(prefix): v for n, v in saved.items() if n.startswith(prefix)}

        self.history, self.step = saved["history"], int(saved["done"])
        self.block_seed, self._block = int(saved["block_seed"]), None
        self.scales = Scales(**part("scales."))
        self.network.load_state_dict(part("network."))
        self.averaged.load_state_dict(part("averaged."))
        for moment, values in (("first", self.first), ("second", self.second)):
            for i, value in enumerate(values):
                value.copy_(saved[f"adam.{i}.{moment}"])


def _moments(values: Tensor, sizes: list[int], entrywise: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, or of each block of columns; 1 where there is no spread."""
    if entrywise:
        mean, sd = values.mean(0), values.std(0)
    else:
        parts = values.split(sizes, 1)
        mean = torch.cat([p.mean().expand(p.shape[1]) for p in parts])
        sd = torch.cat([p.std().expand(p.shape[1]) for p in parts])
    return mean, torch.where(sd > 1e-9 * mean.abs(), sd, torch.ones_like(sd))


def dtype_of(network: nn.Module) -> torch.dtype:
    """The floating type of a network's weights."""
    return next(network.parameters()).dtype


def judged_rows(pairs: Pairs) -> int:
    """How many fresh pairs a held-out loss is taken over."""
    return max(2, min(JUDGED, BLOCK // (pairs.dim + pairs.data_dim)))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))

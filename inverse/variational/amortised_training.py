"""Training the denoiser of an amortised posterior: every step sees pairs that no step saw before.

min E_{p(z, y)} E_{sigma, n} lambda(sigma) |D(z + sigma n, sigma, y) - z|^2, with optimum D = E[z | z + sigma n, y]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inverse.variational.amortised_network import ResidualMLP, Shaped
from inverse.variational.amortised_pairs import Pairs
from ppl.errors import NotFiniteError, OptionError
from ppl.trace import seeded
from sde.denoiser import EDMDenoiser

if TYPE_CHECKING:
    from inverse.variational.amortised import AmortisedDenoiser

__all__ = ["Scales", "Training", "build_network", "judge"]

BLOCK = 2**22  # numbers simulated at once, at most
BATCHES_AT_ONCE = 16
WARMUP = 0.05  # share of the steps in which the learning rate rises
CLIP = 1.0
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-8  # of Adam, Kingma & Ba (2015)
JUDGED = 2048  # fresh pairs behind the held-out loss, at most


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


def build_network(options: AmortisedDenoiser, pairs: Pairs, generator: torch.Generator) -> nn.Module:
    """The network on vectors: a new MLP, or a copy of the user's own."""
    if options.network is None:
        with seeded(generator):
            network = ResidualMLP(pairs.dim, pairs.data_dim, options.width, options.depth)
        return network.to(pairs.program.device, torch.float32)
    shapes = [s[0] if len(s) == 1 else (n,) for s, n in _shapes(pairs)]
    own_network = Shaped(copy.deepcopy(options.network).to(pairs.program.device), *shapes)
    own = next((p for p in own_network.parameters()), None)
    if own is None:
        raise OptionError("the network has no parameters, so there is nothing to train")
    x, y = (torch.zeros(2, n, dtype=own.dtype, device=own.device) for n in (pairs.dim, pairs.data_dim))
    with torch.no_grad(), seeded(generator):
        try:
            own_network(x, x[:, 0], y)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OptionError(
                f"the network cannot be called with (x: (rows, {', '.join(map(str, shapes[0]))}), level: (rows,), "
                f"data: (rows, {', '.join(map(str, shapes[1]))})), or does not return what has the shape of x: {error}"
            ) from error
    return own_network


def judge(
    network: nn.Module, options: Mapping[str, float], scales: Scales, pairs: Pairs, seed: int
) -> tuple[float, float, float]:
    """Mean denoising loss on fresh pairs, its standard error, and how far the pairs are from those of the training.

    Noise levels are the quantiles of the law trained on, so that their scatter adds nothing to the error.
    """
    generator = torch.Generator(pairs.program.device).manual_seed(seed)
    rows = max(2, min(JUDGED, BLOCK // (pairs.dim + pairs.data_dim)))
    raw = pairs.draw(rows, generator)
    clean, data = (v.to(_dtype(network)) for v in scales.standard(*raw))
    ranks = (torch.arange(rows, dtype=torch.float64, device=clean.device) + 0.5) / rows
    sigma = torch.exp(options["p_mean"] + options["p_std"] * torch.special.ndtri(ranks)).to(clean)
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=generator.device)
    was = network.training
    with torch.no_grad(), seeded(generator):
        network.eval()
        parts = [
            EDMDenoiser(network, 1.0).loss(*part)
            for part in zip(*(v.split(512) for v in (clean, sigma, noise, data)), strict=True)
        ]
    network.train(was)
    loss = torch.cat(parts).double()
    # Neighbours share their noise level all but exactly: their differences are what is left to chance.
    stderr = float((loss.diff().square().mean() / (2 * rows)).sqrt())
    return float(loss.mean()), stderr, scales.distance(*raw)


class Training:
    """All that changes while training, and all that a checkpoint holds.

    Args:
        options: of the backend.
        pairs: simulates the program.
        generator: source of all randomness.
        start: network and scales to go on from.
    """

    def __init__(
        self,
        options: AmortisedDenoiser,
        pairs: Pairs,
        generator: torch.Generator,
        start: tuple[nn.Module, Scales] | None = None,
    ) -> None:
        self.options, self.pairs, self.generator = options, pairs, generator
        rows = max(1, BLOCK // ((pairs.dim + pairs.data_dim) * options.batch))
        self.per_block = min(BATCHES_AT_ONCE, rows)
        if start is None:
            self.scales = Scales.of(*self._simulate(_seed(generator)), pairs, entrywise=options.network is None)
            self.network = build_network(options, pairs, generator)
        else:
            self.network, self.scales = copy.deepcopy(start[0]), start[1]
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.network.train().requires_grad_(True)
        self.weights: list[Tensor] = list(self.network.parameters())
        self.first, self.second = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.history = torch.full((options.steps,), math.nan, dtype=torch.float64)
        self.step, self.block_seed = 0, 0
        self._block: tuple[Tensor, Tensor] | None = None

    def advance(self) -> float:
        """One step of Adam on fresh pairs; returns its loss."""
        place = self.step % self.per_block
        if place == 0:
            self.block_seed, self._block = _seed(self.generator), None
        if self._block is None:
            z, y = self.scales.standard(*self._simulate(self.block_seed))
            self._block = (z.to(_dtype(self.network)), y.to(_dtype(self.network)))
        rows = slice(place * self.options.batch, (place + 1) * self.options.batch)
        clean, data = (v[rows] for v in self._block)
        sigma, noise = _levels(self.options.levels_of_training, clean, self.generator)
        with torch.enable_grad(), seeded(self.generator):  # a network with dropout draws from the global generator
            loss = EDMDenoiser(self.network, 1.0).loss(clean, sigma, noise, data).mean()
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


def _levels(options: Mapping[str, float], clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels (rows,) and noise (rows, dim) of one batch."""
    own: dict[str, Any] = {"dtype": clean.dtype, "device": generator.device}
    sigma = torch.exp(options["p_mean"] + options["p_std"] * torch.randn(len(clean), generator=generator, **own))
    return sigma, torch.randn(clean.shape, generator=generator, **own)


def _moments(values: Tensor, sizes: list[int], entrywise: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, or of each block of columns; 1 where there is no spread."""
    if entrywise:
        mean, sd = values.mean(0), values.std(0)
    else:
        parts = values.split(sizes, 1)
        mean = torch.cat([p.mean().expand(p.shape[1]) for p in parts])
        sd = torch.cat([p.std().expand(p.shape[1]) for p in parts])
    return mean, torch.where(sd > 1e-9 * mean.abs(), sd, torch.ones_like(sd))


def _shapes(pairs: Pairs) -> list[tuple[list[tuple[int, ...]], int]]:
    """Shapes of the latents and of the data, each with the length of their vector."""
    return [(list(pairs.latent_shapes.values()), pairs.dim), (list(pairs.data_shapes.values()), pairs.data_dim)]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))

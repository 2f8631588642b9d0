"""A small U-Net for images of 8 to 32 pixels: F(x, noise_level, label), the raw network inside an EDM denoiser.

The image is first folded, patch x patch pixels into channels, so that a 28 x 28 image is worked on at 14 x 14 and
7 x 7; the finest level, where a plain U-Net spends most of its time, is not there. Everything is made of operations
with batching, forward and reverse rules, without in-place writes and without branches on values, so the network can
stand inside `torch.func.vmap`, `jvp` and `vjp`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ppl.errors import OptionError, ShapeError

__all__ = ["UNet", "UNetConfig"]


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a `UNet`; goes to JSON and back.

    Args:
        event_shape: (channels, height, width) of an image.
        patch: side of the squares folded into channels before the first convolution.
        widths: channels at each resolution, finest first; every further entry halves the side.
        blocks: residual blocks per resolution, on the way down and again on the way up.
        attention: one self-attention block at the coarsest resolution.
        heads: heads of that attention.
        embedding: width of the noise-level and label embedding.
        labels: number of classes; 0 for a network without labels. Index `labels` is the null label.
        dropout: share of features dropped inside residual blocks while training.

    Raises:
        OptionError: if a size does not divide the one it must divide, or is out of range.

    Example:
        >>> UNetConfig.from_json(UNetConfig((1, 8, 8), patch=1).to_json()) == UNetConfig((1, 8, 8), patch=1)
        True
    """

    event_shape: tuple[int, int, int] = (1, 28, 28)
    patch: int = 2
    widths: tuple[int, ...] = (48, 96)
    blocks: int = 2
    attention: bool = True
    heads: int = 4
    embedding: int = 128
    labels: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.event_shape) != 3 or min(self.event_shape) < 1:
            raise OptionError(f"event_shape must be (channels, height, width), got {self.event_shape}")
        unit = self.patch * 2 ** (len(self.widths) - 1)
        if self.patch < 1 or not self.widths or any(side % unit for side in self.event_shape[1:]):
            raise OptionError(
                f"height and width must be multiples of patch * 2^(levels - 1) = {unit}, got {self.event_shape[1:]}; "
                "use a smaller patch or fewer widths"
            )
        if any(width < _GROUPS or width % _GROUPS for width in self.widths):
            raise OptionError(f"widths must be multiples of {_GROUPS} (the groups of GroupNorm), got {self.widths}")
        if self.attention and (self.heads < 1 or self.widths[-1] % self.heads):
            raise OptionError(f"heads must divide the last width {self.widths[-1]}, got {self.heads}")
        if self.blocks < 1 or self.embedding < 2 or self.labels < 0:
            raise OptionError("blocks must be 1 or more, embedding 2 or more and labels 0 or more")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout must be in [0, 1), got {self.dropout}")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UNetConfig:
        """The config whose `to_json` gave these values.

        Raises:
            OptionError: if a field is unknown.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"unknown fields {sorted(unknown)} for UNetConfig; was it written by a newer version?")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


_GROUPS = 8
_FREQUENCIES = 16


class UNet(nn.Module):
    """F(x, noise_level, label), an image-to-image network modulated by noise level and class.

    Args:
        config: the shape of the network.
        generator: draws the initial weights; without one they come from a generator seeded with 0.

    Example:
        >>> network = UNet(UNetConfig((1, 8, 8), patch=1, widths=(8, 16), blocks=1, embedding=16))
        >>> network(torch.zeros(3, 1, 8, 8), torch.zeros(3), torch.tensor([0, 5, 9])).shape
        torch.Size([3, 1, 8, 8])
    """

    frequencies: Tensor

    def __init__(self, config: UNetConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        # Modules draw default weights from the global generator, all of which are drawn again below.
        with torch.random.fork_rng(devices=[]):
            self._build(config)
        self._initialise(generator or torch.Generator().manual_seed(0))
        # Convolutions read the layout off their weights; this one is three times faster on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _build(self, config: UNetConfig) -> None:
        """Make the modules."""
        channels = config.event_shape[0] * config.patch**2
        widths, emb = config.widths, config.embedding
        # Periods from 4 down to 1/8 in ln(sigma) / 4: smooth in sigma, so derivatives along the schedule stay tame.
        self.register_buffer("frequencies", 2 * math.pi * 2 ** torch.linspace(-2, 3, _FREQUENCIES))
        self.embed_noise = nn.Sequential(nn.Linear(2 * _FREQUENCIES, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_label = nn.Embedding(config.labels + 1, emb) if config.labels else None
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)

        down: list[nn.ModuleList] = []
        self.shrink = nn.ModuleList()
        skips = []
        width = widths[0]
        for level, w in enumerate(widths):
            down.append(nn.ModuleList())
            for _ in range(config.blocks):
                down[level].append(_Residual(width, w, emb, config.dropout))
                width = w
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(w, w, 3, stride=2, padding=1))
        self.attention = _Attention(width, config.heads) if config.attention else None
        up: list[nn.ModuleList] = []
        self.grow = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            up.append(nn.ModuleList())
            for _ in range(config.blocks):
                up[-1].append(_Residual(width + skips.pop(), w, emb, config.dropout))
                width = w
            if level > 0:
                self.grow.append(nn.Conv2d(w, widths[level - 1], 3, padding=1))
                width = widths[level - 1]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm = _Norm(_GROUPS, width)
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, noise_level: Tensor, label: Tensor | None = None) -> Tensor:
        """The raw network output.

        Args:
            x: (batch, channels, height, width).
            noise_level: (batch,), ln(sigma) / 4 in an EDM denoiser.
            label: (batch,) integers in [0, labels]; `labels` is the null label, which None stands for too.

        Returns:
            (batch, channels, height, width).

        Raises:
            ShapeError: if x is not a batch of images of the network's event shape.
            OptionError: if a label is given to a network without labels.
        """
        config = self.config
        if x.shape[1:] != config.event_shape:
            raise ShapeError(
                f"the network takes (batch, {', '.join(map(str, config.event_shape))}), got {tuple(x.shape)}; "
                "flatten leading axes into one batch axis first"
            )
        emb = self._embed(x.shape[0], noise_level, label)
        h = self.stem(_fold(x, config.patch))
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, emb)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        if self.attention is not None:
            h = self.attention(h)
        for level, blocks in enumerate(self.up):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if level < len(self.grow):
                h = self.grow[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return _unfold(self.head(F.silu(self.norm(h))), config.patch)

    def _embed(self, batch: int, noise_level: Tensor, label: Tensor | None) -> Tensor:
        """(batch, embedding): noise level and label together."""
        angle = noise_level.reshape(-1, 1).expand(batch, 1) * self.frequencies
        emb = self.embed_noise(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.embed_label is None:
            if label is not None:
                raise OptionError("this network was built without labels (labels=0); leave label out")
            return F.silu(emb)
        if label is None:
            label = torch.full((batch,), self.config.labels, dtype=torch.long, device=emb.device)
        return F.silu(emb + self.embed_label(label.reshape(-1).expand(batch)))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Fan-in normal weights; residual branches and the head start at zero, so D starts at c_skip x."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)
        for module in self.modules():
            if isinstance(module, _Residual):
                module.second.weight.zero_()
            elif isinstance(module, _Attention):
                module.out.weight.zero_()
        self.head.weight.zero_()


def _fold(x: Tensor, patch: int) -> Tensor:
    """Squares of patch x patch pixels into channels; torch's pixel_unshuffle fails for an empty batch."""
    batch, channels, rows, columns = x.shape
    x = x.reshape(batch, channels, rows // patch, patch, columns // patch, patch).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * patch**2, rows // patch, columns // patch)


def _unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `_fold`."""
    batch, channels, rows, columns = x.shape
    x = x.reshape(batch, channels // patch**2, patch, patch, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // patch**2, rows * patch, columns * patch)


class _Norm(nn.GroupNorm):
    """GroupNorm whose forward-mode derivative also takes channels-last images."""

    def forward(self, x: Tensor) -> Tensor:
        # The jvp of torch's group norm views its input, which channels-last strides do not allow; the copy costs
        # reverse mode a third, so it is made only inside forward mode.
        return super().forward(x.contiguous() if forward_ad._current_level >= 0 else x)


class _Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) (1 + scale) + shift)), scale and shift from the embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_first = _Norm(_GROUPS, inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm_second = _Norm(_GROUPS, outputs)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.first(F.silu(self.norm_first(x)))
        h = self.norm_second(h) * (1 + scale) + shift
        return self.skip(x) + self.second(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(width)) v) over the pixels of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _Norm(_GROUPS, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        # Written out: the fused kernels have no forward-mode derivative.
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, width // self.heads, rows * columns).unbind(1)
        weight = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) * (width // self.heads) ** -0.5, dim=-1)
        return x + self.out(torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(batch, width, rows, columns))

"""A latent video model: a few coordinates move by a stochastic differential equation, a network draws the frames.

What does not change, how the digit looks, is a median over the frames; what moves is the latent path. Forecasts follow
the posterior to the last frame seen and then the prior, with the noise's own memory.

Source: Daems et al. (ICLR 2024), the video model of the public code [read], at reduced size: 16 x 16 pixels, one digit.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.latent_encoding import Encoding
from models.latent_sde import LatentSDE
from models.zoo import read_checked
from ppl.errors import OptionError, WeightsError
from sde.fractional import Kind

__all__ = ["FrameDecoder", "VideoConfig", "VideoEncoder", "load_video", "psnr", "score", "video_model"]

WEIGHTS = "moving_digits"


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of a video model.

    Args:
        hurst: Hurst index, "learn", or None for Brownian motion without factors.
        horizon: last time that will be asked for, forecasts included.
        frame_step: time between two frames.
        size: pixels along an edge, a multiple of 8.
        latent: coordinates that move.
        content: numbers that stay.
        features: numbers read off one frame.
        channels: of the first convolution; later ones have two and four times as many.
        width: units of drift and control.
        kind: of a fractional noise, see `LatentSDE`.
        factors: K of a fractional noise.
        substeps: steps of the process between two frames.
        scales: see `LatentSDE`.

    Raises:
        OptionError: an option is out of range.
    """

    hurst: float | Literal["learn"] | None = "learn"
    horizon: float = 2.4
    frame_step: float = 0.1
    size: int = 16
    latent: int = 4
    content: int = 12
    features: int = 48
    channels: int = 8
    width: int = 48
    factors: int = 5
    substeps: int = 1
    scales: bool = True
    kind: Kind = "II"

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8 or self.channels % 4 or self.channels < 4:
            raise OptionError(
                f"size must be a multiple of 8 and channels one of 4, got {self.size} and {self.channels}"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class VideoEncoder(nn.Module):
    """Features of every frame; a median over frames for the content, convolutions along time for the control.

    Args:
        config: sizes.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        c, self.context = config.channels, 32
        blocks: list[nn.Module] = []
        for a, b in ((1, c), (c, 2 * c), (2 * c, 4 * c)):
            blocks += [nn.Conv2d(a, b, 3, padding=1), nn.MaxPool2d(2), nn.GroupNorm(4, b), nn.SiLU()]
        self.frame = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * c * (config.size // 8) ** 2, config.features))
        self.still = nn.Sequential(
            nn.Linear(config.features, config.features), nn.SiLU(), nn.Linear(config.features, 2 * config.content)
        )
        self.first_time = nn.Conv1d(config.features, self.context, 3, padding=1)
        self.second_time = nn.Conv1d(self.context, self.context, 3, padding=1)
        self.start = nn.Sequential(
            nn.Linear(self.context + 3 * config.features, 64), nn.SiLU(), nn.Linear(64, 2 * config.latent)
        )

    def forward(self, y: Tensor) -> Encoding:
        """Read (batch, frames, size, size)."""
        features = self.frame(y.flatten(0, 1)[:, None]).unflatten(0, y.shape[:2])
        content = self.still(features.median(1).values)
        context = self.second_time(nn.functional.silu(self.first_time(features.mT))).mT
        early = features[:, [min(i, y.shape[1] - 1) for i in range(3)]].flatten(1)
        return Encoding(context, self.start(torch.cat([context[:, 0], early], 1)), content)


class FrameDecoder(nn.Module):
    """Frames in [0, 1] from the content and the latent state of each.

    Args:
        config: sizes.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        c, small = config.channels, config.size // 4
        self.frame = nn.Sequential(
            nn.Linear(config.latent + config.content, 128), nn.SiLU(),
            nn.Linear(128, 4 * c * small**2), nn.Unflatten(1, (4 * c, small, small)), nn.GroupNorm(4, 4 * c), nn.SiLU(),
            nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1), nn.GroupNorm(4, 2 * c), nn.SiLU(),
            nn.ConvTranspose2d(2 * c, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor, content: Tensor | None) -> Tensor:
        """(batch, frames, latent) and (batch, content) -> (batch, frames, size, size)."""
        parts = [x] if content is None else [x, content[:, None].expand(*x.shape[:2], -1)]
        return self.frame(torch.cat(parts, -1).flatten(0, 1))[:, 0].unflatten(0, x.shape[:2])


def video_model(config: VideoConfig, generator: torch.Generator) -> LatentSDE:
    """A model with fresh weights.

    Args:
        config: sizes and noise.
        generator: source of the weights.

    Example:
        >>> model = video_model(VideoConfig(), torch.Generator().manual_seed(0))
        >>> videos = torch.rand(2, 6, 16, 16)
        >>> model.forecast(videos, 3, draws=4, generator=torch.Generator().manual_seed(0)).mean.shape
        torch.Size([4, 2, 3, 16, 16])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return LatentSDE(
            VideoEncoder(config), FrameDecoder(config), config.latent, config.horizon, frame_step=config.frame_step,
            hurst=config.hurst, factors=config.factors, substeps=config.substeps, content=config.content,
            width=config.width, scales=config.scales, kind=config.kind,
        )  # fmt: skip


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1], (*batch) over the last two axes.

    Example:
        >>> psnr(torch.full((4, 4), 0.1), torch.zeros(4, 4)).item()
        20.0
    """
    return -10 * (found - truth).square().mean((-1, -2)).clamp_min(1e-10).log() / math.log(10)


def place(frames: Tensor) -> Tensor:
    """The centre of mass of images, (..., size, size) -> (..., 2) rows and columns.

    Example:
        >>> place(torch.eye(3)[None]).tolist()
        [[1.0, 1.0]]
    """
    at = torch.arange(frames.shape[-1], dtype=frames.dtype, device=frames.device)
    mass = frames.sum((-1, -2)).clamp_min(1e-6)
    return torch.stack([(frames.sum(-1) * at).sum(-1), (frames.sum(-2) * at).sum(-1)], -1) / mass[..., None]


@torch.no_grad()
def score(model: LatentSDE, videos: Tensor, frames: int, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a model makes of videos whose first frames it sees, one number for each video.

    Args:
        model: trained.
        videos: (videos, frames + ahead, size, size).
        frames: how many are seen.
        draws: forecasts of each video.
        generator: source of randomness.

    Returns:
        (videos,) each: `bound`, nats for a frame seen; PSNR in dB of `reconstruction` and of forecasts: `draw`, one of
        them; `best` of all; their `mean`; `last`, the last frame seen held still. For the place of the digit in frames
        to come: `distance` of the mean from the truth in pixels, and `covered`, how often a coordinate lies in the
        central 90 % of the draws.
    """
    seen, future = videos[:, :frames], videos[:, frames:]
    drawn = model.forecast(seen, future.shape[1], draws, generator).mean
    quality = psnr(drawn, future).mean(-1)
    where, truth = place(drawn), place(future)
    low, high = where.quantile(torch.tensor([0.05, 0.95]), 0)
    return {
        "bound": model.bound(seen, generator).value / frames,
        "reconstruction": psnr(model.reconstruct(seen, 1, generator).mean[0], seen).mean(-1),
        "draw": quality.mean(0),
        "best": quality.amax(0),
        "mean": psnr(drawn.mean(0), future).mean(-1),
        "last": psnr(seen[:, -1:], future).mean(-1),
        "distance": (where.mean(0) - truth).norm(dim=-1).mean(-1),
        "covered": ((truth >= low) & (truth <= high)).float().mean((-1, -2)),
    }


def load_video(motion: str, noise: str) -> LatentSDE:
    """A trained model that comes with the package, in evaluation mode.

    Args:
        motion: "smooth".
        noise: "brownian" or "fractional".

    Raises:
        WeightsError: no such model, or a damaged file.

    Example:
        >>> model = load_video("smooth", "fractional")
        >>> 0.5 < float(model.hurst) < 1
        True
    """
    folder = resources.files("models") / "weights"
    known = json.loads((folder / f"{WEIGHTS}.json").read_text())
    name = f"{motion}_{noise}"
    if name not in known["models"]:
        raise WeightsError(f"there is no video model {name!r}; choose one of: {', '.join(known['models'])}")
    tensors, _ = read_checked(folder / f"{WEIGHTS}.safetensors", known["sha256"])
    model = video_model(VideoConfig(**known["models"][name]["config"]), torch.Generator().manual_seed(0))
    own = {k.removeprefix(f"{name}/"): w.float() for k, w in tensors.items() if k.startswith(f"{name}/")}
    model.load_state_dict(own)
    return model.eval().requires_grad_(False)

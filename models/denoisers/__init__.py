"""Networks that denoise, and the loop that trains them."""

from __future__ import annotations

from models.denoisers.config import TrainConfig
from models.denoisers.run import TrainedDenoiser
from models.denoisers.train import TrainProgress, train
from models.denoisers.unet import UNet, UNetConfig

__all__ = ["TrainConfig", "TrainProgress", "TrainedDenoiser", "UNet", "UNetConfig", "train"]

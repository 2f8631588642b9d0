"""Networks, trained priors and whole models as Pyro programs.

`load(name)` gives a trained diffusion prior, ready to be a site of a program; `available()` lists the names.
"""

from __future__ import annotations

from models.data import ImageData, digits, fashion_mnist, held_out_fashion
from models.denoisers import TrainConfig, TrainedDenoiser, TrainProgress, UNet, UNetConfig, train
from models.zoo import available, facts, load, save

__all__ = [
    "ImageData",
    "TrainConfig",
    "TrainProgress",
    "TrainedDenoiser",
    "UNet",
    "UNetConfig",
    "available",
    "digits",
    "facts",
    "fashion_mnist",
    "held_out_fashion",
    "load",
    "save",
    "train",
]

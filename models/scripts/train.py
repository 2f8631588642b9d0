"""Train a prior that comes with the package: `python -m models.scripts.train fashion28x28`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.data import ImageData, digits, fashion_mnist
from models.denoisers import TrainConfig, TrainProgress, UNetConfig, train

__all__ = ["RECIPES", "Recipe", "main"]


@dataclass(frozen=True)
class Recipe:
    """What makes one shipped prior.

    Args:
        data: loads the images.
        config: of the training; its sigma_data is the root mean square of the training pixels.
        sigma_min: lowest noise level of the prior.
        sigma_max: highest, about ten times the largest principal standard deviation of the data.
    """

    data: Callable[[], ImageData]
    config: TrainConfig
    sigma_min: float
    sigma_max: float


RECIPES = {
    "digits8x8": Recipe(
        data=digits,
        config=TrainConfig(
            network=UNetConfig((1, 8, 8), patch=1, widths=(48, 96), blocks=2, embedding=96, dropout=0.15),
            sigma_data=0.847,
            p_mean=-0.7,
            p_std=1.2,
            steps=6000,
            batch=128,
            learning_rate=1e-3,
            warmup=200,
            cooldown=3000,
            evaluate_every=250,
            evaluate_images=297,
            patience=8,
        ),
        sigma_min=0.01,
        sigma_max=20.0,
    ),
    "fashion28x28": Recipe(
        data=fashion_mnist,
        config=TrainConfig(
            network=UNetConfig((1, 28, 28), patch=2, widths=(32, 96), blocks=2, embedding=128),
            sigma_data=0.826,
            p_mean=-0.5,
            p_std=1.5,
            steps=14_000,
            batch=128,
            learning_rate=1.5e-3,
            warmup=300,
            cooldown=4_500,
            evaluate_every=250,
            evaluate_images=512,
        ),
        sigma_min=0.01,
        sigma_max=80.0,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Train one recipe, resuming from its checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: runs/NAME.safetensors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: what torch chooses")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]

    def say(now: TrainProgress) -> None:
        if now.held_out is not None:
            losses = f"loss {now.loss:.4f}  held out {now.held_out:.4f}"
            print(f"step {now.step}  {losses}  {now.images_per_second:.0f} images/s", flush=True)

    path = options.checkpoint or Path("runs") / f"{options.name}.safetensors"
    train(recipe.data(), recipe.config, checkpoint=path, callback=say, device=options.device)


if __name__ == "__main__":
    main()

"""Model cards: what was measured about a prior, and a picture of its draws. `python -m models.card digits8x8`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data import ImageData
from models.features import frechet_distance, nearest_distance, train_classifier
from models.zoo import facts, load
from sde.diffusion import DiffusionPrior

__all__ = ["LinearDenoiser", "measure", "picture", "write_card"]


class LinearDenoiser:
    r"""The best linear denoiser, m + C (C + sigma^2 I)^{-1} (x - m), with mean and covariance of a set of images.

    A network that learned the data must beat it: it is exact only for Gaussian data.

    Args:
        images: (n, *event) that the mean and covariance are taken from.
    """

    def __init__(self, images: Tensor) -> None:
        flat = images.double().flatten(1)
        self.mean = flat.mean(0)
        values, self.vectors = torch.linalg.eigh(torch.cov(flat.T))
        self.values = values.clamp(min=0)

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Denoise x: (batch, *event) at one noise level."""
        z = (x.double().flatten(1) - self.mean) @ self.vectors
        z = z * (self.values / (self.values + float(sigma) ** 2))
        return (self.mean + z @ self.vectors.T).reshape(x.shape).to(x.dtype)


def measure(
    prior: DiffusionPrior,
    data: ImageData,
    *,
    draws: int = 1000,
    denoised: int = 500,
    classifier_steps: int = 1500,
    seed: int = 0,
) -> tuple[dict[str, Any], Tensor]:
    """Measure a prior against held-out images.

    Args:
        prior: a trained prior.
        data: the images it was trained on, and others.
        draws: draws per comparison; at most the number of held-out images.
        denoised: images denoised at each noise level.
        classifier_steps: training steps of the feature network.
        seed: of noise, draws and feature network.

    Returns:
        Facts as JSON values, and (draws, *event) draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = min(draws, len(data.held_out))
    classes = len(data.classes)
    x = _draws(prior, draws, generator)
    asked = torch.arange(draws) % classes
    x_given = torch.empty_like(x)
    for c in range(classes):
        x_given[asked == c] = _draws(prior(label=c), int((asked == c).sum()), generator)
    classifier = train_classifier(data, classifier_steps, seed=seed)
    # As many training images as draws, by the same feature network: what two samples of the data differ by.
    some = data.train[torch.randperm(len(data.train), generator=generator)[:draws]]
    others = data.held_out[torch.randperm(len(data.held_out), generator=generator)[:draws]]
    reference = classifier.embed(others)
    bank = data.train
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9])
    near_draws, near_others = nearest_distance(x, bank), nearest_distance(others, bank)
    low, high = data.data_range
    measured = {
        "draws": draws,
        "steps": prior.steps,
        "denoising": _denoising(prior, data, denoised, generator),
        "frechet": {
            "draws_to_held_out": frechet_distance(classifier.embed(x), reference),
            "label_draws_to_held_out": frechet_distance(classifier.embed(x_given), reference),
            "training_to_held_out": frechet_distance(classifier.embed(some), reference),
            "images_each": draws,
            "classifier_accuracy": _share(classifier.predict(data.held_out) == data.held_out_label),
        },
        "label_agreement": _share(classifier.predict(x_given) == asked),
        "class_shares_of_draws": [_share(classifier.predict(x) == c) for c in range(classes)],
        "nearest_training_image": {
            "quantiles": quantiles.tolist(),
            "draws": near_draws.quantile(quantiles).tolist(),
            "held_out": near_others.quantile(quantiles).tolist(),
        },
        "pixels": {
            "mean_of_draws": float(x.mean()),
            "mean_of_held_out": float(others.mean()),
            "sd_of_draws": float(x.std()),
            "sd_of_held_out": float(others.std()),
            "share_of_draws_outside_range_by_0.1": _share((x < low - 0.1) | (x > high + 0.1)),
        },
    }
    return _rounded(measured), x


def picture(images: Tensor, path: str | Path, *, columns: int = 16, data_range: tuple[float, float] = (-1, 1)) -> None:
    """Write images side by side as a PNG.

    Args:
        images: (n, 1, height, width); as many as fill whole rows are shown.
        path: of the PNG.
        columns: images per row.
        data_range: values shown black and white.
    """
    import matplotlib.image

    rows = len(images) // columns
    height, width = images.shape[-2:]
    tiles = images[: rows * columns, 0].reshape(rows, columns, height, width)
    sheet = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=data_range[1])
    sheet = sheet.transpose(1, 2).reshape(rows * (height + 2), columns * (width + 2))
    scale = max(1, round(900 / sheet.shape[1]))
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    matplotlib.image.imsave(path, sheet.numpy(), cmap="gray", vmin=data_range[0], vmax=data_range[1])


def write_card(name: str, data: ImageData, folder: str | Path, **options: Any) -> dict[str, Any]:
    """Measure a prior in a folder of weights; write NAME.md, NAME.png, and the facts into NAME.json.

    Args:
        name: of the prior.
        data: what it was trained on.
        folder: where its weights are.
        options: of `measure`.

    Returns:
        The facts.
    """
    place = Path(folder)
    measured, draws = measure(load(name, folder=place), data, **options)
    known = {**facts(name, place), "measured": measured}
    (place / f"{name}.json").write_text(json.dumps(known, indent=2) + "\n")
    picture(draws[:128], place / f"{name}.png", data_range=data.data_range)
    (place / f"{name}.md").write_text(_text(known))
    return known


def _draws(prior: DiffusionPrior, count: int, generator: torch.Generator) -> Tensor:
    """Draws in parts, to bound memory."""
    sizes = [256] * (count // 256) + ([count % 256] if count % 256 else [])
    with torch.no_grad():
        return torch.cat([prior.draw((size,), generator) for size in sizes])


@torch.no_grad()
def _denoising(
    prior: DiffusionPrior, data: ImageData, count: int, generator: torch.Generator
) -> list[dict[str, float]]:
    """Mean squared error per pixel at noise levels from sigma_min to sigma_max, and that of the linear denoiser."""
    linear = LinearDenoiser(data.train)
    held_out, label = data.held_out[:count], data.held_out_label[:count]
    index = torch.randperm(len(data.train), generator=generator)[: len(held_out)]
    rows = []
    levels = torch.logspace(math.log10(prior.sigma_min), math.log10(prior.sigma_max), 12).tolist()
    for sigma in levels:
        noise = torch.randn(held_out.shape, generator=generator)

        def error(denoised: Tensor, clean: Tensor) -> float:
            return float((denoised - clean).square().mean())

        noisy, noisy_train = held_out + sigma * noise, data.train[index] + sigma * noise
        rows.append(
            {
                "sigma": sigma,
                "held_out": error(prior.denoise(noisy, sigma), held_out),
                "held_out_with_label": error(prior.denoise(noisy, sigma, label), held_out),
                "training": error(prior.denoise(noisy_train, sigma), data.train[index]),
                "linear_held_out": error(linear(noisy, sigma), held_out),
            }
        )
    return rows


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())


def _rounded(values: Any) -> Any:
    """Four significant digits: no figure here is known better."""
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.4g}") if isinstance(values, float) else values


def _text(known: dict[str, Any]) -> str:
    """The card, from facts alone."""
    name, m, training = known["name"], known["measured"], known["training"]
    near, frechet, pixels = m["nearest_training_image"], m["frechet"], m["pixels"]
    shares = ", ".join(f"{c} {s:.3f}" for c, s in zip(known["classes"], m["class_shares_of_draws"], strict=True))
    levels = "\n".join(
        f"| {row['sigma']:.3g} | {row['held_out']:.3g} | {row['held_out_with_label']:.3g} | {row['training']:.3g} "
        f"| {row['linear_held_out']:.3g} |"
        for row in m["denoising"]
    )
    distances = "\n".join(
        f"| {q:.0%} | {d:.3g} | {h:.3g} |"
        for q, d, h in zip(near["quantiles"], near["draws"], near["held_out"], strict=True)
    )
    height, width = known["event_shape"][1:]
    runs = "; then ".join(
        f"{t['step_of_weights']} steps of {t['batch']} images, ln sigma ~ N({t['p_mean']}, {t['p_std']}^2), "
        f"{t['label_dropout']:.0%} without label, {t['seconds'] / 60:.0f} minutes"
        for t in [*known.get("earlier_training", []), training]
    )
    # Weights picked by the held-out loss have, in this one number, seen the held-out images.
    chosen = "" if training["patience"] is None else "; the step with the lowest held-out loss was kept"
    return f"""# {name}

A diffusion prior for {height} x {width} images in [{known["data_range"][0]:g}, {known["data_range"][1]:g}], with or \
without a class label: `models.load("{name}")`.

![{name}: draws]({name}.png)

The picture shows draws without a label, in the order in which they were made: none was chosen.

| | |
|---|---|
| data | {known["data"]} |
| licence of the data | {known["licence"]} |
| network | U-Net, {known["parameters"]} parameters, {known["bytes"] / 1e6:.1f} MB, sigma_data {known["sigma_data"]} |
| noise levels | sigma_min {known["sigma_min"]}, sigma_max {known["sigma_max"]}; largest principal standard \
deviation of the data {known["data_std"]} |
| training | {runs}{chosen} |
| made by | `{known["script"]}` |
| SHA-256 | `{known["sha256"]}` |

## Denoising error

Mean squared error per pixel, without a label unless stated; the linear denoiser has mean and covariance of the training
images, and is the best there is for Gaussian data.

| sigma | held out | held out, label given | training | linear, held out |
|---|---|---|---|---|
{levels}

## Draws

{m["draws"]} draws of the prior's default sampler ({m["steps"]} steps), compared with {m["draws"]} held-out images.

Frechet distance between features of a small classifier trained here ({frechet["classifier_accuracy"]:.1%} of held-out \
images right): draws to held-out {frechet["draws_to_held_out"]}; draws with labels in equal shares \
{frechet["label_draws_to_held_out"]}; the floor, training images to held-out images of the same number, \
{frechet["training_to_held_out"]}. The numbers compare with each other only, not with published FIDs.

Draws made for a label are given that label by the classifier {m["label_agreement"]:.1%} of the time. Shares of the
classes among draws without a label: {shares}.

Pixels: mean {pixels["mean_of_draws"]} (held-out {pixels["mean_of_held_out"]}), standard deviation \
{pixels["sd_of_draws"]} (held-out {pixels["sd_of_held_out"]}); {pixels["share_of_draws_outside_range_by_0.1"]:.2%} of
the pixels of draws are more than 0.1 outside the data range.

## Memory

Distance to the nearest training image. A prior that stored its training images would have draws far closer to them than
held-out images are.

| quantile | draws | held-out images |
|---|---|---|
{distances}
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure a shipped prior and write its card."""
    from models.scripts.train import RECIPES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args(arguments)
    folder = Path(__file__).parent / "weights"
    known = write_card(options.name, RECIPES[options.name].data(), folder, draws=options.draws)
    print(json.dumps(known["measured"], indent=2))


if __name__ == "__main__":
    main()

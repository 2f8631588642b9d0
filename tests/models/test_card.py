"""Model cards: the linear denoiser is the exact one for Gaussian data, and a card holds only what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import models
from models.card import LinearDenoiser, measure, picture, write_card
from sde.diffusion import DiffusionPrior

WEIGHTS = Path(models.__file__).parent / "weights"


def test_linear_denoiser_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 2, 3, generator=generator, dtype=torch.float64).cumsum(-1)
    x = torch.randn(5, 1, 2, 3, generator=generator, dtype=torch.float64)
    flat = images.flatten(1)
    c = torch.cov(flat.T)
    gain = c @ torch.linalg.inv(c + 0.7**2 * torch.eye(6, dtype=torch.float64))
    expected = flat.mean(0) + (x.flatten(1) - flat.mean(0)) @ gain.T
    torch.testing.assert_close(LinearDenoiser(images)(x, 0.7), expected.reshape(x.shape))


def test_a_prior_that_knows_the_answer_measures_as_the_linear_denoiser():
    """With the linear denoiser itself as the prior, both columns of the denoising table agree."""
    data = models.digits()
    linear = LinearDenoiser(data.train)
    prior = DiffusionPrior(
        lambda x, sigma, label=None: linear(x, sigma), (1, 8, 8), sigma_min=0.1, sigma_max=10.0, steps=4
    )
    facts, draws = measure(prior, data, draws=20, denoised=50, classifier_steps=5)
    assert draws.shape == (20, 1, 8, 8)
    for row in facts["denoising"]:
        assert row["held_out"] == row["linear_held_out"] == row["held_out_with_label"]
    assert [row["sigma"] for row in facts["denoising"]][:: len(facts["denoising"]) - 1] == [0.1, 10.0]
    assert facts["frechet"]["images_each"] == 20
    assert abs(sum(facts["class_shares_of_draws"]) - 1) < 1e-3


def test_card_is_written(tmp_path):
    for suffix in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"digits8x8.{suffix}", tmp_path)
    known = write_card("digits8x8", models.digits(), tmp_path, draws=16, denoised=8, classifier_steps=5)
    text = (tmp_path / "digits8x8.md").read_text()
    assert known["sha256"] in text
    assert str(known["measured"]["frechet"]["training_to_held_out"]) in text
    assert json.loads((tmp_path / "digits8x8.json").read_text()) == known
    assert (tmp_path / "digits8x8.png").read_bytes().startswith(b"\x89PNG")
    assert models.load("digits8x8", folder=tmp_path).event_shape == (1, 8, 8)


def test_picture_puts_images_in_rows(tmp_path):
    """Two rows of two: bright images stand where they should, the rest is dark."""
    import matplotlib.image

    images = torch.full((5, 1, 4, 4), -1.0)
    images[2] = 1.0
    picture(images, tmp_path / "x.png", columns=2)
    sheet = torch.tensor(matplotlib.image.imread(tmp_path / "x.png")[..., 0])
    quarters = [part.mean() for half in sheet.chunk(2) for part in half.chunk(2, dim=1)]
    assert torch.stack(quarters).argmax() == 2

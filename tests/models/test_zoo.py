"""Shipped priors load, say what is wrong with a bad file, and denoise better than a linear denoiser does."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import models
from models.card import LinearDenoiser
from models.data import FASHION_FOLDER
from models.denoisers import TrainConfig, UNetConfig, train
from models.zoo import read_checked
from ppl.errors import OptionError, WeightsError
from sde.diffusion import DiffusionPrior

WEIGHTS = Path(models.__file__).parent / "weights"
NAMES = ("digits8x8", "fashion28x28")


@pytest.fixture
def copied(tmp_path) -> Path:
    for suffix in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"digits8x8.{suffix}", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def fashion() -> models.ImageData:
    if not FASHION_FOLDER.is_dir():
        pytest.skip("Fashion-MNIST is not on this machine")
    return models.fashion_mnist()


def test_available_names_priors_only():
    assert models.available() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_load(name):
    known = models.facts(name)
    prior = models.load(name, steps=3)
    assert isinstance(prior, DiffusionPrior)
    assert list(prior.event_shape) == known["event_shape"]
    assert prior.data_range == (-1.0, 1.0)
    assert (prior.sigma_min, prior.sigma_max, prior.data_std) == tuple(
        known[key] for key in ("sigma_min", "sigma_max", "data_std")
    )
    assert prior.sigma_max >= 5 * prior.data_std
    draws = prior(label=3).draw((2,), torch.Generator().manual_seed(0))
    assert draws.shape == (2, *prior.event_shape)
    assert draws.dtype == torch.float32
    double = models.load(name, dtype=torch.float64)
    x = torch.randn(2, *prior.event_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(double.denoise(x.double(), 1.0).float(), prior.denoise(x, 1.0), rtol=1e-3, atol=1e-4)
    assert not any(w.requires_grad for w in prior.denoiser.parameters())
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size == known["bytes"] < 10_000_000


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_of_a_card(name):
    known = models.facts(name)
    assert {"licence", "script", "training", "classes", "data", "measured"} <= known.keys()
    assert (WEIGHTS / f"{name}.md").read_text().startswith(f"# {name}\n")
    assert (WEIGHTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_prior():
    assert models.load("digits8x8", steps=7, sigma_max=30.0).sigmas().shape == (8,)
    assert models.load("digits8x8", sigma_max=30.0).sigma_max == 30.0


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(WeightsError, match="digits8x8, fashion28x28"):
        models.load("cats")
    with pytest.raises(WeightsError, match="cats"):
        models.load("cats", folder=tmp_path)


def test_one_flipped_bit_is_noticed(copied):
    path = copied / "digits8x8.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(bytes(raw))
    expected, found = models.facts("digits8x8")["sha256"], hashlib.sha256(raw).hexdigest()
    with pytest.raises(WeightsError, match=f"{found}, expected {expected}.*install the package again"):
        models.load("digits8x8", folder=copied)


def test_missing_weights_are_named(copied):
    (copied / "digits8x8.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        models.load("digits8x8", folder=copied)


def test_weights_of_another_network_are_refused(copied):
    """A whole file with a fitting checksum, but the facts describe another network."""
    path = copied / "digits8x8.json"
    known = json.loads(path.read_text())
    known["network"]["embedding"] *= 2
    path.write_text(json.dumps(known))
    with pytest.raises(WeightsError, match=r"another network: .* expected \(.*found \("):
        models.load("digits8x8", folder=copied)


def test_foreign_files_are_refused(copied):
    """Not safetensors at all, with a checksum that fits; JSON of something else; JSON that is none."""
    path = copied / "digits8x8.safetensors"
    path.write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_checked(path, hashlib.sha256(path.read_bytes()).hexdigest())
    (copied / "digits8x8.json").write_text('{"format": 99, "network": {}}')
    with pytest.raises(WeightsError, match="format 99"):
        models.facts("digits8x8", copied)
    (copied / "digits8x8.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        models.facts("digits8x8", copied)


def test_save_and_load_give_the_trained_denoiser_back(tmp_path):
    data = models.digits()
    network = UNetConfig((1, 8, 8), patch=2, widths=(8,), blocks=1, heads=1, embedding=16)
    trained = train(data, TrainConfig(network=network, steps=3, batch=8))
    levels = {"data_range": data.data_range, "sigma_min": 0.1, "sigma_max": 10.0, "data_std": 1.5}
    models.save(trained, "mine", tmp_path, **levels, notes={"licence": "ours"})
    prior = models.load("mine", folder=tmp_path)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.denoise(x, 1.0), trained.denoiser(x, torch.tensor(1.0)))
    assert (prior.sigma_min, prior.sigma_max, prior.data_std) == (0.1, 10.0, 1.5)
    assert models.facts("mine", tmp_path)["licence"] == "ours"
    with pytest.raises(OptionError, match="sigma_min < sigma_max"):
        models.save(trained, "mine", tmp_path, **{**levels, "sigma_min": 20.0})


def error_ratio(prior, train_images, held_out, sigma: float) -> float:
    """Squared denoising error of the network over that of the best linear denoiser, on the same noisy images."""
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(7))
    noisy = held_out + sigma * noise
    network = (prior.denoise(noisy, sigma) - held_out).square().sum()
    return float(network / (LinearDenoiser(train_images)(noisy, sigma) - held_out).square().sum())


@pytest.mark.parametrize(("sigma", "bound"), [(0.1, 0.7), (0.5, 0.7), (2.0, 1.0), (20.0, 1.05)])
def test_digits_beat_the_linear_denoiser(sigma, bound):
    """At most `bound` times its error on held-out images; at 20 only the mean is left and the two agree."""
    data = models.digits()
    assert error_ratio(models.load("digits8x8"), data.train, data.held_out, sigma) < bound


@pytest.mark.parametrize(("sigma", "bound"), [(0.1, 0.5), (0.5, 0.55), (2.0, 0.8), (50.0, 1.05)])
def test_fashion_beats_the_linear_denoiser(fashion, sigma, bound):
    """At most `bound` times its error on held-out images; skipped where the training images are not there."""
    ratio = error_ratio(models.load("fashion28x28"), fashion.train[:10_000], fashion.held_out[:200], sigma)
    assert ratio < bound

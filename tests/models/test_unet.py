"""The U-Net: shapes, labels, and the transforms of torch.func that samplers put it through."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from models.denoisers.unet import UNet, UNetConfig, _fold, _unfold
from ppl.errors import OptionError, ShapeError
from sde.denoiser import EDMDenoiser

SMALL = UNetConfig((1, 8, 8), patch=1, widths=(8, 16), blocks=1, heads=2, embedding=16, labels=3)
FOLDED = UNetConfig((2, 12, 20), patch=2, widths=(8, 16), blocks=2, attention=False, embedding=16, labels=0)


def randomised(config: UNetConfig) -> UNet:
    """A float64 network without the zeros of its initialisation, which would hide mistakes."""
    network = UNet(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for w in network.parameters():
        w.copy_(0.2 * torch.randn(w.shape, generator=generator, dtype=w.dtype))
    return network


def images(batch: int, config: UNetConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *config.event_shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("config", [SMALL, FOLDED], ids=["labels", "folded"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_shape_and_independent_rows(config, batch):
    network = randomised(config)
    x, level = images(batch, config)
    out = network(x, level)
    assert out.shape == x.shape
    assert out.dtype == torch.float64
    for i in range(batch):
        torch.testing.assert_close(network(x[i : i + 1], level[i : i + 1])[0], out[i], rtol=1e-10, atol=1e-10)


def test_folding_is_pixel_unshuffle():
    """Same order of channels as torch's function, and its own inverse."""
    x, _ = images(3, FOLDED)
    assert torch.equal(_fold(x, 2), torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(_unfold(_fold(x, 2), 2), x)


def test_starts_as_the_skip_of_the_denoiser():
    """With a zero head D(x) = c_skip x: an untrained denoiser is the one for N(0, sigma_data^2)."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = EDMDenoiser(UNet(SMALL), sigma_data=0.5)(x, torch.tensor(2.0))
    torch.testing.assert_close(out, x * 0.25 / 4.25)


def test_null_label_is_no_label():
    network = randomised(SMALL)
    x, level = images(3, SMALL)
    none = network(x, level)
    torch.testing.assert_close(network(x, level, torch.full((3,), SMALL.labels)), none)
    for c in range(SMALL.labels):
        assert (network(x, level, torch.full((3,), c)) - none).abs().max() > 1e-3
    mixed = network(x, level, torch.tensor([3, 0, 3]))
    torch.testing.assert_close(mixed[[0, 2]], none[[0, 2]])


def test_noise_level_matters():
    network = randomised(SMALL)
    x, level = images(3, SMALL)
    assert (network(x, level) - network(x, level + 0.1)).abs().max() > 1e-3


@pytest.mark.parametrize("config", [SMALL, FOLDED], ids=["labels", "folded"])
def test_vmap_is_a_loop(config):
    network = randomised(config)
    x, level = images(4, config)
    one = lambda x, level: network(x[None], level[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(x, level), network(x, level), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [SMALL, FOLDED], ids=["labels", "folded"])
def test_jvp_and_vjp_agree_with_differences(config):
    """<u, J v> from forward mode, reverse mode and a central difference."""
    network = randomised(config)
    x, level = images(2, config)
    v, u = images(2, config)[0].flip(0), torch.cos(x)
    f = lambda x: network(x, level)  # noqa: E731
    forward = (u * torch.func.jvp(f, (x,), (v,))[1]).sum()
    reverse = (torch.func.vjp(f, x)[1](u)[0] * v).sum()
    step = 1e-5
    difference = (u * (f(x + step * v) - f(x - step * v))).sum() / (2 * step)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-6)


def test_vmapped_vjp():
    """Per-particle vjps, the shape in which guided samplers ask for them."""
    network = randomised(SMALL)
    x, level = images(3, SMALL)
    u = torch.sin(x)
    one = lambda x, s, u: torch.func.vjp(lambda x: network(x[None], s[None])[0], x)[1](u)[0]  # noqa: E731
    whole = torch.func.vjp(lambda x: network(x, level), x)[1](u)[0]
    torch.testing.assert_close(torch.func.vmap(one)(x, level, u), whole, rtol=1e-9, atol=1e-9)


def test_same_generator_same_weights_and_global_state_untouched():
    before = torch.random.get_rng_state()
    a, b, c = (UNet(SMALL, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert all(torch.equal(v, w) for v, w in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.stem.weight, c.stem.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_config_survives_json():
    for config in (SMALL, FOLDED):
        assert UNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(OptionError, match="unknown fields"):
        UNetConfig.from_json({"depth": 3})


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 3},
        {"widths": (8, 12)},
        {"widths": ()},
        {"heads": 5},
        {"dropout": 1.0},
        {"blocks": 0},
        {"event_shape": (8, 8)},
    ],
    ids=str,
)
def test_impossible_configs_are_refused(change):
    with pytest.raises(OptionError):
        dataclasses.replace(SMALL, **change)


def test_wrong_images_and_labels_are_refused():
    x, level = images(2, SMALL)
    with pytest.raises(ShapeError, match="flatten leading axes"):
        randomised(SMALL)(x[:, :, :4], level)
    x, level = images(2, FOLDED)
    with pytest.raises(OptionError, match="without labels"):
        randomised(FOLDED)(x, level, torch.zeros(2, dtype=torch.long))

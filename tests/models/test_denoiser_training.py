"""The training loop: it learns, repeats itself exactly, and survives a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from models.data import ImageData
from models.denoisers import TrainConfig, UNetConfig, train
from models.denoisers.run import _shifted
from ppl.errors import CheckpointError, NotFiniteError, OptionError, ShapeError

NETWORK = UNetConfig((1, 4, 4), patch=1, widths=(8,), blocks=1, heads=1, embedding=16, labels=2, dropout=0.1)
CONFIG = TrainConfig(
    network=NETWORK,
    sigma_data=1.0,
    p_mean=0.0,
    p_std=1.0,
    steps=12,
    batch=16,
    warmup=4,
    cooldown=4,
    evaluate_every=5,
    evaluate_images=32,
    shift=1,
    flip_labels=(0,),
)


def stripes(images: int = 64) -> ImageData:
    """Two images, rows or columns of +1 and -1, with their label: the best denoiser is a tanh."""
    rows = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 4)
    label = torch.arange(images) % 2
    x = torch.where(label[:, None, None] == 0, rows, rows.T)[:, None]
    return ImageData("stripes", x, label, x[:32], label[:32], (-1.0, 1.0), ("rows", "columns"), "none")


def weights(trained) -> torch.Tensor:
    return torch.cat([w.flatten() for w in trained.network.parameters()])


def test_training_lowers_the_held_out_loss():
    """From about 1 (a denoiser that knows only the scale) to below 0.2; the floor for two points is close to 0."""
    config = dataclasses.replace(
        CONFIG, steps=150, learning_rate=5e-3, cooldown=50, evaluate_every=50, shift=0, flip_labels=()
    )
    trained = train(stripes(), config)
    untrained = train(stripes(), dataclasses.replace(config, steps=1, learning_rate=1e-12))
    assert 0.5 < untrained.history[-1]["held_out"] < 2
    assert trained.history[-1]["held_out"] < 0.2
    assert [h["step"] for h in trained.history] == [50, 100, 150]
    assert not trained.interrupted
    assert not trained.network.training
    assert not any(w.requires_grad for w in trained.network.parameters())
    # Given a label, the answer at high noise is its image; without one it is about the mean of the two.
    data = stripes()
    x = 20 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    error = (trained.denoiser(x, torch.tensor(20.0), data.train_label) - data.train).square().mean()
    assert error < 0.25 < (trained.denoiser(x, torch.tensor(20.0)) - data.train).square().mean()


def test_same_seed_same_weights_and_global_generator_untouched():
    before = torch.random.get_rng_state()
    a, b = train(stripes(), CONFIG), train(stripes(), CONFIG)
    c = train(stripes(), dataclasses.replace(CONFIG, seed=1))
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))
    assert torch.equal(torch.random.get_rng_state(), before)


_KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {here!r}]
import torch
torch.set_num_threads(1)
from test_denoiser_training import CONFIG, stripes
from models.denoisers import train
def die(now):
    if now.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
train(stripes(), CONFIG, checkpoint={path!r}, checkpoint_every=0, callback=die, progress=False)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """A real SIGKILL in step 8 of 12 loses that step and nothing else: weights and losses end equal to the bit."""
    path, here = tmp_path / "run.safetensors", Path(__file__).parent
    script = _KILLED.format(root=str(here.parents[1]), here=str(here), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    seen: list[int] = []
    resumed = train(stripes(), CONFIG, checkpoint=path, checkpoint_every=0, callback=lambda now: seen.append(now.step))
    whole = train(stripes(), CONFIG)
    assert seen == [8, 9, 10, 11, 12]
    assert torch.equal(weights(resumed), weights(whole))
    assert [(h["step"], h["held_out"]) for h in resumed.history] == [(h["step"], h["held_out"]) for h in whole.history]
    assert not path.with_name("run.safetensors.part").exists()


def test_a_longer_run_may_go_on_from_a_shorter_one(tmp_path):
    path = tmp_path / "run.safetensors"
    train(stripes(), dataclasses.replace(CONFIG, steps=6, cooldown=0), checkpoint=path)
    longer = train(stripes(), CONFIG, checkpoint=path)
    assert torch.equal(weights(longer), weights(train(stripes(), CONFIG)))


def test_a_run_may_start_from_the_weights_of_another(tmp_path):
    path = tmp_path / "run.safetensors"
    first = train(stripes(), CONFIG)
    still = dataclasses.replace(CONFIG, steps=1, learning_rate=1e-12, seed=5)
    torch.testing.assert_close(
        weights(train(stripes(), still, initial=first.network, checkpoint=path)), weights(first), rtol=0, atol=1e-9
    )
    with pytest.raises(CheckpointError, match="another run"):
        train(stripes(), still, checkpoint=path)
    with pytest.raises(ShapeError, match="initial network"):
        train(
            stripes(), dataclasses.replace(still, network=dataclasses.replace(NETWORK, heads=2)), initial=first.network
        )
    assert first.summary()["images_seen"] == 12 * 16


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    train(stripes(), CONFIG, checkpoint=path)
    with pytest.raises(CheckpointError, match="another run"):
        train(stripes(), dataclasses.replace(CONFIG, batch=8), checkpoint=path)
    with pytest.raises(CheckpointError, match="another run"):
        train(stripes(62), CONFIG, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole training checkpoint"):
        train(stripes(), CONFIG, checkpoint=path)


def test_ctrl_c_finishes_the_step_and_returns_what_there_is(tmp_path):
    path = tmp_path / "run.safetensors"

    def interrupt(now):
        if now.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    part = train(stripes(), CONFIG, checkpoint=path, callback=interrupt)
    assert part.interrupted
    assert part.step in (3, 4)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(weights(train(stripes(), CONFIG, checkpoint=path)), weights(train(stripes(), CONFIG)))


def test_runs_outside_the_main_thread():
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(train(stripes(), CONFIG, progress=False).step))
    thread.start()
    thread.join()
    assert found == [12]


def test_patience_keeps_the_best_weights():
    """With a learning rate that ruins the network, the best held-out loss comes early and its weights are returned."""
    config = dataclasses.replace(
        CONFIG, steps=200, learning_rate=0.5, warmup=40, evaluate_every=4, patience=3, clip=100.0, ema=0.0
    )
    trained = train(stripes(), config)
    losses = {h["step"]: h["held_out"] for h in trained.history}
    assert trained.step == min(losses, key=lambda step: losses[step])
    assert max(losses) < 200
    assert sum(step > trained.step for step in losses) == 3


def test_shifts_move_whole_images():
    """Every shifted image is one of the nine windows of the padded one, and all nine appear.

    900 images: the chance that one window is missed is below 9 (8/9)^900 < 1e-45.
    """
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(900, 1, 4, 4) / 16
    out = _shifted(x, 1, -1.0, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0, 0], (1,) * 4, value=-1.0)
    windows = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    match = torch.stack([(out[:, 0] == w).all(-1).all(-1) for w in windows])
    assert (match.sum(0) == 1).all()
    assert (match.sum(1) > 0).all()


def test_loss_that_is_not_finite_stops_the_run():
    data = stripes()
    broken = dataclasses.replace(data, train=data.train.clone())
    broken.train[0] = torch.nan
    with pytest.raises(NotFiniteError, match="step 0"):
        train(broken, dataclasses.replace(CONFIG, batch=512))


def test_impossible_options_are_refused():
    for change in ({"sigma_data": 0.0}, {"steps": 0}, {"label_dropout": 1.5}, {"patience": 0}, {"shift": -1}):
        with pytest.raises(OptionError):
            dataclasses.replace(CONFIG, **change)
    with pytest.raises(OptionError, match="labels"):
        train(stripes(), dataclasses.replace(CONFIG, network=dataclasses.replace(NETWORK, labels=1)))
    with pytest.raises(ShapeError):
        train(stripes(), dataclasses.replace(CONFIG, network=dataclasses.replace(NETWORK, event_shape=(1, 8, 8))))


def test_config_survives_json():
    assert TrainConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG
    with pytest.raises(OptionError, match="unknown fields"):
        TrainConfig.from_json({"speed": 3})


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_the_same_up_to_rounding():
    """All random numbers are drawn on the CPU; without dropout only float32 rounding is left of the difference."""
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(NETWORK, dropout=0.0), steps=3)
    here, there = train(stripes(), config), train(stripes(), config, device="cuda")
    torch.testing.assert_close(weights(there).cpu(), weights(here), rtol=1e-3, atol=1e-4)

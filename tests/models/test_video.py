"""The latent video model: shapes, scores, its training script, and the models that come with the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.moving_digits import moving_digits
from models.scripts import train_video
from models.video import VideoConfig, load_video, place, psnr, score, video_model
from models.zoo import read_checked
from ppl.errors import OptionError, WeightsError

WEIGHTS = Path(models.__file__).parent / "weights"


def some(count: int, frames: int, seed: int = 0, **options: Any) -> torch.Tensor:
    images = (models.digits().held_out[:, 0] + 1) / 2
    return moving_digits(images, count, frames, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("hurst", [None, "learn", 0.7])
def test_frames_are_pictures_and_the_bound_has_gradients(hurst: Any) -> None:
    model = video_model(VideoConfig(hurst=hurst), torch.Generator().manual_seed(0))
    y = some(3, 6)
    bound = model.bound(y, torch.Generator().manual_seed(1))
    assert bound.value.shape == (3,)
    bound.value.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    frames = model.forecast(y, 2, 4, torch.Generator().manual_seed(2)).mean
    assert frames.shape == (4, 3, 2, 16, 16)
    assert float(frames.min()) >= 0
    assert float(frames.max()) <= 1


def test_content_does_not_move() -> None:
    """It is a median over the frames: their order does not matter, and one frame that is nothing hardly does."""
    model = video_model(VideoConfig(), torch.Generator().manual_seed(0))
    y = some(2, 7)
    with torch.no_grad():
        one, other = model.encoder(y), model.encoder(y.flip(1))
    assert torch.equal(one.content, other.content)
    assert not torch.allclose(one.context, other.context)


def test_same_seed_same_weights() -> None:
    one, same, other = (video_model(VideoConfig(), torch.Generator().manual_seed(s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["drift.0.weight"], other["drift.0.weight"])


def test_scores_of_a_perfect_forecast() -> None:
    """A model whose futures are the truth, twice: no distance, everything covered, PSNR at its cap of 100 dB."""
    y = some(2, 6)

    class Oracle:
        def forecast(self, seen: Any, ahead: int, draws: int, generator: Any) -> Any:
            return type("F", (), {"mean": y[:, -ahead:].expand(draws, -1, -1, -1, -1)})

        def reconstruct(self, seen: Any, draws: int, generator: Any) -> Any:
            return type("F", (), {"mean": seen[None] + 0.1})

        def bound(self, seen: Any, generator: Any) -> Any:
            return type("B", (), {"value": torch.full((2,), 8.0)})

    found = score(Oracle(), y, 4, 3, torch.Generator())  # type: ignore[arg-type]
    assert found["bound"].tolist() == [2, 2]
    assert float((found["reconstruction"] - 20).abs().max()) < 1e-4
    for name in ("draw", "best", "mean"):
        torch.testing.assert_close(found[name], torch.full((2,), 100.0))
    assert float(found["distance"].max()) < 1e-5
    assert found["covered"].tolist() == [1, 1]
    torch.testing.assert_close(found["last"], psnr(y[:, 3:4], y[:, 4:]).mean(-1))
    assert float(psnr(y[0, 0], y[0, 0] + 0.01)) == pytest.approx(40, abs=1e-3)
    assert place(y).shape == (2, 6, 2)


def test_the_script_trains_resumes_measures_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {n: VideoConfig(hurst=c.hurst, channels=4, width=8, features=8) for n, c in train_video.NOISES.items()}
    monkeypatch.setattr(train_video, "NOISES", small)
    options = ["--motions", "rough", "--steps", "2", "--batch", "2", "--videos", "4", "--draws", "2"]
    train_video.main([*options, "--folder", str(tmp_path), "--export", str(tmp_path)])
    train_video.main([*options, "--folder", str(tmp_path)])
    known = json.loads((tmp_path / "moving_digits.json").read_text())
    assert set(known["models"]) == {"rough_brownian", "rough_fractional"}
    tensors, _ = read_checked(tmp_path / "moving_digits.safetensors", known["sha256"])
    assert "rough_fractional/hurst_logit" in tensors
    assert "| rough_fractional | 0." in (tmp_path / "moving_digits.md").read_text()


@pytest.mark.parametrize("noise", ["brownian", "fractional"])
def test_shipped_models_reconstruct_and_forecast(noise: str) -> None:
    """Held-out videos that no training saw: as good as the card says, and the digit is where it is.

    The mean of 24 videos may lie six standard errors below the card's.
    """
    known = json.loads((WEIGHTS / "moving_digits.json").read_text())["models"][f"smooth_{noise}"]
    model = load_video("smooth", noise)
    assert float(torch.as_tensor(model.hurst)) == pytest.approx(known["hurst"], abs=1e-3)
    source = train_video.videos("smooth", held_out=True)
    y = source(24, train_video.FRAMES + train_video.AHEAD, torch.Generator().manual_seed(11))
    found = score(model, y, train_video.FRAMES, 8, torch.Generator().manual_seed(0))
    for name in ("bound", "reconstruction", "mean"):
        error = math.hypot(float(found[name].std()) / math.sqrt(24), known["scores"][name][1])
        assert float(found[name].mean()) > known["scores"][name][0] - 6 * error
    seen = y[:, : train_video.FRAMES]
    again = model.reconstruct(seen, 1, torch.Generator().manual_seed(1)).mean[0]
    assert float((place(again) - place(seen)).norm(dim=-1).mean()) < 0.5


def test_shipped_files_are_small_and_have_a_card() -> None:
    assert (WEIGHTS / "moving_digits.safetensors").stat().st_size < 1_000_000
    assert "CC BY 4.0" in (WEIGHTS / "moving_digits.md").read_text()
    assert "moving_digits" not in models.available()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(OptionError, match="multiple of 8"):
        VideoConfig(size=12)
    with pytest.raises(WeightsError, match="smooth_fractional"):
        load_video("smooth", "levy")

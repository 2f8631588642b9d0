"""Networks of diffusers as denoisers: schedules to the digit, exact denoisers, and a real file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde import DiffusersDenoiser, from_diffusers, training_levels

F64 = torch.float64
LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class Network(nn.Module):
    """What diffusers networks look like from outside; the exact answer for data of N(0, tau^2 I)."""

    def __init__(self, prediction: str, tau: float = 0.5, double_channels: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=2, sample_size=3)
        self.prediction, self.tau, self.double_channels = prediction, tau, double_channels
        self.levels = training_levels(LINEAR)
        self.asked: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        self.asked.append(timestep)
        # The level of a fractional step, by the same interpolation that made it.
        low = timestep.floor().long().clamp(max=len(self.levels) - 2)
        log_s = self.levels.log()
        s = torch.lerp(log_s[low], log_s[low + 1], timestep.to(F64) - low).exp().to(sample)[:, None, None, None]
        alpha = (1 + s.square()).rsqrt()
        x_0 = sample / alpha * self.tau**2 / (self.tau**2 + s.square())
        eps = (sample - alpha * x_0) / (s * alpha)
        answer = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - s * alpha * x_0}[self.prediction]
        if class_labels is not None:
            answer = answer + class_labels[:, None, None, None]
        return SimpleNamespace(sample=torch.cat([answer, 7 * answer], 1) if self.double_channels else answer)


def direct(config: dict[str, Any]) -> list[float]:
    """The levels by the plainest loop, in Python floats."""
    steps, low, high = config.get("num_train_timesteps", 1000), config["beta_start"], config["beta_end"]
    kept, levels = 1.0, []
    for i in range(steps):
        part = i / (steps - 1)
        if config["beta_schedule"] == "linear":
            beta = low + (high - low) * part
        elif config["beta_schedule"] == "scaled_linear":
            beta = (math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * part) ** 2
        elif config["beta_schedule"] == "sigmoid":
            beta = low + (high - low) / (1 + math.exp(6 - 12 * part))
        else:

            def bar(t: float) -> float:
                return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

            beta = min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999)
        kept *= 1 - beta
        levels.append(math.sqrt((1 - kept) / kept))
    return levels


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("steps", [1000, 50])
def test_levels_are_those_of_the_betas(kind: str, steps: int) -> None:
    config = {"beta_schedule": kind, "num_train_timesteps": steps, "beta_start": 8.5e-4, "beta_end": 0.012}
    torch.testing.assert_close(training_levels(config), torch.tensor(direct(config), dtype=F64), rtol=1e-10, atol=0)


def test_trained_betas_and_zero_terminal_signal() -> None:
    betas = [0.1, 0.2, 0.5]
    kept = torch.tensor([0.9, 0.72, 0.36], dtype=F64)
    torch.testing.assert_close(training_levels({"trained_betas": betas}), ((1 - kept) / kept).sqrt())
    zero = training_levels({"trained_betas": betas, "rescale_betas_zero_snr": True})
    assert zero[-1] == math.inf
    torch.testing.assert_close(zero[0], training_levels({"trained_betas": betas})[0])
    assert len(DiffusersDenoiser(nn.Identity(), zero).levels) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_denoiser_is_the_exact_one_at_every_level(prediction: str) -> None:
    """For N(0, tau^2 I) the denoiser is x tau^2 / (tau^2 + s^2), at the steps of the training and between them."""
    network = Network(prediction)
    denoiser = from_diffusers(network, {**LINEAR, "prediction_type": prediction})
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    s = torch.tensor([0.011, 0.3, 1.0, 20.0, 150.0], dtype=F64)
    expected = x * 0.25 / (0.25 + s.square()[:, None, None, None])
    torch.testing.assert_close(denoiser(x, s), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(denoiser(x, 0.3)[1], expected[1], rtol=1e-8, atol=1e-10)
    doubled = from_diffusers(Network(prediction, double_channels=True), {**LINEAR, "prediction_type": prediction})
    torch.testing.assert_close(doubled(x, s), expected, rtol=1e-8, atol=1e-10)


def test_steps_are_those_of_the_table_and_log_linear_between() -> None:
    denoiser = from_diffusers(nn.Identity(), LINEAR)
    table = denoiser.levels
    steps = torch.arange(1000, dtype=F64)
    torch.testing.assert_close(denoiser.timestep(table), steps, rtol=0, atol=1e-8)
    between = (table[:-1] * table[1:]).sqrt()
    torch.testing.assert_close(denoiser.timestep(between), steps[:-1] + 0.5, rtol=0, atol=1e-8)
    ends = denoiser.timestep(torch.tensor([1e-4, 1e4], dtype=F64))
    assert ends.tolist() == [0.0, 999.0]


def test_networks_that_look_steps_up_get_whole_ones() -> None:
    network = Network("epsilon")
    network.config.time_embedding_type = "learned"
    denoiser = from_diffusers(network, LINEAR)
    denoiser(torch.zeros(1, 2, 3, 3), float(denoiser.levels[10] * 1.001))
    assert network.asked[0].tolist() == [10]
    assert network.asked[0].dtype == torch.int64


def test_prior_takes_shape_and_levels_from_the_network() -> None:
    """And draws have the variance of the data: 2000 entries of N(0, 1/4), z-score at 5, false alarm below 1e-6."""
    denoiser = from_diffusers(Network("v_prediction").double(), {**LINEAR, "prediction_type": "v_prediction"})
    prior = denoiser.prior(steps=40, data_std=0.5, dtype=F64)
    assert prior.event_shape == (2, 3, 3)
    assert (prior.sigma_min, prior.sigma_max) == (float(denoiser.levels[0]), float(denoiser.levels[-1]))
    x = prior.draw((112,), torch.Generator().manual_seed(0))
    assert abs(float(x.square().mean()) / 0.25 - 1) < 5 * math.sqrt(2 / x.numel()) + 0.01
    labelled = denoiser(torch.ones(2, 2, 3, 3, dtype=F64), 1.0, torch.tensor([0, 1]))
    assert not torch.allclose(labelled[0], labelled[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_diffusers(nn.Identity()), "give its scheduler"),
        (lambda: from_diffusers(nn.Identity(), {"beta_schedule": "cubic"}), "expected linear"),
        (lambda: from_diffusers(nn.Identity(), {"_class_name": "EDMEulerScheduler"}), "EDMEulerScheduler"),
        (lambda: from_diffusers(nn.Identity(), {**LINEAR, "prediction_type": "flow"}), "prediction_type"),
        (lambda: from_diffusers("no/such/folder"), "nothing is downloaded"),
        (lambda: from_diffusers(nn.Identity(), "no/such/file.json"), "scheduler_config.json"),
        (lambda: from_diffusers(nn.Identity(), LINEAR).prior(), "give event_shape"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_folders_are_checked_before_diffusers_is_imported(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(LINEAR))
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
def test_a_saved_unet_agrees_with_its_scheduler(pipeline: bool, tmp_path: Path) -> None:
    """Levels and x_0 are those that diffusers computes in float32, at every hundredth step."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    network.save_pretrained(tmp_path / "unet" if pipeline else tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    denoiser = from_diffusers(tmp_path)
    for options in ({}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"}):
        theirs = diffusers.DDPMScheduler(**options)
        kept = theirs.alphas_cumprod.double()
        torch.testing.assert_close(training_levels(theirs.config), ((1 - kept) / kept).sqrt(), rtol=5e-3, atol=0)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(0, 1000, 100):
            alpha = scheduler.alphas_cumprod[step].sqrt()
            eps = network(x_t, step).sample
            theirs = scheduler.step(eps, step, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
            ours = denoiser(x_t / alpha, float(denoiser.levels[step]))
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(1 / alpha))
    prior = denoiser.prior(steps=3)
    assert prior.event_shape == (1, 8, 8)
    assert prior.draw((2,), torch.Generator().manual_seed(0)).isfinite().all()
    assert not any(p.requires_grad for p in denoiser.parameters())

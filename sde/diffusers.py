r"""Unconditional diffusers networks, with the schedule they were trained on, as denoisers in the noise coordinate.

    s_i = sqrt((1 - a_i) / a_i),  a_i = prod_{j <= i} (1 - beta_j);     the network is asked at x / sqrt(1 + s^2), t(s)
    epsilon   x_0 = x - s eps       sample   x_0 = output       v_prediction   x_0 = x / (1 + s^2) - s v / sqrt(1 + s^2)

t(s) is a fractional step: log s is interpolated linearly between the steps of the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde.denoiser import noise_levels
from sde.diffusion import DiffusionPrior

__all__ = ["DiffusersDenoiser", "from_diffusers", "training_levels"]

_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def training_levels(config: Mapping[str, Any]) -> Tensor:
    """Noise levels s_i of the training steps that a scheduler's config describes.

    Args:
        config: of DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler or another one with discrete betas.

    Returns:
        (steps,) ascending float64 levels; a last step without any signal is infinite.

    Raises:
        ValueError: if the config has no betas, or a schedule of them that is not known.

    Source: diffusers, schedulers/scheduling_ddpm.py, betas_for_alpha_bar and rescale_zero_terminal_snr [read].

    Example:
        >>> training_levels({"beta_schedule": "linear", "num_train_timesteps": 1000})[[0, -1]]
        tensor([1.0001e-02, 1.5741e+02], dtype=torch.float64)
    """
    steps = int(config.get("num_train_timesteps", 1000))
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(low, high, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(low), math.sqrt(high), steps, dtype=torch.float64).square()
    elif kind == "squaredcos_cap_v2":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    elif kind == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (high - low) + low
    else:
        name = config.get("_class_name", "the scheduler")
        raise ValueError(
            f"{name} has beta_schedule {kind!r}; expected linear, scaled_linear, squaredcos_cap_v2, sigmoid or "
            "trained_betas. Networks of other schedules go through sde.VelocityDenoiser, sde.ScoreDenoiser, ..."
        )
    # 1 - a as -expm1(log a): digits near the clean end.
    log_kept = torch.log1p(-betas).cumsum(0)
    if config.get("rescale_betas_zero_snr"):
        root = (log_kept / 2).exp()
        kept = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        return ((1 - kept) / kept).sqrt()
    return torch.expm1(-log_kept).sqrt()


class DiffusersDenoiser(nn.Module):
    """E[x_0 | x_0 + sigma n = x] by a network that was trained with discrete steps.

    Below the first and above the last level of the training the network is asked at that step; `prior` stays between.
    x_0 is not clipped, whatever the scheduler does.

    Args:
        network: called as network(sample, timestep (batch,)).sample, with class_labels=label where there is a label.
        levels: (steps,) ascending noise levels of the training steps.
        prediction: what the network returns: "epsilon", "sample" or "v_prediction".

    Raises:
        ValueError: if there is no such prediction, or the levels do not ascend.
    """

    def __init__(self, network: nn.Module, levels: Tensor, prediction: str = "epsilon") -> None:
        super().__init__()
        if prediction not in _PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction!r}")
        levels = levels.double()
        levels = levels[levels.isfinite()]
        if levels.ndim != 1 or len(levels) < 2 or not bool((levels.diff() > 0).all() & (levels[0] > 0)):
            raise ValueError("expected two or more ascending positive noise levels, one per training step")
        self.network, self.prediction = network, prediction
        self.levels = levels
        config = getattr(network, "config", {})
        embedding = _get(config, "time_embedding_type", "positional")
        if embedding == "fourier":
            raise ValueError(
                "the network embeds log sigma (time_embedding_type 'fourier'), not steps; use ScoreDenoiser"
            )
        self.whole_steps = embedding == "learned"

    def timestep(self, sigma: Tensor) -> Tensor:
        """Fractional step of a noise level, of any shape, in float64 or where the device has none in float32."""
        table = self.levels.log().to(sigma.device, sigma.dtype)
        log_sigma = sigma.log()
        upper = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        t = upper - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)
        return t.round() if self.whole_steps else t

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        rows, s = noise_levels(x, sigma)
        scale = (1 + s.square()).rsqrt()
        t = self.timestep(rows)
        given = {} if label is None else {"class_labels": label}
        answer = self.network(x * scale, t.long() if self.whole_steps else t, **given)
        output = getattr(answer, "sample", answer)
        # Networks with a learned variance return it behind the prediction.
        output = output[:, : x.shape[1]]
        if self.prediction == "epsilon":
            return x - s * output
        if self.prediction == "v_prediction":
            return x * scale.square() - s * scale * output
        return output

    def prior(self, event_shape: tuple[int, ...] | None = None, **options: Any) -> DiffusionPrior:
        """The distribution that this denoiser defines, between the first and the last level of its training.

        Args:
            event_shape: of one draw; None takes channels and size from the network's config.
            options: of `DiffusionPrior`; give `data_std`, the standard deviation along the widest direction, if known.
        """
        if event_shape is None:
            config = getattr(self.network, "config", {})
            channels, size = _get(config, "in_channels", None), _get(config, "sample_size", None)
            if channels is None or size is None:
                raise ValueError("the network's config names no in_channels and sample_size; give event_shape")
            sides = (size, size) if isinstance(size, int) else tuple(size)
            event_shape = (channels, *sides)
        known = {"sigma_min": float(self.levels[0]), "sigma_max": float(self.levels[-1])}
        return DiffusionPrior(self, event_shape, **{**known, **options})


def from_diffusers(
    path_or_module: str | Path | nn.Module, scheduler: Any = None, *, dtype: torch.dtype | None = None
) -> DiffusersDenoiser:
    """A diffusers `UNet2DModel` as a denoiser; `.prior()` of it is the distribution.

    Args:
        path_or_module: a local folder (of a model, or of a pipeline with `unet` and `scheduler` in it) with
            safetensors; nothing is downloaded. Or a network `network(sample, timestep).sample`, used as it is.
        scheduler: the scheduler of the training: an object with `.config`, a config, or the path of a
            scheduler_config.json or its folder; None takes the one in the folder.
        dtype: of a network that is loaded; None keeps float32.

    Raises:
        ValueError: if a file is missing, or the schedule or the prediction is not one of discrete steps.
        ImportError: if a folder is given and diffusers is not installed.

    Example:
        >>> denoiser = from_diffusers(nn.Identity(), {"beta_schedule": "linear", "prediction_type": "sample"})
        >>> denoiser.levels[-1]                             # one thousand steps of the usual schedule
        tensor(157.4073, dtype=torch.float64)
    """
    folder = None if isinstance(path_or_module, nn.Module) else Path(path_or_module)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder here; download the model first, nothing is downloaded from here")
    config = _scheduler_config(folder if scheduler is None else scheduler)
    network = path_or_module if isinstance(path_or_module, nn.Module) else _load(Path(path_or_module), dtype)
    return DiffusersDenoiser(network, training_levels(config), config.get("prediction_type", "epsilon"))


def _get(config: Any, key: str, default: Any) -> Any:
    """An entry of a config, which may be a mapping or an object."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def _scheduler_config(scheduler: Any) -> Mapping[str, Any]:
    """The config of a scheduler, from itself, from its file or from a folder."""
    if scheduler is None:
        raise ValueError(
            "a network alone does not say how it was trained; give its scheduler, or the scheduler's config"
        )
    if isinstance(scheduler, str | Path):
        place = Path(scheduler)
        tries = [place, place / "scheduler_config.json", place / "scheduler" / "scheduler_config.json"]
        found = next((path for path in tries if path.is_file()), None)
        if found is None:
            raise ValueError(
                f"there is no scheduler_config.json in {place} or {place / 'scheduler'}; give scheduler=..."
            )
        return dict(json.loads(found.read_text()))
    return dict(getattr(scheduler, "config", scheduler))


def _load(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """A network from its folder, or from `unet` inside."""
    place = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (place / name).is_file():
            raise ValueError(f"{place / name} is missing; from_diffusers reads local folders with safetensors")
    kind = json.loads((place / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{place} holds a {kind}, and from_diffusers loads UNet2DModel; load it and give the module")
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "loading a network of diffusers needs it installed: pip install 'pilotlight[diffusers]'"
        ) from error
    network = UNet2DModel.from_pretrained(place, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
    return network.eval().requires_grad_(False).to(dtype=dtype)

"""Trained priors that come with the package: weights in safetensors, facts in a JSON file beside them."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.denoisers.run import TrainedDenoiser
from models.denoisers.unet import UNet, UNetConfig
from ppl.errors import OptionError, WeightsError
from sde.denoiser import EDMDenoiser
from sde.diffusion import DiffusionPrior

__all__ = ["available", "facts", "load", "read_checked", "save"]

_FORMAT = 1


def available() -> tuple[str, ...]:
    """Names that `load` takes.

    Example:
        >>> "digits8x8" in available()
        True
    """
    names = (entry.name for entry in _shipped().iterdir())
    # Only a prior has a network; other weights, such as held-out images, lie in the same folder.
    found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return tuple(sorted(name for name in found if "network" in json.loads((_shipped() / f"{name}.json").read_text())))


def facts(name: str, folder: str | Path | None = None) -> dict[str, Any]:
    """What is known about a prior: network, noise levels, data, licence, how it was trained, what was measured.

    Args:
        name: one of `available()`, or the name of a prior in `folder`.
        folder: where `save` put it; None is the package.

    Raises:
        WeightsError: if there is no such prior, or its JSON file is damaged.

    Example:
        >>> facts("digits8x8")["event_shape"]
        [1, 8, 8]
    """
    place = _shipped() if folder is None else Path(folder)
    path = place / f"{name}.json"
    if not path.is_file():
        known = ", ".join(available()) if folder is None else f"what lies in {folder}"
        raise WeightsError(f"there is no prior called {name!r}; choose one of: {known}")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); install the package again") from error
    if values.get("format") != _FORMAT or "network" not in values:
        raise WeightsError(
            f"{path} has format {values.get('format')!r}, this version reads format {_FORMAT} of a prior; "
            "save the prior again with this version"
        )
    return values


def load(
    name: str,
    *,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> DiffusionPrior:
    """A trained prior as a distribution; `prior(label=c)` is its distribution given the class.

    Args:
        name: one of `available()`, or the name of a prior in `folder`.
        folder: where `save` put it; None is the package.
        device: where the weights go; None is the CPU.
        dtype: of weights and draws.
        options: passed on to `sde.DiffusionPrior`, e.g. `steps`, `solver`, `sigma_max`.

    Returns:
        The prior, with the event shape, data range and noise levels it was trained for.

    Raises:
        WeightsError: if the weight file is damaged, or made for another network.

    Example:
        >>> load("digits8x8").event_shape
        torch.Size([1, 8, 8])
    """
    known = facts(name, folder)
    place = _shipped() if folder is None else Path(folder)
    tensors, _ = read_checked(place / f"{name}.safetensors", known["sha256"])
    network = UNet(UNetConfig.from_json(known["network"]))
    _fill(network, tensors, name)
    network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    settings: dict[str, Any] = {
        "data_range": tuple(known["data_range"]),
        "sigma_min": known["sigma_min"],
        "sigma_max": known["sigma_max"],
        "data_std": known["data_std"],
    }
    return DiffusionPrior(
        EDMDenoiser(network, known["sigma_data"]), tuple(known["event_shape"]), **{**settings, **options}
    )


def save(
    trained: TrainedDenoiser,
    name: str,
    folder: str | Path,
    *,
    data_range: tuple[float, float],
    sigma_min: float,
    sigma_max: float,
    data_std: float,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write averaged weights and their facts, for `load(name, folder=folder)`.

    Args:
        trained: what `train` returned.
        name: of the two files.
        folder: where they go; made if it is not there.
        data_range: lowest and highest value of the data.
        sigma_min: lowest noise level of the prior.
        sigma_max: highest noise level of the prior.
        data_std: standard deviation of the data along their widest direction.
        notes: more facts: classes, licence, command, measured figures.

    Returns:
        The path of the weight file.

    Raises:
        OptionError: if the noise levels are not 0 < sigma_min < sigma_max.
    """
    from safetensors.torch import save as to_bytes

    if not 0 < sigma_min < sigma_max:
        raise OptionError(f"noise levels must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    weights = {key: w.detach().cpu().contiguous() for key, w in trained.network.state_dict().items()}
    raw = to_bytes(weights, metadata={"prior": name})
    path = place / f"{name}.safetensors"
    path.write_bytes(raw)
    config = trained.config
    known = {
        "format": _FORMAT,
        "name": name,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "event_shape": list(config.network.event_shape),
        "data_range": list(data_range),
        "sigma_data": config.sigma_data,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "data_std": data_std,
        "network": config.network.to_json(),
        "parameters": sum(w.numel() for w in trained.network.parameters()),
        "training": trained.summary(),
        **(notes or {}),
    }
    (place / f"{name}.json").write_text(json.dumps(known, indent=2) + "\n")
    return path


def read_checked(path: Traversable, sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file with this checksum.

    Args:
        path: the file.
        sha256: what its bytes must hash to.

    Returns:
        Tensors by name, and the strings in the header.

    Raises:
        WeightsError: if the file is missing, damaged or another one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if not path.is_file():
        raise WeightsError(f"{path} is missing; install the package again")
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"{path} has SHA-256 {found}, expected {sha256}: it is damaged or another file; install the package again"
        )
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return from_bytes(raw), header.get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path} is not a safetensors file ({error}); save the prior again") from error


def _fill(network: UNet, tensors: dict[str, Tensor], name: str) -> None:
    """Copy weights into a network that must expect exactly these."""
    expected = {key: tuple(w.shape) for key, w in network.state_dict().items()}
    found = {key: tuple(w.shape) for key, w in tensors.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        first = wrong[0]
        raise WeightsError(
            f"the weights of {name!r} were made for another network: {len(wrong)} tensors differ, first {first!r}: "
            f"expected {expected.get(first, 'none')}, found {found.get(first, 'none')}; "
            "load them with the JSON file that was saved with them"
        )
    network.load_state_dict(tensors)


def _shipped() -> Traversable:
    """The folder of weights inside the package."""
    return resources.files("models") / "weights"

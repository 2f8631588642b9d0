"""A posterior as one netCDF file: nothing lost, checked by a checksum, readable by ArviZ.

Draws, info per draw and data are where ArviZ looks for them; the groups pilotlight_* hold everything else and a JSON
text with the own name, dtype and place of every tensor. Weighted draws are in "weighted_posterior", not in "posterior".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.arviz_export import datasets, layout, portable
from ppl.cost import Cost
from ppl.errors import CheckpointError
from ppl.posterior import Estimate, Posterior, SavedGuide
from ppl.storage import atomic_path, decode_json, digest, dtype_name, encode_json

if TYPE_CHECKING:
    import xarray

__all__ = ["load", "save"]

_FORMAT = 1
_META = "pilotlight_meta"
_HOMES = {"posterior": "draws", "observed_data": "observed"}


def save(posterior: Posterior, path: Path) -> None:
    """See `Posterior.save`."""
    import numpy
    import xarray

    plan = layout(posterior)
    groups = datasets(plan, posterior.shape)
    if posterior.log_weight is not None and "posterior" in groups:
        groups["weighted_posterior"] = groups.pop("posterior")
    attrs = dict(posterior.attrs)
    guide_meta, guide_tensors = _guide_state(posterior.guide, attrs)
    evidence = posterior.log_evidence
    loose: dict[str, dict[str, Tensor]] = {
        "parameters": posterior.parameters,
        "info": plan.rest,
        "guide": guide_tensors,
        "evidence": {} if evidence is None else evidence._asdict(),
        "weight": {} if posterior.log_weight is None else {"log_weight": posterior.log_weight},
    }
    index: list[dict[str, Any]] = []
    content: dict[str, Tensor] = {}
    for group, variables in plan.groups.items():
        for name, variable in variables.items():
            if group == "sample_stats" and variable.own not in posterior.info:
                continue  # the log weights, there for people only
            own = f"log_likelihood.{variable.own}" if group == "log_likelihood" else variable.own
            place = group if group in groups else "weighted_posterior"
            _enter(index, content, _HOMES.get(group, "info"), own, place, name, variable.tensor)
    for kind, tensors in loose.items():
        data = {}
        for number, (own, tensor) in enumerate(tensors.items()):
            tensor = tensor.detach().cpu()
            data[f"v{number}"] = (tuple(f"n{size}_{axis}" for axis, size in enumerate(tensor.shape)), portable(tensor))
            _enter(index, content, kind, own, f"pilotlight_{kind}", f"v{number}", tensor)
        if data:
            groups[f"pilotlight_{kind}"] = xarray.Dataset(data)
    meta = {
        "tensors": index,
        "problems": posterior.problems,
        "dims": dict(posterior.dims),
        "coords": dict(posterior.coords),
        "cost": posterior.cost.to_dict(),
        "guide": guide_meta,
        "attrs": attrs,
    }
    text = encode_json(meta, "posterior")
    # As data, not as an attribute: HDF5 holds 64 KiB of attributes.
    raw = numpy.frombuffer(text.encode(), dtype=numpy.uint8)
    groups[_META] = xarray.Dataset({"json": ("byte", raw)}, attrs={"sha256": digest(content, text)})
    root = xarray.Dataset(attrs={"pilotlight_format": _FORMAT, "inference_library": "pilotlight"})
    with atomic_path(path) as temporary:
        root.to_netcdf(temporary, mode="w", engine="h5netcdf")
        for group, data_set in groups.items():
            # No fill value: a NaN is a NaN, and integers stay integers.
            encoding: dict[Any, dict[str, Any]] = {name: {"_FillValue": None} for name in data_set.variables}
            data_set.to_netcdf(temporary, mode="a", group=group, engine="h5netcdf", encoding=encoding)


def load(path: Path) -> Posterior:
    """See `Posterior.load`."""
    import xarray

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with xarray.open_dataset(path, engine="h5netcdf") as root:
            version = root.attrs.get("pilotlight_format")
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise CheckpointError(f"{path} is damaged or is not a netCDF file ({error})") from error
    if version is None:
        raise CheckpointError(f"{path} was not written by Posterior.save; open it with arviz.from_netcdf")
    if int(version) != _FORMAT:
        raise CheckpointError(
            f"{path} has posterior format {version}, this version reads {_FORMAT}; update the toolkit"
        )
    try:
        head = _read(path, _META)
        text = head["json"].to_numpy().tobytes().decode()
        meta = decode_json(text)
        groups: dict[str, xarray.Dataset] = {}
        kinds: dict[str, dict[str, Tensor]] = {}
        content: dict[str, Tensor] = {}
        for entry in meta["tensors"]:
            place = entry["group"]
            if place not in groups:
                groups[place] = _read(path, place)
            array = groups[place][entry["variable"]].to_numpy()
            dtype = getattr(torch, entry["dtype"])
            # Empty arrays arrive with strides of zero.
            tensor = torch.from_numpy(array.copy()).to(dtype) if array.size else torch.empty(array.shape, dtype=dtype)
            content[f"{entry['kind']}/{entry['name']}"] = tensor
            per_draw = not place.startswith("pilotlight_") and place != "observed_data"
            if meta["problems"] is not None and per_draw:
                tensor = tensor.movedim(2, 0).contiguous()
            kinds.setdefault(entry["kind"], {})[entry["name"]] = tensor
        found = digest(content, text)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); no part of it was used") from error
    if found != head.attrs.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; no part of it was used")
    evidence = kinds.get("evidence")
    return Posterior(
        draws=kinds.get("draws", {}),
        log_weight=kinds.get("weight", {}).get("log_weight"),
        log_evidence=None if evidence is None else Estimate(**evidence),
        parameters=kinds.get("parameters", {}),
        guide=None if meta["guide"] is None else SavedGuide(meta["guide"]["meta"], kinds.get("guide", {})),
        cost=Cost.from_dict(meta["cost"]),
        info=kinds.get("info", {}),
        dims=meta["dims"],
        coords=meta["coords"],
        observed=kinds.get("observed", {}),
        attrs=meta["attrs"],
    )


def _enter(
    index: list[dict[str, Any]],
    content: dict[str, Tensor],
    kind: str,
    own: str,
    group: str,
    variable: str,
    tensor: Tensor,
) -> None:
    """Note where a tensor is, and keep it for the checksum."""
    index.append({"kind": kind, "name": own, "group": group, "variable": variable, "dtype": dtype_name(tensor.dtype)})
    content[f"{kind}/{own}"] = tensor


def _guide_state(guide: Any, attrs: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The state of a guide, or a note that it has none."""
    if guide is None:
        return None, {}
    if not hasattr(guide, "state"):
        note = f"the guide ({type(guide).__name__}) has no state() and was not saved"
        attrs["notes"] = [*attrs.get("notes", []), note]
        return None, {}
    meta, tensors = guide.state()
    return {"meta": meta}, dict(tensors)


def _read(path: Path, group: str) -> xarray.Dataset:
    """One group, in memory, as it was written: nothing that looks like a time is decoded into one."""
    import xarray

    with xarray.open_dataset(path, engine="h5netcdf", group=group, decode_times=False, decode_coords=False) as data:
        return data.load()

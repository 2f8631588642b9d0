"""The posterior as ArviZ sees it: InferenceData or DataTree, with dims, coords, and names that cannot clash.

Groups: posterior, sample_stats (info per draw), log_likelihood (info "log_likelihood.<site>"), observed_data. What is
not per draw (cost, evidence, parameters, other info) is JSON in the attribute "pilotlight".
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.effective_size import shared_ess
from ppl.errors import OptionError
from ppl.storage import dtype_name, encode_json

if TYPE_CHECKING:
    import numpy
    import xarray

    from ppl.posterior import Posterior

__all__ = ["Layout", "Variable", "datasets", "layout", "portable", "to_arviz"]

_LIKELIHOOD = "log_likelihood."
_LARGEST = 1500  # numbers in the JSON attribute; all attributes of a group share 64 KiB in HDF5


@dataclass(frozen=True)
class Variable:
    """One tensor with its place.

    Args:
        own: its own name: a site, or an entry of info.
        dims: names of all its axes.
        tensor: on the CPU; (chain, draw, ...), then "problem", where it is per draw.
    """

    own: str
    dims: tuple[str, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    Args:
        groups: group -> name of the variable -> the variable.
        coords: name of an axis -> its labels.
        rest: entries of info that are not per draw.
    """

    groups: dict[str, dict[str, Variable]] = field(default_factory=dict)
    coords: dict[str, list[Any]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


def layout(posterior: Posterior) -> Layout:
    """Sort the tensors of a posterior into groups, and give every variable and every axis a name of its own.

    xarray takes a variable with the name of an axis for the labels of that axis; a program may well have a site and a
    plate of one name, or a plate of two sizes. The variable keeps its name and the axis gets "_dim" or the variable's
    name behind it; a site called "chain" becomes "chain_", and "/" (a path in a file) becomes "|".
    """
    lead = posterior._lead
    result = Layout()
    stats: dict[str, Tensor] = {}
    likelihood: dict[str, Tensor] = {}
    for own, value in posterior.info.items():
        if tuple(value.shape[:lead]) != posterior.shape:
            result.rest[own] = value
        elif own.startswith(_LIKELIHOOD):
            likelihood[own.removeprefix(_LIKELIHOOD)] = value
        else:
            stats[own] = value
    if posterior.log_weight is not None:
        stats.setdefault("log_weight", posterior.log_weight)
    groups = {
        "posterior": posterior.draws,
        "sample_stats": stats,
        "log_likelihood": likelihood,
        "observed_data": posterior.observed,
    }
    reserved = {"chain", "draw", "problem"}
    names: dict[str, str] = {}
    for own in itertools.chain.from_iterable(groups.values()):
        # One name for one site in all groups: ArviZ pairs log_likelihood and observed_data by it.
        if own not in names:
            taken = reserved | set(names.values())
            names[own] = next(name for name in _candidates(own, "") if name not in taken)
    taken = reserved | set(names.values())
    sizes: dict[str, int] = {}
    for group, tensors in groups.items():
        for own, tensor in tensors.items():
            skip = 0 if group == "observed_data" else lead
            value = tensor.detach().cpu()
            event = value.shape[skip:]
            dims: list[str] = [] if skip == 0 else ["chain", "draw"] if skip == 2 else ["chain", "draw", "problem"]
            wanted = posterior.dims.get(own, ())
            if len(wanted) != len(event):
                wanted = tuple(f"{names[own]}_dim_{axis}" for axis in range(len(event)))
            for dim, size in zip(wanted, event, strict=True):
                for name in _candidates(dim, f"_{names[own]}"):
                    if name not in taken and name not in dims and sizes.setdefault(name, size) == size:
                        break
                labels = posterior.coords.get(dim, ())
                result.coords[name] = list(labels) if len(labels) == size else list(range(size))
                dims.append(name)
            if skip == 3:
                value = value.movedim(0, 2)
            result.groups.setdefault(group, {})[names[own]] = Variable(own, tuple(dims), value)
    return result


def _candidates(name: str, owner: str) -> Iterator[str]:
    """The name itself, then longer and longer ones."""
    name = name.replace("/", "|") or "_"
    yield name
    if owner:
        yield f"{name}_dim"
        yield f"{name}{owner}"
    for number in itertools.count(2):
        yield f"{name}{owner}_{number}"


def portable(tensor: Tensor) -> numpy.ndarray:
    """The tensor as an array of a type that NumPy and netCDF have; narrow floats are widened, which is exact."""
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    elif tensor.dtype == torch.complex32:
        tensor = tensor.to(torch.complex64)
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().numpy()


def datasets(plan: Layout, shape: tuple[int, ...]) -> dict[str, xarray.Dataset]:
    """One xarray dataset for each group of the layout.

    Args:
        plan: from `layout`.
        shape: (chain, draw) or (problem, chain, draw).
    """
    import numpy
    import xarray

    *lead, chains, draws = shape
    index = {"chain": chains, "draw": draws} | ({"problem": lead[0]} if lead else {})
    result = {}
    for group, variables in plan.groups.items():
        used = {dim for variable in variables.values() for dim in variable.dims}
        coords: dict[str, Any] = {dim: numpy.arange(size) for dim, size in index.items() if dim in used}
        coords |= {dim: _index(labels) for dim, labels in plan.coords.items() if dim in used}
        data = {name: (variable.dims, portable(variable.tensor)) for name, variable in variables.items()}
        result[group] = xarray.Dataset(data, coords=coords)
    return result


def _index(labels: list[Any]) -> numpy.ndarray:
    """Labels as an array; mixed kinds become text."""
    import numpy

    if all(isinstance(label, str) for label in labels) or len({type(label) for label in labels} - {int, float}) > 0:
        return numpy.array([str(label) for label in labels], dtype=object if labels else float)
    return numpy.array(labels)


def facts(posterior: Posterior, rest: Mapping[str, Tensor]) -> str:
    """JSON of what is not per draw; large entries are named with their shape only."""
    evidence = posterior.log_evidence
    room = _LARGEST
    shown: dict[str, dict[str, Any]] = {"parameters": {}, "info": {}}
    left_out: dict[str, Any] = {}
    for kind, tensors in {"info": rest, "parameters": posterior.parameters}.items():
        for name, value in tensors.items():
            if value.numel() <= room:
                room -= value.numel()
                real = torch.view_as_real(value) if value.is_complex() else value
                shown[kind][name] = real.tolist()
            else:
                left_out[name] = {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    content = {
        "cost": posterior.cost.to_dict(),
        "log_evidence": None if evidence is None else [part.tolist() for part in evidence],
        **shown,
        "left_out": left_out,
        "attrs": json.loads(encode_json(posterior.attrs, "attrs")),
        "complete": posterior.complete,
    }
    return json.dumps(content)


def to_arviz(posterior: Posterior, format: str, resample: bool, generator: torch.Generator | None, seed: int) -> Any:
    """See `Posterior.to_arviz`."""
    if format not in ("inferencedata", "datatree"):
        raise OptionError(f'format must be "inferencedata" or "datatree", got {format!r}')
    attrs: dict[str, Any] = {"inference_library": "pilotlight"}
    if posterior.log_weight is not None:
        shared = shared_ess(posterior)
        assert shared is not None
        attrs["resampled"] = int(resample)
        attrs["effective_draws"] = float(shared.min())
        if resample:
            posterior = posterior.resampled(generator or torch.Generator().manual_seed(seed))
    plan = layout(posterior)
    attrs["pilotlight"] = facts(posterior, plan.rest)
    groups: dict[str, Any] = datasets(plan, posterior.shape)
    for data in groups.values():
        data.attrs.update(attrs if data is groups.get("posterior") else {"inference_library": "pilotlight"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version at import
        if format == "inferencedata":
            import arviz

            return arviz.InferenceData(attrs=attrs, **groups)
        import arviz_base  # noqa: F401 - registers what ArviZ needs of a DataTree
        import xarray

        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})

"""What is known of the sites of a program, and where its latents lie on R^n."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppl.errors import DataError, ProgramError, ShapeError
from ppl.numbers import as_tensor

__all__ = [
    "Layout",
    "Leaf",
    "Site",
    "check_latents",
    "check_observations",
    "is_data",
    "is_deterministic",
    "is_factor",
    "observed_tensor",
    "read_sites",
    "same_distribution",
    "same_support",
    "unwrap",
]


@dataclass(frozen=True)
class Site:
    """What a program knows of one of its sites.

    Args:
        name: the name in `pyro.sample`.
        shape: shape of one draw, plates first, subsampled plates at full size.
        event_dim: number of rightmost axes that belong to one event.
        plates: names of the plates around the site, outermost first.
        support: the constraint on its values.
        observed: whether it carries data.
        discrete: whether its support is discrete.
        subsampled: names of the plates around it that show only part of their data at a time.
        capabilities: what its distribution can do (`"denoiser"`, `"noise_space"`, `"gaussian"`, `"enumerable"`, ...).
        distribution: the distribution of the first run; the same object in every run when `static`.
        static: whether the distribution depends on no other latent site.
    """

    name: str
    shape: torch.Size
    event_dim: int
    plates: tuple[str, ...]
    support: Any
    observed: bool
    discrete: bool
    subsampled: tuple[str, ...]
    capabilities: frozenset[str]
    distribution: Any = field(repr=False)
    static: bool = False
    frames: tuple[Any, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Leaf:
    """Place of one latent site in the flat vector: `z[start:stop]`, reshaped to `shape` (unconstrained, full)."""

    site: str
    start: int
    stop: int
    shape: torch.Size
    noise: bool = False


@dataclass(frozen=True)
class Layout:
    """Places of all continuous latent sites of one draw on R^n."""

    leaves: dict[str, Leaf]
    dim: int

    @classmethod
    def of(cls, sites: Mapping[str, Site], lifted: frozenset[str]) -> Layout:
        """Lay out continuous latents in program order; lifted sites are laid out in their noise."""
        leaves, start = {}, 0
        for name, site in sites.items():
            if site.observed or site.discrete:
                continue
            if name in lifted:
                fn = site.distribution
                base = unwrap(fn)
                shape = site.shape[: len(site.shape) - len(base.event_shape)] + base.noise_shape
            else:
                shape = biject_to(site.support).inverse_shape(site.shape)
            stop = start + math.prod(shape)
            leaves[name] = Leaf(name, start, stop, torch.Size(shape), noise=name in lifted)
            start = stop
        return cls(leaves, start)


@biject_to.register(constraints.MixtureSameFamilyConstraint)
def _of_components(support: Any) -> Any:
    """A mixture lies where its components do; torch knows no transform for it."""
    return biject_to(support.base_constraint)


def unwrap(fn: Any) -> Any:
    """The distribution below `to_event`, `mask` and a generic `expand`."""
    while True:
        if isinstance(fn, ExpandedDistribution | dist.MaskedDistribution | torch.distributions.Independent):
            fn = fn.base_dist
        else:
            return fn


def is_deterministic(msg: Any) -> bool:
    """Whether a site only names a value: `pyro.deterministic`, or a site that a reparametrisation computes."""
    if msg["type"] != "sample" or not msg["is_observed"]:
        return False
    delta = isinstance(unwrap(msg["fn"]), dist.Delta) and isinstance(msg["fn"], dist.MaskedDistribution)
    return delta or bool(msg["infer"].get("_deterministic", False))


def is_factor(msg: Any) -> bool:
    """Whether a sample message or trace node is a `pyro.factor`."""
    return bool(msg["type"] == "sample" and msg["is_observed"] and isinstance(unwrap(msg["fn"]), dist.Unit))


def is_data(msg: Any) -> bool:
    """Whether a sample message or trace node carries data (not a deterministic value, a factor or plate indices)."""
    return bool(
        msg["type"] == "sample"
        and msg["is_observed"]
        and not is_deterministic(msg)
        and not site_is_subsample(msg)
        and not isinstance(unwrap(msg["fn"]), dist.Unit)
    )


def read_sites(trace: Any) -> dict[str, Site]:
    """The latent and observed sites of a trace, in program order."""
    sites = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or (node["is_observed"] and not is_data(node)):
            continue
        fn, value = node["fn"], node["value"]
        frames = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
        shape = list(value.shape)
        for frame in frames:
            if frame.full_size is not None:
                shape[value.ndim - fn.event_dim + frame.dim] = frame.full_size
        base = unwrap(fn)
        capabilities = set(getattr(base, "capabilities", ()))
        if fn.has_enumerate_support:
            capabilities.add("enumerable")
        sites[name] = Site(
            name=name,
            shape=torch.Size(shape),
            event_dim=fn.event_dim,
            plates=tuple(f.name for f in sorted(frames, key=lambda f: f.dim)),
            support=fn.support,
            observed=bool(node["is_observed"]),
            discrete=bool(fn.support.is_discrete),
            subsampled=tuple(f.name for f in frames if f.full_size not in (None, f.size)),
            capabilities=frozenset(capabilities),
            distribution=fn,
            frames=frames,
        )
    return sites


def observed_tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Data of an observed site as a tensor.

    Args:
        name: of the site.
        value: a tensor, a numpy array, a number, or a list of them.
        dtype: floating type of plain numbers; torch's default when None.

    Raises:
        DataError: it does not hold numbers.
    """
    try:
        return as_tensor(value, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"observed site {name!r} has data of type {type(value).__name__}, expected a tensor, an array or numbers "
            f"({error}); convert the data with torch.as_tensor"
        ) from None


def check_observations(trace: Any, moves: Callable[[str], bool] = lambda name: False) -> None:
    """Data are finite, of the shape their distribution has, and inside its support.

    Args:
        trace: Pyro's trace of one run.
        moves: whether the support of an observed site depends on latents: other values of them may hold the data.
    """
    for name, node in trace.nodes.items():
        if not is_data(node):
            continue
        fn, value = node["fn"], node["value"]
        expected = fn.shape()
        if value.shape != expected:
            raise ShapeError(
                f"observed site {name!r} has data of shape {tuple(value.shape)}, but its distribution has shape "
                f"{tuple(expected)}; put the site in a pyro.plate, declare its event axes with .to_event(n), or "
                "reshape the data"
            )
        if value.is_floating_point() or value.is_complex():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise DataError(
                    f"observed site {name!r} has {bad} of {value.numel()} values that are NaN or infinite; "
                    "remove them, or leave them out with obs_mask after replacing them by any finite number"
                )
        if "denoiser" in getattr(unwrap(fn), "capabilities", ()):
            continue
        inside = fn.support.check(value)
        mask = node["mask"]
        if isinstance(mask, Tensor):
            inside = inside | ~mask
        if mask is not False and not bool(torch.as_tensor(inside).all()) and not moves(name):
            raise DataError(
                f"observed site {name!r} has data outside the support of {type(unwrap(fn)).__name__} ({fn.support}); "
                "check the units and the type of the data, or choose a distribution that covers them"
            )


def check_latents(sites: Mapping[str, Site], data_dtype: torch.dtype | None, data_device: torch.device) -> None:
    """There is something to infer, and priors live where the data live."""
    latents = [s for s in sites.values() if not s.observed]
    if not latents:
        raise ProgramError(
            "the model has no latent site: there is nothing to infer. Expected at least one pyro.sample without obs=; "
            "pyro.param declares point estimates only"
        )
    for site in latents:
        base = unwrap(site.distribution)
        if "denoiser" not in site.capabilities:
            continue
        dtype, device = getattr(base, "dtype", None), getattr(base, "device", None)
        if data_dtype is not None and dtype is not None and dtype != data_dtype:
            raise DataError(
                f"the prior of site {site.name!r} computes in {dtype}, but the data are {data_dtype}; convert the data "
                f"with .to({dtype}) or the prior with prior.to(dtype={data_dtype})"
            )
        if device is not None and torch.device(device).type != data_device.type:
            raise DataError(
                f"the prior of site {site.name!r} is on {device}, but the data are on {data_device}; "
                f"move one of them with .to(...)"
            )


def same_support(a: Any, b: Any) -> bool:
    """Whether two constraints have the same bounds."""
    if type(a) is not type(b):
        return False
    ours, theirs = vars(a), vars(b)
    return all(
        same_support(ours[k], theirs[k])
        if isinstance(ours[k], constraints.Constraint)
        else not isinstance(ours[k], Tensor | int | float) or bool((torch.as_tensor(ours[k] == theirs[k])).all())
        for k in ours
    )


def same_distribution(a: Any, b: Any) -> bool:
    """Whether two distributions are the same object, or were built from the same parts."""
    a, b = unwrap(a), unwrap(b)
    if a is b:
        return True
    ours, theirs = ({k: v for k, v in x.__dict__.items() if k != "_validate_args"} for x in (a, b))
    if type(a) is not type(b) or ours.keys() != theirs.keys():
        return False

    def equal(u: Any, v: Any) -> bool:
        if u is v:
            return True
        if isinstance(u, Tensor) and isinstance(v, Tensor):
            return u.shape == v.shape and torch.equal(u, v)
        if type(u) is not type(v):
            return False
        if isinstance(u, torch.distributions.Distribution):  # what a mixture or a transformed law is made of
            return same_distribution(u, v)
        if isinstance(u, list):
            return len(u) == len(v) and all(equal(*pair) for pair in zip(u, v, strict=True))
        if isinstance(u, torch.distributions.Transform):
            return bool(u == v)
        return isinstance(u, str | int | float | tuple | frozenset | None | torch.dtype | torch.device) and u == v

    return all(equal(ours[k], theirs[k]) for k in ours)

"""One run of a Pyro model with its latents, data, parameters and subsample indices set from outside.

This file is the only one that knows Pyro's messages: `run_model` returns Pyro's trace, `log_prob_of` scores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from ppl.sites import Layout, Leaf, is_data, observed_tensor, unwrap

__all__ = ["Run", "log_prob_of", "run_model", "seeded", "set_values", "settings", "values_of"]


@dataclass
class Run:
    """What is set from outside for one run of a model.

    Args:
        values: latent values by site, plates at full size.
        z: flat vector (n,) from which the sites of `layout` that are not in `values` are built.
        layout: places of the sites in `z`.
        data: observed values that replace those in the model.
        indices: subsample indices by plate.
        plates: indices of sequential plates, as integers, so that a loop over them can be traced.
        params: learnable tensors by name, constrained.
        functions: distributions that replace those in the model.
        unscored: sites whose density is not counted; `None` scores all.
        predict: draw observed sites anew instead of using their data.
        enumerate_: marginalise discrete latents.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    z: Tensor | None = None
    layout: Layout | None = None
    data: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    plates: Mapping[str, list[int]] = field(default_factory=dict)
    params: Mapping[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)
    unscored: frozenset[str] = frozenset()
    predict: bool = False
    enumerate_: bool = False


class _Setter(Messenger):
    """Sets values, data, indices and parameters; collects the log-Jacobian and the unconstrained values."""

    def __init__(self, run: Run, visit: Callable[[str], None]) -> None:
        super().__init__()
        self.run, self.visit = run, visit
        self.log_jacobian: Tensor | float = 0.0
        self.unconstrained: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        run, name = self.run, msg["name"]
        self.visit(name)
        if site_is_subsample(msg):
            if name in run.indices:
                msg["value"] = run.indices[name]
            elif name in run.plates:
                msg["value"] = run.plates[name]
            return
        if name in run.functions:
            msg["fn"] = run.functions[name]
        if is_data(msg):
            if run.predict:
                msg["is_observed"], msg["value"] = False, None
            elif name in run.data:
                msg["value"] = run.data[name]
            if msg["is_observed"]:
                msg["value"] = observed_tensor(name, msg["value"])
            return
        if msg["is_observed"]:  # deterministic sites and factors
            return
        leaf = run.layout.leaves.get(name) if run.layout is not None else None
        if name in run.values:
            msg["value"] = value = gather(run.values[name], msg, run.indices)
            if leaf is not None and not leaf.noise and run.z is None:
                self.unconstrained[name] = biject_to(msg["fn"].support).inv(value)
        elif leaf is not None and run.z is not None:
            self._from_flat(msg, leaf)
        elif isinstance(unwrap(msg["fn"]), dist.ImproperUniform):
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.rand(transform.inverse_shape(msg["fn"].shape())) * 2 - 1)
        if name in run.unscored and msg["value"] is not None:
            msg["fn"] = dist.Delta(msg["value"], event_dim=msg["fn"].event_dim).mask(False)

    def _from_flat(self, msg: Any, leaf: Leaf) -> None:
        assert self.run.z is not None
        fn = msg["fn"]
        u = gather(self.run.z[leaf.start : leaf.stop].reshape(leaf.shape), msg, self.run.indices)
        scale = math.prod(f.full_size / f.size for f in msg["cond_indep_stack"] if f.full_size not in (None, f.size))
        if leaf.noise:
            value = unwrap(fn).from_noise(u)
            msg["value"], msg["fn"] = value, dist.Delta(value, event_dim=fn.event_dim).mask(False)
            self.log_jacobian = self.log_jacobian + scale * dist.Normal(0.0, 1.0).log_prob(u).sum()
            return
        transform = biject_to(fn.support)
        value = msg["value"] = transform(u)
        self.log_jacobian = self.log_jacobian + scale * transform.log_abs_det_jacobian(u, value).sum()
        mask = _static_mask(msg)
        if mask is not None and fn.event_dim == 0:
            # A masked latent has a flat density; a standard normal in its place is independent of all else.
            self.log_jacobian = self.log_jacobian + torch.where(mask.to(u.device), 0.0, -0.5 * u.square()).sum()

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.run.params:
            msg["value"], msg["done"] = self.run.params[msg["name"]], True


def set_values(run: Run, model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with data, parameters and distributions set by `run`, still to be run by Pyro itself."""
    return _Setter(run, lambda name: None)(model)


def _static_mask(msg: Any) -> Tensor | None:
    fn = msg["fn"]
    mask = getattr(fn, "_mask", None) if isinstance(fn, dist.MaskedDistribution) else msg["mask"]
    if mask is False:
        mask = torch.zeros(fn.batch_shape, dtype=torch.bool)
    return mask if isinstance(mask, Tensor) else None


def gather(value: Tensor, msg: Any, indices: Mapping[str, Tensor]) -> Tensor:
    """The rows of a full-size value that the subsampled plates around a site show."""
    for frame in msg["cond_indep_stack"]:
        if frame.name in indices and frame.dim is not None:
            axis = value.ndim - msg["fn"].event_dim + frame.dim
            value = value.index_select(axis, indices[frame.name])
    return value


@contextmanager
def settings(dtype: torch.dtype, validate: bool) -> Iterator[None]:
    """Default dtype, validation and an own parameter store while a model runs; all restored."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pyro.validation_enabled(validate), pyro.get_param_store().scope():
            yield
    finally:
        torch.set_default_dtype(before)


def run_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Run,
    *,
    nesting: int = 0,
    visit: Callable[[str], None] = lambda name: None,
) -> tuple[Any, _Setter]:
    """Run a model once under `settings`; returns Pyro's trace and the setter that holds the log-Jacobian."""
    setter = _Setter(run, visit)
    target = model
    if run.enumerate_:
        enum = pyro.poutine.enum(first_available_dim=-1 - nesting)
        target = enum(pyro.infer.config_enumerate(model, default="parallel"))
    with _module_weights() if any("$$$" in name for name in run.params) else nullcontext():
        trace = pyro.poutine.trace(setter(target)).get_trace(*args, **kwargs)
    return trace, setter


@contextmanager
def _module_weights() -> Iterator[None]:
    """While a model runs, `pyro.module` puts the values of its parameters into the module; taken out again after."""
    original = pyro.module
    saved: list[tuple[torch.nn.Module, dict[str, Any]]] = []

    def module(name: str, nn_module: torch.nn.Module, update_module_params: bool = False) -> torch.nn.Module:
        saved.extend((part, dict(part._parameters)) for part in nn_module.modules())
        return original(name, nn_module, update_module_params=True)

    pyro.module = pyro.primitives.module = module
    try:
        yield
    finally:
        pyro.module = pyro.primitives.module = original
        for part, parameters in reversed(saved):
            part._parameters.update(parameters)


def log_prob_of(trace: Any, names: Callable[[Any], bool], *, enumerated: bool, nesting: int) -> Tensor:
    """Sum of the log densities of the sites that `names` selects, scaled and masked; enumerated sites summed out."""
    if enumerated:
        return TraceEinsumEvaluator(trace, True, nesting).log_prob(trace)
    from pyro.distributions.util import scale_and_mask

    total: Any = torch.zeros(())
    for node in trace.nodes.values():
        if node["type"] != "sample" or site_is_subsample(node) or not names(node):
            continue
        if node["mask"] is False:
            continue
        fn = node["fn"]
        if isinstance(fn, dist.MaskedDistribution) and isinstance(fn.base_dist, dist.Delta):
            continue
        log_prob = fn.log_prob(node["value"], *node["args"], **node["kwargs"])
        total = total + scale_and_mask(log_prob, node["scale"], node["mask"]).sum()
    return total


def values_of(trace: Any) -> dict[str, Tensor]:
    """Values of sample sites and deterministic sites of a trace."""
    return {
        n: node["value"]
        for n, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not isinstance(unwrap(node["fn"]), dist.Unit)
        and isinstance(node["value"], Tensor)
    }


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Run Pyro's own draws under a fork of the global generator, seeded from `generator`."""
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield

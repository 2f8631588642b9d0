"""One run of a Pyro program for all particles and samples at once, with values, data and parameters set from outside.

Particles, samples and data lie on axes to the left of the program's own plates: (*particles, samples, *plates, *event).
A program that does not broadcast so runs particle by particle instead, which is slower and never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl.objectives.estimators import Estimator, MeasureValued
from ppl.objectives.measure_valued import Arm, arms
from ppl.sites import is_data, is_deterministic, is_factor, unwrap
from ppl.trace import _module_weights

__all__ = ["Node", "Setting", "Source", "run_lanes", "run_plain", "unpad"]


@dataclass(frozen=True, eq=False)
class Source:
    """A Pyro program with its arguments.

    Args:
        fn: the program.
        arguments: makes positional and keyword arguments, with a function applied to those tensors that differ between
            lanes.
        data: observed values that replace those in the program.
        functions: distributions that replace those in the program.
    """

    fn: Callable[..., Any]
    arguments: Callable[[Callable[[Tensor], Tensor]], tuple[tuple[Any, ...], Mapping[str, Any]]]
    data: Mapping[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Node:
    """A sample site of a run.

    Args:
        value: (*particles, samples, *plates, *event).
        raw: (*particles, samples, *plates) log density, masked, not scaled.
        full: the same without the mask, where the site is drawn.
        scale: what the log density counts for.
        frames: the plates around the site.
        event_dim: axes of one event.
        rank: plates of the site itself, without those it is padded with.
        observed: whether it carries data, or is a factor.
        latent: whether it is a draw of the program.
        is_data: whether it carries data.
        auxiliary: whether the guide marks it as none of the model's.
        support: constraint on its values; `None` for a point mass.
        discrete: whether the support is discrete.
        estimator: how its gradient is estimated, if it was drawn here and counts.
        arms: rows of the measure-valued derivative.
        baseline: prediction of the cost by the guide.
        atom: axes of one coordinate's value.
        states: (states, *atom) its finite support.
        fn: its distribution, where all lanes share one.
    """

    value: Tensor
    raw: Tensor
    full: Tensor
    scale: Any
    frames: tuple[Any, ...]
    event_dim: int
    rank: int
    observed: bool
    latent: bool
    is_data: bool
    auxiliary: bool
    support: Any
    discrete: bool
    estimator: Estimator | None = None
    arms: tuple[Arm, ...] = ()
    baseline: Tensor | None = None
    atom: int = 0
    states: Tensor | None = None
    fn: Any = None


@dataclass(eq=False)
class Setting:
    """What a run is given.

    Args:
        params: learnable tensors by name, constrained.
        values: values of sites, padded to the lanes.
        data: values of observed sites, likewise.
        draw: `draw(name, message) -> (value, estimator, baseline)` for sites without a value.
        simulate: draw observed sites as well.
        indices: indices of subsampled plates; those of plates met for the first time are added.
        dtype: floating type of what the program makes without naming one.
    """

    params: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    draw: Callable[[str, Any], tuple[Tensor, Estimator | None, Tensor | None]] | None
    simulate: bool
    indices: dict[str, Tensor]
    dtype: torch.dtype


class _Lanes(Messenger):
    """Sets parameters, indices, data and values, gives every site the lane axes, and records it."""

    def __init__(self, source: Source, setting: Setting, lead: tuple[int, ...], plates: int) -> None:
        super().__init__()
        self.source, self.setting, self.lead, self.plates = source, setting, lead, plates
        self.nodes: dict[str, Node] = {}
        self.drawn: dict[str, tuple[Estimator | None, Tensor | None]] = {}
        self.params: dict[str, Any] = {}

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.setting.params:
            msg["value"], msg["done"] = self.setting.params[msg["name"]], True

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = msg

    def _pyro_sample(self, msg: Any) -> None:
        name, setting = msg["name"], self.setting
        if site_is_subsample(msg):
            fn = msg["fn"]
            if msg["value"] is None and fn.subsample_size not in (None, -1, fn.size):
                if name not in setting.indices:
                    setting.indices[name] = torch.randperm(fn.size)[: fn.subsample_size]
                msg["value"] = setting.indices[name]
            return
        if name in self.source.functions:
            msg["fn"] = self.source.functions[name]
        self._expand(msg)
        if msg["is_observed"] and is_data(msg):
            if name in setting.values:
                msg["value"] = setting.values[name]
            elif not setting.simulate:
                if name in setting.data:
                    msg["value"] = setting.data[name]
                elif name in self.source.data:
                    msg["value"] = self.source.data[name]
                return
            msg["is_observed"] = False
        elif msg["is_observed"]:
            return
        if name in setting.values:
            msg["value"] = setting.values[name]
        elif setting.draw is not None:
            msg["value"], estimator, baseline = setting.draw(name, msg)
            self.drawn[name] = (estimator, baseline)
        msg["done"] = msg["value"] is not None

    def _expand(self, msg: Any) -> None:
        fn = msg["fn"]
        if not self.lead or not hasattr(fn, "batch_shape"):
            return
        own = fn.batch_shape
        width = len(self.lead) + self.plates
        missing = max(self.plates - len(own), 0)
        target = torch.broadcast_shapes((1,) * missing + tuple(own), self.lead + (1,) * self.plates)
        if len(target) != width:
            raise ValueError(f"site {msg['name']!r} has the batch shape {tuple(own)}, more axes than its plates")
        if target != own:
            able = fn.has_rsample
            msg["fn"] = fn = fn.expand(torch.Size(target))
            if fn.has_rsample != able:
                fn.has_rsample = able

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        full = raw = fn.log_prob(value, *msg["args"], **msg["kwargs"])
        estimator, baseline = self.drawn.get(name, (None, None))
        if estimator is not None and isinstance(fn, dist.MaskedDistribution):
            full = fn.base_dist.log_prob(value)
        if msg["mask"] is not None:
            raw = scale_and_mask(raw, 1.0, msg["mask"])
        base = unwrap(fn)
        latent = not msg["is_observed"]
        rows: tuple[Arm, ...] = ()
        if isinstance(estimator, MeasureValued) and torch.is_grad_enabled():
            rows = tuple(arms(fn, value))
        self.nodes[name] = Node(
            value=value,
            raw=raw,
            full=full,
            scale=msg["scale"],
            frames=msg["cond_indep_stack"],
            event_dim=fn.event_dim,
            rank=len(fn.batch_shape) if not self.lead else self.plates,
            observed=bool(msg["is_observed"]),
            latent=latent and not is_factor(msg),
            is_data=is_data(msg),
            auxiliary=bool(msg["infer"].get("is_auxiliary", False)),
            support=None if isinstance(base, dist.Delta) else fn.support,
            discrete=bool(getattr(fn.support, "is_discrete", False)),
            estimator=estimator,
            arms=rows,
            baseline=baseline,
            atom=len(base.event_shape),
            fn=fn,
        )


def _call(source: Source, setting: Setting, lanes: _Lanes, each: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    args, kwargs = source.arguments(each)
    modules = _module_weights() if any("$$$" in n for n in setting.params) else nullcontext()
    with modules, lanes:
        source.fn(*args, **kwargs)


def run_plain(source: Source, setting: Setting) -> tuple[dict[str, Node], dict[str, Any]]:
    """One run without lanes: its sites, and its parameter messages."""
    lanes = _Lanes(source, setting, (), 0)
    _call(source, setting, lanes)
    return lanes.nodes, lanes.params


def run_lanes(
    source: Source, setting: Setting, lead: tuple[int, ...], plates: int, ranks: Mapping[str, int], *, loop: bool
) -> dict[str, Node]:
    """One run for all lanes.

    Args:
        source: the program.
        setting: what it is given.
        lead: sizes of the lane axes, leftmost first.
        plates: axes that are kept for the program's own plates.
        ranks: axes of the plates of each site, where known.
        loop: run lane by lane.
    """
    if loop:
        return _looped(source, setting, lead, plates)
    lanes = _Lanes(source, setting, lead, plates)
    _call(source, setting, lanes)
    width = lead + (1,) * plates
    out = {}
    for name, node in lanes.nodes.items():
        raw = node.raw
        if raw.shape[: len(lead)] != lead or raw.ndim != len(width):
            raw = raw.expand(torch.broadcast_shapes(raw.shape, width))
        out[name] = replace(node, raw=raw, rank=ranks.get(name, plates))
    return out


def _looped(source: Source, setting: Setting, lead: tuple[int, ...], plates: int) -> dict[str, Node]:
    """Lane by lane; sites that only some lanes visit count as zero in the others."""
    count = math.prod(lead)
    rows: list[dict[str, Node]] = []
    outer = setting.draw

    def lane(x: Tensor, i: int) -> Tensor:
        place = [i // math.prod(lead[j + 1 :]) % size for j, size in enumerate(lead)]
        return unpad(x[tuple(0 if n == 1 else p for p, n in zip(place, x.shape, strict=False))], plates)

    for i in range(count):
        values = {n: lane(v, i) for n, v in setting.values.items()}
        data = {n: lane(v, i) for n, v in setting.data.items()}
        draw = None if outer is None else (lambda name, msg, i=i: outer(name, {**msg, "lane": (i, lead, plates)}))
        one = replace(setting, values=values, data=data, draw=draw)
        lanes = _Lanes(source, one, (), 0)
        lanes.plates = plates
        _call(source, one, lanes, lambda x, i=i: lane(x, i))  # type: ignore[misc]
        rows.append(lanes.nodes)
    names = list(dict.fromkeys(n for row in rows for n in row))
    return {n: _stack([row.get(n) for row in rows], lead, plates) for n in names}


def unpad(value: Tensor, plates: int) -> Tensor:
    """The value of one lane without the axes of size one that it was padded with."""
    drop = 0
    while drop < plates and value.ndim > 0 and value.shape[0] == 1:
        value, drop = value[0], drop + 1
    return value


def _stack(rows: list[Node | None], lead: tuple[int, ...], plates: int) -> Node:
    first = next(row for row in rows if row is not None)

    def join(parts: list[Tensor], trailing: int) -> Tensor:
        whole = torch.stack(parts)
        batch = whole.shape[1 : whole.ndim - trailing]
        return whole.reshape(*lead, *(1,) * (plates - len(batch)), *whole.shape[1:])

    def column(read: Callable[[Node], Tensor], trailing: int, absent: float | None = None) -> Tensor:
        empty = read(first)
        missing = empty if absent is None else torch.full_like(empty, absent)
        return join([missing if row is None else read(row) for row in rows], trailing)

    def arm(j: int, side: str) -> Tensor | None:
        if getattr(first.arms[j], side) is None:
            return None
        return column(lambda node: getattr(node.arms[j], side).expand(node.value.shape), first.event_dim)

    rows_of_arms = tuple(
        Arm(*(arm(j, side) for side in ("parameter", "constant", "plus", "minus")))  # type: ignore[arg-type]
        for j in range(len(first.arms))
    )

    def baseline(node: Node) -> Tensor:
        assert node.baseline is not None
        return node.baseline.expand(node.raw.shape)

    scales = [row.scale for row in rows if row is not None]
    return replace(
        first,
        value=column(lambda node: node.value, first.event_dim),
        raw=column(lambda node: node.raw, 0, 0.0),
        full=column(lambda node: node.full, 0, 0.0),
        scale=scales[0],
        arms=rows_of_arms,
        baseline=None if first.baseline is None else column(baseline, 0),
        fn=None,
    )

"""What a problem should say of itself before anyone believes its draws: data that no x explains, look-alike answers.

rank r < m:   |d|^2 - |U^T d|^2 is chi^2 with m - r degrees of freedom where the model is right
range [a, b]: data beyond it by more than a few noise levels cannot come from the operator
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.gaussian_likelihood import GaussianLikelihood
from inverse.likelihood import Likelihood
from inverse.operators import CallRecord, record_calls
from ppl.sites import unwrap

__all__ = ["remarks"]

BEYOND = 6.0
"""Noise levels by which right data miss once in a thousand million."""
SVD_LIMIT = 2**16
"""Entries of the operator up to which its rank is looked at."""


def remarks(likelihood: Likelihood) -> list[str]:
    """One sentence for each thing that draws alone would not show.

    Args:
        likelihood: of a program, with its data.

    Returns:
        Sentences; none where nothing is wrong.
    """
    if likelihood.is_gaussian:
        return _unreachable(likelihood.gaussian)
    # Probes are not draws of the prior: zero is a place where every operator is defined.
    x = torch.zeros(likelihood.shape, dtype=likelihood.program.dtype, device=likelihood.program.device)
    with torch.no_grad(), record_calls() as calls:
        trace = likelihood.observe(x)
    found = _cut(likelihood)
    for record in calls:
        found += _alike(record) + _outside(likelihood, record, trace)
    return list(dict.fromkeys(found))


def _unreachable(gaussian: GaussianLikelihood) -> list[str]:
    """Data that lie outside the span of a linear operator, by more than their noise."""
    operator, m = gaussian.operator, gaussian.size
    if "svd" not in operator.capabilities or m * math.prod(operator.in_shape) > SVD_LIMIT:
        return []
    svd = operator.svd()
    free = m - svd.rank
    if free <= 0:
        return []
    data = gaussian.data.double()
    missed = float(data.square().sum() - svd.to_spectral_data(data).square().sum())
    if missed <= free + BEYOND * math.sqrt(2 * free) + BEYOND**2:
        return []
    return [
        f"the data lie outside the range of the operator: {free} of {m} combinations of them do not depend on the "
        f"site, and these are {math.sqrt(missed / free):.3g} noise levels from zero, where about 1 is right; check "
        "units, offsets and the noise level"
    ]


def _cut(likelihood: Likelihood) -> list[str]:
    """Entries of the site that the data answer to and that have no gradient, at any of three points."""

    def value(x: Tensor) -> Tensor:
        nodes = likelihood.observe(x).nodes.values()
        data = [node for node in nodes if node["type"] == "sample" and node["is_observed"]]  # factors too
        return sum((node["fn"].log_prob(node["value"]).sum() for node in data), start=x.new_zeros(()))

    still, before = torch.ones(likelihood.shape, dtype=torch.bool, device=likelihood.program.device), []
    try:
        for probe in likelihood.probes():
            with torch.enable_grad():
                leaf = probe.detach().requires_grad_()
                before.append(value(leaf))
                if not before[-1].requires_grad:
                    return []  # a backend that asks for the gradient raises
                (gradient,) = torch.autograd.grad(before[-1], leaf)
            still &= gradient == 0
        if not bool(still.any()):
            return []
        first, _, second = likelihood.probes()
        with torch.no_grad():
            pairs = [
                (value(torch.where(still, second, first)), before[0]),
                (value(torch.where(still, first, second)), before[2]),
            ]
    except ValueError:  # a parameter that its distribution refuses: nothing can be said
        return []
    if all(bool((a - b).abs() <= 1e-6 * (1 + b.abs())) or not bool((a - b).isfinite()) for a, b in pairs):
        return []
    return [
        f"the data depend on {likelihood.site!r} where their likelihood has no gradient, in {int(still.sum())} of "
        f"{still.numel()} entries at three points: a detach(), a rounding or a threshold in the model, and nothing "
        "leads a backend that follows the gradient there; inverse.DiffusionPCN asks for none"
    ]


def _alike(record: CallRecord) -> list[str]:
    """Different images with the same data."""
    equivalents = getattr(record.operator, "equivalents", None)
    if equivalents is None:
        return []
    name = type(record.operator).__name__
    return [
        f"{name} gives the same data for {len(equivalents(record.input))} images ({name}.equivalents): the posterior "
        f"may have a mode at each; use {name}.align(draws, reference) before draws are averaged or compared"
    ]


def _outside(likelihood: Likelihood, record: CallRecord, trace: Any) -> list[str]:
    """Data that an operator of limited range cannot have made."""
    limits = getattr(record.operator, "limits", None)
    if limits is None:
        return []
    found = []
    for name in likelihood.program.observed:
        node = trace.nodes[name]
        fn = unwrap(node["fn"])
        if not isinstance(fn, dist.Normal) or fn.loc.shape != record.output.shape:
            continue
        if not torch.equal(fn.loc, record.output):
            continue
        y: Tensor = node["value"]
        low, high = limits
        beyond = (y < low - BEYOND * fn.scale) | (y > high + BEYOND * fn.scale)
        if bool(beyond.any()):
            found.append(
                f"{int(beyond.sum())} of {y.numel()} data of {name!r} lie outside the range of "
                f"{type(record.operator).__name__}, [{low:.4g}, {high:.4g}], by more than {BEYOND:g} noise levels: "
                f"data in [{float(y.min()):.4g}, {float(y.max()):.4g}]; check units and the operator's limits"
            )
    return found

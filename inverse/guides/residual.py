"""y - A(x) in the units of the data, without the noise level: what DPS and RED-diff are published with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.problem import DiffusionProblem
from ppl.errors import CapabilityError
from ppl.sites import is_data, unwrap

__all__ = ["gradient_of", "misfit", "residual_fn"]


def residual_fn(problem: DiffusionProblem) -> Callable[[Tensor], Tensor]:
    """The function x (lanes, *shape) -> y - A(x) (lanes, m) of all observed sites, differentiable in x.

    A(x) is the mean of the observed distribution, linear in x or not; masked entries are left out (they are zero).

    Raises:
        CapabilityError: when an observed distribution has no mean to compare real data with, or the program has a
            factor, which is no comparison with data and would be left out.
    """
    likelihood = problem.likelihood
    if problem.program.factors:
        raise CapabilityError(
            f"the published weight compares data with their mean and would leave out pyro.factor "
            f'{problem.program.factors[0]!r}; use the likelihood itself: weight="likelihood" (DPS) or '
            'scale="likelihood" (RED-diff)'
        )
    gaussian = likelihood.gaussian if likelihood.is_gaussian else None
    if gaussian is not None and gaussian.stddev is not None:
        data = gaussian.data * gaussian.stddev
        return lambda x: (data - gaussian.measured(x)).reshape(len(x), gaussian.size).to(x.dtype)
    read = problem.program.batched(_residuals)
    # A graph is made for a positive number of lanes.
    return lambda x: read(likelihood.values(x)) if len(x) else 0 * x.flatten(1)


def _residuals(trace: Any) -> Tensor:
    """Residuals of one draw, flattened and joined."""
    parts = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not is_data(node):
            continue
        fn = node["fn"]
        try:
            mean = unwrap(fn).mean
        except NotImplementedError:
            raise CapabilityError(
                f"the published weight compares the data of {name!r} with their mean, but {type(unwrap(fn)).__name__} "
                'has none; use the likelihood itself: weight="likelihood" (DPS) or scale="likelihood" (RED-diff)'
            ) from None
        gap = node["value"] - mean
        for mask in _masks(node):
            gap = torch.where(mask, gap, torch.zeros_like(gap))
        parts.append(gap.reshape(-1))
    return torch.cat(parts)


def _masks(node: Any) -> Iterator[Tensor]:
    """The masks of a site, from `poutine.mask` and from `.mask()`, with axes for the event."""
    fn, mask = node["fn"], node["mask"]
    while True:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=node["value"].device)
            yield mask.reshape(*mask.shape, *[1] * len(fn.event_shape))
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask
        elif isinstance(fn, dist.Independent):
            mask = None
        else:
            return
        fn = fn.base_dist


def misfit(residual: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """||y - A(x)||^2 / 2 per lane (lanes,), and its gradient (lanes, *shape)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = 0.5 * residual(leaf).square().sum(-1)
        gradient = gradient_of(value, leaf)
    return value.detach(), gradient


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of each lane's value (lanes,) with respect to its leaf (lanes, *shape).

    Raises:
        CapabilityError: no differentiable path leads from one to the other.
    """
    if not value.requires_grad:
        raise CapabilityError(
            "the likelihood does not depend on the diffusion site through a differentiable path, so that its gradient "
            "would guide nothing: look in the model for detach(), item(), numpy, torch.no_grad or a datum that does "
            "not use the site; backends that ask for no gradient are inverse.DiffusionPCN and ppl.NoiseSpace("
            "ppl.EllipticalSlice())"
        )
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient

"""What lets a model be simulated under vmap: memory of each lane's own, and laws whose draws can be batched.

with drawn_in_lanes(lane):
    trace = ...            # of one draw, inside torch.vmap(..., randomness="different")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppl.sites import unwrap

__all__ = ["drawn_in_lanes"]

FACTORIES = {
    torch.empty,
    torch.empty_like,
    torch.zeros,
    torch.zeros_like,
    torch.ones,
    torch.ones_like,
    torch.full,
    Tensor.new,
    Tensor.new_empty,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
}


@contextmanager
def drawn_in_lanes(lane: Tensor) -> Iterator[None]:
    """While a model runs under vmap, its sites draw for each lane.

    Args:
        lane: a zero of the lane, 0-d inside vmap.

    Example:
        >>> def one(lane):
        ...     with drawn_in_lanes(lane):
        ...         return dist.Exponential(torch.tensor(2.0)).sample()
        >>> with torch.random.fork_rng(devices=[]):
        ...     x = torch.vmap(one, randomness="different")(torch.zeros(4000))
        >>> x.shape, bool((x.mean() - 0.5).abs() < 0.05), len(x.unique()) > 3900
        (torch.Size([4000]), True, True)
    """
    with _OwnMemory(lane), _ByGammas():
        yield


class _OwnMemory(TorchFunctionMode):
    """Under vmap, new tensors belong to each lane, so that they can be filled with random numbers in place."""

    def __init__(self, lane: Tensor) -> None:
        super().__init__()
        self.lane = lane

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clamp_:  # vmap has a rule for the other form alone; Gamma draws use this one
            return args[0].copy_(torch.clamp(*args, **(kwargs or {})))
        out = func(*args, **(kwargs or {}))
        if func in FACTORIES and isinstance(out, Tensor) and out.is_floating_point():
            return out + self.lane.to(out.dtype)
        return out


class _ByGammas(Messenger):
    """Draws Beta and Dirichlet sites from Gamma variables, because torch's own way cannot be batched."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = unwrap(msg["fn"])
        if msg["value"] is not None or msg["is_observed"] or type(fn) not in (dist.Beta, dist.Dirichlet):
            return
        shape = msg["fn"].shape()
        if isinstance(fn, dist.Beta):
            one, other = (torch._standard_gamma(c.expand(shape)) for c in (fn.concentration1, fn.concentration0))
            msg["value"] = one / (one + other)
        else:
            parts = torch._standard_gamma(fn.concentration.expand(shape))
            msg["value"] = parts / parts.sum(-1, keepdim=True)

"""A value and the products with its transposed Jacobian, as often as wanted, from one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["vector_jacobian"]

_LARGEST = 2**25 - 2**16
"""Bytes of the largest block that glibc learns from: its limit, less what it writes in front of a block."""


def vector_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """function(x), and v -> J^T v from the graph of this one evaluation, which lives as long as the second does.

    Plain autograd, which gives less memory back to the system between evaluations than `torch.func.vjp` does; that one
    only where a transform or a gradient from outside goes through.

    Args:
        function: differentiable, from x to a tensor.
        x: where.

    Example:
        >>> value, pull = vector_jacobian(torch.square, torch.tensor([1.0, 3.0]))
        >>> pull(torch.tensor([1.0, 1.0]))
        tensor([2., 6.])
    """
    if torch.is_grad_enabled() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        value, through = torch.func.vjp(function, x)[:2]
        return value, lambda v: through(v)[0]
    if x.device.type == "cpu":
        _keep_memory()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        tracked = function(leaf)

    def pull(v: Tensor) -> Tensor:
        if not tracked.requires_grad:  # a constant
            return torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(tracked, leaf, v, retain_graph=True, materialize_grads=True)
        return found

    return tracked.detach(), pull


@cache
def _keep_memory() -> None:
    """Have the C library keep up to 64 MB of freed memory: what one step frees, the next one takes again.

    glibc gives the end of its heap back to the system from twice the size of the largest block that was ever freed.
    Graphs of small networks are many blocks below that size, and all of their pages were asked for anew in every step,
    for a tenth of the time. One larger block, of which no page is touched, is what it learns from; other libraries take
    no notice.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)

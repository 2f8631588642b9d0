"""Conjugate gradients for batches of symmetric positive systems, known only through their products.

p_0 = r_0 = b - M x_0,   x += (r.z / p.Mp) p,   z = K r  (K a preconditioner, or the identity)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import OptionError, PilotlightError

__all__ = ["ConvergenceError", "Solution", "conjugate_gradient"]

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class ConvergenceError(PilotlightError, RuntimeError):
    """An iterative solver ran out of steps before it reached its tolerance."""


class Solution(NamedTuple):
    """What conjugate gradients returns.

    x: (*batch, *event) solution. steps: matrix products spent. residual: (*batch,) ||b - M x|| / ||b||, by recursion.
    image: L x, where `matvec` gave (M x, L x).
    """

    x: Tensor
    steps: int
    residual: Tensor
    image: Tensor | None = None


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    b: Tensor,
    *,
    event_ndim: int = 1,
    tolerance: float | None = None,
    max_steps: int | None = None,
    fixed_steps: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
) -> Solution:
    """Solve M x = b for every batch member at once, M symmetric positive (semi-)definite.

    Each member has its own step lengths and is frozen once it has converged, so the answer does not depend on its
    neighbours. For a singular M with b in its range and start zero, the result is the solution of least norm.

    Args:
        matvec: x -> M x on (*batch, *event); may differ between batch members. Where M x is made through another
            linear image L x (*batch, *any), it may return (M x, L x): L of the solution then costs no product more.
        b: (*batch, *event) right-hand sides.
        event_ndim: number of trailing axes that form one vector.
        tolerance: relative residual at which a member stops; 1e-10 in float64 and 1e-5 in float32 when None.
        max_steps: products allowed; 10 (size of event) + 50 when None.
        fixed_steps: run exactly this many steps and never look at the values, as a traced graph or vmap needs.
        preconditioner: x -> K x, K symmetric positive definite and close to M^{-1}.
        start: (*batch, *event) first guess, zero when None.

    Returns:
        Solution(x, steps, residual, image).

    Raises:
        ConvergenceError: if a member has not converged after max_steps (never with fixed_steps).

    Source: Hestenes & Stiefel (1952) [inferred].

    Example:
        >>> M = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> conjugate_gradient(lambda x: x @ M, torch.tensor([3.0, 4.0], dtype=torch.float64)).x
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    if fixed_steps is not None and fixed_steps < 1:
        raise OptionError(f"fixed_steps must be one or more, got {fixed_steps}; leave it None to stop at the tolerance")
    if event_ndim > b.ndim:
        raise OptionError(f"event_ndim is {event_ndim}, but b has only {b.ndim} axes: shape {tuple(b.shape)}")
    tolerance = _TOLERANCE[b.dtype] if tolerance is None else tolerance
    size = 1
    for n in b.shape[b.ndim - event_ndim :]:
        size *= n
    limit = fixed_steps if fixed_steps is not None else (10 * size + 50 if max_steps is None else max_steps)
    axes = tuple(range(b.ndim - event_ndim, b.ndim))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(axes, keepdim=True) if axes else u * v

    def ratio(a: Tensor, c: Tensor) -> Tensor:
        # A member that has converged has a = c = 0: its step is zero, not NaN.
        empty = c == 0
        return torch.where(empty, torch.zeros_like(a), a / torch.where(empty, torch.ones_like(c), c))

    lead = b.shape[: b.ndim - event_ndim]

    def product(v: Tensor) -> tuple[Tensor, Tensor | None]:
        found = matvec(v)
        return found if isinstance(found, tuple) else (found, None)

    image: Tensor | None = None
    if start is None:
        x, r = torch.zeros_like(b), b
    else:
        x = start
        taken, image = product(x)
        r = b - taken
    z = r if preconditioner is None else preconditioner(r)
    p, rz, scale = z, dot(r, z), dot(b, b)
    target = tolerance**2 * scale
    steps = 0
    active = dot(r, r) > target
    while steps < limit and (fixed_steps is not None or bool(active.any())):
        along, seen = product(p)
        step = ratio(rz, dot(p, along))
        if fixed_steps is None:
            step = torch.where(active, step, torch.zeros_like(step))
        x, r = x + step * p, r - step * along
        if seen is not None:
            part = step.reshape(*lead, *[1] * (seen.ndim - len(lead))) * seen
            image = part if image is None else image + part
        z = r if preconditioner is None else preconditioner(r)
        rz_next = dot(r, z)
        p, rz = z + ratio(rz_next, rz) * p, rz_next
        active = dot(r, r) > target
        steps += 1
    residual = ratio(dot(r, r), scale).sqrt().reshape(lead)
    if fixed_steps is None and bool((~(dot(r, r) <= target)).any()):
        raise ConvergenceError(
            f"conjugate gradients reached relative residual {float(residual.max()):.1e} after {steps} steps, expected "
            f"{tolerance:.1e}; allow more with max_steps, loosen tolerance, give a preconditioner, work in float64, or "
            "check that the matrix is symmetric and positive"
        )
    return Solution(x, steps, residual, image)

"""Draws of a denoiser's probability flow with the density that these very draws have.

x_T = D(0, sigma_T) + sigma_T n,   x_{i+1} = f_i(x_i),   log q = log N(n; 0, I) - d log sigma_T - sum_i log |det f_i'|

f_i is one Heun step. Its Jacobian is exact, so q is the law of the draws at any number of steps, not only in the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sde.solvers import EDMHeun

__all__ = ["push_forward"]

OUT: Any = (None, 0)  # all lanes share the value, each has its own tangent

Denoise = Callable[[Tensor, Tensor], Tensor]


def push_forward(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor, int]:
    """Draws and their log density.

    Args:
        denoise: (x: (rows, dim), sigma: 0-d) -> (rows, dim), row by row.
        noise: (rows, dim) standard normal.
        sigmas: (steps + 1,) descending noise levels, the last 0.

    Returns:
        Draws (rows, dim), log density (rows,), and how many rows went through a step that turned space inside out:
        where there are any, the steps are too large to be one-to-one and the density is not to be trusted.

    Example:
        >>> sigmas = torch.tensor([10.0, 1.0, 0.1, 0.0], dtype=torch.float64)
        >>> noise = torch.zeros(1, 2, dtype=torch.float64)
        >>> x, log_q, folded = push_forward(lambda x, sigma: x / (1 + sigma**2), noise, sigmas)
        >>> x.tolist(), folded
        ([[0.0, 0.0]], 0)
    """
    rows, dim = noise.shape
    first = sigmas[0]
    x = denoise(torch.zeros_like(noise), first) + first.to(noise) * noise
    log_q = -0.5 * noise.square().sum(1) - dim * (0.5 * math.log(2 * math.pi) + math.log(float(first)))
    basis = torch.eye(dim, dtype=x.dtype, device=x.device)[:, None].expand(dim, rows, dim)
    solver, folded = EDMHeun(), torch.zeros(rows, dtype=torch.bool, device=x.device)
    for a, b in pairwise(sigmas):

        def step(x: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return solver.step(x, a, b, denoise(x, a), denoiser=denoise).mean

        def along(tangent: Tensor, x: Tensor = x, step: Callable[[Tensor], Tensor] = step) -> Any:
            return torch.func.jvp(step, (x,), (tangent,))

        moved, columns = torch.func.vmap(along, out_dims=OUT)(basis)
        sign, log_det = torch.linalg.slogdet(columns.permute(1, 2, 0))
        folded |= sign <= 0
        x, log_q = moved, log_q - log_det
    return x, log_q, int(folded.sum())

r"""Gaussian densities of stationary series on a regular grid: n^2 operations, derivatives for n log n more.

With R_ij = rho(i - j), u = R^-1 e_0 and the prediction errors v_k of Durbin and Levinson,

    R^-1 = (L(u) L(u)' - L(w) L(w)') / u_0,   w = (0, u_{n-1}, .., u_1),   log det R = sum_k log v_k

where L(u) is lower triangular and Toeplitz with first column u, so that R^-1 y is a handful of convolutions. The
recursion is sequential. It runs as one operation of a graph, on values alone; derivatives come from formulas around
it that change no value, with constants u*, R*, S* = R*^-1 where nothing is differentiated:

    z(y) = S* y + S* (y - R S* y)                                       = R^-1 y to first order in R - R*
    x' R^-1 x = 2 x' z(x) - z(x)' R z(x)                                to third
    log det R = log det R* + (s(u*) + s(z(e_0))) . (rho - rho*) / 2     to second

    s_k(u) = d log det R / d rho_k = (1 + [k > 0]) sum_m (n - k - 2 m) u_m u_{m+k} / u_0

Source: Durbin (1960), Levinson (1947), Gohberg and Semencul (1972) [inferred]; the corrections and s [derived].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "convolve",
    "inverse_column",
    "quadratic_and_log_det",
    "stationary_log_density",
    "toeplitz_product",
    "toeplitz_solve",
]


@torch.library.custom_op("pilotlight::inverse_column", mutates_args=(), schema="(Tensor rho) -> (Tensor, Tensor)")
def inverse_column(rho: Tensor) -> tuple[Tensor, Tensor]:
    """First column of R^-1 and log det R of a stationary covariance, without derivatives.

    By NumPy: n small steps in turn, for which a GPU is no faster. NaN where R is singular to the last digit.

    Args:
        rho: (*batch, n) float64, the covariance at lags 0 to n - 1.

    Returns:
        (*batch, n) and (*batch,).

    Example:
        >>> column, log_det = inverse_column(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> [round(v, 6) for v in column.tolist()], round(log_det.exp().item(), 6)
        ([0.666667, -0.333333], 3.0)
    """
    table = np.ascontiguousarray(rho.detach().cpu().numpy().reshape(-1, rho.shape[-1]).T)  # lanes are contiguous
    back, n = table[::-1], len(table)
    phi, errors = np.zeros_like(table), np.empty_like(table)
    errors[0] = table[0]
    with np.errstate(all="ignore"):
        for k in range(1, n):
            known = phi[: k - 1]
            reflection = (table[k] - np.einsum("ij,ij->j", known, back[n - k : n - 1])) / errors[k - 1]
            known -= reflection * known[::-1]
            phi[k - 1] = reflection
            errors[k] = errors[k - 1] * (1 - reflection**2)
        column = np.concatenate([np.ones_like(table[:1]), -phi[:-1]]) / errors[-1]
        log_det = np.log(errors).sum(0)
    return (
        torch.from_numpy(np.ascontiguousarray(column.T)).reshape(rho.shape).to(rho.device),
        torch.from_numpy(log_det).reshape(rho.shape[:-1]).to(rho.device),
    )


@inverse_column.register_fake
def _shapes(rho: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(rho.shape, dtype=rho.dtype, device=rho.device), rho.new_empty(rho.shape[:-1])


@inverse_column.register_vmap
def _lanes(info: Any, in_dims: tuple[int | None], rho: Tensor) -> tuple[Any, tuple[int, int]]:
    return inverse_column(rho.movedim(in_dims[0] or 0, 0)), (0, 0)


def convolve(a: Tensor, b: Tensor) -> Tensor:
    """sum_m a_m b_{k-m} for k = 0 .. n - 1: the product L(a) b.

    Example:
        >>> convolve(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])).round().tolist()
        [1.0, 12.0]
    """
    n = a.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(a, 2 * n) * torch.fft.rfft(b, 2 * n), 2 * n)[..., :n]


def _correlate(a: Tensor, b: Tensor) -> Tensor:
    """sum_m a_m b_{m+k} for k = 0 .. n - 1: the product L(a)' b."""
    n = a.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(a, 2 * n).conj() * torch.fft.rfft(b, 2 * n), 2 * n)[..., :n]


def toeplitz_product(rho: Tensor, y: Tensor) -> Tensor:
    """R y for a symmetric Toeplitz matrix with first column rho, (*batch, n).

    Example:
        >>> toeplitz_product(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])).round().tolist()
        [2.0, 1.0]
    """
    n = rho.shape[-1]
    row = torch.cat([rho, torch.zeros_like(rho[..., :1]), rho[..., 1:].flip(-1)], -1)
    return torch.fft.irfft(torch.fft.rfft(row) * torch.fft.rfft(y, 2 * n), 2 * n)[..., :n]


def toeplitz_solve(column: Tensor, y: Tensor) -> Tensor:
    """R^-1 y from the first column of R^-1, (*batch, n).

    Example:
        >>> found = toeplitz_solve(torch.tensor([2 / 3, -1 / 3]), torch.tensor([3.0, 0.0]))
        >>> [round(v, 5) for v in found.tolist()]
        [2.0, -1.0]
    """
    n = column.shape[-1]
    w = torch.cat([torch.zeros_like(column[..., :1]), column[..., 1:].flip(-1)], -1)
    sides = torch.fft.rfft(torch.stack([column, w], -2), 2 * n)
    inner = torch.fft.irfft(sides.conj() * torch.fft.rfft(y, 2 * n)[..., None, :], 2 * n)[..., :n]
    first, second = (sides * torch.fft.rfft(inner, 2 * n)).unbind(-2)
    return torch.fft.irfft(first - second, 2 * n)[..., :n] / column[..., :1]


def _log_det_slope(u: Tensor) -> Tensor:
    """s_k, the derivative of log det R by rho_k."""
    n = u.shape[-1]
    m = torch.arange(n, dtype=u.dtype, device=u.device)
    sums = (n - m) * _correlate(u, u) - 2 * _correlate(m * u, u)
    return sums / u[..., :1] * torch.where(m > 0, 2.0, 1.0)


def stationary_log_density(autocovariance: Tensor, series: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """log N(x; 0, scale^2 R) in float64, with first and second derivatives in everything.

    Args:
        autocovariance: (*batch, n), rho at lags 0 to n - 1.
        series: (*batch, n).
        scale: (*batch,); the best one, over which the likelihood is profiled, when None.

    Returns:
        (*batch,) in float64.

    Example:
        >>> round(stationary_log_density(torch.tensor([1.0, 0.0]), torch.zeros(2), 1.0).item(), 4)
        -1.8379
    """
    square, log_det = quadratic_and_log_det(autocovariance.double(), series.double())
    n = series.shape[-1]
    s = (square / n).sqrt() if scale is None else torch.as_tensor(scale, dtype=torch.float64, device=series.device)
    return -0.5 * (square / s**2 + log_det + n * (2 * torch.log(s) + math.log(2 * math.pi)))


def quadratic_and_log_det(rho: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x' R^-1 x and log det R: (*batch,) each."""
    fixed = rho.detach()
    column, log_det = inverse_column(fixed)
    shape = torch.broadcast_shapes(rho.shape, x.shape)
    first = torch.cat([torch.ones_like(x[..., :1]), torch.zeros_like(x[..., 1:])], -1)
    y = torch.stack([first.expand(shape), x.expand(shape)], -2)
    known, solver = rho[..., None, :], column[..., None, :]
    z = toeplitz_solve(solver, y)
    z = z + toeplitz_solve(solver, y - toeplitz_product(known, z))
    u, z = z[..., 0, :], z[..., 1, :]
    square = 2 * (x * z).sum(-1) - (z * toeplitz_product(rho, z)).sum(-1)
    slope = 0.5 * (_log_det_slope(column) + _log_det_slope(u))
    return square, log_det + (slope * (rho - fixed)).sum(-1)

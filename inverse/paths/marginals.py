r"""Gaussian marginals of a path at all times, as curves in time, drawn and differentiated without simulation.

    X_t = x_0 + o(t) + C(t) r + G_0 R(t) eps,     R(t) = sqrt(t) (exp(tau a(t)) on the diagonal + tau N(t) off it)

with t since the start, tau = t / T, r the other unknowns, G_0 the diffusion at the start, and o(0) = C(0) = 0. So
X_t starts where the path does and spreads at first as the path does, which keeps the drift below finite; a, N, o and C
are cubic between knots, continuous, with slopes of their own on either side: data bend a posterior at their times.

    velocity at fixed eps:  x' = o' + C' r + G_0 R' eps          score:  -(G_0 R)^-T eps
    drift of the SDE with these marginals and the diffusion g:   x' + div(g g') / 2 + g g' score / 2

Source: Bartosh, Vetrov & Naesseth (2025), SDE matching [inferred]; this family and its start [derived].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.vi.guides.guide import Params
from sde.incomplete_gamma import Array, constant
from sde.process import Process

__all__ = ["Curves", "Marginals", "half_divergence", "squared"]


class Curves(NamedTuple):
    """All curves at some times: o and C r, and R, each with its derivative.

    Args:
        offset: (..., d) o + C r.
        offset_rate: (..., d).
        spread: (..., d, d) R, or (..., d) where it is diagonal.
        spread_rate: likewise.
    """

    offset: Tensor
    offset_rate: Tensor
    spread: Tensor
    spread_rate: Tensor


@dataclass(frozen=True)
class Marginals:
    """The family: which curves there are.

    Args:
        knots: (pieces + 1,) times, the first the start.
        size: d.
        others: coordinates of the other unknowns.
        scale: (d,) unit of the offsets, such as the standard deviation of the path at its end.
        diagonal: N = 0.

    Example:
        >>> import numpy as np
        >>> family = Marginals(np.linspace(0.0, 1.0, 5), 2, 0, np.ones(2), False)
        >>> params = family.init(torch.zeros(5, 2))
        >>> family.at(params, torch.tensor([0.25]), None).spread[0]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    knots: Array
    size: int
    others: int
    scale: Array
    diagonal: bool

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Numbers of curves of each kind: o, C, a, N."""
        d = self.size
        return d, d * self.others, d, 0 if self.diagonal else d * d

    def init(self, offsets: Tensor) -> dict[str, Tensor]:
        """Curves that run through given offsets and spread like Brownian motion.

        Args:
            offsets: (pieces + 1, d) of the path from its start, at the knots.
        """
        rest = offsets.new_zeros(len(offsets), sum(self.widths) - self.size)
        node = torch.cat([offsets / constant(self.scale, offsets).to(offsets), rest], 1)
        return {"node": node, "bend": node.new_zeros(len(node) - 1, 2, node.shape[1])}

    def at(self, params: Params, times: Tensor, others: Tensor | None) -> Curves:
        """The curves and their derivatives.

        Args:
            params: of `init`.
            times: (...), not before the start.
            others: (..., others) values of the other unknowns, or None where there are none.
        """
        d, knots = self.size, constant(self.knots, times).to(times)
        piece = torch.bucketize(times.detach().contiguous(), knots[1:-1].contiguous(), right=True)
        width = (knots[1:] - knots[:-1])[piece][..., None]
        s = (times - knots[piece])[..., None] / width
        begun = torch.ones(sum(self.widths), dtype=times.dtype, device=times.device)
        begun[: d + d * self.others] = 0.0  # offsets start at zero
        node = torch.cat([params["node"][:1] * begun, params["node"][1:]])
        left, rise, bend = node[piece], node[piece + 1] - node[piece], params["bend"][piece]
        value = left + s * rise + s * (1 - s) ** 2 * bend[..., 0, :] - s**2 * (1 - s) * bend[..., 1, :]
        slope = rise + (1 - s) * (1 - 3 * s) * bend[..., 0, :] + s * (3 * s - 2) * bend[..., 1, :]
        o, c, a, n = value.split(self.widths, -1)
        o_, c_, a_, n_ = (slope / width).split(self.widths, -1)
        if others is not None and self.others:
            o = o + (c.unflatten(-1, (d, -1)) @ others[..., None])[..., 0]
            o_ = o_ + (c_.unflatten(-1, (d, -1)) @ others[..., None])[..., 0]
        unit = constant(self.scale, times).to(times)
        horizon, since = float(self.knots[-1] - self.knots[0]), (times - knots[0])[..., None]
        tau = since / horizon
        spread = (tau * a).exp()
        rate = spread * (a / horizon + tau * a_)
        root = since.clamp_min(torch.finfo(times.dtype).tiny).sqrt()
        if not self.diagonal:
            off = 1 - torch.eye(d, dtype=times.dtype, device=times.device)
            n, n_ = n.unflatten(-1, (d, d)) * off, n_.unflatten(-1, (d, d)) * off
            tau, root = tau[..., None], root[..., None]
            spread = torch.diag_embed(spread) + tau * n
            rate = torch.diag_embed(rate) + n / horizon + tau * n_
        return Curves(o * unit, o_ * unit, root * spread, spread / (2 * root) + root * rate)

    def times(self, curves: Curves, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """R eps, R' eps and R^-T eps, (..., d)."""
        if self.diagonal:
            return curves.spread * eps, curves.spread_rate * eps, eps / curves.spread
        e = eps[..., None]
        inverse = torch.linalg.solve(curves.spread.mT, e)
        return (curves.spread @ e)[..., 0], (curves.spread_rate @ e)[..., 0], inverse[..., 0]

    def inverse(self, curves: Curves, moved: Tensor) -> Tensor:
        """R^-1 of R eps: eps."""
        if self.diagonal:
            return moved / curves.spread
        return torch.linalg.solve(curves.spread, moved[..., None])[..., 0]


def squared(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """g g' at a state (d,) and time: its diagonal (d,), or (d, d) in general."""
    g = process.g(x, t)
    return g @ g.mT if process.general else g.square()


def half_divergence(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """div(g g') / 2 at a state (d,) and time: (d,)."""
    if not callable(process.diffusion):
        return torch.zeros_like(x)
    slope = torch.func.jacrev(lambda x: squared(process, x, t))(x)  # (d, d) or (d, d, d), the last axis of x
    return 0.5 * (slope.diagonal(dim1=-2, dim2=-1).sum(-1) if process.general else slope.diagonal())

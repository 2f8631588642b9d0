"""Uphill on many lanes at once by L-BFGS: the search for modes, and the path that Pathfinder reads.

    z' = z + t H g,   H from the last pairs s = z' - z, y = g - g',   t by bisection until both hold:

    f(z') >= f(z) + 1e-4 t g'H g        g(z')'H g <= 0.9 g'H g                                 (weak Wolfe conditions)

Lanes that have arrived, or cannot climb any further, wait for the others. Source: Nocedal & Wright (2006), algorithm
7.4 [inferred]; the line search: Lewis & Overton (2013), section 3 [inferred].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Climb"]

RISE, SLOPE = 1e-4, 0.9
TRIALS = 30  # evaluations of one line search
FLAT = 1e-12  # relative curvature below which a pair is left out

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Climb:
    """The state of a search: where the lanes are, what they remember, which of them still move.

    Args:
        z: (lanes, dim) points.
        value: (lanes,) log density there.
        grad: (lanes, dim) its gradient.
        steps: (memory, lanes, dim) last moves, oldest first; zero where a lane had none.
        falls: (memory, lanes, dim) by how much the gradient fell along them.
        going: (lanes,) which lanes still move.

    Example:
        >>> def bowl(z):
        ...     return -0.5 * (z * z * torch.tensor([1.0, 100.0])).sum(1), -z * torch.tensor([1.0, 100.0])
        >>> climb = Climb.start(torch.tensor([[3.0, 1.0], [-2.0, 5.0]]), bowl, memory=6)
        >>> for _ in range(20):
        ...     climb.advance(bowl, tolerance=1e-5)
        >>> bool(climb.z.abs().max() < 1e-4), climb.going
        (True, tensor([False, False]))
    """

    z: Tensor
    value: Tensor
    grad: Tensor
    steps: Tensor
    falls: Tensor
    going: Tensor

    @classmethod
    def start(cls, z: Tensor, evaluate: Evaluate, memory: int) -> Climb:
        """Begin at z (lanes, dim), where the density is finite."""
        value, grad = evaluate(z)
        none = z.new_zeros((memory, *z.shape))
        return cls(z, value, grad, none, none.clone(), torch.ones(len(z), dtype=torch.bool, device=z.device))

    def state(self) -> dict[str, Tensor]:
        """All that a resumed search needs."""
        return dict(vars(self))

    def advance(self, evaluate: Evaluate, tolerance: float) -> None:
        """One step of every lane that still moves.

        Args:
            evaluate: log density (lanes,) and gradient (lanes, dim).
            tolerance: a lane has arrived when a whole step promises to raise its log density by less.
        """
        direction = self._direction()
        slope = (self.grad * direction).sum(1)
        self.going = self.going & (slope > tolerance)
        if not bool(self.going.any()):
            return
        z, value, grad, found = self._search(evaluate, direction, slope)
        moved = self.going & found
        step = torch.where(moved[:, None], z - self.z, 0.0)
        fall = torch.where(moved[:, None], self.grad - grad, 0.0)
        # A pair without curvature, where the density is not concave, would spoil the metric.
        curved = (step * fall).sum(1) > FLAT * fall.square().sum(1)
        for memory, new in ((self.steps, step), (self.falls, fall)):
            shifted = torch.cat([memory[1:], new[None]])
            memory.copy_(torch.where(curved[None, :, None], shifted, memory))
        self.z = torch.where(moved[:, None], z, self.z)
        self.value = torch.where(moved, value, self.value)
        self.grad = torch.where(moved[:, None], grad, self.grad)
        self.going = moved

    def _direction(self) -> Tensor:
        """H g by the two loops; the first step has length one at most."""
        q = self.grad
        inner = (self.steps * self.falls).sum(2)  # (memory, lanes)
        known = inner > 0
        inverse = torch.where(known, 1 / torch.where(known, inner, 1.0), 0.0)
        shares = []
        for i in reversed(range(len(self.steps))):
            share = inverse[i] * (self.steps[i] * q).sum(1)
            shares.append(share)
            q = q - share[:, None] * self.falls[i]
        square = self.falls[-1].square().sum(1)
        first = self.grad.norm(dim=1).clamp_min(1.0)
        scale = torch.where(known[-1], inner[-1] / torch.where(known[-1], square, 1.0), 1 / first)
        q = scale[:, None] * q
        for i, share in zip(range(len(self.steps)), reversed(shares), strict=True):
            other = inverse[i] * (self.falls[i] * q).sum(1)
            q = q + (share - other)[:, None] * self.steps[i]
        uphill = (self.grad * q).sum(1) > 0
        return torch.where(uphill[:, None] & torch.isfinite(q).all(1, keepdim=True), q, self.grad / first[:, None])

    def _search(self, evaluate: Evaluate, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points, values and gradients of the lanes' steps, and which lanes found one."""
        size = torch.ones_like(slope)
        low, high = torch.zeros_like(slope), torch.full_like(slope, math.inf)
        # The best point that rises enough is kept for lanes whose slope never gets small.
        z, value, grad = self.z, self.value, self.grad
        found, done = torch.zeros_like(self.going), ~self.going
        for _ in range(TRIALS):
            trial = self.z + (torch.where(done, 0.0, size))[:, None] * direction
            new, new_grad = evaluate(trial)
            good = torch.isfinite(new) & torch.isfinite(new_grad).all(1)
            rises = good & (new >= self.value + RISE * size * slope)
            better = ~done & rises
            z = torch.where(better[:, None], trial, z)
            value, grad = torch.where(better, new, value), torch.where(better[:, None], new_grad, grad)
            found = found | better
            steep = rises & ((new_grad * direction).sum(1) > SLOPE * slope)
            high = torch.where(~done & ~rises, size, high)
            low = torch.where(~done & steep, size, low)
            done = done | (rises & ~steep)
            if bool(done.all()):
                break
            size = torch.where(torch.isinf(high), 2 * low, 0.5 * (low + high))
        return z, value, grad, found

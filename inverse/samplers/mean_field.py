r"""A Gaussian step bent towards a potential: mean-field variational inference for one transition.

q = N(m + c u, diag(c e^r)^2) minimises  KL(q || N(m, c^2 I)) - E_q log g  over u and r, from u = u_0 and r = 0:

    grad_u = u - c grad log g(x),     grad_r = e^{2r} - 1 - c e^r z grad log g(x),     x = m + c (u + e^r z)

In these coordinates the KL has unit curvature, and the sizes of steps are in sds of the transition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from inverse.guides.damping import per_lane
from inverse.samplers.lanes import Noise
from ppl.errors import OptionError

__all__ = ["MeanField", "Optimizer"]

Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class MeanField:
    """Options of the fit.

    Args:
        steps: gradient steps, each one evaluation of the potential; 0 draws from the transition itself.
        learning_rate: size of a step. "sgd" takes it times the gradient of u and of r, each shortened to length one
            if it is longer; for "adam" it is that of Adam.
        optimizer: "sgd" or "adam", with moments (0.9, 0.999).
    """

    steps: int
    learning_rate: float
    optimizer: Optimizer

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise OptionError(f"fit_steps must be zero or more, got {self.steps}")
        if not 0 < self.learning_rate <= 1:
            raise OptionError(f"learning_rate must lie in (0, 1], got {self.learning_rate}")
        if self.optimizer not in get_args(Optimizer):
            raise OptionError(f"optimizer must be one of {get_args(Optimizer)}, got {self.optimizer!r}")

    def draw(
        self,
        mean: Tensor,
        sd: float,
        gradient: Callable[[Tensor], Tensor],
        noise: Noise,
        start: Tensor | None = None,
    ) -> Tensor:
        """A draw of the fitted Gaussian, (lanes, *shape).

        Args:
            mean: m, (lanes, *shape).
            sd: c, positive.
            gradient: x -> grad log g, an unbiased estimate of it.
            noise: of the lanes.
            start: u_0; None is zero.
        """
        u, r = torch.zeros_like(mean) if start is None else start, torch.zeros_like(mean)
        moments = [torch.zeros_like(mean) for _ in range(4)]
        for k in range(1, self.steps + 1):
            z = noise.normal(mean.shape[1:])
            spread = r.exp()
            slope = sd * gradient(mean + sd * (u + spread * z))
            first, second = u - slope, spread.square() - 1 - spread * z * slope
            if self.optimizer == "sgd":
                u, r = u - self.learning_rate * _short(first), r - self.learning_rate * _short(second)
            else:
                u, moments[0], moments[1] = self._adam(u, first, moments[0], moments[1], k)
                r, moments[2], moments[3] = self._adam(r, second, moments[2], moments[3], k)
        return mean + sd * (u + r.exp() * noise.normal(mean.shape[1:]))

    def _adam(self, x: Tensor, g: Tensor, m: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        return x - self.learning_rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8), m, v


def _short(g: Tensor) -> Tensor:
    """The gradient of every lane, no longer than one."""
    return g / per_lane(g.square().flatten(1).sum(1).sqrt().clamp(min=1.0), g)

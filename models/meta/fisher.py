"""The loss of an episode from the diagonal of its Fisher information.

theta <- theta - t P^-1 (grad l_i + P (theta - m_0)),   t by Barzilai and Borwein in the metric of P
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from models.meta.distributed import episode_noise
from models.meta.episodes import Points
from models.meta.local import Quadratic, curvature_of, losses_and_gradients, multiplied, start_at
from models.meta.niw_math import GlobalLaw
from models.meta.program import Hierarchy
from ppl.option_checks import check_integers

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher information at a point near the mode; memory of one gradient, for large networks.

    Gradient steps in the metric of the prior walk from m_0 towards the mode of l_i plus half the prior's square form.
    They move theta where the data tell it to go, as the mode does; steps of one size for every coordinate (Adam) fit
    few shots as well and classify new images worse. The diagonal is then estimated by Hutchinson's probes, one
    vector-Jacobian product each. The point is taken for the mode.

    Args:
        steps: towards the mode; their sizes need no tuning, and the lowest point on the way is kept. 0 stays at m_0.
        probes: of the diagonal.

    Raises:
        OptionError: an option is out of range.

    Source: step sizes, Barzilai & Borwein (1988) [inferred]
    """

    steps: int = 10
    probes: int = 8

    def __post_init__(self) -> None:
        check_integers(self, steps=0, probes=1)

    @torch.no_grad()
    def __call__(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """See `LocalFit`."""
        theta, precision = self._mode(hierarchy, law, points, sigma), law.precision()
        with torch.enable_grad():
            at = theta.clone().requires_grad_()
            outputs = hierarchy.network(at, points.x)
        _, root = curvature_of(hierarchy, outputs.detach(), points, sigma)
        diagonal = torch.zeros_like(theta)
        own: dict[str, Any] = {"generator": generator, "dtype": root.dtype, "device": root.device}
        for probe in range(self.probes):
            bits = episode_noise(lambda shape: torch.randint(2, shape, **own), root.shape[:-1], generator)
            sign = 2.0 * bits - 1.0
            weight = (root @ sign[..., None])[..., 0].reshape(outputs.shape)
            (part,) = torch.autograd.grad(outputs, at, weight, retain_graph=probe + 1 < self.probes)
            diagonal += part.square() / self.probes
        natural = diagonal * theta + multiplied(precision, theta - law.mean)
        constant = hierarchy.losses(theta, points, sigma)
        constant = constant + (natural * theta).sum(-1) - 0.5 * (diagonal * theta.square()).sum(-1)
        return Quadratic(natural, diagonal, None, constant)

    def _mode(self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None) -> Tensor:
        """The lowest of the points after each step, (b, d)."""
        theta, precision, spread = start_at(law, points), law.precision(), law.scale / law.df

        def slope(theta: Tensor) -> tuple[Tensor, Tensor]:
            losses, grad = losses_and_gradients(hierarchy, theta, points, sigma)
            pull = multiplied(precision, theta - law.mean)
            return losses + 0.5 * (pull * (theta - law.mean)).sum(-1), grad + pull

        value, grad = slope(theta)
        down = multiplied(spread, grad)
        # The first size is exact for the Gauss-Newton form: down' P down over down' (A + P) down.
        outputs, change = jvp(lambda t: hierarchy.network(t, points.x), (theta,), (down,))  # type: ignore[misc]
        _, root = curvature_of(hierarchy, outputs, points, sigma)
        along = (root.mT @ change.reshape(root.shape[:-1])[..., None]).square().sum((1, 2, 3))
        size = 1 / (1 + along / (grad * down).sum(-1).clamp_min(torch.finfo(grad.dtype).tiny))
        best = theta
        for _ in range(self.steps):
            move = -size[:, None] * down
            theta = theta + move
            last, (now, grad) = grad, slope(theta)
            best, value = torch.where((now < value)[:, None], theta, best), torch.minimum(now, value)
            turn = grad - last
            down = multiplied(spread, grad)
            bend, square = (move * turn).sum(-1), (turn * multiplied(spread, turn)).sum(-1)
            size = torch.where(bend > 0, bend / square.clamp_min(torch.finfo(grad.dtype).tiny), 0.5 * size).clamp(max=1)
        return best

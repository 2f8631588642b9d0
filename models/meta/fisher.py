"""The loss of an episode from the diagonal of its Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.meta.distributed import episode_noise
from models.meta.episodes import Points
from models.meta.local import Quadratic, curvature_of, losses_and_gradients, multiplied, start_at
from models.meta.niw_math import GlobalLaw
from models.meta.program import Hierarchy
from ppl.option_checks import check_integers, check_positive
from ppl.vi.ascent import adam

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher information at a point near the mode; memory of one gradient, for large networks.

    Adam walks from m_0 towards the mode of l_i + (theta - m_0)' P (theta - m_0) / 2; the diagonal is then estimated by
    Hutchinson's probes, one vector-Jacobian product each. The point is taken for the mode.

    Args:
        steps: of Adam.
        lr: its learning rate.
        probes: of the diagonal.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 10
    lr: float = 0.02
    probes: int = 8

    def __post_init__(self) -> None:
        check_integers(self, steps=1, probes=1)
        check_positive(self, "lr")

    @torch.no_grad()
    def __call__(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """See `LocalFit`."""
        theta, precision = start_at(law, points), law.precision()
        first, second = torch.zeros_like(theta), torch.zeros_like(theta)
        for k in range(self.steps):
            _, grad = losses_and_gradients(hierarchy, theta, points, sigma)
            grad = grad + multiplied(precision, theta - law.mean)
            theta, first, second = adam(theta, first, second, k + 1, -grad, self.lr)
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

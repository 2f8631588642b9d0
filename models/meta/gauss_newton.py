"""The loss of an episode from Gauss-Newton steps and the matrix where they end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.meta.episodes import Points
from models.meta.local import Quadratic, close, curvature_of, multiplied, start_at
from models.meta.niw_math import GlobalLaw
from models.meta.program import Hierarchy
from ppl.errors import OptionError
from ppl.option_checks import check_integers

__all__ = ["GaussNewton"]


@dataclass(frozen=True)
class GaussNewton:
    """Gauss-Newton steps to the mode, and the generalised Gauss-Newton matrix there with all its correlations.

    A = J' F J with F the Fisher information of the outputs; h = A theta - grad l_i. Exact for a network that is linear
    in theta with Gaussian targets. A is kept by one row for each output of each point, and no d x d matrix is formed
    unless the global law has one.

    Args:
        steps: Gauss-Newton steps; 1 linearises at m_0 alone.
        halvings: how often a step that does not lower the objective is halved.
        through: differentiate the linearisation at m_0 itself, so that training also shapes the derivatives that an
            episode adapts along; for `steps=1`, and for about four times the time.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 3
    halvings: int = 4
    through: bool = False

    def __post_init__(self) -> None:
        check_integers(self, steps=1, halvings=0)
        if self.through and self.steps > 1:
            raise OptionError(f"through=True takes one linearisation, at m_0: steps=1, got {self.steps}")

    def __call__(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """See `LocalFit`."""
        if self.through:
            return self._form(hierarchy, law.mean.expand(len(points.x), -1), points, sigma)
        return self._fitted(hierarchy, law, points, sigma, generator)

    @torch.no_grad()
    def _fitted(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """Steps without a graph."""
        theta, precision = start_at(law, points), law.precision().detach()
        mean = law.mean.detach()

        def objective(at: Tensor) -> Tensor:
            off = at - mean
            return hierarchy.losses(at, points, sigma) + 0.5 * (off * multiplied(precision, off)).sum(-1)

        form = self._form(hierarchy, theta, points, sigma)
        for _ in range(self.steps - 1):
            move, value = close(form, mean, precision).mean - theta, objective(theta)
            size = torch.ones_like(value)
            for _ in range(self.halvings):
                worse = ~(objective(theta + size[:, None] * move) <= value)
                size = torch.where(worse, 0.5 * size, size)
            theta = torch.where(
                (objective(theta + size[:, None] * move) <= value)[:, None], theta + size[:, None] * move, theta
            )
            form = self._form(hierarchy, theta, points, sigma)
        return form

    def _form(self, hierarchy: Hierarchy, theta: Tensor, points: Points, sigma: Tensor | None) -> Quadratic:
        """The form at theta (b, d)."""
        network = hierarchy.network
        outputs = network(theta, points.x)
        jacobian = network.jacobian(theta, points.x)
        slope, half = curvature_of(hierarchy, outputs, points, sigma)
        root = (half.mT @ jacobian).flatten(1, 2)
        grad = torch.einsum("bpkd,bpk->bd", jacobian, slope)
        along = torch.einsum("bqd,bd->bq", root, theta)
        natural = torch.einsum("bqd,bq->bd", root, along) - grad
        constant = hierarchy.losses(theta, points, sigma) + (natural * theta).sum(-1) - 0.5 * along.square().sum(-1)
        return Quadratic(natural, None, root, constant, theta)

"""Where chains begin: uniformly around zero on R^n, or at draws of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import ProgramError

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.monitor import Monitor
    from ppl.smc.reference import Reference

__all__ = ["StartingPoints", "check_init"]

TRIES = 100


def check_init(init: Any) -> None:
    """Raise unless chains can begin there: None, a fitted guide or a backend with `fit`.

    Raises:
        OptionError: with what would do.
    """
    if init is not None:
        from ppl.smc.reference import check_source

        check_source(init, "init")


class StartingPoints:
    """A function of lanes and generator that gives starting points (lanes, dim) with a finite density and gradient.

    A fit is made once for each problem, when the first points are asked for.

    Args:
        flat: the density.
        init: None for uniform points, a fitted guide, or a backend that fits one.
        radius: of uniform points.
        monitor: progress and cost of a fit.
        generator: of a fit.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 0.1), obs=y)
        >>> flat, generator = ppl.Program(model, torch.tensor(9.0)).flat(), torch.Generator().manual_seed(0)
        >>> begin = StartingPoints(flat, ppl.Laplace(), 2.0, ppl.Monitor(), generator)
        >>> bool((begin(4, generator) - 9.0).abs().max() < 0.5)
        True
    """

    def __init__(
        self, flat: FlatDensity, init: Any, radius: float, monitor: Monitor, generator: torch.Generator
    ) -> None:
        self.flat, self.init, self.radius = flat, init, radius
        self.monitor, self.generator = monitor, generator
        self._references: list[Reference] = []

    def __call__(self, lanes: int, generator: torch.Generator) -> Tensor:
        """Starting points (lanes, dim).

        Raises:
            ProgramError: no finite density was found.
        """
        if self.init is None:
            return self.flat.initial(lanes, generator, self.radius)
        z = self._draw(lanes, generator)
        for _ in range(TRIES):
            value, grad = self.flat.log_density_and_grad(z)
            bad = ~(torch.isfinite(value) & torch.isfinite(grad).all(1))
            if not bool(bad.any()):
                return z
            z = torch.where(bad[:, None], self._draw(lanes, generator), z)
        raise ProgramError(
            f"{int(bad.sum())} of {lanes} chains found no draw of {self.init!r} at which the density is finite; leave "
            "out init, or fit longer"
        )

    def _draw(self, lanes: int, generator: torch.Generator) -> Tensor:
        """Draws of the fits, problem-major."""
        from ppl.smc.reference import reference_of

        program = self.flat.program
        problems = [program] if program.problems is None else [program.problem(i) for i in range(program.problems)]
        for i in range(len(self._references), len(problems)):
            with self.monitor.section(f"start {i}"):
                self._references.append(reference_of(self.init, problems[i], self.generator, self.monitor))
        return torch.cat([reference.draw(lanes // len(problems), generator) for reference in self._references])

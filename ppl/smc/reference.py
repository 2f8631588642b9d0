"""Where weighted draws come from: a normalised density q on R^n, and the way from it to the posterior.

    log q_beta(z) = log q(z) + beta r(z),   r(z) = log p(z, y) - log q(z)

For the prior, r is the log likelihood; for a fitted guide, r is the log importance weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.flat import FlatDensity
from ppl.smc.tempered import PriorDraws, TemperedDensity
from ppl.vi.fitted import FittedGuide
from ppl.vi.fitted_base import with_parameters
from ppl.vi.full_data import full_log_density

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["GuideReference", "PriorReference", "Reference", "check_source", "in_chunks", "reference_of"]


class Reference(Protocol):
    """A normalised density q on the unconstrained vectors of a program."""

    program: Program
    flat: FlatDensity
    guide: FittedGuide | None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim)."""
        ...

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q (lanes,) and log p(z, y) - log q (lanes,)."""
        ...

    def tempered(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """log q + beta (log p - log q), (lanes,), and its gradient (lanes, dim)."""
        ...

    def prepare(self, z: Tensor, calls: int) -> None:
        """Capture the graph of `tempered` for the lane count of z."""
        ...


class PriorReference:
    """The program's own prior.

    Args:
        program: the program.

    Raises:
        ProgramError: the prior cannot be drawn from.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.guide: FittedGuide | None = None
        self.flat = program.flat()
        self._density = TemperedDensity(program)
        self._draws = PriorDraws(self.flat)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim)."""
        return self._draws.draw(count, generator)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior and log likelihood."""
        return self._density.split(z)

    def tempered(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Log prior plus beta times log likelihood, with its gradient."""
        return self._density.tempered(z, beta)

    def prepare(self, z: Tensor, calls: int) -> None:
        """Capture the graph of `tempered` for the lane count of z."""
        self._density.prepare(z, calls)


class GuideReference:
    """A fitted guide.

    Args:
        program: what the guide is led to; it has the guide's learned parameters.
        guide: the fit, of this program or of one with the same latents.

    Raises:
        ShapeError: the guide was fitted to other latents.
    """

    def __init__(self, program: Program, guide: FittedGuide) -> None:
        self.program = with_parameters(program, guide.parameters)
        self.guide: FittedGuide | None = guide
        self._fitted = guide
        self.flat = self.program.flat()
        ours, theirs = (
            {n: (tuple(leaf.shape), leaf.noise) for n, leaf in f.layout.leaves.items()}
            for f in (self.flat, guide.program.flat())
        )
        if list(ours.items()) != list(theirs.items()):
            raise ShapeError(f"the guide was fitted to the sites {theirs} (shape, noise), but the program has {ours}")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim)."""
        return self._fitted.sample(count, generator)[0]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q and the log importance weight; all data count where plates are subsampled."""
        log_q = self._fitted.log_prob(z)
        log_p, _ = full_log_density(self.flat, z, self._fitted.lanes)
        return log_q, log_p - log_q

    def tempered(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The geometric mean of the guide and the posterior, with its gradient."""
        log_p, grad_p = self.flat.log_density_and_grad(z)
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            log_q = self._fitted.guide.log_prob(self._fitted.guide_params, point)
            (grad_q,) = torch.autograd.grad(log_q.sum(), point)
        return torch.lerp(log_q.detach(), log_p, beta), torch.lerp(grad_q, grad_p, beta)

    def prepare(self, z: Tensor, calls: int) -> None:
        """Capture the graph of the density for the lane count of z."""
        self.flat.prepare(z, calls)


def check_source(source: Any, name: str) -> None:
    """Raise unless a source of draws is None, a fitted guide, or a backend with `fit`.

    Raises:
        OptionError: with what would do.
    """
    ok = source is None or isinstance(source, FittedGuide) or callable(getattr(source, "fit", None))
    if isinstance(source, type) or not ok:
        raise OptionError(
            f"{name} must be None (the prior), a fitted guide, or a backend that fits one, such as ppl.Laplace() or "
            f"ppl.SVI(guide=ppl.FullRank()); got {source!r}"
        )


def reference_of(source: Any, program: Program, generator: torch.Generator, monitor: Monitor) -> Reference:
    """The prior (None), a fitted guide, or what a backend fits to the program."""
    if source is None:
        return PriorReference(program)
    if not isinstance(source, FittedGuide):
        with monitor.section("fit of the start"):
            source = source.fit(program, generator=generator, monitor=monitor)
    return GuideReference(program, source)


def in_chunks(fn: Callable[[Tensor], Any], z: Tensor, size: int | None) -> Any:
    """A function of lanes, run on chunks of one size, the last one padded: the size is part of a graph.

    Example:
        >>> in_chunks(lambda z: (z.sum(1), 2 * z), torch.ones(5, 2), 2)[0]
        tensor([2., 2., 2., 2., 2.])
    """
    if size is None or len(z) <= size:
        return fn(z)
    missing = -len(z) % size
    padded = torch.cat([z, z[:missing]]) if missing else z
    parts = [fn(part) for part in padded.split(size)]
    return tuple(torch.cat(column)[: len(z)] for column in zip(*parts, strict=True))

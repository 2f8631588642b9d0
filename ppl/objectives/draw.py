"""What programs give to objectives: draws with their densities, and the axes of particles they lie on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppl.objectives.density import Direct, LogDensity
from ppl.objectives.run import Node

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["Address", "Draw", "Given", "Particles", "Stochastic", "logmeanexp"]

Address = tuple[int, str]


def logmeanexp(x: Tensor, dim: int = 0) -> Tensor:
    """log mean exp over an axis, the newest particle axis by default.

    Example:
        >>> import torch
        >>> logmeanexp(torch.tensor([0.0, 0.0]))
        tensor(0.)
    """
    return x.logsumexp(dim) - math.log(x.shape[dim])


@dataclass(eq=False)
class Particles:
    """An axis of particles; `baseline` sets what is taken from the cost in the score of each one.

    Args:
        size: particles.
    """

    size: int
    control: Tensor | None = None

    def baseline(self, value: Tensor) -> None:
        """A baseline (size, *outer axes, samples, *data) for the draws on this axis, independent of each one's own.

        Entry k may depend on all particles but the k-th, and then leaves the gradient unbiased.
        """
        self.control = value.detach()


@dataclass(frozen=True, eq=False)
class Draw:
    """Values of a program's sites and the density that came with them.

    `draw["z"]` is the value of a site, (*particles, samples, *plates, *event).

    Args:
        values: values by site, padded to the plates of all programs.
        density: the log density; exact for a program, of the reciprocal for `Marginal` and `Normalize`.
        auxiliary: sites that are none of the model's.
        nodes: what is known of each site.
        lanes: lane axes.
        call: number of the run that drew it; zero where it is of no single run.
    """

    values: dict[str, Tensor]
    density: LogDensity
    auxiliary: frozenset[str] = frozenset()
    nodes: dict[str, Node] = field(default_factory=dict, repr=False)
    lanes: int = 0
    call: int = 0

    def __getitem__(self, name: str) -> Tensor:
        value = self.values[name]
        node = self.nodes.get(name)
        if node is None:
            return value
        pads = value.ndim - node.event_dim - self.lanes - node.rank
        return value.reshape(*value.shape[: self.lanes], *value.shape[self.lanes + pads :]) if pads > 0 else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def only(self, names: Any) -> Draw:
        """The same draw with some of its sites."""
        wanted = set(names)
        kept = {n: v for n, v in self.values.items() if n in wanted}
        return replace(self, values=kept, auxiliary=frozenset())

    def detached(self) -> Draw:
        """The same draw, through which no gradient flows."""
        return replace(
            self,
            values={n: v.detach() for n, v in self.values.items()},
            density=type(self.density)(self.density.log.detach()),
        )


class Stochastic:
    """A program whose density is only estimated; see `Marginal` and `Normalize`."""

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """A draw and an estimate whose reciprocal is unbiased."""
        raise TypeError(f"{type(self).__name__} cannot be drawn from")

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """An unbiased estimate of the density of values."""
        raise TypeError(f"{type(self).__name__} has no density")


@dataclass(frozen=True, eq=False)
class Given:
    """A program called with values of other sites as its first argument, a dict."""

    program: Any
    values: Mapping[str, Tensor]

"""The density of some sites given the values of all others, on R^n, for many chains at once.

    log pi(z_B | x_rest) = log p(x_B(z_B), x_rest, y) + log |det dx_B / dz_B|   up to a constant in z_B

The other sites are held at their values, not at their coordinates: a support that depends on a site of the block does
not move them. Terms that cannot depend on the block are left out, so that a diffusion prior among the others costs
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.errors import OptionError
from ppl.sites import Layout
from ppl.trace import Run, log_prob_of

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["Conditional"]

Values = Mapping[str, Tensor]
INTERVALS = (
    constraints.interval,
    constraints.half_open_interval,
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
)


class Conditional:
    """The conditional density of a block of continuous sites.

    Args:
        program: the program; discrete latents that are not among the values given are summed out.
        sites: names of the block, in any order.

    Raises:
        OptionError: a site is not a continuous latent, or its density is that of a diffusion prior.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl.program import Program
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.Exponential(1.0))
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        >>> block = Conditional(Program(model, torch.tensor(1.0)), ["sigma"])
        >>> values = {"sigma": torch.tensor([1.0, 2.0]), "mu": torch.zeros(2)}
        >>> block.ravel(values).shape, block.log_density(block.ravel(values), values).shape
        (torch.Size([2, 1]), torch.Size([2]))
    """

    def __init__(self, program: Program, sites: Sequence[str]) -> None:
        wrong = [n for n in sites if n not in program.latents or program.sites[n].discrete]
        if wrong or not sites:
            raise OptionError(
                f"expected continuous latent sites, got {wrong or 'none'}; there are {list(program.latents)}"
            )
        hard = [n for n in sites if "denoiser" in program.sites[n].capabilities]
        if hard:
            raise OptionError(f"sites {hard} are diffusion priors; use a kernel from `inverse` for their block")
        self.program = program
        self.sites = tuple(n for n in program.latents if n in sites)
        self.layout = Layout.of({n: program.sites[n] for n in self.sites}, frozenset())
        self.dim = self.layout.dim

    def log_density(self, z: Tensor, values: Values) -> Tensor:
        """Log density with Jacobian, up to a constant in z: (chains, dim) -> (chains,).

        Args:
            z: coordinates of the block.
            values: site -> (chains, *shape) for all other sites; entries of the block are not looked at.
        """
        lane, given = self._lane(values)
        lane["z"] = z
        with torch.no_grad():
            return self._density(lane, given)(lane, self.program.shared_inputs())

    def log_density_and_grad(self, z: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """The same with its gradient (chains, dim)."""
        lane, given = self._lane(values)
        lane["z"] = z.detach()
        value, grads = self._density(lane, given).value_and_grad(lane, self.program.shared_inputs(), ("z",))
        return value, grads["z"]

    def ravel(self, values: Values) -> Tensor:
        """Coordinates (chains, dim) of the block's values, given the others."""
        lane, given = self._lane(values)
        lane |= {f"own.{n}": values[n] for n in self.sites}

        def one(lane: Values, shared: Values) -> dict[str, Tensor]:
            own = {n: lane[f"own.{n}"] for n in self.sites}
            run = Run(values={**_named(lane, given), **own}, layout=self.layout, enumerate_=self._summed(given))
            return self.program.trace_one(lane, shared, run)[1].unconstrained

        with torch.no_grad():
            function = self.program.lane_function(("conditional ravel", self.sites, given), one, lane)
            out = function(lane, self.program.shared_inputs())
        rows = len(values[self.sites[0]])
        return torch.cat([out[n].reshape(rows, -1) for n in self.sites], 1)

    def constrain(self, z: Tensor, values: Values) -> dict[str, Tensor]:
        """Values of the block's sites, site -> (chains, *shape), given the others."""
        lane, given = self._lane(values)
        lane["z"] = z

        def one(lane: Values, shared: Values) -> dict[str, Tensor]:
            run = Run(values=_named(lane, given), z=lane["z"], layout=self.layout, enumerate_=self._summed(given))
            trace = self.program.trace_one(lane, shared, run)[0]
            return {n: trace.nodes[n]["value"] for n in self.sites}

        with torch.no_grad():
            function = self.program.lane_function(("conditional constrain", self.sites, given), one, lane)
            return dict(function(lane, self.program.shared_inputs()))

    def _lane(self, values: Values) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        given = tuple(n for n in self.program.latents if n in values and n not in self.sites)
        return {f"given.{n}": values[n] for n in given}, given

    def _summed(self, given: tuple[str, ...]) -> bool:
        return any(n not in given for n in self.program.discrete)

    def _density(self, lane: dict[str, Tensor], given: tuple[str, ...]) -> Any:
        program = self.program
        enumerated = self._summed(given)
        constant = frozenset(n for n in given if program.sites[n].static)
        moving = [n for n in given if n not in constant and _bounded(program.sites[n].support)]

        def one(lane: Values, shared: Values) -> Tensor:
            run = Run(
                values=_named(lane, given), z=lane["z"], layout=self.layout, unscored=constant, enumerate_=enumerated
            )
            trace, setter = program.trace_one(lane, shared, run)
            scored = log_prob_of(trace, lambda node: True, enumerated=enumerated, nesting=program.nesting)
            for name in moving:
                # Unvalidated densities can be finite outside their support, which the block may have moved.
                fn = trace.nodes[name]["fn"]
                inside = fn.support.check(trace.nodes[name]["value"]).all()
                scored = torch.where(inside, scored, -torch.inf)
            return scored + setter.log_jacobian

        return program.lane_function(("conditional", self.sites, given), one, lane)


def _bounded(support: Any) -> bool:
    """Whether a support is an interval, whose ends may depend on another site."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, INTERVALS)


def _named(lane: Values, given: tuple[str, ...]) -> dict[str, Tensor]:
    return {n: lane[f"given.{n}"] for n in given}

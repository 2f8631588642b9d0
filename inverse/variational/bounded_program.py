"""A program whose diffusion sites are scored through their denoisers, so that gradient engines see one density on R^n.

    log pi(z) = sum_i log p_i(x_i(z)) + log p(other latents, y | x(z)) + log |det dx/dz|,     x_i = c_i + s_i z_i

with c_i what the prior expects and s_i its largest standard deviation: in z a prior of any scale has scale one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from inverse.likelihood import diffusion_sites
from inverse.problem import DiffusionProblem
from inverse.variational.prior_bounds import Bound, PriorDensity
from ppl.cost import Cost, DenoiserCounter
from ppl.errors import CapabilityError, OptionError
from ppl.flat import FlatDensity
from ppl.program import Program
from ppl.sites import Leaf, unwrap

__all__ = ["BoundedDensity", "BoundedProgram"]


class BoundedProgram(Program):
    """The same program, in which `flat()` scores diffusion sites by a bound; made by `of`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), 4 * torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> flat = BoundedProgram.of(Program(model, torch.zeros(2)), "score").flat()
        >>> flat.constrain(torch.ones(1, 2))["x"]                                                        # 2 z
        tensor([[2., 2.]])
    """

    densities: dict[str, PriorDensity]
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        program: Program,
        bound: Bound,
        sigma_min: float | Mapping[str, float] | None = None,
        levels: int = 4,
        check: int = 16,
        cost: Cost | None = None,
    ) -> BoundedProgram:
        """Score the diffusion sites of a program by a bound.

        Args:
            program: a program with latent sites that can be denoised.
            bound: "score" or "immse".
            sigma_min: lowest noise level, or one for each site; None takes the lowest that the prior knows and the data
                ask for.
            levels: see `PriorDensity`.
            check: see `PriorDensity`.
            cost: what the calls that read the prior are counted into.

        Raises:
            CapabilityError: there is no such site, or its distribution depends on another site.
        """
        sites = diffusion_sites(program)
        if not sites:
            raise CapabilityError(
                f"expected a latent site with a diffusion prior, found {list(program.latents)}; ppl.SVI fits these"
            )
        moving = [n for n in sites if not program.sites[n].static]
        if moving:
            raise CapabilityError(
                f"the prior of {moving} depends on other sites or is built anew in every run, so that its density is "
                "no function of the value alone; build it outside of the model, fix these sites with pyro.condition, "
                "or use ppl.NoiseSpace(ppl.SVI(...))"
            )
        lifted = program.noise_space(*sites)
        new = cls.__new__(cls)
        new.__dict__.update(lifted.__dict__)
        new.generator = torch.Generator(program.device).manual_seed(0)
        new.densities = {}
        for name in sites:
            prior = unwrap(program.sites[name].distribution)
            given = sigma_min[name] if isinstance(sigma_min, Mapping) else sigma_min
            floor = _lowest(program, name)
            low = floor if given is None else given
            if not low < prior.sigma_max:
                raise OptionError(f"sigma_min={low:.4g} is not below the prior's sigma_max={prior.sigma_max:.4g}")
            with _counting([prior], Cost() if cost is None else cost):
                new.densities[name] = PriorDensity(prior, program.sites[name].shape, bound, low, levels, check, floor)
        return new

    def at_level(self, level: float) -> BoundedProgram:
        """The same program with the score taken at a level, where that is above the lowest."""
        new = copy.copy(self)
        new.densities = {n: d.at_level(level) for n, d in self.densities.items()}
        return new

    def flat(self) -> BoundedDensity:
        """The view on R^n."""
        return BoundedDensity(self)

    def counting(self, cost: Cost) -> AbstractContextManager[None]:
        """Count the denoiser calls made inside into `cost`; rows that are differentiated count as vjps."""
        return _counting([d.prior for d in self.densities.values()], cost)


class BoundedDensity(FlatDensity):
    """The flat density of a `BoundedProgram`.

    Gradients are those of the bound; `log_density` is exact where a prior has a density in closed form.
    """

    def __init__(self, program: BoundedProgram) -> None:
        super().__init__(program)
        self.densities, self.generator = program.densities, program.generator

    def constrain(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Site values of unconstrained vectors, (lanes, dim) -> site -> (lanes, *shape)."""
        return {n: v for n, v in super().constrain(z, subsample).items() if n not in self._noise_names}

    def ravel(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vectors (lanes, dim) of site values."""
        own = {
            f"{n}_noise": ((values[n] - d.center) / d.scale).reshape(len(values[n]), -1)
            for n, d in self.densities.items()
            if n in values
        }
        return super().ravel({**values, **own})

    @property
    def _noise_names(self) -> set[str]:
        return {f"{n}_noise" for n in self.densities}

    def _build(self, leaf: Leaf, noise: Tensor) -> Tensor:
        """Values of a diffusion site in the units of its prior: (lanes, *shape)."""
        density = self.densities[leaf.site]
        return density.center + density.scale * noise.reshape(-1, *leaf.shape)

    def _log_base(self, leaf: Leaf, noise: Tensor, value: Tensor) -> Tensor:
        """Log density (lanes,) of a diffusion site in its coordinates."""
        density = self.densities[leaf.site]
        log_prob = density.surrogate(value, self.generator) if value.requires_grad else density.value(value)
        return log_prob + density.shape.numel() * math.log(density.scale)


def _lowest(program: Program, site: str) -> float:
    """The lowest level that the prior knows, and the data ask for."""
    if len(program.latents) == 1:
        return DiffusionProblem.of(program).lowest_level
    prior = unwrap(program.sites[site].distribution)
    return prior.sigma_min / 5 if "exact_covariance" in prior.capabilities else prior.sigma_min


@contextmanager
def _counting(priors: list[Any], cost: Cost) -> Iterator[None]:
    """Count the calls of denoisers; the lists of counters may be shared."""
    lists = {id(prior.counters): prior.counters for prior in priors}
    counter = DenoiserCounter(cost, recorded=True)
    for counters in lists.values():
        counters.append(counter)
    try:
        yield
    finally:
        for counters in lists.values():
            counters[:] = [c for c in counters if c is not counter]

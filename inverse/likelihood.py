"""Density of the data as a function of the diffusion sites of a program, the other latents being given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inverse.gaussian_likelihood import GaussianLikelihood
from inverse.linear_form import NotGaussian, read_gaussian
from ppl.errors import CapabilityError
from ppl.program import Program
from ppl.sites import unwrap

__all__ = ["Likelihood", "diffusion_sites", "read_likelihood"]


@dataclass(frozen=True)
class Likelihood:
    """Density of the data as a function of one site, or of several joined into one vector, all others being given.

    Args:
        program: the program it was read from.
        sites: the latent sites it is a function of, in program order.
        given: values of all other latents, one draw each, without a leading axis.
    """

    program: Program
    sites: tuple[str, ...]
    given: Mapping[str, Tensor]

    @property
    def site(self) -> str:
        """Name of the site, or all names, for messages."""
        return " + ".join(self.sites)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of one value of every site, plates first."""
        return [self.program.sites[n].shape for n in self.sites]

    @property
    def shape(self) -> torch.Size:
        """Shape of one value of the site; several are flattened and joined."""
        return self.shapes[0] if len(self.sites) == 1 else torch.Size([sum(s.numel() for s in self.shapes)])

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Values by site: (*batch, *shape) -> (*batch, *shape of the site)."""
        if len(self.sites) == 1:
            return {self.sites[0]: x}
        pieces = x.split([s.numel() for s in self.shapes], -1)
        return {
            n: piece.reshape(*x.shape[:-1], *shape)
            for n, piece, shape in zip(self.sites, pieces, self.shapes, strict=True)
        }

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Values of all latents for a batch of x (lanes, *shape)."""
        return {**self.split(x), **{n: v.expand(len(x), *v.shape) for n, v in self.given.items()}}

    def distributions(self) -> list[Any]:
        """The prior of every site, given the values of the others."""
        fixed = all(self.program.sites[n].static for n in self.sites) or not self.given
        if fixed:
            return [_law(self.program.sites[n].distribution) for n in self.sites]
        zero = torch.zeros(self.shape, dtype=self.program.dtype, device=self.program.device)
        with torch.no_grad():
            nodes = self.observe(zero, scored=True).nodes
        return [_law(nodes[n]["fn"]) for n in self.sites]

    def observe(self, x: Tensor, scored: bool = False) -> Any:
        """Pyro's trace of one run with the sites set to x; their distributions are in it only when scored."""
        from ppl.trace import Run

        values = {**self.split(x), **self.given}
        run = Run(values=values, unscored=frozenset() if scored else frozenset(values))
        return self.program.trace_one({}, self.program.shared_inputs(), run)[0]

    def probes(self) -> tuple[Tensor, Tensor, Tensor]:
        """A point of the size of the prior, zero, and another point, each (*shape)."""
        program = self.program
        generator = torch.Generator(program.device).manual_seed(0)
        priors = [_law(program.sites[n].distribution) for n in self.sites]
        dtype = getattr(priors[0], "dtype", program.dtype)

        def draw() -> Tensor:
            parts = [
                float(getattr(prior, "data_std", 1.0))
                * torch.randn(tuple(shape), generator=generator, dtype=dtype, device=program.device)
                for prior, shape in zip(priors, self.shapes, strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat([p.flatten() for p in parts])

        first, second = draw(), draw()
        return first, torch.zeros_like(first), second

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x), (lanes, *shape) -> (lanes,); differentiable where gradients are recorded."""
        if self._gaussian is not None:
            return self._gaussian.log_prob(x)
        if len(x) == 0:  # a graph is made for a positive number of lanes
            return x.new_zeros(0)
        return self.program.log_likelihood(self.values(x))

    @property
    def gaussian(self) -> GaussianLikelihood:
        """The linear Gaussian form.

        Raises:
            CapabilityError: the likelihood is not Gaussian, or its mean is not linear in the site.
        """
        if self._gaussian is None:
            raise CapabilityError(
                f"this backend needs data that are linear in {self.site!r} with Gaussian noise, but {self._why_not}; "
                "use one that takes any differentiable likelihood, such as inverse.DPS or ppl.NoiseSpace(ppl.HMC())"
            )
        return self._gaussian

    @property
    def is_gaussian(self) -> bool:
        """Whether `gaussian` exists."""
        return self._gaussian is not None

    @cached_property
    def _reading(self) -> tuple[GaussianLikelihood | None, str]:
        try:
            return read_gaussian(self), ""
        except NotGaussian as reason:
            return None, str(reason)

    @property
    def _gaussian(self) -> GaussianLikelihood | None:
        return self._reading[0]

    @property
    def _why_not(self) -> str:
        return self._reading[1]


def diffusion_sites(program: Program) -> list[str]:
    """Names of the latent sites that can be denoised."""
    return [n for n, c in program.capabilities.items() if c & {"denoiser", "condition_linear"}]


def _law(fn: Any) -> Any:
    """A site's distribution; of a linear path, its Gaussian law."""
    base = unwrap(fn)
    return base.gaussian() if {"path", "condition_linear"} <= base.capabilities else base


def read_likelihood(program: Program, site: str | None = None, given: Mapping[str, Tensor] | None = None) -> Likelihood:
    """The likelihood of the diffusion site of a program, or of all of them together.

    Args:
        program: a program with a latent site that can be denoised.
        site: its name; None takes all diffusion sites that have no value in `given`.
        given: values of the other latents, for programs that have any.

    Raises:
        CapabilityError: no site can be denoised, other latents have no value, or the priors of the sites depend on
            each other.
        ProgramError: a plate is subsampled.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., :1], 0.5).to_event(1), obs=y)
        >>> read_likelihood(Program(model, torch.tensor([1.0]))).gaussian.operator.dense()
        tensor([[2., 0.]], dtype=torch.float64)
    """
    from ppl.mcmc.target import refuse_subsampling

    refuse_subsampling(program, "a guided backend")
    given = dict(given or {})
    found = diffusion_sites(program)
    sites = tuple(n for n in found if n not in given) if site is None else (site,)
    if not sites:
        raise CapabilityError(
            f"expected a latent site with a diffusion prior, found {found or 'none'} among {list(program.latents)}; "
            "generic engines such as ppl.NUTS need none"
        )
    others = [n for n in program.latents if n not in sites]
    missing = [n for n in others if n not in given]
    if missing:
        raise CapabilityError(
            f"a guided backend draws {list(sites)} alone, but the program has other latents {missing}; carry them on "
            f"particles, inverse.NuisanceSMC(), give each a block, ppl.Gibbs({{({sites[0]!r},): ..., "
            f"({missing[0]!r},): ...}}), run ppl.NoiseSpace(engine) on all of them, or fix them with pyro.condition"
        )
    likelihood = Likelihood(program, sites, {n: given[n] for n in others})
    _check_independent(likelihood)
    return likelihood


def _check_independent(likelihood: Likelihood) -> None:
    """Raise CapabilityError where the prior of a site or of a given latent moves with the diffusion sites."""
    program = likelihood.program
    several = likelihood.sites if len(likelihood.sites) > 1 else ()
    moving = [n for n in (*several, *likelihood.given) if not program.sites[n].static]
    if not moving:
        return
    first, _, second = likelihood.probes()
    with torch.no_grad():
        runs = [likelihood.observe(x, scored=True).nodes for x in (first, second)]
        for name in moving:
            if name in likelihood.given:
                one, other = (nodes[name]["fn"].log_prob(likelihood.given[name]) for nodes in runs)
            else:
                value = likelihood.split(first)[name]
                one, other = (unwrap(n[name]["fn"]).denoise(value, unwrap(n[name]["fn"]).data_std) for n in runs)
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-6):
                raise CapabilityError(
                    f"the prior of {name!r} depends on {likelihood.site}, so that the likelihood alone does not say "
                    "what a draw is worth; run ppl.NoiseSpace(engine) on all sites"
                )

"""An inverse problem as guided backends see it: the diffusion sites of a program, their prior and their likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inverse.likelihood import Likelihood, read_likelihood
from inverse.remarks import remarks
from ppl.cost import Cost, DenoiserCounter
from ppl.monitor import Monitor
from ppl.program import Program
from sde.joint import JointPrior

__all__ = ["DiffusionProblem"]


@dataclass(frozen=True)
class DiffusionProblem:
    """A program's diffusion sites with everything that a guided backend asks for.

    Several sites are one to all backends: their flattened values joined into a vector, with a `JointPrior`.

    Args:
        program: where it was read from.
        sites: names of the diffusion sites, in program order.
        prior: their distribution, a `DiffusionPrior`, a `GaussianMixture`, or a `JointPrior` of several.
        likelihood: density of the data as a function of the sites.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> DiffusionProblem.of(Program(model, torch.zeros(2))).shape
        torch.Size([2])
    """

    program: Program
    sites: tuple[str, ...]
    prior: Any
    likelihood: Likelihood

    @classmethod
    def of(
        cls, program: Program, site: str | None = None, given: Mapping[str, Tensor] | None = None
    ) -> DiffusionProblem:
        """Read the problem off a program.

        Args:
            program: with one diffusion site or more.
            site: the one to infer; None takes all that have no value in `given`.
            given: values of the other latents, if there are any.

        Raises:
            CapabilityError: there is no diffusion site, other latents have no value, or priors depend on each other.
        """
        likelihood = read_likelihood(program, site, given)
        priors = likelihood.distributions()
        if len(priors) == 1:
            return cls(program, likelihood.sites, priors[0], likelihood)
        plates = [s[: len(s) - len(p.event_shape)] for p, s in zip(priors, likelihood.shapes, strict=True)]
        joint = JointPrior([p.expand(plate) for p, plate in zip(priors, plates, strict=True)])
        return cls(program, likelihood.sites, joint, likelihood)

    @property
    def site(self) -> str:
        """Name of the site, or all names, for messages."""
        return self.likelihood.site

    @property
    def shape(self) -> torch.Size:
        """Shape of one value of the site, plates first; several sites are flattened and joined."""
        return self.likelihood.shape

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the prior."""
        return self.prior.dtype

    @property
    def device(self) -> torch.device:
        """Device of the prior."""
        return torch.device(self.prior.device)

    @property
    def lowest_level(self) -> float:
        """Last positive noise level for methods whose answer is blurred by it.

        A network knows no level below the prior's own; an exact denoiser can go to a tenth of the smallest sd of a
        component and of what the data resolve, sigma_y / ||A||.
        """
        if "exact_covariance" not in self.prior.capabilities:
            return self.prior.sigma_min
        low = self.prior.sigma_min / 5
        norm = float(self.likelihood.gaussian.operator.norm()) if self.likelihood.is_gaussian else 0.0
        return min(low, 0.1 / norm) if norm > 0 else low

    def noise(self, lanes: int, generator: torch.Generator, shape: torch.Size | None = None) -> Tensor:
        """Standard normal noise (lanes, *shape), the shape of the site by default; drawn in one call."""
        size = (lanes, *(self.shape if shape is None else shape))
        return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

    @contextmanager
    def counting(self, cost: Cost) -> Iterator[None]:
        """Count the denoiser calls made inside straight into `cost`, as they happen."""
        counter = DenoiserCounter(cost)
        self.prior.counters.append(counter)
        try:
            yield
        finally:
            self.prior.counters[:] = [c for c in self.prior.counters if c is not counter]

    @contextmanager
    def running(self, monitor: Monitor) -> Iterator[None]:
        """A backend's run: denoiser calls are counted, and what draws would not show is noted."""
        for remark in remarks(self.likelihood):
            monitor.note(remark)
        with self.counting(monitor.cost):
            yield

    def results(self, x: Tensor) -> dict[str, Tensor]:
        """Draws by site name from values (chain, draw, *shape), with deterministic sites where there is any draw."""
        draws = self.likelihood.split(x)
        if self.program.deterministic and x.shape[0] * x.shape[1] > 0:
            names = list(self.program.deterministic)
            read = self.program.batched(lambda trace: {n: trace.nodes[n]["value"] for n in names})
            flat = x.reshape(-1, *self.shape)
            with torch.no_grad():
                values = read(self.likelihood.values(flat))
            draws |= {n: v.reshape(*x.shape[:2], *v.shape[1:]) for n, v in values.items()}
        return draws

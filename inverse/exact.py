"""Exact inference: p(x | y) in closed form, for priors that can condition on linear data with Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.likelihood import GaussianLikelihood
from inverse.problem import DiffusionProblem
from inverse.samplers.guided import residual_chi
from ppl.backend import Exactness, register
from ppl.errors import CapabilityError
from ppl.monitor import Monitor
from ppl.posterior import Estimate, Posterior
from ppl.program import Program

__all__ = ["Exact"]


@register
@dataclass(frozen=True)
class Exact:
    """Independent draws from the exact posterior, with the exact evidence.

    Asks the prior for `condition_linear(A, y, R)` and `log_evidence(A, y, R)`, which a `GaussianMixture` has, and the
    program for data that are linear in the site with Gaussian noise. Copies of the prior in plates are conditioned one
    by one, so no measurement may mix them. The conditioned distribution is `posterior.guide` where there are no plates.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), Exact(), draws=100)
        >>> posterior.guide.mean.tolist(), round(posterior.log_evidence.value.item(), 4)     # log N(1; 0, 1.25)
        ([0.80..., 0.0], -1.4305)
    """

    exact: ClassVar[Exactness] = "always"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    needs: ClassVar[frozenset[str]] = frozenset({"condition_linear"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Condition, then draw."""
        sites = [n for n, c in program.capabilities.items() if "condition_linear" in c]
        problem = DiffusionProblem.of(program, sites[0] if len(sites) == 1 else None)
        gaussian = problem.likelihood.gaussian
        plates = problem.shape[: len(problem.shape) - len(problem.prior.event_shape)]
        with torch.no_grad(), monitor:
            parts = _by_plate(gaussian, plates.numel(), problem.site)
            posteriors = [_condition(problem.prior, rows, data) for rows, data in parts]
            log_evidence = torch.stack([e.double() for _, e in posteriors]).sum() + gaussian.log_normaliser.double()
            log_evidence = log_evidence + 0.5 * gaussian.size * math.log(2 * math.pi)
            x = torch.stack([p.draw((chains, draws), generator) for p, _ in posteriors], 2)
            x = x.reshape(chains, draws, *problem.shape)
            results = problem.results(x)
        return Posterior(
            draws=results,
            log_evidence=Estimate(log_evidence, torch.zeros_like(log_evidence)),
            guide=None if plates else posteriors[0][0],
            info=residual_chi(problem, x),
        )


def _condition(prior: Any, rows: Tensor, data: Tensor) -> tuple[Any, Tensor]:
    """The posterior of one copy of the prior and log p(d), for whitened data d = rows x + n."""
    if not len(rows):
        return prior.expand(torch.Size()), data.new_zeros(())
    return prior.condition_linear(rows, data, 1.0), prior.log_evidence(rows, data, 1.0)


def _by_plate(gaussian: GaussianLikelihood, copies: int, site: str) -> list[tuple[Tensor, Tensor]]:
    """For each copy of the prior, the rows of B that see it and their data."""
    matrix = gaussian.operator.dense(dtype=torch.float64)
    data = gaussian.data.reshape(-1)
    if copies == 1:
        return [(matrix, data)]
    blocks = matrix.reshape(len(matrix), copies, -1)
    seen = (blocks != 0).any(-1)
    if bool((seen.sum(1) > 1).any()):
        raise CapabilityError(
            f"Exact conditions the copies of {site!r} in plates one by one, but a measurement depends on several of "
            "them; use inverse.TwistedSMC, or write the copies as one prior without a plate"
        )
    # A row that sees nothing still has a density: it goes to the first copy.
    owner = torch.where(seen.any(1), seen.int().argmax(1), torch.zeros_like(seen.int().argmax(1)))
    return [(blocks[owner == i, i], data[owner == i]) for i in range(copies)]

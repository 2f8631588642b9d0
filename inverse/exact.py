"""Exact inference: p(x | y) in closed form, for priors that can condition on linear data with Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.guided import residual_chi
from ppl.backend import Exactness, register
from ppl.errors import CapabilityError
from ppl.monitor import Monitor
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from sde.joint import JointPrior

__all__ = ["Exact"]


@register
@dataclass(frozen=True)
class Exact:
    """Independent draws from the exact posterior, with the exact evidence.

    Asks the prior for `condition_linear(A, y, R)` and `log_evidence(A, y, R)`, which a `GaussianMixture` has, and the
    program for data that are linear in the sites with Gaussian noise. Sites, and copies of a site in plates, that no
    measurement mixes are conditioned one by one; those that are mixed, together, as one mixture with a component for
    every choice of theirs, while that is small. The conditioned distribution is `posterior.guide` where there is one.

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
        problem = DiffusionProblem.of(program)
        gaussian = problem.likelihood.gaussian
        copies = _copies(problem)
        with torch.no_grad(), monitor:
            matrix, data = gaussian.operator.dense(dtype=torch.float64), gaussian.data.reshape(-1)
            groups = _groups(matrix, copies)
            x = torch.zeros(chains, draws, problem.shape.numel(), dtype=problem.dtype, device=problem.device)
            log_evidence = gaussian.log_normaliser.double() + 0.5 * gaussian.size * math.log(2 * math.pi)
            posteriors = []
            for members, rows in groups:
                prior = _together([copies[i][0] for i in members], problem.site)
                columns = torch.cat([copies[i][1] for i in members]).to(matrix.device)
                posterior, evidence = _condition(prior, matrix[rows][:, columns], data[rows])
                log_evidence = log_evidence + evidence.double()
                x[..., columns] = posterior.draw((chains, draws), generator).reshape(chains, draws, -1)
                posteriors.append(posterior)
            x = x.reshape(chains, draws, *problem.shape)
            results = problem.results(x)
        return Posterior(
            draws=results,
            log_evidence=Estimate(log_evidence, torch.zeros_like(log_evidence)),
            guide=posteriors[0] if len(groups) == 1 else None,
            info=residual_chi(problem, x),
        )


def _copies(problem: DiffusionProblem) -> list[tuple[Any, Tensor]]:
    """Every copy of every site's prior, with its places in the flattened value."""
    shape, prior = problem.shape, problem.prior
    plates = shape[: len(shape) - len(prior.event_shape)]
    members = prior.priors if isinstance(prior, JointPrior) else (prior.expand(plates),)
    out, start = [], 0
    for member in members:
        if "condition_linear" not in member.capabilities:
            raise CapabilityError(
                f"Exact needs priors that can be conditioned in closed form, such as GaussianMixture, for all of "
                f"{problem.site}, got {member!r}; use inverse.TwistedSMC"
            )
        size = member.event_shape.numel()
        for _ in range(member.batch_shape.numel()):
            out.append((member.expand(torch.Size()), torch.arange(start, start + size)))
            start += size
    return out


def _groups(matrix: Tensor, copies: list[tuple[Any, Tensor]]) -> list[tuple[list[int], Tensor]]:
    """Copies that measurements tie together, and the rows that see them."""
    seen = torch.stack([(matrix[:, places.to(matrix.device)] != 0).any(1) for _, places in copies], 1)
    # A row that sees nothing still has a density: it goes to the first copy.
    seen[:, 0] |= ~seen.any(1)
    group = torch.arange(len(copies), device=matrix.device)
    for row in seen:
        tied = group[row].unique()
        group[torch.isin(group, tied)] = tied.min()
    members = [(group == g).nonzero()[:, 0].tolist() for g in group.unique()]
    return [(m, seen[:, m].any(1)) for m in members]


def _together(priors: list[Any], site: str) -> Any:
    """One prior of several copies; a single one as it is."""
    if len(priors) == 1:
        return priors[0]
    joint = JointPrior(priors)
    if "condition_linear" not in joint.capabilities:
        raise CapabilityError(
            f"a measurement depends on several copies or parts of {site}, and the product of their components is too "
            f"large to write down ({len(priors)} mixtures in {joint.event_shape[0]} dimensions); use inverse.TwistedSMC"
        )
    return joint


def _condition(prior: Any, rows: Tensor, data: Tensor) -> tuple[Any, Tensor]:
    """The posterior of one copy of the prior and log p(d), for whitened data d = rows x + n."""
    if not len(rows):
        return prior.expand(torch.Size()), data.new_zeros(())
    return prior.condition_linear(rows, data, 1.0), prior.log_evidence(rows, data, 1.0)

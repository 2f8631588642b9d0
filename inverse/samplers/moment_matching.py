"""Moment matching as a backend: the whole Tweedie covariance, in the guide and where possible in the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from inverse.guides.moment_matching import MomentMatchingGuide
from inverse.problem import DiffusionProblem
from inverse.samplers.claims import NeverExact
from inverse.samplers.guided import GuidedSampler
from ppl.backend import register
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import CovarianceCorrected, DPMSolver2MSDE, Schedule, Solver

__all__ = ["MomentMatching"]


@register
@dataclass(frozen=True)
class MomentMatching(NeverExact):
    """Guidance by conditional moments, for linear data with Gaussian noise.

    Exact for Gaussian priors at any number of steps, one included, when the step uses the covariance. For mixtures it
    is biased where modes split: `TwistedSMC` takes the same step and corrects it with weights.

    Args:
        steps: denoiser evaluations per draw.
        solver: None takes `CovarianceCorrected` where the prior has an exact covariance or an event of at most `small`
            entries, else `DPMSolver2MSDE`.
        exact_limit: most measurements for which their covariance given x is written down; see `MomentMatchingGuide`.
        cg_steps: conjugate-gradient steps beyond.
        small: entries of an event up to which the covariance of a network is written down (one vjp per entry and step).
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Source: Rozet et al. (2024) for the guide [read]; the step [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0))
        >>> posterior = ppl.infer(program, MomentMatching(steps=2), draws=1000)
        >>> [round(v, 1) for v in posterior.mean("x").tolist()]                    # the exact mean is (0.8, 0)
        [0.8, ...]
    """

    steps: int = 50
    solver: Solver | None = None
    exact_limit: int = 64
    cg_steps: int = 20
    small: int = 64
    schedule: Schedule | None = None
    chunk: int | None = None

    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_prior", "linear_gaussian_likelihood")

    def __post_init__(self) -> None:
        _ = self._sampler(CovarianceCorrected() if self.solver is None else self.solver)

    def _sampler(self, solver: Solver) -> GuidedSampler:
        corrected = getattr(solver, "needs_covariance", False)
        guide = MomentMatchingGuide(self.exact_limit, self.cg_steps, dense=corrected)
        start = corrected and self.schedule is None
        return GuidedSampler(guide, solver, self.steps, self.schedule, informed_start=start, chunk=self.chunk)

    def sampler(self, problem: DiffusionProblem) -> GuidedSampler:
        """The guide and solver that this stands for on a problem."""
        if self.solver is not None:
            return self._sampler(self.solver)
        prior = problem.prior
        known = "exact_covariance" in prior.capabilities or prior.event_shape.numel() <= self.small
        return self._sampler(CovarianceCorrected() if known else DPMSolver2MSDE())

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw all chains side by side."""
        sampler = self.sampler(DiffusionProblem.of(program))
        return sampler.run(program, draws=draws, chains=chains, generator=generator, monitor=monitor)

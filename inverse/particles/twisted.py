"""Twisted sequential Monte Carlo: a guided sampler whose particles are weighted, so that the guide cannot bias it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.guides import PiGDMGuide
from inverse.particles.closure import ClosureKernel
from inverse.particles.core import Kernel, Merged, Run, merge, run_particles
from inverse.particles.guided import GuidedKernel
from inverse.problem import DiffusionProblem
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["TwistedSMC", "particle_kernel"]


@register
@dataclass(frozen=True)
class TwistedSMC:
    """Twisted SMC, its runs repeated and merged by evidence until the root ESS reaches the number of draws.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        guide: what leads the particles, such as `PiGDMGuide()`; None takes the full moment closure where the prior
            has an exact covariance, and `PiGDMGuide()` otherwise.
        solver: the stochastic solver that a guide acts in.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per guide call; changes memory, nothing else.

    The target is the program with the discretised prior: the error vanishes as particles (and steps) grow. Draws are
    equally weighted; `info["root_ess"]` says how many independent ones they are worth.

    Source: Wu et al. (2023), twisted diffusion sampler [read]; closure, root ESS and merging [derived], with defaults
    measured on exact problems.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> posterior = ppl.infer(program, TwistedSMC(steps=5), draws=500)
        >>> abs(posterior.log_evidence.value.item() + 1.4305) < 0.05                # log N(1; 0, 1.25)
        True
    """

    steps: int | None = None
    particles: int | None = None
    guide: Any = None
    solver: Solver = field(default_factory=DPMSolver2MSDE)
    threshold: float = 0.5
    runs: int = 8
    chunk: int | None = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("particles", "steps")
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 2:
            raise OptionError(f"steps must be 2 or more noise levels, got {self.steps}")
        if self.particles is not None and self.particles < 2:
            raise OptionError(f"particles must be 2 or more, got {self.particles}")
        if not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must lie in (0, 1], a share of the particles, got {self.threshold}")
        if self.runs < 1:
            raise OptionError(f"runs must be one or more, got {self.runs}")
        if self.guide is not None and not hasattr(self.guide, "bind"):
            raise OptionError(f"expected a guide such as inverse.PiGDMGuide(), got {self.guide!r}")
        if self.guide is not None and self.guide.acts_in != "denoiser":
            raise OptionError(
                f"{self.guide!r} changes the step and not the estimate of x_0, so its proposal has no density here; "
                'use DPSGuide(weight="likelihood") or PiGDMGuide()'
            )
        Chunks(self.chunk)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the engine once or more for every chain."""
        problem = DiffusionProblem.of(program)
        with torch.no_grad(), problem.counting(monitor.cost):
            kernel = particle_kernel(problem, self._levels(problem), self.guide, self.solver, self.chunk, monitor.cost)
            found: list[tuple[Tensor, Merged]] = []
            for chain in range(chains):
                done = self._chain(kernel, draws, chain, generator, monitor)
                if done is None:
                    break
                found.append(done)
            if not found:
                monitor.note("TwistedSMC: stopped before its first pass over the noise levels was complete: no draws")
                empty = torch.zeros(1, 0, *problem.shape, dtype=problem.dtype, device=problem.device)
                return Posterior(draws={problem.site: empty}, attrs={"complete": False})
            x = torch.stack([values for values, _ in found])
            results = problem.results(x)
        merged = [m for _, m in found]
        return Posterior(
            draws=results,
            log_evidence=_evidence(merged),
            info=_info(merged),
            attrs={"complete": len(found) == chains, "independent": "roots"},
        )

    def _levels(self, problem: DiffusionProblem) -> Tensor:
        """Noise levels: the prior's own for the closure, which draws its last step; lower ones for a guide's steps."""
        prior = problem.prior
        if self.guide is None:
            return prior.sigmas(self.steps)
        return prior.grid(prior.sigma_max, problem.lowest_level, prior.steps if self.steps is None else self.steps)

    def _chain(
        self, kernel: Kernel[Any], draws: int, chain: int, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Merged] | None:
        """One chain: runs until the merge is worth `draws` independent draws."""
        particles = self.particles or draws

        def one_run(r: int) -> Run | None:
            if monitor.interrupted:
                return None
            with monitor.section(f"chain {chain}, run {r}"):
                saved = monitor.finished("run")
                if saved is not None:
                    return Run.unpack(kernel, saved, kernel.levels - 1)
                run = run_particles(
                    kernel, particles, threshold=self.threshold, generator=generator, monitor=monitor, label="levels"
                )
                if run is not None:
                    monitor.finish("run", run.pack())
                return run

        merged, reached = merge(one_run, target=min(draws, particles), limit=self.runs, monitor=monitor)
        if merged is None:
            return None
        if not reached and self.runs > 1:
            monitor.note(
                f"TwistedSMC: after {len(merged.runs)} runs of {particles} particles the draws are worth "
                f"{float(merged.root_ess):.0f} independent ones (root ESS), asked for {draws}; raise particles, or use "
                "a better guide"
            )
        parts = [
            kernel.finish(run.population.select(index), generator)
            for run, index in zip(merged.runs, merged.choose(draws, generator), strict=True)
            if len(index)
        ]
        return torch.cat(parts), merged


def particle_kernel(
    problem: DiffusionProblem, sigmas: Tensor, guide: Any, solver: Solver, chunk: int | None, cost: Cost
) -> Kernel[Any]:
    """How particles move: by the full moment closure where the prior has an exact covariance, or led by a guide."""
    if guide is None and "exact_covariance" in problem.prior.capabilities:
        return ClosureKernel(problem, sigmas)
    guide = PiGDMGuide() if guide is None else guide
    return GuidedKernel(problem, sigmas, guide.bind(problem, cost), solver, chunk)


def _evidence(merged: list[Merged]) -> Estimate:
    """Evidence of all chains together: chains are runs as well."""
    together = Merged(tuple(run for m in merged for run in m.runs))
    return Estimate(together.log_evidence, together.stderr)


def _info(merged: list[Merged]) -> dict[str, Tensor]:
    """Diagnostics per chain; ESS per level for every run."""
    runs = [run for m in merged for run in m.runs]
    return {
        "root_ess": torch.stack([m.root_ess for m in merged]),
        "distinct_roots": torch.tensor([m.distinct_roots for m in merged]),
        "runs": torch.tensor([len(m.runs) for m in merged]),
        "ess": torch.tensor([run.ess for run in runs], dtype=torch.float64),
        "resampled": torch.tensor([run.resampled for run in runs]),
        "run_log_evidence": torch.stack([run.log_evidence for run in runs]),
    }

"""Twisted sequential Monte Carlo: a guided sampler whose particles are weighted, so that the guide cannot bias it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.particles.closure import ClosureKernel
from inverse.particles.core import Kernel, Merged, Run, merge, run_particles
from inverse.problem import DiffusionProblem
from ppl.backend import Exactness, register
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor
from ppl.posterior import Estimate, Posterior
from ppl.program import Program

__all__ = ["TwistedSMC"]


@register
@dataclass(frozen=True)
class TwistedSMC:
    """Twisted SMC, its runs repeated and merged by evidence until the root ESS reaches the number of draws.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        kernel: how particles move, `Closure()` or `Guided(guide)`; None takes the closure where the prior has a
            covariance that can be drawn from, and the guided kernel otherwise.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.

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
        >>> round(posterior.log_evidence.value.item(), 4)                # log N(1; 0, 1.25)
        -1.4305
    """

    steps: int | None = None
    particles: int | None = None
    kernel: Any = None
    threshold: float = 0.5
    runs: int = 8

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

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the engine once or more for every chain."""
        problem = DiffusionProblem.of(program)
        with torch.no_grad(), problem.counting(monitor.cost):
            kernel = self._kernel(problem, monitor)
            found: list[tuple[Tensor, Merged]] = []
            for chain in range(chains):
                done = self._chain(kernel, draws, chain, generator, monitor)
                if done is None:
                    break
                found.append(done)
            if not found:
                raise NotFiniteError("the run was interrupted before its first pass over the noise levels was complete")
            x = torch.stack([values for values, _ in found])
            results = problem.results(x)
        merged = [m for _, m in found]
        return Posterior(
            draws=results,
            log_evidence=_evidence(merged),
            info=_info(merged),
            attrs={"complete": len(found) == chains, "independent": "roots"},
        )

    def _kernel(self, problem: DiffusionProblem, monitor: Monitor) -> Kernel:
        sigmas = problem.prior.sigmas(self.steps)
        if self.kernel is not None:
            return self.kernel.bind(problem, sigmas, monitor.cost)
        if "exact_covariance" in problem.prior.capabilities:
            return ClosureKernel(problem, sigmas)
        from inverse.particles.guided import Guided

        return Guided().bind(problem, sigmas, monitor.cost)

    def _chain(
        self, kernel: Kernel, draws: int, chain: int, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Merged] | None:
        """One chain: runs until the merge is worth `draws` independent draws."""
        particles = self.particles or draws

        def one_run(r: int) -> Run | None:
            if monitor.interrupted:
                return None
            with monitor.section(f"chain {chain}, run {r}"):
                saved = monitor.finished("run")
                if saved is not None:
                    return _restore(kernel, saved)
                run = run_particles(
                    kernel, particles, threshold=self.threshold, generator=generator, monitor=monitor, label="levels"
                )
                if run is not None:
                    monitor.finish("run", _store(run))
                return run

        merged, reached = merge(one_run, target=min(draws, particles), limit=self.runs, monitor=monitor)
        if merged is None:
            return None
        if not reached and self.runs > 1:
            monitor.note(
                f"TwistedSMC: after {len(merged.runs)} runs of {particles} particles the draws are worth "
                f"{float(merged.root_ess):.0f} independent ones (root ESS), asked for {draws}; raise particles, or use a "
                "better guide"
            )
        parts = [
            kernel.finish(run.population.select(index), generator)
            for run, index in zip(merged.runs, merged.choose(draws, generator), strict=True)
            if len(index)
        ]
        return torch.cat(parts), merged


def _store(run: Run) -> dict[str, Tensor]:
    tensors = {f"p.{n}": t for n, t in run.population.pack().items()}
    return tensors | {
        "log_weight": run.log_weight,
        "roots": run.roots,
        "log_z": run.log_z,
        "ess": torch.tensor(run.ess, dtype=torch.float64),
        "resampled": torch.tensor(run.resampled),
    }


def _restore(kernel: Kernel, saved: Mapping[str, Tensor]) -> Run:
    population = kernel.unpack(
        {n.removeprefix("p."): t for n, t in saved.items() if n.startswith("p.")}, kernel.levels - 1
    )
    return Run(
        population,
        saved["log_weight"],
        saved["roots"],
        saved["log_z"],
        saved["ess"].tolist(),
        int(saved["resampled"]),
    )


def _evidence(merged: list[Merged]) -> Estimate:
    """Evidence of all chains together: chains are runs as well."""
    return Estimate(*_all(merged))


def _all(merged: list[Merged]) -> tuple[Tensor, Tensor]:
    together = Merged(tuple(run for m in merged for run in m.runs))
    return together.log_evidence, together.stderr


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

"""What all particle backends share: runs repeated and merged by evidence, chains, checkpoints, diagnostics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.particles.core import Kernel, Moves, Run, run_particles
from inverse.particles.merging import Merged, merge
from inverse.problem import DiffusionProblem
from ppl.backend import Exactness
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.posterior import Estimate, Posterior
from ppl.program import Program

__all__ = ["ParticleBackend"]


@dataclass(frozen=True)
class ParticleBackend:
    """The door of particle backends; a subclass gives its options and `kernel`.

    Args:
        steps: noise levels; None takes the prior's own number.
        particles: particles of one run; None takes the number of draws asked for.
        threshold: resample when ESS < threshold * particles.
        runs: at most this many runs per chain; 1 never repeats.
        chunk: particles per denoiser or guide call; changes memory, nothing else.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int | None = None
    particles: int | None = None
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
        check_integers(self, **{n: 2 for n in ("steps", "particles") if getattr(self, n) is not None})
        if not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must lie in (0, 1], a share of the particles, got {self.threshold}")
        check_integers(self, runs=1)
        Chunks(self.chunk)

    def problem(self, program: Program) -> DiffusionProblem:
        """What is solved."""
        return DiffusionProblem.of(program)

    @abstractmethod
    def kernel(self, problem: DiffusionProblem, cost: Cost) -> Kernel[Any]:
        """How particles move on a problem."""

    def rejuvenation(self, problem: DiffusionProblem, kernel: Kernel[Any]) -> Moves | None:
        """What to do to the particles after a resampling; nothing by default."""
        return None

    def levels(self, problem: DiffusionProblem) -> Tensor:
        """(steps + 1,) noise levels down to what the data resolve, the last exactly 0."""
        prior = problem.prior
        return prior.grid(prior.sigma_max, problem.lowest_level, prior.steps if self.steps is None else self.steps)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the engine once or more for every chain, that of many problems in one batch where the class says so."""
        if program.problems is not None:
            from inverse.particles.many import run_problems

            return run_problems(self, program, draws=draws, chains=chains, generator=generator, monitor=monitor)
        problem = self.problem(program)
        with torch.no_grad(), problem.running(monitor):
            kernel = self.kernel(problem, monitor.cost)
            moves = self.rejuvenation(problem, kernel)
            found: list[tuple[Tensor, Merged]] = []
            for chain in range(chains):
                try:
                    done = self._chain(kernel, moves, draws, chain, generator, monitor)
                except NotFiniteError as error:
                    if not found:
                        raise
                    monitor.note(f"chain {chain} was lost, {len(found)} of {chains} are kept: {error}")
                    break
                if done is None:
                    break
                found.append(done)
            if not found:
                monitor.note(
                    f"{type(self).__name__}: stopped before its first pass over the noise levels was complete: no draws"
                )
            return self.posterior(problem, found, chains)

    def posterior(self, problem: DiffusionProblem, found: Sequence[tuple[Tensor, Merged]], chains: int) -> Posterior:
        """What was found in each chain, `chains` of them when complete; without draws where nothing was."""
        if not found:
            empty = torch.zeros(1, 0, *problem.shape, dtype=problem.dtype, device=problem.device)
            return Posterior(draws=problem.results(empty), attrs={"complete": False})
        merged = [m for _, m in found]
        return Posterior(
            draws=problem.results(torch.stack([values for values, _ in found])),
            log_evidence=_evidence(merged),
            info=_info(merged),
            attrs={"complete": len(found) == chains, "independent": "roots"},
        )

    def _chain(
        self,
        kernel: Kernel[Any],
        moves: Moves | None,
        draws: int,
        chain: int,
        generator: torch.Generator,
        monitor: Monitor,
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
                    kernel,
                    particles,
                    threshold=self.threshold,
                    generator=generator,
                    monitor=monitor,
                    label="levels",
                    moves=moves,
                )
                if run is not None:
                    monitor.finish("run", run.pack())
                return run

        merged, reached = merge(one_run, target=min(draws, particles), limit=self.runs, monitor=monitor)
        if merged is None:
            return None
        if not reached:
            self.remark(merged, draws, monitor)
        return self.finish(kernel, merged, draws, generator), merged

    def remark(self, merged: Merged, draws: int, monitor: Monitor, of: str = "") -> None:
        """Say that the runs are worth fewer draws than were asked for."""
        if self.runs > 1:
            monitor.note(
                f"{type(self).__name__}: {of}after {len(merged.runs)} runs of {self.particles or draws} particles the "
                f"draws are worth {float(merged.root_ess):.0f} independent ones (root ESS), asked for {draws}; raise "
                "particles, or use a better guide"
            )

    def finish(self, kernel: Kernel[Any], merged: Merged, draws: int, generator: torch.Generator) -> Tensor:
        """(draws, *shape) equally weighted values."""
        parts = [
            kernel.finish(run.population.select(index), generator)
            for run, index in zip(merged.runs, merged.choose(draws, generator), strict=True)
            if len(index)
        ]
        return torch.cat(parts)


def _evidence(merged: list[Merged]) -> Estimate:
    """Evidence of all chains together: chains are runs as well."""
    together = Merged(tuple(run for m in merged for run in m.runs), sum(m.dead for m in merged))
    return Estimate(together.log_evidence, together.stderr)


def _info(merged: list[Merged]) -> dict[str, Tensor]:
    """Diagnostics per chain; ESS per level for every run."""
    runs = [run for m in merged for run in m.runs]
    info = {
        "root_ess": torch.stack([m.root_ess for m in merged]),
        "distinct_roots": torch.tensor([m.distinct_roots for m in merged]),
        "runs": torch.tensor([len(m.runs) for m in merged]),
        "ess": torch.tensor([run.ess for run in runs], dtype=torch.float64),
        "resampled": torch.tensor([run.resampled for run in runs]),
        "run_log_evidence": torch.stack([run.log_evidence for run in runs]),
    }
    moved = [sum(run.accepted) / len(run.accepted) if run.accepted else float("nan") for run in runs]
    if any(run.accepted for run in runs):
        info["acceptance_rate"] = torch.tensor(moved, dtype=torch.float64)
    return info

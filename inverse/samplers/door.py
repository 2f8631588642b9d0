"""The door of samplers whose lanes run side by side, those of all problems of `program.over(...)` in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.many import ManyProblems, Streams, UnlikeError
from inverse.problem import DiffusionProblem
from inverse.samplers.claims import NeverExact
from inverse.samplers.lanes import Method, run_lanes, run_problem_lanes
from ppl.backend import in_turn, problem_seeds, stack_problems
from ppl.cost import Cost
from ppl.errors import CapabilityError, NotFiniteError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["FAR_OFF", "TrajectorySampler", "residual_chi"]

FAR_OFF = 3.0
"""Median residual_chi from which a note says that the draws do not fit the data."""


class TrajectorySampler(NeverExact):
    """The door of backends whose lanes run side by side; a subclass gives its options and `method`."""

    chunk: int | None
    loop: ClassVar[str] = "noise levels"

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> Method:
        """The steps that lanes take on a problem."""
        raise CapabilityError(f"{type(self).__name__} has no steps; write method(problem, cost) in the subclass")

    def remarks(self, methods: Sequence[Any], missed: float) -> Iterator[str]:
        """What to say of a run, given the methods that made it and the median of its residual_chi."""
        if missed > FAR_OFF:
            yield (
                f"the draws miss the data by {missed:.3g} times the noise level, exact draws by about 1; take more "
                "steps, or MomentMatching"
            )

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw all chains side by side, those of all problems together."""
        if program.problems is not None:
            return self._run_problems(program, draws, chains, generator, monitor)
        problem = DiffusionProblem.of(program)
        with torch.no_grad(), problem.running(monitor):
            method = self.method(problem, monitor.cost)
            x, complete = run_lanes(
                method,
                problem,
                draws=draws,
                chains=chains,
                chunk=self.chunk,
                generator=generator,
                monitor=monitor,
                label=self.loop,
            )
            results = problem.results(x)
            info = residual_chi(problem, x)
        for remark in self.remarks([method], _missed(info)):
            monitor.note(remark)
        return Posterior(draws=results, info=info, attrs={"complete": complete})

    def _run_problems(
        self, program: Program, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """The lanes of all problems in one batch, or problems in turn where they are too unlike each other."""
        seeds = problem_seeds(program, generator)
        methods: list[Method] = []

        def make(lanes: DiffusionProblem) -> Method:
            methods.append(self.method(lanes, monitor.cost))
            return methods[-1]

        with torch.no_grad():
            try:
                many = ManyProblems.of(program)
                make(many.lanes(torch.arange(len(many.singles))))  # nothing is drawn yet: it says whether it can be
                methods.clear()
            except UnlikeError as why:
                return in_turn(program, self, draws=draws, chains=chains, seeds=seeds, monitor=monitor, why=why)
            with many.running(monitor):
                found = run_problem_lanes(
                    make,
                    many,
                    draws=draws,
                    chains=chains,
                    chunk=self.chunk,
                    streams=Streams.of(seeds, generator.device),
                    monitor=monitor,
                    label=self.loop,
                )
                parts: list[Posterior | NotFiniteError] = []
                worst = 0.0
                for problem, x in zip(many.singles, found, strict=False):
                    if isinstance(x, NotFiniteError):
                        parts.append(x)
                        continue
                    info = residual_chi(problem, x)
                    worst = max(worst, _missed(info))
                    attrs = {"complete": x.shape[1] == draws}
                    parts.append(Posterior(draws=problem.results(x), info=info, attrs=attrs))
        for remark in self.remarks(methods, worst):
            monitor.note(remark)
        return stack_problems(parts, len(many.singles), seeds, monitor)


def residual_chi(problem: DiffusionProblem, x: Tensor) -> dict[str, Tensor]:
    """chi = ||d - B x|| / sqrt(m) for draws (chain, draw, *shape), near 1 for draws that fit as well as the noise does.

    Below 1 the noise is fitted, above 1 the data are missed. Empty for likelihoods without a Gaussian form.
    """
    if not problem.likelihood.is_gaussian:
        return {}
    gaussian = problem.likelihood.gaussian
    r = gaussian.residual(x)
    return {"residual_chi": (r.square().reshape(*x.shape[:2], gaussian.size).mean(-1)).sqrt()}


def _missed(info: dict[str, Tensor]) -> float:
    """Median of the residuals, zero where there is none."""
    chi = info.get("residual_chi")
    return 0.0 if chi is None or not chi.numel() else float(chi.median())

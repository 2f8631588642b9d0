"""The particle core where particles, runs or chains fail: the dead stay dead, and what is there is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from particle_checks import F64, program_of, two_modes
from torch import Tensor

import ppl
from inverse.particles import TwistedSMC, run_particles
from inverse.particles.core import AllDeadError, Run
from inverse.particles.merging import merge
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import NotFiniteError
from ppl.monitor import Monitor

DEAD = -torch.inf


@dataclass
class Population:
    x: Tensor
    log_twist: Tensor

    def select(self, index: Tensor) -> Population:
        return Population(self.x[index], self.log_twist[index])

    def pack(self) -> dict[str, Tensor]:
        return {"x": self.x, "log_twist": self.log_twist}


class Scripted:
    """A kernel whose particles stand still and whose weights are given, one list per step."""

    def __init__(self, *weights: list[float]) -> None:
        self.weights = [torch.tensor(w, dtype=F64) for w in weights]

    @property
    def levels(self) -> int:
        return len(self.weights) - 1

    def start(self, particles: int, generator: torch.Generator) -> Population:
        return Population(torch.arange(particles, dtype=F64), self.weights[0])

    def first_weight(self, population: Population) -> Tensor:
        return self.weights[0]

    def move(self, population: Population, level: int, generator: torch.Generator) -> tuple[Population, Tensor]:
        return population, self.weights[level + 1]

    def last_weight(self, population: Population) -> Tensor:
        return self.weights[-1]


def run(kernel: Any, threshold: float = 1e-6, monitor: Monitor | None = None) -> Run:
    generator = torch.Generator().manual_seed(0)
    found = run_particles(
        kernel, 4, threshold=threshold, generator=generator, monitor=monitor or Monitor(), label="levels"
    )
    assert found is not None
    return found


def test_a_dead_particle_stays_dead_whatever_its_increments() -> None:
    """Weights 1, 0, 1, 1: twice as many, with NaN and infinity for the dead one, still give an evidence of 3 / 4."""
    found = run(Scripted([0.0, DEAD, 0.0, 0.0], [0.0, math.nan, 0.0, 0.0], [0.0, math.inf, 0.0, 0.0]))
    assert float(found.log_evidence) == pytest.approx(math.log(0.75))
    assert float(found.root_ess) == pytest.approx(3.0)
    assert found.ess == pytest.approx([3.0, 3.0])


def test_the_dead_have_no_descendants() -> None:
    found = run(Scripted([0.0, DEAD, 0.0, DEAD], [0.0] * 4, [0.0] * 4), threshold=0.9)
    assert found.resampled == 1
    assert set(found.roots.tolist()) == {0, 2}
    assert float(found.log_evidence) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("at", [0, 1, 2], ids=["start", "on the way", "end"])
def test_all_dead_is_one_clear_error(at: int) -> None:
    weights = [[0.0] * 4, [0.0] * 4, [0.0] * 4]
    weights[at] = [DEAD] * 4
    with pytest.raises(AllDeadError, match=r"all 4 particles have weight zero at .*; check the support") as error:
        run(Scripted(*weights))
    assert isinstance(error.value, NotFiniteError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_weight_that_is_no_number_is_an_error(bad: float, at: int) -> None:
    weights = [[0.0] * 4, [0.0] * 4, [0.0] * 4]
    weights[at] = [0.0, bad, 0.0, 0.0]
    with pytest.raises(NotFiniteError, match="log weight") as error:
        run(Scripted(*weights))
    assert not isinstance(error.value, AllDeadError)


def merged(*runs: Callable[[], Run], target: float = 100.0) -> Any:
    monitor = Monitor()
    found, reached = merge(lambda r: runs[r](), target=target, limit=len(runs), monitor=monitor)
    assert not reached
    return found, monitor.notes


def good() -> Run:
    return run(Scripted([0.0] * 4, [0.0] * 4))


def dead() -> Run:
    return run(Scripted([0.0] * 4, [DEAD] * 4))


def broken() -> Run:
    return run(Scripted([0.0] * 4, [math.nan] * 4))


def test_a_run_that_dies_counts_as_evidence_zero() -> None:
    """Two runs with evidence 1 and one with 0 have a mean of 2 / 3; without the dead one it would be 1."""
    found, notes = merged(good, dead, good)
    assert len(found.runs) == 2
    assert float(found.log_evidence) == pytest.approx(math.log(2 / 3))
    assert "evidence zero" in notes[0]


def test_a_fault_in_a_later_run_keeps_the_runs_before() -> None:
    found, notes = merged(good, broken, good)
    assert len(found.runs) == 1
    assert "stopped after 1 runs" in notes[0]
    with pytest.raises(NotFiniteError):
        merged(broken, good)
    with pytest.raises(AllDeadError):
        merged(dead, dead)


@dataclass(frozen=True)
class FailsLater(TwistedSMC):
    """Its second chain meets weights that are no numbers."""

    bad: float = math.nan

    def kernel(self, problem: DiffusionProblem, cost: Cost) -> Any:
        kernel = super().kernel(problem, cost)
        begun: list[int] = []
        start, first = kernel.start, kernel.first_weight

        def counted(particles: int, generator: torch.Generator) -> Any:
            begun.append(1)
            return start(particles, generator)

        kernel.start = counted  # type: ignore[method-assign]
        kernel.first_weight = lambda p: first(p) + (self.bad if len(begun) > 1 else 0.0)  # type: ignore[method-assign]
        return kernel


@pytest.mark.parametrize("bad", [math.nan, DEAD])
def test_a_chain_that_fails_is_noted_and_the_others_are_kept(bad: float) -> None:
    prior, matrix, sigma, y = two_modes()
    backend = FailsLater(steps=4, particles=20, runs=1, bad=bad)
    posterior = ppl.infer(program_of(prior, matrix, sigma, y), backend, draws=20, chains=3, seed=0)
    assert posterior["x"].shape[:2] == (1, 20)
    assert not posterior.complete
    assert any("chain 1 was lost, 1 of 3 are kept" in note for note in posterior.attrs["notes"])

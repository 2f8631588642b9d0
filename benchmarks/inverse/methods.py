"""What is compared: one method of one package, with its default setting first and others to choose from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import inverse
import ppl
from benchmarks.inverse.problems import Judge, Score, Task
from inverse.guides import Guide
from models.references import ExactProblem
from sde import Ancestral

Sample = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A peer's sampler.

    Args:
        package: it comes from.
        name: in that package.
        sample: (task, draws, **setting) -> (draws, d) in the task's units; draws from the global generator.
        settings: label -> options; the first are the package's defaults.
        close: whether it comes close enough to the floor for its setting to be chosen on more problems.
    """

    package: str
    name: str
    sample: Sample
    settings: Mapping[str, Mapping[str, Any]]
    close: bool = False

    @property
    def default(self) -> str:
        return next(iter(self.settings))

    def run(self, problem: ExactProblem, judge: Judge, setting: str, draws: int, seed: int) -> Score:
        """One scored run; package code draws from torch's global generator, so that is forked and seeded."""
        task = Task(problem)
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x = self.sample(task, draws, **self.settings[setting])
        seconds = time.perf_counter() - start
        return judge.score(x.detach().double() * task.half, task.evals / draws, seconds)


@dataclass(frozen=True)
class Ours:
    """A backend of this project at one setting; the fields are those of Method.

    Args:
        name: in the table.
        make: the backend.
        chains: of backends whose draws follow each other: all of the draws are spread over so many, beyond `warmup`.
        widest: largest dimension that it is run in.
    """

    name: str
    make: Callable[[], ppl.Backend]
    chains: int | None = None
    widest: int = 800
    package: str = "pilotlight"
    default: str = "default"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"default": {}})

    def run(self, problem: ExactProblem, judge: Judge, setting: str, draws: int, seed: int) -> Score:
        """One scored run."""
        start = time.perf_counter()
        each = draws if self.chains is None else draws // self.chains
        posterior = ppl.infer(problem.program, self.make(), draws=each, chains=self.chains, seed=seed)
        seconds = time.perf_counter() - start
        return judge.score(posterior.flatten("x"), posterior.cost.denoiser_evals / draws, seconds)


CHAINS = 50  # of backends whose draws follow each other: twenty draws of each, beyond the warmup
RECOMMENDED = "TwistedSMC"
FIFTY = "TwistedSMC, one run of 50 levels"


def ours() -> list[Ours]:
    """Backends of this project, the recommended default first; `Exact` is the control."""

    def guided(guide: Guide) -> Callable[[], ppl.Backend]:
        return lambda: inverse.GuidedSampler(guide, Ancestral(), steps=100)

    side_by_side: dict[str, Callable[[], ppl.Backend]] = {
        "DDSMC": inverse.DDSMC,
        "MCGdiff": inverse.MCGdiff,
        "FPSSMC": inverse.FPSSMC,
        "DCPS": inverse.DCPS,
        "MGPS": inverse.MGPS,
        "TMPD": guided(inverse.TMPDGuide()),
        "LGD": guided(inverse.LGDGuide()),
        "DAPS": inverse.DAPS,
        "DDNM+": inverse.DDNM,
        "ReSample": inverse.ReSample,
        "MPGD": inverse.MPGD,
        "FreeDoM": inverse.FreeDoM,
    }
    one_after_another: dict[str, Callable[[], ppl.Backend]] = {
        "SplitGibbs": inverse.SplitGibbs,
        "PnP-DM": inverse.PnPDM,
        "DiffusionPCN": inverse.DiffusionPCN,
        "AnnealedLangevin": inverse.AnnealedLangevin,
        "ParallelTempering": inverse.ParallelTempering,
    }
    return [
        Ours(RECOMMENDED, inverse.TwistedSMC),
        Ours(FIFTY, lambda: inverse.TwistedSMC(steps=50, runs=1)),
        Ours("Exact (control)", inverse.Exact),
        Ours("MomentMatching", inverse.MomentMatching),
        Ours("PiGDM", inverse.PiGDM),
        Ours("DDRM", inverse.DDRM),
        Ours("DiffPIR", inverse.DiffPIR),
        Ours("DPS", inverse.DPS),
        *(Ours(name, make, widest=80) for name, make in side_by_side.items()),
        *(Ours(name, make, chains=CHAINS, widest=80) for name, make in one_after_another.items()),
    ]

"""Many problems through `program.over`: all lanes in one batch against problems in turn.

16 held-out digits of 8x8 with half of the pixels hidden, 4 draws of each (of 4 chains each, where chains draw). Both
sides read the same program and make the same draws; their runs alternate, and the median of the ratios of neighbours
counts. Processor seconds of one thread, which other users of the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import inverse
import models
import ppl
from inverse.operators import Mask
from models.data import digits
from ppl.backend import in_turn
from ppl.monitor import Monitor

PROBLEMS, DRAWS, STEPS, SIGMA = 16, 4, 25, 0.2


def program_of(problems: int, *, own: bool) -> ppl.Program:
    """Held-out digits behind one mask, or behind a mask of its own each."""
    prior = models.load("digits8x8")
    truth = digits().held_out[:problems]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(problems, truth[0].numel(), generator=generator).argsort(-1)
    seen = (order < truth[0].numel() // 2).reshape(truth.shape)
    seen = seen if own else seen[:1].expand_as(seen)
    y = torch.stack([Mask(m)(t) for m, t in zip(seen, truth, strict=True)])
    y = y + SIGMA * torch.randn(y.shape, generator=generator)

    def model(y: Tensor, seen: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(Mask(seen)(x), SIGMA).to_event(1), obs=y)

    return ppl.Program(model, y[0], seen[0]).over(y=y, seen=seen)


def backends() -> dict[str, Any]:
    """What is timed, and in what particles."""
    return {
        "PiGDM": inverse.PiGDM(steps=STEPS),
        "DPS": inverse.DPS(steps=STEPS),
        "REDDiff": inverse.REDDiff(steps=STEPS),
        "TwistedSMC(particles=16, runs=1)": inverse.TwistedSMC(steps=STEPS, particles=16, runs=1),
        "DDSMC(particles=16, runs=1)": inverse.DDSMC(steps=STEPS, particles=16, runs=1),
        "MCGdiff(particles=16, runs=1)": inverse.MCGdiff(steps=STEPS, particles=16, runs=1),
        "FPSSMC(particles=16, runs=1)": inverse.FPSSMC(steps=STEPS, particles=16, runs=1),
        # Four chains of each problem, 4 draws of each after a short warmup: what a move costs does not depend on it.
        "SplitGibbs": inverse.SplitGibbs(steps=5, warmup=5),
        "PnPDM": inverse.PnPDM(steps=5, warmup=5),
        "DiffusionPCN": inverse.DiffusionPCN(steps=5, warmup=5),
        "AnnealedLangevin": inverse.AnnealedLangevin(levels=5, steps=4, warmup=5, thin=1),
        "ParallelTempering": inverse.ParallelTempering(levels=4, warmup=5),
    }


def processor_seconds(run: Callable[[], object]) -> float:
    """Of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def chains_of(backend: Any) -> int:
    """Four where draws come from chains, else one."""
    return min(backend.default_chains, 4)


def one_by_one(program: ppl.Program, backend: Any, seeds: list[int]) -> ppl.Posterior:
    """The same problems one after the other."""
    with Monitor() as monitor:
        chains = chains_of(backend)
        return in_turn(program, backend, draws=DRAWS, chains=chains, seeds=seeds, monitor=monitor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--names", nargs="*", default=list(backends()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.problems} digits of 8x8, {DRAWS} draws each, {STEPS} steps: in turn over in one batch")
    for own in (False, True):
        program = program_of(options.problems, own=own)
        for name in options.names:
            compare(name, program, options.pairs, "a mask each" if own else "one mask")


def compare(name: str, program: ppl.Program, pairs: int, masks: str) -> None:
    """Time one backend both ways and print a line."""
    backend = backends()[name]
    chains = chains_of(backend)
    first = ppl.infer(program, backend, DRAWS, chains)
    seeds = first.attrs["problem_seeds"]
    gap = float((first["x"] - one_by_one(program, backend, seeds)["x"]).abs().max())
    batch, turn = [], []
    for _ in range(pairs):
        batch.append(processor_seconds(lambda: ppl.infer(program, backend, DRAWS, chains)))
        turn.append(processor_seconds(lambda: one_by_one(program, backend, seeds)))
    ratios = sorted(t / b for t, b in zip(turn, batch, strict=True))
    print(
        f"  {name:33s} {masks:11s} ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
        f"in one batch {statistics.median(batch):6.2f} s, in turn {statistics.median(turn):6.2f} s   "
        f"largest gap {gap:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()

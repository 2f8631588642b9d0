"""Peak memory of the particle engine against its bound: 1.3 times one chunk's forward and vjp, plus 8 states.

Each figure is the high-water mark of a process of its own, less that of a process that loads the same things and runs
two particles. 10,000 particles of 28x28 in chunks of 64.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

PARTICLES, CHUNK = 10_000, 64


def work(kind: str) -> None:
    """Do one kind of work and print the high-water mark in MiB."""
    import torch

    import inverse
    import models
    import ppl
    from benchmarks.cost import program_of

    torch.set_num_threads(1)
    prior = models.load("fashion28x28")
    program = program_of(prior)
    ppl.infer(program, inverse.TwistedSMC(steps=2, particles=2, runs=1), draws=2)
    if kind == "chunk":
        x = torch.randn(CHUNK, *prior.event_shape)
        for _ in range(2):
            mean, pull = torch.func.vjp(lambda x: prior.denoiser(x, torch.tensor(1.0)), x)
            pull(mean)
    elif kind == "engine":
        backend = inverse.TwistedSMC(steps=3, particles=PARTICLES, runs=1, chunk=CHUNK)
        ppl.infer(program, backend, draws=PARTICLES)
    scale = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20)


def peak(kind: str) -> float:
    """High-water mark of a fresh process, MiB."""
    run = subprocess.run([sys.executable, "-m", "benchmarks.memory", kind], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", nargs="?", choices=["base", "chunk", "engine"])
    kind = parser.parse_args().kind
    if kind:
        work(kind)
        return
    base, chunk, engine = peak("base"), peak("chunk"), peak("engine")
    state = PARTICLES * 28 * 28 * 4 / 2**20
    bound = 1.3 * (chunk - base) + 8 * state
    print(f"one chunk's forward and vjp {chunk - base:.0f} MiB, one copy of the state {state:.1f} MiB")
    print(f"engine {engine - base:.0f} MiB, bound {bound:.0f} MiB, ratio {(engine - base) / bound:.2f}")


if __name__ == "__main__":
    main()

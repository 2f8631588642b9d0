"""Paths of stochastic differential equations: time beside hand-written loops, torchsde and diffrax, in one process.

    make bench-paths                            all of it, with diffrax in its own environment
    python -m benchmarks.paths                  without diffrax where it is not installed
    python -m benchmarks.paths --long           gradient through 10,000 steps: memory and time with checkpoints

Batch 64, eight dimensions, a network of two hidden layers as drift, 200 steps, one thread. Seconds are
those of the processor, so that a shared machine does not blur them, except for first calls, whose compilers run beside.
Medians of interleaved ratios to the hand-written Euler-Maruyama loop, which moves factor by factor for K = 8 and is
compiled in pieces as long as ours. torchsde has a Brownian object that is given dt, and its default one; diffrax has
the same network under `jit` and a VirtualBrownianTree for the whole batch, with half a step as tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

from sde import MarkovNoise, Path, Process
from sde.recursion import PIECE

BATCH, DIM, STEPS, WIDTH = 64, 8, 200, 64
DT = 1 / STEPS
LONG, KEEP = 10_000, 100
HAND, HAND_COMPILED = "hand-written loop", "hand-written loop, compiled"
K0, K0_COMPILED, K8, K8_COMPILED = "Path, K = 0", "Path, K = 0, compiled", "Path, K = 8", "Path, K = 8, compiled"
GIVEN, DEFAULT, DIFFRAX = "torchsde, given dt", "torchsde, default", "diffrax, VirtualBrownianTree"
# (whose time, over whose, at most, with backward)
GOALS = [
    (GIVEN, K0, 1 / 2.5, False),
    (GIVEN, K0_COMPILED, 1 / 2.5, False),
    (DEFAULT, K0, 1 / 5, False),
    (DEFAULT, K0_COMPILED, 1 / 5, False),
    (DIFFRAX, K0, 1 / 5, False),
    (DIFFRAX, K0_COMPILED, 1 / 5, False),
    (HAND_COMPILED, K8_COMPILED, 2.0, False),
    (HAND, K8, 4.0, False),
    (HAND, K8, 1.2, True),
    (HAND_COMPILED, K8_COMPILED, 1.2, True),
]

Run = Callable[[bool], None]  # whether with the backward pass


class Drift(nn.Module):
    """A network of two hidden layers, in our terms and in torchsde's."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(DIM, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, DIM)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x)

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)


def loop(drift: Drift, noise: MarkovNoise | None, compile: bool) -> Callable[[], Tensor]:
    """Euler and Maruyama as one would write it."""
    rates, weights = torch.zeros(0), torch.zeros(0)
    if noise is not None:
        rates, weights = torch.from_numpy(noise.rates).float(), noise.weights()
    decay, gain = (-rates * DT).exp(), torch.where(rates > 0, -torch.expm1(-rates * DT) / (rates * DT), 1.0)

    def steps(x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        for n in range(len(eps)):
            if noise is None:
                x = x + drift.net(x) * DT + 0.5 * eps[n]
            else:
                new = decay * y + gain * eps[n][..., None]
                x, y = x + drift.net(x) * DT + 0.5 * ((new - y) * weights).sum(-1), new
        return x, y

    run = torch.compile(steps) if compile else steps
    length = PIECE if compile else STEPS

    def whole() -> Tensor:
        x, y = torch.zeros(BATCH, DIM), torch.zeros(BATCH, DIM, len(rates))
        eps = torch.randn(STEPS, BATCH, DIM) * DT**0.5
        for first in range(0, STEPS, length):
            x, y = run(x, y, eps[first : first + length])
        return x

    return whole


def diffrax_run(drift: Drift) -> Run:
    """The same network by diffrax, forward or with the gradient by its weights."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    if hasattr(os, "sched_setaffinity"):  # jax takes as many threads as it sees cores when it starts
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        jax.devices()
        os.sched_setaffinity(0, cores)
    layers = [layer for layer in drift.net if isinstance(layer, nn.Linear)]
    weights = [(jnp.array(one.weight.detach().numpy()), jnp.array(one.bias.detach().numpy())) for one in layers]
    times = jnp.linspace(0, 1, STEPS + 1)[1:]

    def f(t: Any, x: Any, weights: Any) -> Any:
        for i, (w, b) in enumerate(weights):
            x = x @ w.T + b
            x = jnp.tanh(x) if i < len(weights) - 1 else x
        return x

    def g(t: Any, x: Any, weights: Any) -> Any:
        return lineax.DiagonalLinearOperator(jnp.full(x.shape, 0.5))

    def solve(weights: Any, key: Any) -> Any:
        tree = diffrax.VirtualBrownianTree(0.0, 1.0, tol=DT / 2, shape=(BATCH, DIM), key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(f), diffrax.ControlTerm(g, tree))
        return diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 1.0, DT, jnp.zeros((BATCH, DIM)), args=weights,
            saveat=diffrax.SaveAt(ts=times), max_steps=STEPS + 1,
        ).ys  # fmt: skip

    forward, gradient = jax.jit(solve), jax.jit(jax.grad(lambda w, key: (solve(w, key)[-1] ** 2).mean()))
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 10_000))
    return lambda backward: jax.block_until_ready((gradient if backward else forward)(weights, next(keys)))


def by_torch(one: Callable[[], Tensor]) -> Run:
    """Last states, and their gradient where it is asked for."""

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            end = one()
            if backward:
                end.square().mean().backward()

    return run


def runners(drift: Drift) -> dict[str, Run]:
    """What is timed: fresh noise in every call."""
    times = torch.linspace(DT, 1, STEPS)
    second = MarkovNoise(0.3, 1.0)

    def ours(compile: bool = False, **options: Any) -> Callable[[], Tensor]:
        path = Path(Process(drift, 0.5, **options), times, torch.zeros(DIM), compile=compile)
        return lambda: path.from_noise(torch.randn(BATCH, *path.noise_shape))[:, -1]

    def peer(given: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            more = {"dt": DT} if given else {}
            w = torchsde.BrownianInterval(0.0, 1.0 + 1e-6, size=(BATCH, DIM), **more) if given else None
            start = torch.cat([torch.zeros(1), times])
            return torchsde.sdeint(drift, torch.zeros(BATCH, DIM), start, bm=w, dt=DT, method="euler")[-1]

        return run

    def network() -> Tensor:
        x = torch.zeros(BATCH, DIM)
        for _ in range(STEPS):
            x = drift.net(x)
        return x

    found = {
        HAND: loop(drift, None, False),
        HAND_COMPILED: loop(drift, None, True),
        "hand-written loop, K = 8": loop(drift, second, False),
        "hand-written loop, K = 8, compiled": loop(drift, second, True),
        "the network alone": network,
        K0: ours(),
        K0_COMPILED: ours(compile=True),
        K8: ours(noise=second),
        K8_COMPILED: ours(compile=True, noise=second),
        "Path, K = 8, type I": ours(noise=MarkovNoise(0.3, 1.0, "I")),
        GIVEN: peer(given=True),
        DEFAULT: peer(given=False),
    }
    runs = {name: by_torch(one) for name, one in found.items()}
    if importlib.util.find_spec("diffrax") is not None:
        runs[DIFFRAX] = diffrax_run(drift)
    return runs


def speed(rounds: int) -> None:
    """Table of times and the goals."""
    run = runners(Drift())
    first: dict[str, list[float]] = {}
    spent: dict[str, list[list[float]]] = {name: [[], []] for name in run}
    for name, one in run.items():
        first[name] = []
        for backward in (False, True):
            began = time.perf_counter()
            one(backward)
            first[name].append(time.perf_counter() - began)
    for _ in range(rounds):
        for name, one in run.items():
            for backward in (False, True):
                began = time.process_time()
                one(backward)
                spent[name][backward].append(time.process_time() - began)

    def ratio(name: str, other: str, backward: bool) -> float:
        pairs = zip(spent[name][backward], spent[other][backward], strict=True)
        return statistics.median(a / b for a, b in pairs)

    print("| | forward, ms | over the loop | with backward, ms | over the loop | first calls, s |")
    print("|---|---|---|---|---|---|")
    for name, times in spent.items():
        cells = [f"{1000 * statistics.median(times[i]):.1f} | {ratio(name, HAND, bool(i)):.2f}" for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} | {first[name][0]:.2f}, {first[name][1]:.2f} |")
    print()
    for base, name, most, backward in GOALS:
        if base in run:
            found = ratio(name, base, backward)
            words = f"{name} over {base}{', with backward' * backward}"
            print(f"{words}: {found:.2f}, at most {most:.2f}: {'met' if found <= most else 'missed'}")
    if DIFFRAX in run:
        print(f"with its first call: {DIFFRAX} {first[DIFFRAX][0]:.1f} s, {K0} {first[K0][0]:.2f} s")
    else:
        print("diffrax is not installed here: make bench-paths")


def long_path(drift: Drift, keep: int | None, steps: int = LONG, compile: bool = False) -> Run:
    """One forward and backward pass over many steps."""
    end, origin = torch.tensor([1.0]), torch.zeros(DIM)
    path = Path(Process(drift, 0.5), end, origin, dt=1 / steps, checkpoint_steps=keep, compile=compile)
    return by_torch(lambda: path.from_noise(torch.randn(BATCH, *path.noise_shape)))


def peak(checkpoint_steps: int | None) -> float:
    """High-water mark of a pass over many steps beyond that of one over ten, MiB."""
    found = []
    for steps in (10, LONG):
        long_path(Drift(), checkpoint_steps, steps)(True)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (found[1] - found[0]) * (1 if sys.platform == "darwin" else 1024) / 2**20


def long(rounds: int) -> None:
    """Memory in processes of their own, then time in this one."""
    print(f"gradient through {LONG} steps, batch {BATCH}, {DIM} dimensions")
    memory = {}
    for keep in (None, KEEP):  # first, since a process inherits the mark of its parent
        command = [sys.executable, "-m", "benchmarks.paths", "--peak", str(keep or 0)]
        memory[keep] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    runs = {(keep, c): long_path(Drift(), keep, compile=c) for c in (False, True) for keep in memory}
    spent: dict[tuple[int | None, bool], list[float]] = {kind: [] for kind in runs}
    for n in range(rounds + 1):
        for kind, one in runs.items():
            began = time.process_time()
            one(True)
            if n:  # the first compiles
                spent[kind].append(time.process_time() - began)
    for kind, times in spent.items():
        ratio = statistics.median(a / b for a, b in zip(times, spent[None, False], strict=True))
        words = f"{statistics.median(times):.1f} s ({ratio:.2f})" + f", {memory[kind[0]]:.0f} MiB" * (not kind[1])
        print(f"checkpoint_steps={kind[0]}, compile={kind[1]}: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--long", action="store_true", help="gradient through 10,000 steps")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak is not None:
        print(peak(options.peak or None))
    elif options.long:
        long(max(1, options.rounds // 5))
    else:
        speed(options.rounds)


if __name__ == "__main__":
    main()

"""Paths of stochastic differential equations: time beside a hand-written loop and torchsde, in one process.

`python -m benchmarks.paths`: batch 64, eight dimensions, a network as drift, 200 steps, one thread. Medians of
interleaved ratios to the hand-written Euler-Maruyama loop; torchsde with a Brownian object that is given dt, and with
its default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchsde
from torch import Tensor, nn

from sde import MarkovNoise, Path, Process

BATCH, DIM, STEPS, WIDTH = 64, 8, 200, 64


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


def runners(drift: Drift) -> dict[str, Callable[[], Tensor]]:
    """What is timed: each returns the last states of fresh paths."""
    x0, times = torch.zeros(BATCH, DIM), torch.linspace(1 / STEPS, 1, STEPS)
    dt = 1 / STEPS
    with_start = torch.cat([torch.zeros(1), times])

    def by_hand() -> Tensor:
        x, noise = x0, torch.randn(STEPS, BATCH, DIM) * dt**0.5
        for n in range(STEPS):
            x = x + drift.net(x) * dt + 0.5 * noise[n]
        return x

    def ours(**options: object) -> Callable[[], Tensor]:
        path = Path(Process(drift, 0.5, **options), times, torch.zeros(DIM))  # type: ignore[arg-type]
        return lambda: path.from_noise(torch.randn(BATCH, *path.noise_shape))[:, -1]

    def peer(given: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            more = {"dt": dt} if given else {}
            w = torchsde.BrownianInterval(0.0, 1.0 + 1e-6, size=(BATCH, DIM), **more) if given else None
            return torchsde.sdeint(drift, x0, with_start, bm=w, dt=dt, method="euler")[-1]

        return run

    return {
        "hand-written loop": by_hand,
        "Path, K = 0": ours(),
        "Path, K = 8, type II": ours(noise=MarkovNoise(0.3, 1.0)),
        "Path, K = 8, type I": ours(noise=MarkovNoise(0.3, 1.0, "I")),
        "torchsde, given dt": peer(given=True),
        "torchsde, default": peer(given=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    drift = Drift()
    run = runners(drift)
    print("| | forward, ms | over the loop | with backward, ms | over the loop |\n|---|---|---|---|---|")
    spent: dict[str, list[list[float]]] = {name: [[], []] for name in run}
    for _ in range(options.rounds + 1):
        for name, one in run.items():
            for i in (0, 1):
                began = time.perf_counter()
                with torch.set_grad_enabled(i == 1):
                    end = one()
                    if i == 1:
                        end.square().mean().backward()
                spent[name][i].append(time.perf_counter() - began)
    base = spent["hand-written loop"]
    for name, times in spent.items():
        cells = []
        for i in (0, 1):
            ratio = statistics.median(a / b for a, b in zip(times[i][1:], base[i][1:], strict=True))
            cells.append(f"{1000 * statistics.median(times[i][1:]):.1f} | {ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

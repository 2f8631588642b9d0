"""Time per draw at equal steps and with the same network, package beside package.

Every package runs in a process of its own; the processes take turns, so that the machine's mood is shared, and count
processor seconds, since a shared machine's clock counts its other users. The figure is the median over rounds of our
time over that of the faster twin in the same round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

STEPS, DRAWS, GOAL = 20, 16, 0.9
OURS, COMPILED = "pilotlight", "pilotlight, compiled"
PEERS = ("deepinv", "azula")


class Worker:
    """One package in a process of its own."""

    def __init__(self, package: str) -> None:
        command = [sys.executable, "-m", "benchmarks.inverse.speed", package]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.methods: list[str] = self._answer()["methods"]

    def _answer(self) -> dict[str, Any]:
        """The next line that is an answer; packages may print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"a worker ended with {self._process.wait()}; its error is above")

    def run(self, method: str) -> tuple[float, float]:
        """Processor seconds and denoiser evaluations per draw."""
        assert self._process.stdin is not None
        self._process.stdin.write(method + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["evals"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def show_speed(rounds: int, *, compiled: bool) -> None:
    """Print the table; with `compiled`, also ours with the prior's `compile`."""
    workers = {name: Worker(name) for name in (OURS, *([COMPILED] if compiled else []), *PEERS)}
    print(
        f"processor milliseconds per draw: {DRAWS} draws of 28x28, {STEPS} steps, one thread, median of {rounds} "
        f"rounds; ours over the faster peer, goal {GOAL:g}\n"
    )
    print(
        "| method | " + " | ".join(workers) + " | ours / faster | " + ("compiled / faster | " if compiled else ""),
        end="",
    )
    print("evals per draw |")
    print("|---" * (len(workers) + 3 + compiled) + "|")
    for method in workers[OURS].methods:
        print(
            _line(method, {n: w for n, w in workers.items() if method in w.methods}, list(workers), rounds), flush=True
        )
    for worker in workers.values():
        worker.close()


def _line(method: str, workers: dict[str, Worker], columns: list[str], rounds: int) -> str:
    """One row of the table."""
    evals = {name: worker.run(method)[1] for name, worker in workers.items()}  # and warm
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.run(method)[0])
    faster = [min(found) for found in zip(*(times[name] for name in workers if name in PEERS), strict=True)]
    cells = [f"{1e3 * statistics.median(times[name]):.0f}" if name in workers else "-" for name in columns]
    for name in (n for n in columns if n not in PEERS):
        ratio = statistics.median(mine / peer for mine, peer in zip(times[name], faster, strict=True))
        cells.append(f"{ratio:.2f} ({'met' if ratio <= GOAL else 'NOT met'})")
    return f"| {method} | {' | '.join(cells)} | {' / '.join(f'{e:.0f}' for e in evals.values())} |"

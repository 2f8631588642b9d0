"""Two processes fit what one fits; a killed process loses nothing; who is stopped tells the others.

Processes meet through a file and talk over the loopback interface; a server imports torch once and forks them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_reference import episodes as twelve
from gaussian_reference import hierarchy as gaussian
from torch import Tensor

from models.meta import (
    SGLD,
    Episodes,
    Fisher,
    FittedMeta,
    Gaussian,
    GaussNewton,
    Hierarchy,
    Network,
    NIWMeta,
    NormalInverseGamma,
    NormalInverseWishart,
    Sinusoids,
    mlp,
)
from models.meta.distributed import SharedGenerator, Workers, episode_noise
from ppl.errors import OptionError
from ppl.monitor import Event, Monitor

F64 = torch.float64
STEPS = 8


def source(episodes: int, generator: torch.Generator) -> Episodes:
    return Sinusoids(4, 2, 0.1)(episodes, generator).to(dtype=F64)


def network(full: bool = False, learned: bool = False) -> Hierarchy:
    # A linear one for the full law: natural steps of the other amplify rounding a million times.
    net = Network(mlp([1, 1] if full else [1, 4, 1]).module.double())
    law: Any = NormalInverseWishart if full else NormalInverseGamma
    df = net.dim + 5.0 if full else 5.0
    prior = law.around(net.start, 0.5, df, 0.05)
    return Hierarchy(net, Gaussian(0.3, learned=learned), prior)


# Name -> fit(monitor, generator). Batches of 5 are shared unequally by two.
CASES: dict[str, Callable[[dict[str, Any]], FittedMeta]] = {
    "SGLD": lambda o: NIWMeta(SGLD(4), STEPS, 5).fit(network(), source, **o),
    "Fisher": lambda o: NIWMeta(Fisher(3, probes=2), STEPS, 5, draws=2).fit(network(), source, **o),
    "GaussNewton": lambda o: NIWMeta(GaussNewton(2), STEPS, 5, draws=2).fit(network(), source, **o),
    "natural": lambda o: NIWMeta(steps=STEPS, batch=5, update="natural").fit(gaussian(), twelve(), **o),
    "full": lambda o: NIWMeta(steps=STEPS, batch=5, update="natural").fit(network(True), source, **o),
    "learned sigma": lambda o: NIWMeta(SGLD(4), STEPS, 5).fit(network(learned=True), source, **o),
}


def tensors(fitted: FittedMeta) -> dict[str, Tensor]:
    found = {"mean": fitted.law.mean, "scale": fitted.law.scale, "history": fitted.history}
    return found if fitted.sigma is None else found | {"sigma": fitted.sigma}


def fit(name: str, callback: Callable[[Event], bool | None] | None = None, folder: Path | None = None) -> FittedMeta:
    generator = torch.Generator().manual_seed(7)
    monitor = Monitor(callback=callback, checkpoint=folder, checkpoint_every=0, generator=generator)
    return CASES[name]({"generator": generator, "monitor": monitor})


def _worker(
    rank: int, size: int, names: list[str], folder: Path, run: Path | None, act: str, who: int, after: int
) -> None:
    """One process: fits, and leaves what it found in a file of its own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)

    def callback(event: Event) -> bool:
        if rank == who and event.step == after:
            if act == "stop":
                return True
            os.kill(os.getpid(), getattr(signal, act))
        return False

    fitted = [fit(name, callback if act else None, run) for name in names]
    found: dict[str, Any] = {name: tensors(each) for name, each in zip(names, fitted, strict=True)}
    torch.save(found | {"complete": all(each.complete for each in fitted)}, folder / f"worker-{rank}")
    torch.distributed.destroy_process_group()


def together(
    names: list[str], folder: Path, run: Path | None = None, act: str = "", who: int = 1, after: int = 3, size: int = 2
) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Exit codes of the processes, and what each has found."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models.meta"])
    workers = [
        context.Process(target=_worker, args=(rank, size, names, folder, run, act, who, after)) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
    files = [folder / f"worker-{rank}" for rank in range(size)]
    return [worker.exitcode for worker in workers], [torch.load(file) for file in files if file.exists()]


def same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-8) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-10)


def test_two_workers_fit_what_one_does(tmp_path: Path) -> None:
    """All ways to step and to fit episodes, with their noise; both workers hold the same numbers to the last bit."""
    codes, (one, two) = together(list(CASES), tmp_path / "two")
    assert codes == [0, 0]
    for name in CASES:
        alone = tensors(fit(name))
        same(one[name], alone)
        same(two[name], one[name], rtol=0.0)


def test_killed_worker_does_not_lose_the_run(tmp_path: Path) -> None:
    """Worker 1 is killed after half of the steps; a run of two, and a run of one, go on from the checkpoint of 0."""
    name = "SGLD"
    run = tmp_path / "run"
    codes, found = together([name], tmp_path / "killed", run, "SIGKILL")
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert not found
    assert any(run.iterdir()), "nothing was stored before the kill"
    steps: list[int] = []
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = tensors(fit(name))
    alone = fit(name, lambda event: steps.append(event.step), copy)
    assert steps[0] >= 3, "the run began anew"
    same(tensors(alone), whole)
    codes, found = together([name], tmp_path / "again", run)
    assert codes == [0, 0]
    for worker in found:
        same(worker[name], whole)


@pytest.mark.parametrize(("act", "who"), [("SIGINT", 1), ("stop", 0)])
def test_stopped_worker_stops_all_at_one_step(act: str, who: int, tmp_path: Path) -> None:
    """Nobody waits for a worker that left, and the checkpoint goes on to the whole run's numbers."""
    name, run = "natural", tmp_path / "run"
    codes, (one, two) = together([name], tmp_path / "stopped", run, act, who)
    assert codes == [0, 0]
    assert not one["complete"]
    assert not two["complete"]
    assert 4 <= len(one[name]["history"]) < STEPS
    same(two[name], one[name], rtol=0.0)
    same(tensors(fit(name, folder=run)), tensors(fit(name)))


SCRIPT = """
import os, signal, sys, time, torch
from datetime import timedelta
from pathlib import Path
from models.meta.distributed import join
from test_meta_distributed import fit, tensors

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
if again and rank == 0:
    time.sleep(3)  # so that worker 1 looks for its address before there is one
join(timeout=timedelta(seconds=60))


def strike(event):
    if rank == 1 and event.step == 3 and not again:
        os.kill(os.getpid(), signal.SIGKILL)


found = tensors(fit("SGLD", strike, folder / "run"))
torch.save(found | {"again": again}, folder / f"worker-{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_starts_dead_workers_again(tmp_path: Path) -> None:
    """The command of the module's text, with a worker that is killed half-way of its first life, and one restart."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[3]
    path = f"{root}{os.pathsep}{Path(__file__).parent}"
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    subprocess.run([*command, str(script), str(tmp_path)], check=True, timeout=300, env=variables, cwd=root)
    whole = tensors(fit("SGLD"))
    for rank in range(2):
        found = torch.load(tmp_path / f"worker-{rank}")
        assert found["again"]
        same(found, whole)


def test_parts_cover_a_batch_once() -> None:
    workers = Workers()
    for size in (1, 2, 3, 7):
        parts: list[int] = []
        for rank in range(size):
            workers.rank, workers.size = rank, size
            parts += range(11)[workers.part(11)]
        assert parts == list(range(11))
    with pytest.raises(OptionError, match="batch of 6 episodes cannot be shared between 7 workers"):
        workers.part(6)


def test_noise_of_parts_is_that_of_the_whole() -> None:
    """And both leave the generator in one state."""
    generator = torch.Generator().manual_seed(0)
    parts = [SharedGenerator(generator, first, 5) for first in (0, 2)]
    whole = torch.randn(3, 5, 2, generator=generator)

    def cut(part: SharedGenerator, rows: int) -> Tensor:
        return episode_noise(lambda size: torch.randn(size, generator=part), (3, rows, 2), part, axis=1)

    found = [cut(part, rows) for part, rows in zip(parts, (2, 3), strict=True)]
    assert torch.equal(torch.cat(found, 1), whole)
    assert all(torch.equal(part.get_state(), generator.get_state()) for part in parts)

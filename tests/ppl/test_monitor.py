"""Loops, Ctrl-C by a real signal, NaN, checkpoints that survive a real kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from ppl.checkpoint import Checkpoint
from ppl.cost import Cost
from ppl.errors import CheckpointError, NotFiniteError, OptionError
from ppl.monitor import Event, Monitor

ROOT = Path(__file__).parents[2]


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs the script; it says "ready" when the work has begun."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"the process ended without {word!r}: {process.communicate()}")


# -- loops


def test_steps_and_cost() -> None:
    monitor = Monitor()
    seen = []
    with monitor:
        for step in monitor.steps(5, "sampling", start=2):
            seen.append(step)
            time.sleep(0.01)
            monitor.cost.add(denoiser_calls=1, denoiser_evals=8)
    assert seen == [2, 3, 4]
    assert monitor.cost.denoiser_evals == 24
    assert 0.03 <= monitor.cost.seconds < 5
    assert monitor.cost.peak_memory > 2**20
    assert not monitor.interrupted
    before = monitor.cost.seconds
    time.sleep(0.02)
    assert list(monitor.steps(0, "none")) == []
    assert monitor.cost.seconds - before < 0.01, "the clock stands still between runs"


def test_callback_sees_copies_and_stops_all_loops() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.append(event)
        return len(events) == 5

    monitor = Monitor(callback=callback)
    trail = []
    for chain in monitor.steps(3, "chains"):
        with monitor.section(f"chain {chain}"):
            for step in monitor.steps(3, "draws"):
                monitor.cost.add(vjps=1)
                monitor.report(elbo=torch.tensor(float(step), requires_grad=True))
                trail.append((chain, step))
    assert trail == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert (monitor.interrupted, monitor.stop_reason) == (True, "stopped by callback")
    assert [(e.label, e.step, e.total, e.cost.vjps) for e in events] == [
        ("chain 0/draws", 0, 3, 1),
        ("chain 0/draws", 1, 3, 2),
        ("chain 0/draws", 2, 3, 3),
        ("chains", 0, 3, 3),
        ("chain 1/draws", 0, 3, 4),
        ("chains", 1, 3, 4),
    ]
    assert not events[0].info["elbo"].requires_grad
    assert list(monitor.steps(3, "later")) == [], "nothing runs after an interruption"


def test_a_truthy_return_value_does_not_stop() -> None:
    monitor = Monitor(callback=lambda event: "went well")  # type: ignore[arg-type, return-value]
    assert len(list(monitor.steps(3, "s"))) == 3


def test_handler_is_restored() -> None:
    """After an end, a break, an error, nesting, and from another thread."""

    def own(number: int, frame: object) -> None:
        raise AssertionError("not called")

    def fail(monitor: Monitor) -> None:
        for _ in monitor.steps(3, "failing"):
            1 / 0  # noqa: B018

    before = signal.signal(signal.SIGINT, own)
    try:
        monitor = Monitor()
        for step in monitor.steps(3, "outer"):
            assert signal.getsignal(signal.SIGINT) == monitor._on_sigint
            for _ in monitor.steps(2, "inner"):
                pass
            assert signal.getsignal(signal.SIGINT) == monitor._on_sigint, "an inner loop must not give the signal back"
            if step == 1:
                break
        assert signal.getsignal(signal.SIGINT) is own
        with pytest.raises(ZeroDivisionError):
            fail(monitor)
        assert signal.getsignal(signal.SIGINT) is own
        with monitor, monitor:
            assert signal.getsignal(signal.SIGINT) == monitor._on_sigint
        assert signal.getsignal(signal.SIGINT) is own
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.extend(Monitor().steps(3, "thread")))
        thread.start()
        thread.join()
        assert seen == [0, 1, 2]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Monitor():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, (
                "a process told to ignore Ctrl-C keeps ignoring it"
            )
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_bar_without_a_terminal_and_no_rich_without_a_bar() -> None:
    script = """
        import sys
        from ppl.monitor import Monitor
        assert list(Monitor(progress=True).steps(3, "s")) == [0, 1, 2]
        heavy = {"rich", "arviz", "xarray", "pandas", "scipy", "safetensors", "h5netcdf"} & set(sys.modules)
        import ppl.posterior
        heavy |= {"rich", "arviz", "xarray", "pandas", "h5netcdf"} & set(sys.modules)
        print("heavy", heavy)
    """
    out, err = start(script).communicate(timeout=60)
    assert out.strip() == "heavy set()", err
    assert err == ""


def test_bar_shows_cost_and_reports(capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(progress="force")
    for _ in monitor.steps(2, "chains [0]"):
        for _ in monitor.steps(3, "draws"):
            monitor.cost.add(denoiser_calls=1000, denoiser_evals=64000)
            monitor.report(ess=torch.tensor(12.345))
    out = capfd.readouterr().err
    assert "chains [0]" in out
    assert "2/2" in out
    assert "6,000" in out
    assert "12.35" in out or "12.34" in out


def test_the_loop_is_cheap() -> None:
    """Below 50 us for a step without bar and callback: an engine may call it a million times."""
    monitor = Monitor()
    begin = time.perf_counter()
    for _ in monitor.steps(20_000, "fast"):
        monitor.checkpoint(0, {})
    assert time.perf_counter() - begin < 1.0


# -- NaN


def test_check_finite() -> None:
    monitor = Monitor()
    monitor.check_finite("x", torch.zeros(3), 1)
    monitor.check_finite("k", torch.tensor([1, 2]), 1)
    bad = torch.tensor([0.0, float("nan"), float("inf"), float("-inf")])
    with (
        monitor.section("chain 2"),
        pytest.raises(NotFiniteError, match=r"'x'.*step 7 \(chain 2\).*3 of 4.*1 NaN, 2 inf"),
    ):
        monitor.check_finite("x", bad, 7)
    with pytest.raises(NotFiniteError, match="at level 3 of 9"):
        monitor.check_finite("x", bad + 1j, "level 3 of 9")


# -- Ctrl-C by a real signal

LOOP = """
    import signal, sys, time, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a background job may have it ignored
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior
    monitor, draws, tail = Monitor(), [], 0
    try:
        with monitor:
            for chain in monitor.steps(4, "chains"):
                for step in monitor.steps(1000, "draws"):
                    if step == 3: print("ready", flush=True)
                    end = time.monotonic() + float(sys.argv[1])
                    while time.monotonic() < end: time.sleep(0.01)
                    draws.append(float(step))
                tail += 1
    except KeyboardInterrupt:
        print("at once", len(draws), flush=True)
        raise SystemExit(3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    posterior = Posterior({"x": torch.tensor(draws)[None]}, attrs={"complete": not monitor.interrupted})
    print(posterior, draws == [float(i) for i in range(len(draws))], tail, monitor.stop_reason, flush=True)
"""


def test_first_ctrl_c_returns_what_there_is() -> None:
    process = start(LOOP, 0.05)
    wait_for(process, "ready")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "INCOMPLETE" in out
    assert "True 1 interrupted by Ctrl-C" in out, "the step is finished, the other chains do not begin"


def test_second_ctrl_c_stops_at_once() -> None:
    process = start(LOOP.replace("if step == 3:", "if step == 0:"), 20.0)
    wait_for(process, "ready")
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (3, "at once 0")
    assert time.monotonic() - begin < 15


# -- checkpoints


def walk(monitor: Monitor, total: int, stop: int | None = None) -> list[float]:
    """A small engine: a random walk that can go on where it was."""
    assert monitor.generator is not None
    saved = monitor.resume()
    first, state, draws = 0, torch.zeros(()), torch.zeros(0)
    if saved is not None:
        first, state, draws = int(saved["step"]), saved["state"], saved["draws"]
    with monitor:
        for step in monitor.steps(total, "walk", start=first):
            if step == stop:
                return draws.tolist()
            state = state + torch.randn((), generator=monitor.generator)
            draws = torch.cat([draws, state[None]])
            monitor.cost.add(density_evals=1)
            monitor.checkpoint(step + 1, {"state": state, "draws": draws})
    return draws.tolist()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resume_gives_the_same_draws_and_cost(tmp_path: Path) -> None:
    whole = Monitor(generator=seeded())
    expected = walk(whole, 30)
    folder = tmp_path / "run.checkpoint"
    for stop in (7, 7, 20):  # stopped twice at the same place, as a kill may do
        walk(Monitor(checkpoint=folder, checkpoint_every=0, generator=seeded()), 30, stop)
    last = Monitor(checkpoint=folder, checkpoint_every=0, generator=seeded())
    assert walk(last, 30) == expected
    assert last.cost.density_evals == 30
    assert torch.equal(last.generator.get_state(), whole.generator.get_state())  # type: ignore[union-attr]
    last.done()
    assert not folder.exists()


def test_not_due_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run.checkpoint"
    monitor = Monitor(checkpoint=folder, checkpoint_every=1000, generator=seeded())

    def gather() -> dict[str, torch.Tensor]:
        raise AssertionError("the state is gathered only when it is stored")

    monitor.checkpoint(1, gather)
    assert not folder.exists()
    monitor.stop("test")
    monitor.checkpoint(1, {"a": torch.ones(1)})
    assert folder.exists(), "an interruption stores the state whatever the clock says"
    monitor.finish("chain 0", {"a": torch.ones(1)})
    assert monitor.finished("chain 0") is None, "an interrupted chain is not a finished one"
    monitor.done()
    assert folder.exists(), "an interrupted run keeps its checkpoint"


def test_finished_chains_and_sections(tmp_path: Path) -> None:
    folder = tmp_path / "run.checkpoint"

    def run(monitor: Monitor, stop: tuple[int, int] | None) -> list[list[float]]:
        chains = []
        for chain in range(3):
            kept = monitor.finished(f"chain {chain}")
            if kept is None:
                with monitor.section(f"chain {chain}"):
                    draws = walk(monitor, 10, stop[1] if stop is not None and stop[0] == chain else None)
                if stop is not None and stop[0] == chain:
                    return chains
                kept = {"draws": torch.tensor(draws)}
                monitor.finish(f"chain {chain}", kept)
            chains.append(kept["draws"].tolist())
        return chains

    expected = run(Monitor(generator=seeded()), None)
    assert len({tuple(chain) for chain in expected}) == 3
    run(Monitor(checkpoint=folder, checkpoint_every=0, generator=seeded()), (1, 4))
    names = sorted(file.name.split("-")[0] for file in folder.iterdir())
    assert names == ["finished", "run.json", "state"], "the state of a finished chain is gone"
    last = Monitor(checkpoint=folder, checkpoint_every=0, generator=seeded())
    assert run(last, None) == expected
    assert last.cost.density_evals == 30
    assert run(last, None) == expected, "asking again in the same run must not turn the generator back"
    assert last.cost.density_evals == 30


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.int64, torch.uint8],
    ids=str,
)
def test_state_of_every_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    one = torch.arange(6).reshape(2, 3).to(dtype)
    state = {"m": one, "transposed": one.T, "row": one[1], "scalar": one[0, 1], "empty": one[:, :0], "generator": one}
    Monitor(checkpoint=tmp_path / "c", checkpoint_every=0, generator=seeded()).checkpoint(3, state)
    saved = Monitor(checkpoint=tmp_path / "c", generator=seeded(9)).resume()
    assert saved is not None
    assert saved.pop("step").item() == 3
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert saved[name].dtype == dtype
        assert torch.equal(saved[name], value), name


def test_step_is_a_reserved_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="step"):
        Monitor(checkpoint=tmp_path / "c", checkpoint_every=0).checkpoint(1, {"step": torch.ones(1)})
    with pytest.raises(OptionError, match="checkpoint_every"):
        Monitor(checkpoint_every=float("nan"))


def test_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    mine = {"program": "aa", "data": "bb", "seed": "0"}
    Monitor(checkpoint=folder, checkpoint_every=0, fingerprint=mine).checkpoint(1, {})
    assert Monitor(checkpoint=folder, fingerprint=mine).resume() is not None
    with pytest.raises(CheckpointError, match=r"another run \(data: stored 'bb', now 'cc'\).*delete") as caught:
        Monitor(checkpoint=folder, fingerprint={**mine, "data": "cc"})
    assert "program" not in str(caught.value)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Monitor(checkpoint=tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="is a file"):
        Monitor(checkpoint=tmp_path / "foreign" / "thesis.txt")
    header = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Monitor(checkpoint=folder, fingerprint=mine)
    (folder / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Monitor(checkpoint=folder, fingerprint=mine)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """A sample of positions over the whole file: header, tensors, generator state."""
    folder = tmp_path / "c"
    Monitor(checkpoint=folder, checkpoint_every=0, generator=seeded()).checkpoint(1, {"x": torch.randn(50)})
    (file,) = folder.glob("state-*")
    whole = file.read_bytes()
    for where in range(0, len(whole), 97):
        file.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
        with pytest.raises(CheckpointError):
            Monitor(checkpoint=folder, generator=seeded()).resume()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        Monitor(checkpoint=folder, generator=seeded()).resume()


def test_clear_leaves_files_of_others(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c", "one")
    checkpoint.write("state", "a/b [c]", {}, {})
    (tmp_path / "c" / "notes.txt").write_text("mine")
    checkpoint.clear()
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["notes.txt"]


def test_part_names_do_not_meet(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c")
    parts = ["chain 1", "chain_1", "chain 11", "chain 1/warm", "chain 1+warm", "", "é", "e"]
    for number, part in enumerate(parts):
        checkpoint.write("state", part, {"n": torch.tensor(number)}, {})
    for number, part in enumerate(parts):
        found = checkpoint.read("state", part)
        assert found is not None
        assert found[0]["n"].item() == number
    checkpoint.remove("state", "chain 1")
    gone = [part for part in parts if checkpoint.read("state", part) is None]
    assert gone == ["chain 1", "chain 1/warm"]


KILLED = """
    import sys, torch
    from ppl.monitor import Monitor
    monitor = Monitor(checkpoint=sys.argv[1], checkpoint_every=0, fingerprint="kill")
    big = torch.zeros(2_000_000)
    for step in monitor.steps(100_000, "writing"):
        monitor.checkpoint(step, {"big": big.fill_(step)})
        if step == 2: print("ready", flush=True)
"""


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Killed at several moments; a write of 8 MB takes most of each step, so most kills hit one."""
    folder = tmp_path / "c"
    last = -1
    for delay in (0.0, 0.011, 0.023):
        process = start(KILLED, folder)
        wait_for(process, "ready")
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        saved = Monitor(checkpoint=folder, fingerprint="kill").resume()
        assert saved is not None
        assert saved["step"].item() >= 2
        assert (saved["big"] == saved["step"]).all()
        last = max(last, int(saved["step"]))
    assert last >= 2


def test_a_write_that_stops_half_way_leaves_the_previous_one(tmp_path: Path) -> None:
    """The process kills itself after half of the bytes: certain, where the test above is likely."""
    folder = tmp_path / "c"
    script = """
        import os, pathlib, signal, sys, torch
        from ppl.monitor import Monitor
        monitor = Monitor(checkpoint=sys.argv[1], checkpoint_every=0)
        monitor.checkpoint(1, {"x": torch.ones(1000)})
        def half(self, data):
            with open(self, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        pathlib.Path.write_bytes = half
        monitor.checkpoint(2, {"x": torch.zeros(1000)})
    """
    process = start(script, folder)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert any(file.name.endswith(".part") for file in folder.iterdir())
    saved = Monitor(checkpoint=folder).resume()
    assert saved is not None
    assert (saved["step"].item(), saved["x"].sum().item()) == (1, 1000.0)
    Monitor(checkpoint=folder).done()
    assert not folder.exists(), "the half-written file goes too"


def test_notes_survive(tmp_path: Path) -> None:
    monitor = Monitor(checkpoint=tmp_path / "c", checkpoint_every=0)
    monitor.note("once")
    monitor.note("once")
    monitor.checkpoint(1, {})
    later = Monitor(checkpoint=tmp_path / "c")
    later.resume()
    assert later.notes == ["once"]


# -- cost


def test_cost() -> None:
    one, two = Cost(denoiser_calls=1, seconds=0.5, peak_memory=5), Cost(denoiser_calls=2, seconds=0.25, peak_memory=3)
    both = one + two
    assert both == Cost(denoiser_calls=3, seconds=0.75, peak_memory=5)
    assert one.denoiser_calls == 1
    assert one.merge(two) is one
    assert Cost.from_dict(json.loads(json.dumps(both.to_dict()))) == both == one
    with pytest.raises(OptionError, match="wishes"):
        one.add(wishes=3)

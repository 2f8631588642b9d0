"""Every example runs in smoke mode, is short, and leaves its figure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def test_there_are_examples():
    assert {p.stem for p in EXAMPLES} >= {"amortised", "inpainting", "unknown_noise", "eight_schools", "latent_prior"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_is_short(example):
    text = example.read_text()
    assert len(text.splitlines()) < 80
    assert "argparse" not in text


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_leaves_its_figure(example, tmp_path):
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, str(example), "--smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figure = tmp_path / f"{example.stem}.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert figure.stat().st_size > 10_000
    assert "Warning" not in run.stderr

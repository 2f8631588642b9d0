"""Shared test settings: one thread, the reference data when it is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """No test leaves parameters, a default dtype or a moved global generator behind."""
    pyro.clear_param_store()
    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)  # one fault must not make the rest of the run red
    assert after == before, f"the test left the default dtype at {after}; set it back to {before}"


@pytest.fixture(scope="session")
def posteriordb() -> Path:
    """The folder of reference posteriors; skips where it is not there."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "posteriordb"
    if not folder.is_dir():
        pytest.skip("reference posteriors are not on this machine")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip cleanly where there is no GPU."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)

"""Checkpoints of a training run: one safetensors file, facts as JSON in its header, replaced atomically."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ppl.errors import CheckpointError

__all__ = ["interrupts_deferred", "read_checkpoint", "write_checkpoint"]


def write_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts so that a kill at any time leaves either the old file or the new one.

    Args:
        path: the file to replace; its folder is made.
        tensors: by name.
        facts: JSON values.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    # safetensors refuses memory that is shared or not contiguous.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"facts": json.dumps(facts, sort_keys=True)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Args:
        path: a file made by `write_checkpoint`.

    Returns:
        Tensors by name, and the facts.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is not a whole training checkpoint ({error!r}); remove it to start from the beginning"
        ) from error


class _Stop:
    """Whether Ctrl-C came."""

    requested = False


@contextmanager
def interrupts_deferred() -> Iterator[_Stop]:
    """Turn the first Ctrl-C into a flag, so that a step is never cut in two; a second one interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)

"""Split a batch for calls that need memory; the noise is drawn before, so that chunks change nothing but memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppl.errors import OptionError, PilotlightError

__all__ = ["Chunks", "MemoryLimitError", "Whole", "out_of_memory"]


class MemoryLimitError(PilotlightError, MemoryError):
    """Not even one row fits in memory."""


class Chunks:
    """Calls a function on parts of a batch, and on smaller parts when one does not fit in memory.

    Args:
        size: rows of one call; None takes the whole batch.

    Example:
        >>> Chunks(2)(lambda x: 2 * x, torch.arange(5))
        tensor([0, 2, 4, 6, 8])
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise OptionError(f"chunk must be one or more rows, got {size}")
        self.size = size

    def __call__(self, fn: Callable[..., Any], *batch: Any) -> Any:
        """fn(*batch), where every tensor of `batch` and of the result has the rows in front.

        Raises:
            MemoryLimitError: one row alone does not fit.
        """
        leaves, spec = pytree.tree_flatten(batch)
        rows = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).shape[0]
        joined: _Joined | None = None
        start = 0
        while True:
            stop = min(start + (self.size or max(rows, 1)), rows)
            piece = [leaf[start:stop] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                part = fn(*pytree.tree_unflatten(piece, spec))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._shrink(stop - start, error)
                continue
            if stop - start == rows:
                return part
            joined = _Joined(part, rows) if joined is None else joined
            joined.put(part, start, stop)
            start = stop
            if start == rows:
                return joined.whole()

    def _shrink(self, tried: int, error: BaseException) -> None:
        if tried <= 1:
            raise MemoryLimitError(
                f"one row of the batch does not fit in memory ({error}); use a smaller network or image, or a device "
                "with more memory"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = math.ceil(tried / 2)


class Whole(Chunks):
    """Calls a function on a batch that must not be split; where it does not fit in memory, the caller halves it."""

    def __call__(self, fn: Callable[..., Any], *batch: Any) -> Any:
        """fn(*batch)."""
        return fn(*batch)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )


class _Joined:
    """The results of all parts, filled as they come: a list of parts and its concatenation would need twice the room.

    Args:
        part: result of the first part, which says what there is.
        rows: of the whole.
    """

    def __init__(self, part: Any, rows: int) -> None:
        leaves, self._spec = pytree.tree_flatten(part)
        self._leaves = [
            leaf.new_empty((rows, *leaf.shape[1:])) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]

    def put(self, part: Any, start: int, stop: int) -> None:
        """The result of rows `start` to `stop`."""
        for mine, leaf in zip(self._leaves, pytree.tree_leaves(part), strict=True):
            if isinstance(leaf, Tensor):
                mine[start:stop] = leaf

    def whole(self) -> Any:
        """The result of all rows."""
        return pytree.tree_unflatten(self._leaves, self._spec)

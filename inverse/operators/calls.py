"""Which operators a model calls, and with what: how a likelihood finds the operator of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from inverse.operators.base import LinearOperator

__all__ = ["CallRecord", "noted", "record_calls"]


class CallRecord(NamedTuple):
    """One call of an operator: operator, input (*batch, *in_shape), output (*batch, *out_shape)."""

    operator: LinearOperator
    input: Tensor
    output: Tensor


_RECORDS: ContextVar[list[CallRecord] | None] = ContextVar("operator_calls", default=None)


@contextmanager
def record_calls() -> Iterator[list[CallRecord]]:
    """Collect every outermost operator call made inside the block, in order.

    The parts of a composed operator are not listed: `(A @ B)(x)` is one record, of `A @ B`.

    Returns:
        A list that fills with CallRecord(operator, input, output).

    Example:
        >>> import torch
        >>> from inverse.operators import Identity
        >>> A = Identity((3,))
        >>> with record_calls() as calls:
        ...     _ = A(torch.ones(3))
        >>> calls[0].operator is A
        True
    """
    calls: list[CallRecord] = []
    token = _RECORDS.set(calls)
    try:
        yield calls
    finally:
        _RECORDS.reset(token)


def noted(operator: LinearOperator, call: Callable[[], Tensor], x: Tensor) -> Tensor:
    """What a call on x returns, listed where calls are recorded; calls inside it are not."""
    calls = _RECORDS.get()
    if calls is None:
        return call()
    token = _RECORDS.set(None)  # the parts of a composition are not calls of the model
    try:
        y = call()
    finally:
        _RECORDS.reset(token)
    calls.append(CallRecord(operator, x, y))
    return y

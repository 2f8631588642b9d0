"""First-order linear recurrences, block by block instead of step by step.

    v_t = a_t v_{t-1} + b_t   =>   v_{s+j} = (a_{s+j} ... a_{s+1}) v_s + local_{s+j},   local as if v_s were zero

All blocks advance at once, the states between blocks are a shorter recurrence of the same form. T steps take about
3 T^(1/3) operations in a row, on O(T) numbers, and products of the coefficients are the only new intermediate values.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_recurrence"]

SHORT = 8  # steps run one by one


def linear_recurrence(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """States v_1 .. v_T of v_t = a_t v_{t-1} + b_t.

    Args:
        a: coefficients (T, *shape).
        b: shifts (T, *shape).
        first: v_0 (*shape).

    Returns:
        (T, *shape).

    Source: blocked form of a parallel prefix sum [derived].

    Example:
        >>> ones = torch.ones(20)
        >>> linear_recurrence(0.5 * ones, ones, torch.tensor(2.0))[[0, 19]]
        tensor([2., 2.])
    """
    steps = len(b)
    if steps <= SHORT:
        states, state = [], first
        for gain_t, shift_t in zip(a.unbind(), b.unbind(), strict=True):
            state = gain_t * state + shift_t
            states.append(state)
        return torch.stack(states)
    size = max(2, round(steps ** (1 / 3)))
    missing = -steps % size
    if missing:
        tail = b.new_zeros(missing, *b.shape[1:])
        a, b = torch.cat([a, tail]), torch.cat([b, tail])
    rows_a, rows_b = (x.reshape(-1, size, *x.shape[1:]).unbind(1) for x in (a, b))
    gain, local = [rows_a[0]], [rows_b[0]]
    for a_j, b_j in zip(rows_a[1:], rows_b[1:], strict=True):
        gain.append(a_j * gain[-1])
        local.append(a_j * local[-1] + b_j)
    ends = linear_recurrence(gain[-1], local[-1], first)
    starts = torch.cat([first[None], ends[:-1]])
    every = torch.stack(local, 1) + torch.stack(gain, 1) * starts[:, None]
    return every.flatten(0, 1)[:steps]

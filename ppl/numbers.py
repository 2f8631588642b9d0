"""What users hold numbers in, read as tensors: numpy arrays, lists and plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_tensor", "is_array"]


def is_array(value: Any) -> bool:
    """Whether this is a numpy array that torch can hold."""
    import numpy

    return isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc"


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as it is; arrays with the type they have; numbers and lists of numbers or tensors as a tensor.

    Args:
        value: what was given.
        dtype: floating type of plain numbers; torch's default when None.

    Raises:
        TypeError, ValueError: the value does not hold numbers, or rows of unequal length.

    Example:
        >>> as_tensor([1, 2.5]), as_tensor([torch.zeros(2), torch.ones(2)]).shape
        (tensor([1.0000, 2.5000]), torch.Size([2, 2]))
    """
    if isinstance(value, Tensor):
        return value
    if is_array(value):
        return torch.tensor(value)  # a copy: arrays may be read-only, or change later
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) or is_array(v) for v in value):
        return torch.stack([as_tensor(v) for v in value])
    plain = torch.tensor(value)
    return plain.to(dtype) if dtype is not None and plain.is_floating_point() else plain

"""What options of many backends have in common: whole numbers of at least so many, and positive numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from ppl.errors import OptionError

__all__ = ["check_integers", "check_place", "check_positive", "whole_number"]


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An argument that counts something, as an integer; those of numpy are integers too.

    Raises:
        OptionError: it is no integer, or a truth value, or outside its range.

    Example:
        >>> whole_number("draws", 10.0, 1)
        Traceback (most recent call last):
        ppl.errors.OptionError: draws must be an integer of at least 1, got 10.0
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool) or (most is not None and number > most):
        top = "" if most is None else f" and at most {most}"
        raise OptionError(f"{name} must be an integer of at least {least}{top}, got {value!r}")
    return number


def check_integers(options: object, **least: int) -> None:
    """Raise unless each named option is an integer, and no truth value, of at least so many.

    Args:
        options: what holds them.
        **least: the smallest value of each.

    Raises:
        OptionError: one is not.

    Example:
        >>> from types import SimpleNamespace
        >>> check_integers(SimpleNamespace(steps=3), steps=1)
        >>> check_integers(SimpleNamespace(steps=True), steps=1)
        Traceback (most recent call last):
        ppl.errors.OptionError: steps must be an integer of at least 1, got True
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise OptionError(f"{name} must be an integer of at least {smallest}, got {value!r}")


def check_positive(options: object, *names: str) -> None:
    """Raise unless the named options are positive and finite.

    Raises:
        OptionError: one is not.

    Example:
        >>> from types import SimpleNamespace
        >>> check_positive(SimpleNamespace(lr=0.1), "lr")
        >>> check_positive(SimpleNamespace(lr=0.0), "lr")
        Traceback (most recent call last):
        ppl.errors.OptionError: lr must be positive and finite, got 0.0
    """
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"{name} must be positive and finite, got {value!r}")


def check_place(device: Any = None, dtype: Any = None) -> None:
    """Raise unless this machine has the device, and dtype is a floating type; torch's own errors come late.

    Raises:
        OptionError: one is not so.

    Example:
        >>> check_place("cpu", torch.float64)
        >>> check_place("gpu")
        Traceback (most recent call last):
        ppl.errors.OptionError: there is no device 'gpu' here; give "cpu", or "cuda" on a machine that has it
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype must be a floating type, such as torch.float64, got {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        cure = "; write dtype=" if isinstance(device, torch.dtype) else ""
        raise OptionError(
            f'there is no device {device!r} here; give "cpu", or "cuda" on a machine that has it{cure}'
        ) from None

"""What options of many backends have in common: whole numbers of at least so many, and positive numbers."""

from __future__ import annotations

import math

from ppl.errors import OptionError

__all__ = ["check_integers", "check_positive"]


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

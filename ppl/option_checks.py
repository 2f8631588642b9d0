"""What options of many backends have in common: whole numbers of at least so many."""

from __future__ import annotations

from ppl.errors import OptionError

__all__ = ["check_integers"]


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

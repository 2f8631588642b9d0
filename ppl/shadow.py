"""Whether `sde`, `inverse` and `models`, which are common words, mean our packages on this machine."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

__all__ = ["PACKAGES", "ShadowWarning", "home", "message", "shadowed", "warn_if_shadowed"]

PACKAGES = ("ppl", "sde", "inverse", "models")


def home() -> Path:
    """The folder that holds our packages side by side."""
    return Path(__file__).resolve().parents[1]


def _place(name: str) -> Path | None:
    """Where an import of a package would lead, without importing it."""
    if name in sys.modules:
        spec = getattr(sys.modules[name], "__spec__", None)
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
    if spec is None:
        return None
    if spec.origin is not None and spec.has_location:
        path = Path(spec.origin)
        return path.parent if path.name == "__init__.py" else path
    return next(iter(map(Path, spec.submodule_search_locations or ())), None)


def shadowed(beside: Path | None = None) -> dict[str, Path | None]:
    """Packages that an import would find elsewhere than beside `ppl`: name -> where, None for nowhere.

    Args:
        beside: the folder they should be in; that of this package when None.

    Example:
        >>> shadowed()
        {}
    """
    folder = (beside or home()).resolve()
    found = {name: _place(name) for name in PACKAGES}
    return {name: path for name, path in found.items() if path is None or path.resolve() != folder / name}


def message(wrong: Mapping[str, Path | None], beside: Path | None = None) -> str:
    """One sentence about what was expected, what came and what to do."""
    where = ", ".join(f"`import {n}` would load {p if p is not None else 'nothing'}" for n, p in wrong.items())
    return (
        f"another package has the name of one of ours: {where}; expected {beside or home()}. Rename or move the other "
        "one, start Python in another directory, or use a fresh virtual environment"
    )


def warn_if_shadowed() -> None:
    """Warn where a name leads to somebody else's package."""
    wrong = {name: path for name, path in shadowed().items() if path is not None}
    if wrong:
        warnings.warn(message(wrong), ShadowWarning, stacklevel=3)


class ShadowWarning(UserWarning):
    """One of our package names leads to somebody else's package."""

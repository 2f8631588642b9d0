"""Variational inference with a diffusion prior."""

from __future__ import annotations

from inverse.variational.red_diff import REDDiff

__all__ = ["REDDiff"]

"""Inference that uses the structure of a path: guides that steer the driving noise."""

from __future__ import annotations

__all__ = ["ControlGuide"]

from inverse.paths.control_guide import ControlGuide

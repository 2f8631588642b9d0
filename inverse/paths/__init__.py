"""Inference that uses the structure of a path: guides that steer the driving noise."""

from __future__ import annotations

__all__ = ["ControlGuide", "LinearControl", "linear_control", "linear_control_of"]

from inverse.paths.control_guide import ControlGuide
from inverse.paths.linear_control import LinearControl, linear_control, linear_control_of

"""One small tree of errors; each is also the built-in error a caller would expect to catch.

A message says what was expected, what came, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CapabilityError",
    "CheckpointError",
    "ContractError",
    "DataError",
    "NotFiniteError",
    "OptionError",
    "PilotlightError",
    "ProgramError",
    "ShapeError",
    "TraceError",
    "WeightsError",
]


class PilotlightError(Exception):
    """Base of all errors raised on purpose."""


class OptionError(PilotlightError, ValueError):
    """An option of a backend, guide or command has a value it cannot have."""


class ProgramError(PilotlightError, ValueError):
    """A model cannot be used as a program: no latent site, no observed site, a site that an engine cannot hold."""


class DataError(PilotlightError, ValueError):
    """Data are not finite, of the wrong type or on the wrong device."""


class ShapeError(PilotlightError, ValueError):
    """A tensor does not have the promised shape."""


class TraceError(PilotlightError, RuntimeError):
    """A model cannot be turned into a graph, or its graph disagrees with the model."""


class CapabilityError(PilotlightError, ValueError):
    """A backend needs something that the program's sites do not offer."""


class NotFiniteError(PilotlightError, RuntimeError):
    """A NaN or an infinity appeared while an engine ran."""


class CheckpointError(PilotlightError, RuntimeError):
    """A checkpoint or a saved result is damaged or belongs to another run."""


class ContractError(PilotlightError, ValueError):
    """An estimate of a density stands where one of its reciprocal is needed, or the other way round."""


class WeightsError(PilotlightError, ValueError):
    """A weight file is damaged, or made for another network."""

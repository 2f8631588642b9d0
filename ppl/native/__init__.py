"""Densities in C: the graph of one draw written out, compiled by the machine's compiler, called without Python."""

from ppl.native.density import NativeDensity, NativeState, native_density, nutpie_model, nutpie_takes
from ppl.native.values import Unsupported

__all__ = ["NativeDensity", "NativeState", "Unsupported", "native_density", "nutpie_model", "nutpie_takes"]

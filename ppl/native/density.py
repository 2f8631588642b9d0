"""A density at one point as a C function: no Python, no tensors and no allocation between two gradients.

The state of a run (counters, memory for intermediate results, addresses of the data) is one block for each user, so
that several threads can call the same function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ppl.native.emit import emit
from ppl.native.library import load
from ppl.native.values import Unsupported

__all__ = ["NativeDensity", "NativeState", "native_density", "nutpie_model", "nutpie_takes"]

ALIGN = 64  # bytes; vector instructions like it


class NativeDensity:
    """The log density and its gradient at one unconstrained point, compiled from a captured graph.

    Args:
        graph: `(z, *inputs) -> (value (1,), gradient (1, dim))`, whose nodes know their shapes.
        inputs: all inputs; those behind `z` are read once, here.

    Raises:
        Unsupported: the graph holds an operation that is not written in C.
        OSError: there is no C compiler, or it fails.

    Example:
        >>> from ppl.capture import capture
        >>> z, a = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> graph = capture(lambda z, a: [(a * z * z).sum(1), 2 * a * z], z, a)
        >>> density = NativeDensity(graph, [z, a])
        >>> value, gradient = density.state()(z[0].numpy())
        >>> value, gradient.tolist()
        (19.0, [6.0, 16.0])
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.dim = int(inputs[0].shape[1])
        self._source, constants = emit(graph, inputs)
        library = load(self._source.text)
        self.log_density, self.expand = library.log_density, library.expand
        self.log_density.restype = self.expand.restype = ctypes.c_int64
        self.log_density.argtypes = [ctypes.c_uint64, *[ctypes.c_void_p] * 4]
        self.expand.argtypes = [ctypes.c_uint64, ctypes.c_uint64, *[ctypes.c_void_p] * 3]
        self._constants = constants
        self._read(inputs)

    def _read(self, inputs: Sequence[Tensor]) -> None:
        self._data: list[Tensor] = []
        for tensor, strides in zip([*inputs[1:], *self._constants], self._source.strides, strict=True):
            own = torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype)
            self._data.append(own.copy_(tensor.detach()))

    def with_inputs(self, inputs: Sequence[Tensor]) -> NativeDensity:
        """The same function of other data, of the same shapes and types."""
        other = copy(self)
        other._read(inputs)
        return other

    def state(self) -> NativeState:
        """Memory and counters for one user of the function, such as one chain."""
        return NativeState(self, self._source.work, [t.data_ptr() for t in self._data])


class NativeState:
    """One user's block of memory; calling it evaluates the density in that memory."""

    def __init__(self, density: NativeDensity, work: int, data: list[int]) -> None:
        self.density = density
        self._work = np.zeros(work + ALIGN, dtype=np.uint8)
        start = -(-self._work.ctypes.data // ALIGN) * ALIGN
        self._block = np.array([0, 0, start, *data], dtype=np.int64)
        self.address = int(self._block.ctypes.data)

    @property
    def gradients(self) -> int:
        """Evaluations so far."""
        return int(self._block[0])

    @property
    def stored(self) -> int:
        """Draws handed out so far."""
        return int(self._block[1])

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and gradient at a float64 point (dim,).

        Raises:
            ArithmeticError: one of them is not finite there.
            IndexError: an index among the data is out of range.
        """
        point = np.ascontiguousarray(x, dtype=np.float64)
        gradient, value = np.empty(self.density.dim), np.empty(1)
        code = self.density.log_density(
            len(point), point.ctypes.data, gradient.ctypes.data, value.ctypes.data, self.address
        )
        if code < 0:
            raise IndexError("an index among the data is out of range")
        if code:
            raise ArithmeticError("the density or its gradient is not finite here")
        return float(value[0]), gradient


def native_density(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[NativeDensity | None, str]:
    """The density of a graph in C, or None and why not; it is compared with the graph before its first use."""
    if "native" in graph.meta:
        density, reason = graph.meta["native"]
        return (None, reason) if density is None else (density.with_inputs(inputs), reason)
    density, reason = None, ""
    try:
        density = NativeDensity(graph, inputs)
        if not all(_agrees(density, graph, [inputs[0] * scale, *inputs[1:]]) for scale in (1.0, 0.5)):
            density, reason = None, "the density in C disagreed with its graph and is not used"
    except (Unsupported, OSError) as error:
        reason = f"the density was not compiled in C: {error}"
    graph.meta["native"] = density, reason
    return density, reason


def _agrees(density: NativeDensity, graph: fx.GraphModule, inputs: list[Tensor]) -> bool:
    with torch.no_grad():
        value, gradient = (t.double().reshape(-1) for t in graph(*inputs))
    tolerance = 1e-9 if inputs[0].dtype == torch.float64 else 1e-3
    try:
        ours, slope = density.state()(inputs[0][0].double().numpy())
    except ArithmeticError:
        return not bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())
    close = abs(ours - float(value)) <= tolerance * (1 + abs(float(value)))
    # An element that is a difference of large ones has their rounding.
    return close and bool((torch.from_numpy(slope) - gradient).abs().max() <= tolerance * (1 + gradient.abs().max()))


def nutpie_model(state: NativeState, start: np.ndarray) -> Any:
    """What `nutpie.sample` wants of a model, made of C functions; chains begin at `start` (dim,)."""
    from nutpie import _lib
    from nutpie.sample import CompiledModel

    density = state.density

    class Model(CompiledModel):
        @property
        def n_dim(self) -> int:
            return density.dim

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"z": (density.dim,)}

        @property
        def coords(self) -> dict[str, Any]:
            return {}

        def _make_model(self, init_mean: Any) -> Any:
            log_density, expand = (ctypes.cast(f, ctypes.c_void_p).value for f in (density.log_density, density.expand))
            sizes: dict[str, int] = {}
            variables = _lib.PyVariable.new_variables(["z"], ["float64"], [(density.dim,)], sizes, {})  # fills sizes
            return _lib.PyMcModel(
                _lib.LogpFunc(log_density, state.address, state),
                _lib.ExpandFunc(density.dim, density.dim, expand, state.address, state),
                variables,
                density.dim,
                sizes,
                {},
                lambda seed: start.copy(),
                None,
            )

        def _make_sampler(self, settings: Any, init_mean: Any, cores: Any, progress: Any, store: Any) -> Any:
            return _lib.PySampler.from_pymc(settings, cores, self._make_model(init_mean), progress, store)

    return Model(dims={})


def nutpie_takes(density: NativeDensity) -> bool:
    """Whether the nutpie that is installed takes C functions in this form, which it does not promise."""
    try:
        nutpie_model(density.state(), np.zeros(density.dim))._make_model(None)
    except (AttributeError, ImportError, TypeError):
        return False
    return True

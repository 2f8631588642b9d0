"""A captured graph of value and gradient at one point, written as one C function.

Tensors of a few numbers become scalars, larger ones loops. What the function does not know how to write raises
`Unsupported`, and the graph runs as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ppl.native.expressions import CTYPES, POINTWISE, PRELUDE, literal
from ppl.native.indexing import INDEXING
from ppl.native.matrices import MATRICES
from ppl.native.moves import MOVES
from ppl.native.rows import ROWS
from ppl.native.values import Memory, Scalars, Unsupported, Value, inner_first
from ppl.native.writer import SMALL, Call, Operation, Writer

__all__ = ["Source", "emit"]

MOST_LINES = 40_000  # for which a compiler takes some half a minute


@dataclass(frozen=True)
class Source:
    """C code, the bytes of memory it works in, and the strides in which it wants its inputs."""

    text: str
    work: int
    strides: tuple[tuple[int, ...], ...]


def emit(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Source, list[Tensor]]:
    """The C source of `(z, *rest) -> (value, gradient)` for one draw, and the constants it reads behind its inputs.

    Args:
        module: the graph, whose nodes know their shapes.
        inputs: example inputs, `z` of shape (1, dim) first; only their shapes and types count.

    Raises:
        Unsupported: an operation or a type that is not written in C.
    """
    emitter = _Emitter(module, inputs)
    return emitter.source(), emitter.constants


class _Emitter:
    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.module = module
        self.write = Writer()
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[tuple[str, torch.dtype]] = []
        self.strides: list[tuple[int, ...]] = []
        self.given = list(inputs)
        self.constants: list[Tensor] = []
        self.dim = int(inputs[0].shape[1])

    def source(self) -> Source:
        point, *given = self.given
        first = next(n for n in self.module.graph.nodes if n.op == "placeholder")
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._point(point) if node is first else self._input(given.pop(0))
            elif node.op == "get_attr":
                self.env[node] = self._constant(getattr(self.module, str(node.target)))
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                self._finish(*(self.env[n] for n in node.args[0]))
        return self._assemble()

    # Inputs and outputs ----------------------------------------------------------------------------------------------

    def _point(self, z: Tensor) -> Value:
        place = Memory("x", 0, tuple(z.shape), (z.shape[1], 1), torch.float64)
        if z.dtype == torch.float64:
            return place
        return self.write.pointwise(lambda a: f"(float){a}", [place], tuple(z.shape), z.dtype)

    def _input(self, tensor: Tensor) -> Value:
        _known(tensor, "an input")
        name = f"in{len(self.inputs)}"
        self.inputs.append((name, tensor.dtype))
        self.strides.append(inner_first(tuple(tensor.shape)))
        return Memory(name, 0, tuple(tensor.shape), self.strides[-1], tensor.dtype)

    def _constant(self, tensor: Any) -> Value:
        if not isinstance(tensor, Tensor):
            raise Unsupported(f"a constant of type {type(tensor).__name__}")
        _known(tensor, "a constant")
        first = tensor.reshape(-1)[0]
        if tensor.numel() <= SMALL or bool((tensor == first).all()):
            values = tensor if tensor.numel() <= SMALL else first.reshape((1,) * tensor.ndim)
            names = [literal(v, tensor.dtype.is_floating_point) for v in values.reshape(-1).tolist()]
            array = np.array(names, dtype=object).reshape(tuple(values.shape))
            return Scalars(np.broadcast_to(array, tuple(tensor.shape)), tensor.dtype)
        self.constants.append(tensor)
        name = f"k{len(self.constants) - 1}"
        self.write.constants[name] = tensor
        return Memory(name, 0, tuple(tensor.shape), inner_first(tuple(tensor.shape)), tensor.dtype)

    def _finish(self, value: Value, gradient: Value) -> None:
        grad = Memory("grad", 0, (1, self.dim), (self.dim, 1), torch.float64)
        if self.dim <= SMALL:
            for i, name in enumerate(self.write.scalars(gradient).reshape(-1)):
                self.write.code.say(f"grad[{i}] = {name};")
        else:
            self.write.code.keep(grad)
            self.write.pointwise(lambda a: a, [gradient], (1, self.dim), torch.float64, into=grad)
        (name,) = self.write.scalars(value).reshape(-1)
        self.write.code.say(f"*logp = {name};")

    def _assemble(self) -> Source:
        body = self.write.code.write()
        if body.count("\n") > MOST_LINES:
            raise Unsupported(f"{body.count(chr(10))} lines of code")
        places, work = [], 0
        for name in self.write.code.used:
            size, dtype = self.write.code.buffers[name]
            ctype = CTYPES[dtype]
            places.append(f"{ctype} *const {name} = ({ctype} *)(state->work + {work});")
            work += -(-size * dtype.itemsize // 64) * 64
        every = [*self.inputs, *((f"k{i}", t.dtype) for i, t in enumerate(self.constants))]
        given = [
            f"const {CTYPES[dtype]} *const {name} = (const {CTYPES[dtype]} *)state->in[{i}];"
            for i, (name, dtype) in enumerate(every)
        ]
        text = "\n".join(
            [
                PRELUDE,
                "int64_t log_density(uint64_t dim, const double *x, double *grad, double *logp, void *user) {",
                "State *state = user;",
                "state->gradients++;",
                f"if (dim != {self.dim}) return -1;",
                *given,
                *places,
                body,
                "if (!isfinite(*logp)) return 1;",
                f"for (int64_t i = 0; i < {self.dim}; i++) if (!isfinite(grad[i])) return 1;",
                "return 0;",
                "}",
                "int64_t expand(uint64_t dim, uint64_t size, const double *x, double *out, void *user) {",
                "((State *)user)->stored++;",
                "memcpy(out, x, dim * sizeof(double));",
                "return 0;",
                "}",
            ]
        )
        return Source(text, work, (*self.strides, *(inner_first(tuple(t.shape)) for t in self.constants)))

    def _call(self, node: fx.Node) -> Any:
        given: Any = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        args, kwargs = list(given[0]), dict(given[1])
        target: Any = node.target
        if target is operator.getitem:
            if args[0][args[1]] is None:
                raise Unsupported(f"result {args[1]} of {node.args[0]}")
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported(str(target))
        name = target.overloadpacket.__name__
        operation = OPERATIONS.get(name)
        result = node.meta.get("val")
        if operation is None or (name not in _SEVERAL and not isinstance(result, Tensor)):
            raise Unsupported(str(target))
        call = Call(target, name, args, kwargs, (), torch.float64)
        if isinstance(result, Tensor):
            _known(result, str(target))
            call = Call(target, name, args, kwargs, tuple(result.shape), result.dtype)
        return operation(self.write, call)


def _known(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in CTYPES or tensor.numel() == 0:
        raise Unsupported(f"{what} of type {tensor.dtype}, shape {tuple(tensor.shape)}")


def _pointwise(write: Writer, call: Call) -> Value:
    kwargs, args = dict(call.kwargs), list(call.args)
    if call.name == "clamp":
        args += [kwargs.pop(k, None) for k in ("min", "max")[len(args) - 1 :]]
    if any(k not in ("alpha", "value") and v is not None for k, v in kwargs.items()):
        raise Unsupported(f"{call.target} with {kwargs}")
    return write.pointwise(POINTWISE[call.name], args, call.shape, call.dtype, kwargs)


def _filled(write: Writer, call: Call) -> Value:
    name = call.name.replace("new_", "").replace("_like", "")
    number = {"zeros": 0, "ones": 1, "empty": 0}.get(name)
    if number is None:
        number = call.args[0] if name == "scalar_tensor" else call.args[-1]
    text = np.array(literal(number, call.dtype.is_floating_point), dtype=object)
    return Scalars(np.broadcast_to(text, call.shape), call.dtype)


def _converted(write: Writer, call: Call) -> Value:
    ctype = "0 !=" if call.dtype == torch.bool else f"({CTYPES[call.dtype]})"
    return write.pointwise(lambda a: f"{ctype} {a}", [call.args[0]], call.shape, call.dtype)


def _not(write: Writer, call: Call) -> Value:
    if call.dtype != torch.bool:
        raise Unsupported(f"{call.target} of {call.dtype}")
    return write.pointwise(POINTWISE["logical_not"], call.args, call.shape, call.dtype)


def _logit(write: Writer, call: Call) -> Value:
    if len(call.args) > 1 and call.args[1] is not None:
        raise Unsupported(f"{call.target} with eps")
    return write.pointwise(lambda x: f"log({x} / (1 - {x}))", call.args[:1], call.shape, call.dtype)


def _log_sigmoid(write: Writer, call: Call) -> Any:
    value: Value = call.args[0]
    out = write.pointwise(lambda a: f"log_sigmoid_({a})", [value], value.shape, value.dtype)
    return out, value  # the second is only handed to the backward operation, which does without


_SEVERAL = ("max", "min", "linalg_cholesky_ex", "log_sigmoid_forward", "unbind", "split", "split_with_sizes")
OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "scalar_tensor"), _filled),
    **dict.fromkeys(("full", "full_like", "new_full", "fill", "empty", "empty_like", "new_empty"), _filled),
    "_to_copy": _converted,
    "bitwise_not": _not,
    "log_sigmoid_forward": _log_sigmoid,
    "logit": _logit,
    **MOVES,
    **ROWS,
    **MATRICES,
    **INDEXING,
}

"""A function of one draw, captured as a graph, run for many draws at once, differentiated, compiled when that pays.

`LaneFunction` takes a function `fn(lane, shared)` of flat dictionaries of tensors. `lane` holds what differs between
draws, `shared` what does not (data, parameters, subsample indices). The function is traced once into a graph; the
graph, not the Python code, is vmapped, so that handlers cost nothing inside loops. Every graph is compared with the
eager function at fresh inputs before it is used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ppl.capture import capture
from ppl.errors import TraceError
from ppl.lower import Split, native, split_shared
from ppl.passes import simplify
from ppl.rewrites import functional, no_raise, out_of_place, pin_types

__all__ = ["Batching", "Compile", "Inputs", "LaneFunction"]

Inputs = Mapping[str, Tensor]
Batching = Literal["auto", "graph", "vmap", "loop"]
Compile = Literal["auto", "never", "inductor"]

CAPTURE_AFTER = 4  # calls at one lane count before a dedicated graph is worth its capture
LONG_NODES = 2000  # of one draw, such as loops of hundreds of steps: seconds to minutes to capture for many draws
LONG_CAPTURE_AFTER = 100
COMPILE_NODES = 6000  # above this the compiler takes minutes; the graph runs as it is


@dataclass
class _Runner:
    """What runs one (lane count, differentiated or not): the best callable so far and how often it was used."""

    call: Callable[..., Sequence[Tensor]]
    kind: str = "vmap"
    uses: int = 0
    nodes: int = 0
    graph: fx.GraphModule | None = None


class LaneFunction:
    """A function of one draw, ready to run for any number of draws.

    Args:
        fn: `fn(lane, shared) -> pytree of tensors`, for one draw; a deterministic function of its inputs.
        lane: example inputs of one draw, without a leading axis.
        shared: example inputs common to all draws.
        probes: fresh `(lane, shared)` pairs at which graph and eager function must agree.
        batching: `"auto"` traces one draw and vmaps the graph, or else vmaps the function; `"loop"` runs draw by draw.
        compile: `"auto"` compiles when `prepare` is told of enough calls, `"never"`, or `"inductor"` always.
        where: called when tracing fails, to name the place in the model.

    Raises:
        TraceError: the function cannot be traced, hides randomness, or its graph disagrees with it.

    Example:
        >>> square = LaneFunction(lambda lane, shared: (lane["z"] ** 2).sum() * shared["a"],
        ...                       {"z": torch.zeros(3)}, {"a": torch.tensor(2.0)})
        >>> square({"z": torch.ones(5, 3)}, {"a": torch.tensor(2.0)})
        tensor([6., 6., 6., 6., 6.])
    """

    def __init__(
        self,
        fn: Callable[[Inputs, Inputs], Any],
        lane: Inputs,
        shared: Inputs,
        *,
        probes: Sequence[tuple[Inputs, Inputs]] = (),
        batching: Batching = "auto",
        compile: Compile = "auto",
        where: Callable[[], str] = lambda: "",
    ) -> None:
        self.fn = fn
        self.compile = compile
        self._lane_names = tuple(lane)
        self._shared_names = tuple(shared)
        self._spec: Any = None
        self._where = where
        self._runners: dict[tuple[int, tuple[str, ...] | None], _Runner] = {}
        self.notes: list[str] = []
        self.keep: Any = None  # what must live as long as this function
        self.nodes = 0
        self._trace_seconds = 0.0
        self._joined = False
        self._one: Callable[..., Sequence[Tensor]] = self._flat
        self.batching: str = "loop"
        if batching != "loop":
            self._one, self.batching = self._capture(lane, shared, probes, batching)

    # Running ---------------------------------------------------------------------------------------------------------

    def __call__(self, lane: Inputs, shared: Inputs) -> Any:
        """Values for all draws: lane tensors (lanes, ...), result with a leading lane axis.

        Where gradients are recorded the result is differentiable in all inputs.
        """
        if torch.is_grad_enabled():
            args = [lane[n] for n in self._lane_names] + [shared[n] for n in self._shared_names]
            flat: Sequence[Tensor] = self._vmapped()(*args)
        else:
            flat = self._run(None, lane, shared)
        assert self._spec is not None
        return pytree.tree_unflatten(list(flat), self._spec)

    def value_and_grad(self, lane: Inputs, shared: Inputs, wrt: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values (lanes,) of a scalar function and gradients by name.

        The gradient of a lane input has its shape, draw by draw; that of a shared input is summed over draws.
        """
        value, *grads = self._run(tuple(wrt), lane, shared)
        return value, dict(zip(wrt, grads, strict=True))

    def prepare(self, lane: Inputs, shared: Inputs, *, wrt: Sequence[str] | None, calls: int) -> str:
        """Capture, and compile where that pays, for `calls` calls at the lane count of `lane`; says what was chosen."""
        key = (self._lanes(lane), None if wrt is None else tuple(wrt))
        runner = self._runners.setdefault(key, self._plain(key[1]))
        if self.batching == "loop" or runner.kind == "inductor":
            return runner.kind if runner.kind == "inductor" else self.batching
        args = self._args(lane, shared)
        if runner.kind == "vmap" and not self._worth_capturing(runner, args, calls):
            return runner.kind
        self._freeze(runner, args)
        if runner.kind == "graph" and self._worth_compiling(runner, args, calls):
            self._inductor(runner, args)
        return runner.kind

    def bind(self, lane: Inputs, shared: Inputs, wrt: Sequence[str]) -> Callable[[Tensor], Any]:
        """Value and gradients as a function of the first lane input alone, the others held; for many calls."""
        runner = self._runners.setdefault((self._lanes(lane), tuple(wrt)), self._plain(tuple(wrt)))
        rest = self._args(lane, shared)[1:]

        def call(first: Tensor) -> Any:
            with torch.no_grad():
                return runner.call(first, *rest)

        return call

    def captured(
        self, lane: Inputs, shared: Inputs, wrt: Sequence[str], calls: int
    ) -> tuple[fx.GraphModule, list[Tensor]] | None:
        """The graph of value and gradients for this lane count with its inputs; None where it does not pay or fails."""
        key = (self._lanes(lane), tuple(wrt))
        runner = self._runners.setdefault(key, self._plain(key[1]))
        args = self._args(lane, shared)
        if self.batching == "loop" or (runner.kind == "vmap" and not self._worth_capturing(runner, args, calls)):
            return None
        self._freeze(runner, args)
        if runner.graph is None:
            return None
        with torch.no_grad():
            once = runner.call.results(args[runner.call.lanes :]) if isinstance(runner.call, Split) else []
        return runner.graph, [*args, *once]

    def _run(self, wrt: tuple[str, ...] | None, lane: Inputs, shared: Inputs) -> Sequence[Tensor]:
        key = (self._lanes(lane), wrt)
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = self._plain(wrt)
        args = self._args(lane, shared)
        runner.uses += 1
        after = CAPTURE_AFTER if self.nodes <= LONG_NODES else LONG_CAPTURE_AFTER
        if runner.uses == after and runner.kind == "vmap" and self.batching != "loop":
            self._freeze(runner, args)
            if self.compile == "inductor":
                self._inductor(runner, args)
        with torch.no_grad():
            return runner.call(*args)

    def _args(self, lane: Inputs, shared: Inputs) -> list[Tensor]:
        args = [lane[n] for n in self._lane_names] + [shared[n] for n in self._shared_names]
        return [a.detach() if a.requires_grad else a for a in args]

    def _lanes(self, lane: Inputs) -> int:
        return int(lane[self._lane_names[0]].shape[0]) if self._lane_names else 1

    # Building --------------------------------------------------------------------------------------------------------

    def _flat(self, *args: Tensor) -> list[Tensor]:
        """The function of one draw on flat tensors; remembers the shape of the result."""
        split = len(self._lane_names)
        lane = dict(zip(self._lane_names, args[:split], strict=True))
        shared = dict(zip(self._shared_names, args[split:], strict=True))
        flat, self._spec = pytree.tree_flatten(self.fn(lane, shared))
        return flat

    def _vmapped(self) -> Callable[..., Sequence[Tensor]]:
        dims = (0,) * len(self._lane_names) + (None,) * len(self._shared_names)
        if self.batching == "loop":
            return self._looped
        return torch.vmap(self._one, in_dims=dims) if self._lane_names else self._one

    def _looped(self, *args: Tensor) -> list[Tensor]:
        split = len(self._lane_names)
        rows = [self._one(*(a[i] for a in args[:split]), *args[split:]) for i in range(args[0].shape[0])]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _plain(self, wrt: tuple[str, ...] | None) -> _Runner:
        """The batched function, or its value and gradients, as Python runs it."""
        batched = self._vmapped()
        if wrt is None:
            return _Runner(batched)
        names = self._lane_names + self._shared_names
        where = tuple(names.index(n) for n in wrt)

        def total(*args: Tensor) -> tuple[Tensor, Tensor]:
            (value,) = batched(*args)
            return value.sum(), value

        if self.batching == "loop":
            return _Runner(lambda *args: _autograd(total, where, args))
        grad = torch.func.grad(total, argnums=where, has_aux=True)

        def value_and_grad(*args: Tensor) -> list[Tensor]:
            grads, value = grad(*args)
            return [value, *grads]

        return _Runner(value_and_grad)

    def _freeze(self, runner: _Runner, args: list[Tensor]) -> None:
        """Replace vmap by a graph for this lane count."""
        if runner.kind != "vmap":
            return
        try:
            graph = capture(runner.call, *args)
            out_of_place(graph)  # rules of vmap write in place, as those for logical operations do
            graph = simplify(graph)
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.view.default:  # what was simplified may lie otherwise in memory
                    node.target = torch.ops.aten.reshape.default
            parts = split_shared(graph, len(self._lane_names)) if self._lane_names else None
            if parts is None:
                call: Callable[..., Sequence[Tensor]] = native(graph)
            else:
                call = Split(native(parts[0]), native(parts[1]), len(self._lane_names))
            with torch.no_grad():
                pairs = list(zip(call(*args), runner.call(*args), strict=True))
        except Exception:
            runner.kind = "vmap-only"  # slower, never wrong
            return
        if not all(_close(a, b, _tolerance(b)) for a, b in pairs):
            self.notes.append("the graph of many draws disagreed with that of one and is not used")
            runner.kind = "vmap-only"
            return
        runner.graph = graph if parts is None else parts[1]
        runner.call, runner.kind, runner.nodes = call, "graph", len(runner.graph.graph.nodes)

    def _worth_capturing(self, runner: _Runner, args: list[Tensor], calls: int) -> bool:
        """Whether the calls to come repay a graph for this lane count: it halves the time of a call."""
        if self.nodes <= LONG_NODES or self.compile == "inductor":
            return True
        start = time.perf_counter()
        with torch.no_grad():
            runner.call(*args)
        per_call, capture = time.perf_counter() - start, 3 * self._trace_seconds
        pays = 0.5 * per_call * calls > capture
        self.notes.append(
            f"one draw takes {self.nodes} operations, as loops of many steps do: "
            + (
                "its graph was captured for all draws at once"
                if pays
                else "its graph runs under vmap, not captured anew"
            )
            + f" ({calls} calls of {per_call:.2g} s to come, capture about {capture:.2g} s)"
        )
        return pays

    def _worth_compiling(self, runner: _Runner, args: list[Tensor], calls: int) -> bool:
        """Whether the calls to come repay the compiler: about 3 s and 5 ms a node, for a call several times faster."""
        if self.compile != "auto":
            return self.compile == "inductor"
        if runner.nodes > COMPILE_NODES:
            self.notes.append(f"the graph has {runner.nodes} nodes: run as it is, not compiled")
            return False
        with torch.no_grad():
            runner.call(*args)
            times = []
            for _ in range(5):
                start = time.perf_counter()
                runner.call(*args)
                times.append(time.perf_counter() - start)
        per_call = min(times)  # one interruption would otherwise send a small model to the compiler
        return 0.8 * per_call * calls > 3 + 0.005 * runner.nodes

    def _inductor(self, runner: _Runner, args: list[Tensor]) -> None:
        if runner.kind != "graph" or runner.graph is None:
            return
        try:
            from torch._inductor.compile_fx import compile_fx

            split = runner.call if isinstance(runner.call, Split) else None
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                every = args if split is None else [*args, *split.results(args[split.lanes :])]
                compiled: Any = compile_fx(runner.graph, every)
                out, expected = compiled(*every), runner.call(*args)
            tolerance = 1e-9 if out[0].dtype == torch.float64 else 1e-3
            if not all(_close(a, b, tolerance) for a, b in zip(out, expected, strict=True)):
                self.notes.append("the compiled graph disagreed with the graph and is not used")
                return
            runner.call = compiled if split is None else Split(split.once, compiled, split.lanes)
            runner.kind = "inductor"
        except Exception as error:  # no C++ compiler, an operator without lowering
            self.notes.append(f"not compiled: {type(error).__name__}: {str(error)[:200]}")

    def _capture(
        self, lane: Inputs, shared: Inputs, probes: Sequence[tuple[Inputs, Inputs]], batching: Batching
    ) -> tuple[Callable[..., Sequence[Tensor]], str]:
        """Trace one draw; where that fails, try to vmap the function itself."""
        self._flat(*self._args(lane, shared))  # an error of the model itself reaches the user as it is
        failures: list[str] = []
        ways: list[str] = ["graph", "vmap"] if batching == "auto" else [batching]
        for way in ways:
            try:
                self._one, self.batching = self._trace_one(lane, shared) if way == "graph" else self._flat, way
                try:
                    self._check(lane, shared, probes)
                except TraceError:
                    if way != "graph" or not self._joined:
                        raise
                    self.notes = ["joining the steps of a loop changed the result: each runs by itself"]
                    self._one = self._trace_one(lane, shared, repeats=False)
                    self._check(lane, shared, probes)
                return self._one, way
            except TraceError:
                raise
            except Exception as error:
                first_line = str(error).strip().splitlines()[:1]
                failures.append(f"{way}: {type(error).__name__}: {' '.join(first_line)[:200]}{self._where()}")
            finally:
                self._runners.clear()
        raise TraceError(
            "the model cannot be traced into a graph, because it branches on a value, converts one to Python or uses "
            "an operation that cannot be batched. "
            + "; ".join(failures)
            + ". Write it with torch operations on tensors "
            '(torch.where for a branch), or use Program(..., batching="loop"), which runs draw by draw.'
        )

    def _trace_one(self, lane: Inputs, shared: Inputs, repeats: bool = True) -> fx.GraphModule:
        args = self._args(lane, shared)
        start = time.perf_counter()
        graph = capture(self._flat, *args)
        if not out_of_place(graph):
            # Writes such as `out[t] = x`: traced again without them, so that they can be vmapped and have gradients.
            with suppress(Exception):
                graph = functional(capture(torch.func.functionalize(self._flat, remove="mutations"), *args))
        before = len(graph.graph.nodes)
        graph = simplify(no_raise(pin_types(graph)), keep_detach=True, repeats=repeats)
        for node in graph.graph.nodes:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags:
                raise TraceError(
                    f"the density is random: the model draws random numbers outside pyro.sample (operation "
                    f"{node.target}). Make the draw a site, pass it as data, or put dropout and batch norm in "
                    "eval mode."
                )
        self.nodes, self._trace_seconds = len(graph.graph.nodes), time.perf_counter() - start
        self._joined = bool(graph.meta.get("joined"))
        if self._joined and before > LONG_NODES:
            self.notes.append(f"steps of a loop were joined: {before} operations of one draw became {self.nodes}")
        return graph

    def _check(self, lane: Inputs, shared: Inputs, probes: Sequence[tuple[Inputs, Inputs]]) -> None:
        """Compare the batched function with the eager one, value and gradient, at fresh inputs."""
        split = len(self._lane_names)
        for lane_i, shared_i in probes or [(lane, shared)]:
            args = self._args(lane_i, shared_i)
            where = tuple(i for i in range(split) if args[i].is_floating_point())
            twice = [torch.stack([a, a]) for a in args[:split]] + args[split:]
            batched = [b[0] for b in self._vmapped()(*twice)] if split else self._vmapped()(*args)
            scalar = len(batched) == 1 and batched[0].ndim == 0 and batched[0].is_floating_point()
            grads: list[Tensor] = []
            if scalar and where:
                value, *grads = _autograd(lambda *a: (self._flat(*a)[0],) * 2, where, args)
                eager = [value]
            else:
                eager = self._flat(*args)
            if not all(_close(a, b, _tolerance(a)) for a, b in zip(eager, batched, strict=True)):
                raise TraceError(_disagreement("values", eager, batched))
            if not grads:
                continue
            names = tuple(self._lane_names[i] for i in where)
            lanes_grad = [g[0] for g in self._plain(names).call(*twice)[1:]]
            if not all(_close(a, b, 100 * _tolerance(a)) for a, b in zip(grads, lanes_grad, strict=True)):
                raise TraceError(_disagreement("gradients", grads, lanes_grad))


def _autograd(
    total: Callable[..., tuple[Tensor, Tensor]], where: Sequence[int], args: Sequence[Tensor]
) -> list[Tensor]:
    """Value and gradients by ordinary autograd; inputs that are not used get zeros."""
    with torch.enable_grad():
        args = [a.detach().requires_grad_() if i in where else a for i, a in enumerate(args)]
        summed, value = total(*args)
        inputs = [args[i] for i in where]
        if not summed.requires_grad:
            return [value.detach(), *(torch.zeros_like(a) for a in inputs)]
        grads = torch.autograd.grad(summed, inputs, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(inputs, grads, strict=True))]


def _tolerance(x: Tensor) -> float:
    return 1e-8 if x.dtype in (torch.float64, torch.complex128) else 1e-3


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to rounding, relative to one plus the size; equal NaN and infinities count as equal."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    same = torch.isclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)
    return bool(same.all())


def _disagreement(what: str, eager: Sequence[Tensor], batched: Sequence[Tensor]) -> str:
    pairs = [(a.flatten()[:3].tolist(), b.flatten()[:3].tolist()) for a, b in zip(eager, batched, strict=True)]
    return (
        f"the traced graph and the model disagree in {what} at fresh inputs (model, graph: {pairs[:3]}). The model "
        "uses something that tracing bakes in, such as numpy, .item() or .detach(), or it is random. Write it with "
        'torch operations, or use Program(..., batching="loop").'
    )

"""One gradient of an objective as a graph: the handlers run once, while it is traced, and never in the loop.

    (parameters, noise) -> value, gradient

Both programs, the estimators of their sites and the backward pass lie in the graph, which is compiled where that pays.
Minibatch indices are permutations among the noise. It is compared with the engine, at the same fresh noise and other
parameters, before it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ppl.errors import NotFiniteError, TraceError
from ppl.graph import COMPILE_NODES, _tolerance
from ppl.lower import native
from ppl.objectives.engine import Engine
from ppl.objectives.tape import Layout, Tape
from ppl.passes import simplify
from ppl.rewrites import functional, out_of_place, pin_types
from ppl.trace import seeded, settings

__all__ = ["Traced"]

COMPILER_SECONDS, SECONDS_A_NODE = 4.0, 0.012  # what the compiler takes
SAVED_A_NODE = 3e-6  # seconds that the compiler saves in each call: the way from one operation to the next


class Traced:
    """The gradient of an objective, ready to be called many times.

    Args:
        engine: the objective with model and guide.
        transforms: from unconstrained coordinates to each parameter.
        values: unconstrained parameters by name; an example of their shapes.
        samples: independent copies of the objective that are averaged.
        calls: gradients to come, from which it follows whether the compiler pays.
        compile: `"auto"`, `"never"`, or `"inductor"` always.

    Raises:
        TraceError: the programs cannot be traced; the message says why.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        >>> engine = ppl.objectives.Engine(ppl.objectives.ELBO(), ppl.Program(model, torch.tensor(1.0)), guide)
        >>> traced = Traced(engine, {"m": torch.distributions.transform_to(dist.constraints.real)},
        ...                 {"m": torch.tensor(0.0)}, samples=4)
        >>> value, (gradient,) = traced([torch.tensor(0.5)], torch.Generator().manual_seed(0))
        >>> traced.kind, gradient.shape
        ('graph', torch.Size([]))
    """

    def __init__(
        self,
        engine: Engine,
        transforms: Mapping[str, Callable[[Tensor], Tensor]],
        values: Mapping[str, Tensor],
        samples: int,
        *,
        calls: int = 0,
        compile: Literal["auto", "never", "inductor"] = "auto",
    ) -> None:
        self.engine, self.samples = engine, samples
        self.transforms = {n: transforms[n] for n in values}
        self.layout = Layout(engine.device)
        self.notes: list[str] = []
        pieces = [v.detach().clone() for v in values.values()]
        before = dict(engine.averages)
        try:
            with self._quiet(0), torch.enable_grad():
                self._run(pieces, Tape(self.layout))  # finds the draws
            self._averages = tuple(engine.averages)
            self.used: list[bool] = []
            probe = self.layout.draw(torch.Generator(engine.device).manual_seed(1))
            args = [*pieces, *probe, *engine.averages.values()]
            self.graph = self._capture(args)
            self.nodes = len(self.graph.graph.nodes)
            self._call: Callable[..., Sequence[Tensor]] = native(self.graph)
            self.kind = "graph"
            self._compare(args)
            if self._pays(calls, compile):
                self._compile(args)
        finally:
            engine.averages = before

    # Running ---------------------------------------------------------------------------------------------------------

    def __call__(self, pieces: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """An estimate of the objective, and of its gradient in the unconstrained parameters.

        Args:
            pieces: unconstrained parameters, in the order of `values`.
            generator: source of the noise.

        Raises:
            NotFiniteError: the objective is not finite; the message names the site whose density is not.
        """
        return self.at(pieces, self.layout.draw(generator), generator)

    def at(
        self, pieces: Sequence[Tensor], noise: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """The same with noise that is given; draws by rejection take theirs from the generator."""
        averages = self.engine.averages
        if len(averages) < len(self._averages):
            return self.eager(pieces, noise, generator)  # the first step has no past to take an average of
        with torch.no_grad(), self._random(generator):
            value, check, *rest = self._call(*pieces, *noise, *(averages[k] for k in self._averages))
        if not math.isfinite(check.item()):
            self.eager(pieces, noise, generator)  # to name the site
            raise NotFiniteError(f"the gradient of the objective is not finite at the value {float(value):.6g}")
        averages.update(zip(self._averages, rest, strict=False))
        grads = iter(rest[len(self._averages) :])
        return value, [next(grads) if used else torch.zeros_like(p) for p, used in zip(pieces, self.used, strict=True)]

    def eager(
        self, pieces: Sequence[Tensor], noise: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """The same by the engine itself, handlers and all."""
        with self._settings(), self._random(generator), torch.enable_grad():
            return self._run([p.detach() for p in pieces], Tape(self.layout, noise), check=True)

    def _run(self, pieces: Sequence[Tensor], tape: Tape, check: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Value and gradients by the engine, under a tape."""
        leaves = [p.detach().requires_grad_() for p in pieces]
        params = {n: self.transforms[n](leaf) for n, leaf in zip(self.transforms, leaves, strict=True)}
        with self.engine.taped(tape):
            whole, total, ctx = self.engine.terms(params, self.samples, {})
            if check:
                self.engine.check_finite(whole, ctx)
            outer = self.engine.plan.scale / self.samples
            value, total = whole.detach().sum() * outer, total.sum() * outer
            if not total.requires_grad:
                raise TraceError("the objective does not depend on any learnable parameter")
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        self.used = [g is not None for g in grads]
        return value, [torch.zeros_like(p) if g is None else g for p, g in zip(pieces, grads, strict=True)]

    # Building --------------------------------------------------------------------------------------------------------

    def _capture(self, args: list[Tensor]) -> fx.GraphModule:
        sizes = (len(self.transforms), len(self.layout.groups))

        def step(*args: Tensor) -> list[Tensor]:
            pieces, noise, past = args[: sizes[0]], args[sizes[0] : sum(sizes)], args[sum(sizes) :]
            self.engine.averages = dict(zip(self._averages, past, strict=True))
            with torch.enable_grad():
                value, grads = self._run(pieces, Tape(self.layout, noise))
            kept = [g for g, used in zip(grads, self.used, strict=True) if used]
            # A sum is infinite or not a number as soon as one of its terms is.
            check = torch.stack(torch._foreach_norm(kept, 1)).sum() + value
            return [value, check, *(self.engine.averages[k].detach() for k in self._averages), *kept]

        averages = dict(self.engine.averages)
        try:
            with self._quiet(2), torch.no_grad():
                graph = make_fx(step)(*args)
        except TraceError:
            raise
        except Exception as error:
            first = " ".join(str(error).strip().splitlines()[:1])[:200]
            raise TraceError(
                f"the objective cannot be traced into a graph ({type(error).__name__}: {first}): a program branches on "
                "a value or converts one to Python; write it with torch operations (torch.where for a branch)"
            ) from error
        finally:
            self.engine.averages = averages
        random = _random_nodes(graph)
        _tidy(graph)
        if out_of_place(graph):
            functional(graph)
        graph = simplify(pin_types(graph))
        if _random_nodes(graph) != random or random != len(self.layout.rejection):
            raise TraceError("the objective cannot be traced into a graph: its random draws would change")
        return graph

    def _compare(self, args: list[Tensor]) -> None:
        """Graph and engine at fresh noise and other parameters."""
        count = len(self.transforms)
        generator = torch.Generator(self.engine.device).manual_seed(3)
        pieces = [
            p + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in args[:count]
        ]
        noise = self.layout.draw(generator)
        past = dict(self.engine.averages)
        with self._quiet(4), torch.enable_grad():
            value, grads = self._run(pieces, Tape(self.layout, noise))
        eager = [value, *self.engine.averages.values(), *(g for g, u in zip(grads, self.used, strict=True) if u)]
        self.engine.averages = past
        with self._quiet(4), torch.no_grad():
            value, _, *rest = self._call(*pieces, *noise, *past.values())
        if not all(_alike(a, b, _tolerance(a)) for a, b in zip(eager, [value, *rest], strict=True)):
            raise TraceError(
                "the objective cannot be traced into a graph: graph and programs disagree at other parameters and "
                "noise; a program uses something that tracing bakes in, such as numpy or a draw outside of torch"
            )

    def _pays(self, calls: int, compile: str) -> bool:
        """Whether the compiler pays; by counts and not by the clock, so that the same seed gives the same fit."""
        if compile != "auto":
            return compile == "inductor"
        saved, spent = calls * self.nodes * SAVED_A_NODE, COMPILER_SECONDS + SECONDS_A_NODE * self.nodes
        return saved > spent and self.nodes <= COMPILE_NODES

    def _compile(self, args: list[Tensor]) -> None:
        try:
            from torch._inductor.compile_fx import compile_fx

            with self._quiet(2), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = self._call(*args)
                compiled: Any = compile_fx(self.graph, args)
                found = compiled(*args)
            tolerance = 1e-9 if expected[0].dtype == torch.float64 else 1e-3
            if not self.layout.rejection and not all(
                _alike(a, b, tolerance) for a, b in zip(found, expected, strict=True)
            ):
                self.notes.append("the compiled graph disagreed with the graph and is not used")
                return
            self._call, self.kind = compiled, "inductor"
        except Exception as error:  # no C++ compiler, an operator without lowering
            self.notes.append(f"not compiled: {type(error).__name__}: {str(error)[:200]}")

    def _settings(self) -> Any:
        return settings(self.engine.dtype, validate=False)

    def _random(self, generator: torch.Generator) -> Any:
        """Seeds torch's own generator where draws by rejection need it."""
        return seeded(generator) if self.layout.rejection else nullcontext()

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        """Default type, no validation, and torch's generator in a known state."""
        with self._settings(), seeded(torch.Generator(self.engine.device).manual_seed(seed)):
            yield


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to rounding, relative to the largest entry: single ones of a gradient are differences of such."""
    if a.shape != b.shape or not bool((torch.isfinite(a) == torch.isfinite(b)).all()):
        return False
    a, b = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (a, b))
    return not a.numel() or bool((a - b).abs().max() <= tolerance * (1 + a.abs().max()))


def _random_nodes(graph: fx.GraphModule) -> int:
    return sum(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.graph.nodes)


def _tidy(graph: fx.GraphModule) -> None:
    """Drop marks of what has no gradient, since the backward pass is there already, and pairs of transpositions."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is aten.detach.default:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif node.target is aten.t.default and source.target is aten.t.default:
            node.replace_all_uses_with(source.args[0])
            graph.graph.erase_node(node)
    graph.recompile()

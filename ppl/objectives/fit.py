"""Fitting a guide by any objective: Adam on unconstrained parameters, the gradient from a graph of the objective.

Programs that cannot be traced, and fits too short to repay it, take each gradient from `Engine` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.optim.adam import adam

from ppl.errors import OptionError, TraceError
from ppl.monitor import Monitor
from ppl.objectives.bounds import ELBO
from ppl.objectives.compiled import Traced
from ppl.objectives.draw import Stochastic
from ppl.objectives.engine import Engine
from ppl.objectives.family import GUIDE, FlatGuide, FlatModel
from ppl.objectives.fitted import FittedProgram
from ppl.program import Program
from ppl.vi.fitted import FittedGuide, bound_guide
from ppl.vi.fitted_base import with_parameters
from ppl.vi.guides import Guide

if TYPE_CHECKING:
    from ppl.vi.svi import SVI

__all__ = ["fit_objective"]

TRACE_STEPS = 200  # a trace takes as long as so many gradients by the handlers
AVERAGE = "baseline."


def fit_objective(
    options: SVI,
    program: Program,
    generator: torch.Generator,
    monitor: Monitor,
    start: FittedGuide | FittedProgram | None,
) -> FittedGuide | FittedProgram:
    """`SVI.fit` for an objective, or for a guide that is a Pyro program."""
    fit = _Fit(options, program, generator, start)
    finished = monitor.finished("fit")
    saved = finished if finished is not None else monitor.resume()
    first = 0
    if saved is not None:
        first = options.steps if finished is not None else int(saved.pop("step"))
        fit.load(saved)
    if first < options.steps:
        fit.prepare()
        for note in fit.notes:
            monitor.note(note)
        for step in monitor.steps(options.steps, "fit", start=first):
            value = fit.step(step, monitor)
            monitor.cost.add(gradient_evals=options.particles)
            monitor.report(objective=value)
            monitor.checkpoint(step + 1, fit.state)
            if options._settled(fit.history, step + 1):
                monitor.note(f"stopped after {step + 1} of {options.steps} steps: the objective has settled")
                break
        monitor.finish("fit", fit.state())
    return fit.result(not monitor.interrupted)


class _Fit:
    """The state of one fit: unconstrained parameters in one vector, Adam's moments, history, baselines."""

    def __init__(self, options: SVI, program: Program, generator: torch.Generator, start: Any) -> None:
        self.options, self.program, self.generator = options, program, generator
        objective = ELBO() if options.objective is None else options.objective
        self.family: Guide | None = None
        if isinstance(options.guide, Guide) and not isinstance(options.guide, Stochastic):
            flat = program.flat()
            self.family = bound_guide(options.guide, flat)
            own = self.family.init(flat.dim, program.dtype, program.device, generator)
            self.engine = _flat_engine(objective, program, self.family, own)
        else:
            self.engine = Engine(objective, program, options.guide, policy=options.estimators)
        constraints = self.engine.constraints
        self.transforms = {n: transform_to(constraints[n]) for n in self.engine.parameters}
        values = dict(self.engine.parameters)
        if start is not None:
            own = {GUIDE + n: v for n, v in start.params.items()} if isinstance(start, FittedGuide) else start.params
            values |= {n: v for n, v in {**own, **start.parameters}.items() if n in values}
        named = {n: self.transforms[n].inv(v) for n, v in values.items()}
        self.shapes = {n: v.shape for n, v in named.items()}
        flat_parts = [v.detach().reshape(-1).to(program.dtype) for v in named.values()]
        self.theta = torch.cat(flat_parts) if flat_parts else torch.zeros(0, dtype=program.dtype)
        if not self.theta.numel():
            raise OptionError("guide and model have no learnable parameter (pyro.param, pyro.module): nothing to fit")
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.updates = torch.zeros((), dtype=torch.int64)
        self.average = torch.zeros_like(self.theta)
        self.history = torch.full((options.steps,), math.nan, dtype=torch.float64, device=program.device)
        self.traced: Traced | None = None
        self.notes = list(self.engine.notes)
        if start is not None and start.optimizer:
            if start.optimizer["m"].shape != self.theta.shape:
                raise OptionError("cannot go on from a fit with other parameters; use the same guide and program")
            self.m, self.v = start.optimizer["m"].clone(), start.optimizer["v"].clone()
            self.updates = start.optimizer["updates"].clone()
        self._view()

    def _view(self) -> None:
        """The vectors of the optimiser by parameter: views, written in place."""
        self.pieces, *self.moments = (self._split(x) for x in (self.theta, self.m, self.v))
        self.counts = [torch.full((), float(self.updates), device=self.theta.device) for _ in self.pieces]

    def prepare(self) -> None:
        """Trace the gradient of the objective where its steps repay it; a note says what was chosen.

        All steps count, so that a fit that goes on after a kill chooses as it did before.
        """
        if self.options.steps < TRACE_STEPS:
            return
        named = dict(zip(self.shapes, self.pieces, strict=True))
        steps, copies, compile = self.options.steps, self.options.particles, self.program.compile
        try:
            traced = Traced(self.engine, self.transforms, named, copies, calls=steps, compile=compile)
        except TraceError as error:
            self.notes.append(f"each step runs Pyro's handlers: {error}")
            return
        how = {"graph": "run as it is", "inductor": "compiled"}[traced.kind]
        self.notes += [f"the objective was traced: a graph of {traced.nodes} operations, {how}", *traced.notes]
        self.traced = traced

    def state(self) -> dict[str, Tensor]:
        """All that a resumed fit needs."""
        names = ("theta", "m", "v", "updates", "average", "history")
        averages = {f"{AVERAGE}{call}.{site}": v for (call, site), v in self.engine.averages.items()}
        return {**{n: getattr(self, n) for n in names}, **averages}

    def load(self, saved: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in saved.items():
            if name.startswith(AVERAGE):
                call, site = name.removeprefix(AVERAGE).split(".", 1)
                self.engine.averages[int(call), site] = value
            else:
                setattr(self, name, value)
        self._view()

    def step(self, step: int, monitor: Monitor) -> Tensor:
        """One step of Adam; returns the estimate of the objective before it."""
        from ppl.vi.ascent import BETA_1, BETA_2, EPSILON

        options = self.options
        if self.traced is not None:
            value, gradient = self.traced(self.pieces, self.generator)
        else:
            value, gradient = self._eager()
            monitor.check_finite("gradient of the objective", torch.cat([g.reshape(-1) for g in gradient]), step)
        self.history[step] = value
        self.updates += 1
        means, squares = self.moments
        adam(
            self.pieces,
            gradient,
            means,
            squares,
            [],
            self.counts,
            fused=True,
            amsgrad=False,
            maximize=True,
            weight_decay=0.0,
            lr=options.learning_rate(step),
            beta1=BETA_1,
            beta2=BETA_2,
            eps=EPSILON,
        )
        begin = round(options.steps * (1 - options.average))
        if options.average and step >= begin:
            self.average = self.average + (self.theta - self.average) / (step - begin + 1)
        return value

    def _eager(self) -> tuple[Tensor, list[Tensor]]:
        """Value and gradient by the engine, in unconstrained coordinates."""
        leaves = [p.detach().requires_grad_() for p in self.pieces]
        with torch.enable_grad():
            value, surrogate = self.engine.surrogate(self._named(leaves), self.options.particles, self.generator)
            if not surrogate.requires_grad:
                raise OptionError("the objective does not depend on any learnable parameter")
            found = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        return value, [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]

    def result(self, complete: bool) -> FittedGuide | FittedProgram:
        """The fitted guide at the last or at the averaged parameters."""
        options = self.options
        done = int(torch.isfinite(self.history).sum())
        averaged = options.average > 0 and done > round(options.steps * (1 - options.average))
        with torch.no_grad():
            values = {n: v.clone() for n, v in self._unpack(self.average if averaged else self.theta).items()}
        program = with_parameters(self.program, {n: values[n] for n in self.program.parameters})
        params = {n: v for n, v in values.items() if n not in self.program.parameters}
        history, optimizer = self.history[:done].cpu(), {"m": self.m, "v": self.v, "updates": self.updates}
        if self.family is None:
            return FittedProgram(program, options.guide, params, history, optimizer, options.particles, complete)
        own = {n.removeprefix(GUIDE): v for n, v in params.items()}
        return FittedGuide(program, self.family, own, history, optimizer, options.particles, complete)

    def _unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Constrained parameters by name."""
        return self._named(self._split(theta))

    def _named(self, pieces: list[Tensor]) -> dict[str, Tensor]:
        return {n: self.transforms[n](p) for n, p in zip(self.shapes, pieces, strict=True)}

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return [p.view(shape) for p, shape in zip(parts, self.shapes.values(), strict=True)]


def _flat_engine(objective: Callable[..., Tensor], program: Program, guide: Guide, own: dict[str, Tensor]) -> Engine:
    """The engine of a family on the unconstrained vector."""
    flat = program.flat()
    params = {**{GUIDE + n: v for n, v in own.items()}, **program.parameters}
    return Engine(
        objective,
        FlatModel(flat),
        FlatGuide(guide, flat.dim),
        dtype=program.dtype,
        device=program.device,
        parameters=params,
        constraints=program.parameter_constraints,
    )

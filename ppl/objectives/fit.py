"""Fitting a guide by any objective: Adam on unconstrained parameters, the gradient from `Engine`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from ppl.cost import Cost
from ppl.errors import CheckpointError, OptionError, ShapeError
from ppl.monitor import Monitor
from ppl.objectives.bounds import ELBO
from ppl.objectives.context import Context
from ppl.objectives.density import direct, reciprocal
from ppl.objectives.draw import Stochastic
from ppl.objectives.engine import Engine
from ppl.objectives.family import GUIDE, FlatGuide, FlatModel
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.storage import load_tensors, save_tensors
from ppl.trace import seeded, settings
from ppl.vi.fitted import FittedGuide, _mean, _pareto_k, _partition, bound_guide, with_parameters
from ppl.vi.guides import Guide

if TYPE_CHECKING:
    from ppl.vi.svi import SVI

__all__ = ["FittedProgram", "fit_objective"]

LANES_AT_ONCE = 1024
AVERAGE = "baseline."


@dataclass(frozen=True, eq=False)
class FittedProgram:
    """A guide that is a Pyro program, at the parameters that `SVI.fit` found.

    Args:
        program: the program, with its learned parameters.
        guide: the Pyro program that approximates its posterior.
        params: parameters of the guide, constrained.
        history: (steps,) estimates of the objective during the fit, float64.
        optimizer: what a continued fit needs.
        lanes: copies of the objective that one gradient took.
        complete: whether the fit ran to its end.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("y", dist.Normal(z, 0.5), obs=y)
        >>> def guide(y):
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> fitted = ppl.SVI(guide=guide, steps=200, lr=0.1).fit(ppl.Program(model, torch.tensor(1.0)))
        >>> truth = torch.tensor(0.3 / 0.7).log() + 2.0          # log odds of the exact posterior
        >>> bool((fitted.params["logit"] - truth).abs() < 1e-2)
        True
    """

    program: Program
    guide: Any
    params: dict[str, Tensor]
    history: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict, repr=False)
    lanes: int = 16
    complete: bool = True

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Learnable parameters of the program at their fitted values, constrained."""
        return dict(self.program.parameters)

    def elbo(self, particles: int = 1024, generator: torch.Generator | None = None, seed: int = 0) -> Estimate:
        """The evidence lower bound and its Monte-Carlo standard error, both float64.

        Args:
            particles: draws it is estimated from.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
        """
        if particles < 2:
            raise OptionError(f"an ELBO with a standard error needs two particles or more, got {particles}")
        _, log_p, log_q, _ = self._draws(particles, generator or self._generator(seed))
        return _mean(log_p - log_q)

    def posterior(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
    ) -> Posterior:
        """Independent draws of the guide as a posterior, with the ELBO and k-hat that come with them.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws of one q.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
            cost: what the density evaluations are added to.
        """
        if draws < 1 or chains < 1:
            raise OptionError(f"draws and chains must be one or more, got draws={draws}, chains={chains}")
        cost = Cost() if cost is None else cost
        values, log_p, log_q, exact = self._draws(draws * chains, generator or self._generator(seed))
        cost.add(density_evals=draws * chains)
        log_weight = (log_p - log_q).double()
        elbo = _mean(log_weight)
        info = {
            "elbo": elbo.value,
            "elbo_stderr": elbo.stderr,
            "elbo_history": self.history,
            "pareto_k": _pareto_k(log_weight) if exact else torch.tensor(math.nan, dtype=torch.float64),
            "lp": log_p.reshape(chains, draws),
            "log_q": log_q.reshape(chains, draws),
        }
        return Posterior(
            draws={n: v.reshape(chains, draws, *v.shape[1:]) for n, v in values.items()},
            parameters=self.parameters,
            guide=self,
            cost=cost,
            info=info,
            observed=dict(self.program.observed_data()),
            attrs={"backend": "SVI", "complete": self.complete},
        )

    # Files -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same guide again."""
        meta = {
            "kind": "FittedProgram",
            "lanes": self.lanes,
            "complete": self.complete,
            "sites": {n: tuple(s.shape) for n, s in self.program.latents.items()},
        }
        tensors = {f"params.{n}": v for n, v in self.params.items()}
        tensors |= {f"parameters.{n}": v for n, v in self.parameters.items()}
        tensors |= {f"optimizer.{n}": v for n, v in self.optimizer.items()}
        return meta, {**tensors, "history": self.history}

    def save(self, path: str | Path) -> None:
        """Write the parameters to one safetensors file, with a checksum and without the programs."""
        meta, tensors = self.state()
        save_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, program: Program, guide: Any) -> FittedProgram:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was fitted to, or one with the same latents and other data.
            guide: the Pyro program that was fitted.

        Raises:
            CheckpointError: the file is damaged, or not of such a guide.
            ShapeError: the program has other latents.
        """
        tensors, meta = load_tensors(path)
        if not isinstance(meta, Mapping) or meta.get("kind") != "FittedProgram":
            raise CheckpointError(f"{path} does not hold a fitted guide program; give the path that its save wrote")
        sites = {n: tuple(s.shape) for n, s in program.latents.items()}
        if list(meta["sites"].items()) != list(sites.items()):
            raise ShapeError(f"{path} was fitted to the sites {meta['sites']}, but the program has {sites}")

        def part(prefix: str) -> dict[str, Tensor]:
            named = {n: v for n, v in tensors.items() if n.startswith(prefix)}
            return {n.removeprefix(prefix): v.to(program.device) for n, v in named.items()}

        return cls(
            with_parameters(program, part("parameters.")),
            guide,
            part("params."),
            tensors["history"],
            part("optimizer."),
            meta["lanes"],
            meta["complete"],
        )

    # Inside ----------------------------------------------------------------------------------------------------------

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.program.device).manual_seed(seed)

    def _draws(self, count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor, bool]:
        """Values of the latent sites, log p and log q of draws, and whether log p is that of all data."""
        program = self.program
        found: dict[str, Any] = {}

        def look(ctx: Context, model: Any, guide: Any) -> Tensor:
            draw = ctx.sim(guide)
            found["p"] = ctx.density(model, draw).log * ctx.engine.plan.scale
            found["q"] = reciprocal(draw.density, "the guide's density") * ctx.engine.plan.scale
            direct(ctx.density(model, draw), "the model's density")
            found["values"] = {n: draw[n] for n in program.latents}
            return found["p"] - found["q"]

        engine = Engine(look, program, self.guide, policy=lambda name, fn: _plainest(fn))
        params = {**engine.parameters, **self.params, **program.parameters}
        batches = list(_partition(program)) if program.subsampled else [{}]
        exact = bool(batches)
        seeds_from = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        parts = []
        for start in range(0, count, LANES_AT_ONCE):
            size = min(LANES_AT_ONCE, count - start)
            seeds: dict[Any, int] = {}
            engine._generator = torch.Generator(program.device).manual_seed((seeds_from + start) % 2**31)
            runs = []
            for indices in batches or _covers(program):
                with torch.no_grad(), seeded(engine._generator), settings(program.dtype, validate=False):
                    engine._value(Context(engine, params, size, seeds, dict(indices), {}))
                rows = [found[n].reshape(size, -1).sum(1) for n in ("p", "q")]
                runs.append((indices, dict(found["values"]), *rows))
            values = _assembled(program, runs, size)
            parts.append((values, torch.stack([r[2] for r in runs]).mean(0), torch.stack([r[3] for r in runs]).mean(0)))
        values = {n: torch.cat([p[0][n] for p in parts]) for n in parts[0][0]}
        return values, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), exact


def _plainest(fn: Any) -> str:
    """An estimator that any site has, for draws without gradients."""
    return "reparam" if fn.has_rsample else "reinforce"


def _covers(program: Program) -> list[dict[str, Tensor]]:
    """Batches that show every row of every plate at least once, each plate in step with the others."""
    lists = {}
    for plate, (shown, full) in program.subsampled.items():
        starts = [*range(0, full - shown, shown), full - shown]
        lists[plate] = [torch.arange(s, s + shown, device=program.device) for s in starts]
    most = max(len(v) for v in lists.values())
    return [{n: v[i % len(v)] for n, v in lists.items()} for i in range(most)]


def _assembled(program: Program, runs: list[Any], size: int) -> dict[str, Tensor]:
    """Site values with all rows of their subsampled plates."""
    out: dict[str, Tensor] = {}
    for name, site in program.latents.items():
        if not site.subsampled:
            out[name] = runs[0][1][name].expand(size, *site.shape)
            continue
        whole = out[name] = runs[0][1][name].new_zeros(size, *site.shape)
        for indices, values, *_ in runs:
            place = [torch.arange(n, device=whole.device) for n in (size, *site.shape)]
            for frame in site.frames:
                if frame.name in indices:
                    place[1 + len(site.shape) - site.event_dim + frame.dim] = indices[frame.name]
            whole[torch.meshgrid(*place, indexing="ij")] = values[name]
    return out


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
        for note in fit.engine.notes:
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
        if start is not None and start.optimizer:
            if start.optimizer["m"].shape != self.theta.shape:
                raise OptionError("cannot go on from a fit with other parameters; use the same guide and program")
            self.m, self.v = start.optimizer["m"].clone(), start.optimizer["v"].clone()
            self.updates = start.optimizer["updates"].clone()

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

    def step(self, step: int, monitor: Monitor) -> Tensor:
        """One step of Adam; returns the estimate of the objective before it."""
        from ppl.vi.svi import adam

        options = self.options
        theta = self.theta.detach().requires_grad_()
        with torch.enable_grad():
            value, surrogate = self.engine.surrogate(self._unpack(theta), options.particles, self.generator)
            if not surrogate.requires_grad:
                raise OptionError("the objective does not depend on any learnable parameter")
            (gradient,) = torch.autograd.grad(surrogate, theta)
        monitor.check_finite("gradient of the objective", gradient, step)
        self.history[step] = value
        self.updates = self.updates + 1
        self.theta, self.m, self.v = adam(
            self.theta, self.m, self.v, int(self.updates), gradient, options.learning_rate(step)
        )
        begin = round(options.steps * (1 - options.average))
        if options.average and step >= begin:
            self.average = self.average + (self.theta - self.average) / (step - begin + 1)
        return value

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
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        return {n: self.transforms[n](p.reshape(s)) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}


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

"""Stochastic variational inference: Adam on the evidence lower bound, with path gradients and fixed lanes.

    grad ELBO = E[ (grad_z log p(z, y) - grad_z log q(z)) dz/dphi ],   z = t(noise; phi)

The score term, grad_phi log q(z) at fixed z, has mean zero. Without it every single draw gives gradient zero once q is
the posterior; with it the entropy's gradient has no noise while q is far away. So it is kept first and left out later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import transform_to

from ppl.backend import Exactness, register
from ppl.errors import OptionError
from ppl.fit_door import open_fit
from ppl.flat import FlatDensity
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.vi.fitted import FittedGuide, bound_guide
from ppl.vi.fitted_base import with_parameters
from ppl.vi.full_data import draw_subsample
from ppl.vi.guides import Guide, MeanField
from ppl.vi.guides.guide import detached

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["SVI"]

PATH_AFTER = 0.3  # share of the steps that keep the score term, which cancels noise while q is narrow and misplaced
NATURAL = 5.0  # rate of natural gradients as a multiple of Adam's: in their coordinates all curvatures are about one
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # of Adam, Kingma & Ba (2015)
GUIDE, MODEL = "guide.", "model."


@register
@dataclass(frozen=True)
class SVI:
    """Fits a guide q(z) to the posterior by maximising the evidence lower bound; `run` is `fit` and draws of the guide.

    Learnable parameters of the model climb the same bound. Subsampled plates get fresh indices each step. Chains are
    independent fits, so that their disagreement shows what the optimiser left open.

    Args:
        guide: the family of q; or a Pyro program with the model's arguments, or `ppl.objectives.Marginal`.
        steps: gradient steps.
        particles: draws per step; they run as one batch.
        lr: learning rate of Adam at the start.
        decay: how the learning rate falls to `lr * lr_ratio`.
        lr_ratio: the last learning rate as a part of the first.
        natural: take natural gradients, at 5 `lr`, where the guide has them (`FullRank`, up to 256 dimensions):
            scales and correlations of the posterior then do not matter. Parameters of the model stay with Adam.
        path_gradient: leave out the score term of log q after the first steps ("sticking the landing").
        average: share of the last steps whose parameters are averaged; 0 keeps the last ones.
        patience: stop early when the mean ELBO of the last `patience` steps exceeds that of the `patience` before by
            no more than one standard error; None runs all steps.
        objective: what is maximised, such as `ppl.objectives.IWELBO(5)`, or a function of (ctx, model, guide); the
            evidence lower bound when None. `particles` are then independent copies of it. With an objective, or a guide
            that is a Pyro program, `natural` and `path_gradient` are not used (`ppl.objectives.StickingTheLanding`).
        estimators: gradient estimators of the guide's sites, `{site: "mvd"}` or a function of name and distribution;
            what the guide's `infer={"estimator": ...}` says, or a default, where it is silent.

    Raises:
        OptionError: an option is out of range.

    Source: Kucukelbir et al. (2017); path gradient: Roeder, Wu & Duvenaud (2017), equation 5 [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import SVI, Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), SVI(steps=300, lr=0.05), draws=500)
        >>> bool((posterior.sd("mu") - 0.5**0.5).abs() < 0.15)
        True
    """

    guide: Any = field(default_factory=MeanField)
    steps: int = 2000
    particles: int = 16
    lr: float = 0.02
    decay: Literal["cosine", "exponential", "none"] = "cosine"
    lr_ratio: float = 0.01
    natural: bool = True
    path_gradient: bool = True
    average: float = 0.0
    patience: int | None = None
    objective: Any = None
    estimators: Any = None

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ("steps",)
    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_posterior", "full_rank")
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        from ppl.objectives import Stochastic

        if isinstance(self.guide, type) or not (isinstance(self.guide, Guide | Stochastic) or callable(self.guide)):
            raise OptionError(
                "guide must be an object such as ppl.MeanField() or ppl.LowRank(8), or a Pyro program with the model's "
                f"arguments, got {self.guide!r}"
            )
        if self.objective is not None and (isinstance(self.objective, type) or not callable(self.objective)):
            raise OptionError(
                "objective must be an object such as ppl.objectives.IWELBO(5), or a function of (ctx, model, guide), "
                f"got {self.objective!r}"
            )
        if self.steps < 1 or self.particles < 1:
            raise OptionError(f"steps and particles must be one or more, got {self.steps} and {self.particles}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be positive and finite, got {self.lr}")
        if self.decay not in ("cosine", "exponential", "none"):
            raise OptionError(f'decay must be "cosine", "exponential" or "none", got {self.decay!r}')
        if not 0 < self.lr_ratio <= 1:
            raise OptionError(f"lr_ratio must lie in (0, 1], got {self.lr_ratio}")
        if not 0 <= self.average < 1:
            raise OptionError(f"average is a share of the steps, in [0, 1), got {self.average}")
        if self.patience is not None and self.patience < 10:
            raise OptionError(f"patience must be None or at least 10 steps, got {self.patience}")

    def __repr__(self) -> str:
        """Options by name; functions by theirs, so that a run is known again in another process."""
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            name = getattr(value, "__qualname__", None)
            parts.append(f"{f.name}={name if name is not None and callable(value) else value!r}")
        return f"SVI({', '.join(parts)})"

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit once per chain and draw from each fit; see `ppl.infer`."""
        parts: list[Posterior] = []
        for i in range(chains):
            with monitor.section(f"chain {i}"):
                fitted = self.fit(program, generator=generator, monitor=monitor)
                parts.append(fitted.posterior(draws, 1, generator, cost=monitor.cost))
            if monitor.interrupted:
                break
        best = max(parts, key=lambda part: float(part.info["elbo"]))
        if best.info["pareto_k"] > 0.7:
            monitor.note(
                f"k-hat of the importance weights is {float(best.info['pareto_k']):.2f}, above 0.7: the guide misses "
                "part of the posterior; try FullRank(), LowRank() or Flow(), more steps, or NUTS"
            )
        if len(parts) == 1:
            return best
        same = {n for n in best.info if len({p.info[n].shape for p in parts}) == 1}
        info = {n: torch.stack([p.info[n] for p in parts]) for n in same - {"lp", "log_q"}}
        info |= {n: torch.cat([p.info[n] for p in parts]) for n in ("lp", "log_q")}
        return Posterior(
            draws={n: torch.cat([p.draws[n] for p in parts]) for n in best.draws},
            parameters=best.parameters,
            guide=best.guide,
            info=info,
            attrs={"complete": len(parts) == chains and all(p.complete for p in parts)},
        )

    def fit(
        self,
        program: Program,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
        start: FittedGuide | None = None,
    ) -> FittedGuide:
        """Maximise the evidence lower bound.

        Args:
            program: the model and its data.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C; a quiet one when None.
            start: a fit to go on from, of this program or of one with the same latents and other data. The optimiser's
                moments are kept, the learning rate starts again.

        Raises:
            NotFiniteError: the density or its gradient is not finite at a draw of the guide.
            OptionError: `start` is of another family.
        """
        generator, monitor = open_fit("SVI", program, generator, seed, monitor)
        if self.objective is not None or not isinstance(self.guide, Guide):
            from ppl.objectives.fit import fit_objective

            return fit_objective(self, program, generator, monitor, start)  # type: ignore[return-value]
        flat = program.flat()
        guide = bound_guide(self.guide, flat)
        fit = _Fit(self, program, flat, guide, start, generator)
        finished = monitor.finished("fit")
        saved = finished if finished is not None else monitor.resume()
        first = 0
        if saved is not None:
            first = self.steps if finished is not None else int(saved.pop("step"))
            fit.load(saved)
        if first < self.steps:
            names = tuple(program.parameters)
            example = torch.zeros(self.particles, flat.dim, dtype=program.dtype, device=program.device)
            flat.prepare(example, self.steps - first, params=names)
            for step in monitor.steps(self.steps, "fit", start=first):
                elbo = fit.step(step, monitor)
                monitor.cost.add(gradient_evals=self.particles)
                monitor.report(elbo=elbo)
                monitor.checkpoint(step + 1, fit.state)
                if self._settled(fit.history, step + 1):
                    monitor.note(f"stopped after {step + 1} of {self.steps} steps: the ELBO has settled")
                    break
            monitor.finish("fit", fit.state())
        return fit.result(complete=not monitor.interrupted)

    def _settled(self, history: Tensor, done: int) -> bool:
        if self.patience is None or done < 2 * self.patience or done % self.patience:
            return False
        before, after = history[done - 2 * self.patience : done].split(self.patience)
        stderr = ((before.var() + after.var()) / self.patience).sqrt()
        return bool(after.mean() - before.mean() <= stderr)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        part = step / max(self.steps - 1, 1)
        if self.decay == "cosine":
            return self.lr * (self.lr_ratio + (1 - self.lr_ratio) * 0.5 * (1 + math.cos(math.pi * part)))
        return self.lr * (self.lr_ratio**part if self.decay == "exponential" else 1.0)


class _Fit:
    """The state of one fit: all parameters in one vector, Adam's moments, the running average, the history."""

    def __init__(
        self,
        options: SVI,
        program: Program,
        flat: FlatDensity,
        guide: Guide,
        start: FittedGuide | None,
        generator: torch.Generator,
    ) -> None:
        self.options, self.program, self.flat, self.guide, self.generator = options, program, flat, guide, generator
        constraints = program.parameter_constraints
        self.transforms = {n: transform_to(constraints[n]) for n in program.parameters}
        source = program if start is None else start.program
        own = _start(guide, flat, generator) if start is None else start.params
        model = {n: self.transforms[n].inv(source.parameters[n]) for n in program.parameters}
        named = {**{GUIDE + n: v for n, v in own.items()}, **{MODEL + n: v for n, v in model.items()}}
        self.shapes = {n: v.shape for n, v in named.items()}
        self.theta = torch.cat([v.detach().reshape(-1).to(program.dtype) for v in named.values()])
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.updates = torch.zeros((), dtype=torch.int64)
        self.average = torch.zeros_like(self.theta)
        self.history = torch.full((options.steps,), math.nan, dtype=torch.float64, device=program.device)
        self.near = start is not None and int(start.optimizer["updates"]) > 0
        self.natural = options.natural and flat.dim <= getattr(guide, "natural_limit", -1)
        if start is not None:
            self._continue(start)
        # With independent coordinates, log q of the local latents is subsampled as log p is.
        self.each = getattr(guide, "log_prob_each", None) if program.subsampled else None

    def _continue(self, start: FittedGuide) -> None:
        if type(start.guide) is not type(self.guide) or start.optimizer["m"].shape != self.theta.shape:
            raise OptionError(
                f"cannot go on from a fit of {start.guide!r} with {self.guide!r} on this program; use the same guide "
                "and a program with the same latents"
            )
        self.m, self.v = start.optimizer["m"].clone(), start.optimizer["v"].clone()
        self.updates = start.optimizer["updates"].clone()

    def state(self) -> dict[str, Tensor]:
        """All that a resumed fit needs."""
        names = ("theta", "m", "v", "updates", "average", "history")
        return {n: getattr(self, n) for n in names}

    def load(self, saved: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in saved.items():
            setattr(self, name, value)

    def step(self, step: int, monitor: Monitor) -> Tensor:
        """One step of Adam; returns the ELBO estimate before it."""
        options, program = self.options, self.program
        noise = self.guide.noise(options.particles, self.flat.dim, program.dtype, self.generator)
        subsample = draw_subsample(program, self.generator)
        theta = self.theta.requires_grad_()
        with torch.enable_grad():
            own, parameters = self._unpack(theta)
            z, log_q = self._draw(own, noise, subsample, self._path(step))
        log_p, grad_z, grads = self.flat.value_and_grads(
            z, params={n: p.detach() for n, p in parameters.items()} or None, subsample=subsample
        )
        with torch.enable_grad():
            surrogate = ((z * grad_z).sum(1) - log_q).mean()
            for name, grad in grads.items():
                surrogate = surrogate + (parameters[name] * grad).sum() / options.particles
            (gradient,) = torch.autograd.grad(surrogate, theta)
        self.theta = theta.detach()
        elbo = (log_p - log_q.detach()).double().mean()
        monitor.check_finite("log density of the program at the guide's draws", log_p, step)
        monitor.check_finite("gradient of the ELBO", gradient, step)
        self.history[step] = elbo
        rate = options.learning_rate(step)
        self._adam(gradient, rate)
        if self.natural:
            self._replace(self.guide.natural_step(detached(own), noise, grad_z, min(NATURAL * rate, 0.5)))  # type: ignore[attr-defined]
        begin = round(options.steps * (1 - options.average))
        if options.average and step >= begin:
            self.average = self.average + (self.theta - self.average) / (step - begin + 1)
        return elbo

    def result(self, complete: bool) -> FittedGuide:
        """The fitted guide at the last or at the averaged parameters."""
        done = int(torch.isfinite(self.history).sum())
        averaged = self.options.average > 0 and done > round(self.options.steps * (1 - self.options.average))
        with torch.no_grad():
            own, parameters = self._unpack(self.average if averaged else self.theta)
        return FittedGuide(
            program=with_parameters(self.program, {n: v.clone() for n, v in parameters.items()}),
            guide=self.guide,
            params={n: v.clone() for n, v in own.items()},
            history=self.history[:done].cpu(),
            optimizer={"m": self.m, "v": self.v, "updates": self.updates},
            lanes=self.options.particles,
            complete=complete,
        )

    def _path(self, step: int) -> bool:
        """Whether a step leaves out the score term; a fit that goes on from another does from its start."""
        return self.options.path_gradient and (self.near or step >= PATH_AFTER * self.options.steps)

    def _draw(
        self, own: dict[str, Tensor], noise: Tensor, subsample: dict[str, Tensor], path: bool
    ) -> tuple[Tensor, Tensor]:
        """Draws z and log q, whose gradient is the one the options ask for."""
        z, log_q = self.guide.rsample_and_log_prob(own, noise, path=path)
        if self.each is None:
            return z, log_q
        kept = {n: v.detach() for n, v in own.items()} if path else own
        return z, (self._weight(subsample) * self.each(kept, z)).sum(1)

    def _weight(self, subsample: dict[str, Tensor]) -> Tensor:
        """(dim,) what log p counts each coordinate for: full / shown where its plates show it, else 0."""
        weight = self.theta.new_ones(self.flat.dim)
        for name, leaf in self.flat.layout.leaves.items():
            site = self.program.sites[name]
            part = weight[leaf.start : leaf.stop].view(leaf.shape)
            batch = len(site.shape) - site.event_dim
            for frame in site.frames:
                if frame.name in subsample:
                    shown, full = self.program.subsampled[frame.name]
                    scale = part.new_zeros(full)
                    scale[subsample[frame.name]] = full / shown
                    axis = batch + frame.dim
                    part.mul_(scale.reshape(-1, *[1] * (part.ndim - axis - 1)))
        return weight

    def _unpack(self, theta: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Guide parameters, and constrained parameters of the program."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        named = {n: p.reshape(shape) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}
        own = {n.removeprefix(GUIDE): v for n, v in named.items() if n.startswith(GUIDE)}
        model = {n: self.transforms[n](named[MODEL + n]) for n in self.program.parameters}
        return own, model

    def _replace(self, own: dict[str, Tensor]) -> None:
        """Put the guide's parameters into the vector."""
        named = dict(zip(self.shapes, self.theta.split([s.numel() for s in self.shapes.values()]), strict=True))
        named |= {GUIDE + n: v.reshape(-1) for n, v in own.items()}
        self.theta = torch.cat([named[n] for n in self.shapes])

    def _adam(self, gradient: Tensor, lr: float) -> None:
        """One step uphill."""
        self.updates = self.updates + 1
        self.theta, self.m, self.v = adam(self.theta, self.m, self.v, int(self.updates), gradient, lr)


def adam(theta: Tensor, m: Tensor, v: Tensor, count: int, gradient: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step uphill, the `count`-th: parameters and both moments after it."""
    m = BETA_1 * m + (1 - BETA_1) * gradient
    v = BETA_2 * v + (1 - BETA_2) * gradient.square()
    mean, square = m / (1 - BETA_1**count), v / (1 - BETA_2**count)
    return theta + lr * mean / (square.sqrt() + EPSILON), m, v


def _start(guide: Guide, flat: FlatDensity, generator: torch.Generator) -> dict[str, Tensor]:
    """The guide's own start, its centre moved to a point with a finite density where zero has none."""
    params = guide.init(flat.dim, flat.program.dtype, flat.program.device, generator)
    if "loc" in params:
        value, grad = flat.log_density_and_grad(params["loc"][None])
        if not bool(torch.isfinite(value).all() & torch.isfinite(grad).all()):
            params["loc"] = flat.initial(1, generator)[0]
    return params

"""One fit of a guide: Adam on the evidence lower bound, with path gradients and fixed lanes.

    grad ELBO = E[ (grad_z log p(z, y) - grad_z log q(z)) dz/dphi ],   z = t(noise; phi)

The score term, grad_phi log q(z) at fixed z, has mean zero. Without it every single draw gives gradient zero once q is
the posterior; with it the entropy's gradient has no noise while q is far away. So it is kept first and left out later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import transform_to

from ppl.errors import OptionError
from ppl.flat import FlatDensity
from ppl.monitor import Monitor
from ppl.vi.fitted import FittedGuide
from ppl.vi.fitted_base import with_parameters
from ppl.vi.full_data import draw_subsample
from ppl.vi.guides import Guide
from ppl.vi.guides.guide import detached, with_program

if TYPE_CHECKING:
    from ppl.program import Program
    from ppl.vi.svi import SVI

__all__ = ["Ascent", "adam"]

PATH_AFTER = 0.3  # share of the steps that keep the score term, which cancels noise while q is narrow and misplaced
NATURAL = 5.0  # rate of natural gradients as a multiple of Adam's: in their coordinates all curvatures are about one
TRUST, TRUST_STEPS = 4.0, 100  # bound on the noise of natural steps at the start, and how soon it has come down to one
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # of Adam, Kingma & Ba (2015)
GUIDE, MODEL = "guide.", "model."


class Ascent:
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
        self.near = getattr(guide, "near", False) or (start is not None and int(start.optimizer["updates"]) > 0)
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
            z, log_q = self._draw(with_program(self.guide, own, parameters), noise, subsample, self._path(step))
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
            natural, trust = min(NATURAL * rate, 0.5), _trust(step) * rate / options.lr
            self._replace(self.guide.natural_step(detached(own), noise, grad_z, natural, trust))  # type: ignore[attr-defined]
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
        draw = getattr(self.guide, "rsample_and_cost", self.guide.rsample_and_log_prob)
        z, log_q = draw(own, noise, path=path)
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


def _trust(step: int) -> float:
    """How far noise may move the covariance: further in the first steps, which have a long way to go."""
    return 1 + (TRUST - 1) * max(0.0, 1 - step / TRUST_STEPS)


def adam(
    theta: Tensor, m: Tensor, v: Tensor, count: int, gradient: Tensor, lr: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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

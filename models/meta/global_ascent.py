"""The steps of a global law: what one fit of `NIWMeta` knows, and how a batch of episodes changes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.meta.distributed import Workers
from models.meta.episodes import Points
from models.meta.fitted_meta import FittedMeta
from models.meta.local import close, second_moment
from models.meta.niw_math import GlobalLaw, NormalInverseWishart
from models.meta.program import Hierarchy
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.vi.ascent import adam

if TYPE_CHECKING:
    from models.meta.niw import NIWMeta

__all__ = ["GlobalAscent"]


class GlobalAscent:
    """The state of one fit: unconstrained numbers of the global law, Adam's moments, the history."""

    def __init__(self, options: NIWMeta, hierarchy: Hierarchy, total: float, start: FittedMeta | None) -> None:
        if not (math.isfinite(total) and total > 0):
            raise OptionError(f"total is a number of episodes and must be positive, got {total!r}")
        self.options, self.hierarchy, self.total = options, hierarchy, total
        self.workers, self.told = Workers(), False
        prior = hierarchy.prior
        self.full = isinstance(prior, NormalInverseWishart)
        count, df = prior.count + total, prior.df + total
        # The same expected covariance as the prior's, at the counts of the posterior.
        law = prior.replaced(prior.mean, count, df, prior.scale * df / prior.df)
        learned = getattr(hierarchy.likelihood, "learned", False)
        if learned and (options.expectation == "quadratic" or options.update == "natural"):
            raise OptionError('a learned sigma needs update="gradient" and expectation="draw"')
        sigma = prior.mean.new_tensor(hierarchy.likelihood.sigma) if learned else None  # type: ignore[attr-defined]
        if start is not None:
            if type(start.law) is not type(prior) or start.law.dim != prior.dim:
                raise OptionError(f"cannot go on from a fit of {start.law.dim} coordinates; this one has {prior.dim}")
            law = prior.replaced(start.law.mean, count, df, start.law.scale * df / start.law.df)
            sigma = start.sigma if learned else None
        if options.counts == "learned":
            law = prior.replaced(law.mean, prior.count, prior.df, law.scale * prior.df / law.df)
        raw = {"mean": law.mean.clone(), "scale": self._raw_scale(law.scale)}
        if learned:
            assert sigma is not None
            raw["log_sigma"] = sigma.log()
        if options.counts == "learned":
            raw["log_count"] = prior.count.log()
            raw["log_df"] = (prior.df - self._least()).log()
        self.shapes = {name: value.shape for name, value in raw.items()}
        self.theta = torch.cat([value.reshape(-1) for value in raw.values()])
        rates = {"scale": options.lr if options.scale_lr is None else options.scale_lr}
        self.rates = torch.cat([value.new_full((value.numel(),), rates.get(n, options.lr)) for n, value in raw.items()])
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.updates = torch.zeros((), dtype=torch.int64)
        self.average = torch.zeros_like(self.theta)
        self.history = torch.full((options.steps,), math.nan, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed fit needs."""
        return {name: getattr(self, name) for name in ("theta", "m", "v", "updates", "average", "history")}

    def load(self, saved: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in saved.items():
            setattr(self, name, value.to(getattr(self, name).device))

    def step(self, step: int, points: Points, generator: torch.Generator, monitor: Monitor) -> float:
        """One step of the global law; returns the estimate of the evidence bound before it."""
        options, hierarchy, run = self.options, self.hierarchy, generator
        shown = len(points.x)
        points, generator, share = self.workers.share(points, run)
        theta = self.theta.detach().requires_grad_(options.update == "gradient")
        with torch.set_grad_enabled(options.update == "gradient"):
            law, sigma = self._law(theta)
            fixed = None if sigma is None else sigma.detach()
            form = options.local(hierarchy, law, points, fixed, generator)
            monitor.check_finite("quadratic fit of the episodes", form.natural, step)
            if options.expectation == "quadratic" and not form.natural.requires_grad:
                with torch.no_grad():  # q_i is the minimum of these terms: moving it with the law changes no slope
                    local = close(form, law.mean, law.precision())
                    loss = form.expected(local)
            elif options.expectation == "quadratic":
                local = close(form, law.mean, law.precision())
                loss = form.expected(local)
            else:
                local = close(form, law.mean, law.precision())
                loss = hierarchy.losses(local.draw(options.draws, generator), points, sigma).mean(0)
            each = loss + law.expected_kl(local.mean, local.covariance, local.log_det)
            objective = share * (each.mean() + law.kl(hierarchy.prior) / self.total)
        monitor.cost.add(likelihood_evals=len(points.x) * options.draws)
        if options.update == "natural":
            moment = second_moment(local.mean, local.covariance, self.full)
            found = [share * local.mean.mean(0), share * moment]
        else:
            found = list(torch.autograd.grad(objective, theta))
        objective, stop, *found = self.workers.sums(objective, theta.new_tensor(float(monitor.interrupted)), *found)
        if generator is not run:
            run.set_state(generator.get_state())
            if stop > 0:
                self.told = True
                monitor.stop("another worker was stopped")
        monitor.check_finite("objective of the global law", objective, step)
        if options.update == "natural":
            self._natural(step, law, found[0], found[1], shown)
        else:
            (gradient,) = found
            monitor.check_finite("gradient of the global law", gradient, step)
            self.updates = self.updates + 1
            part = 0.5 * (1 + math.cos(math.pi * step / max(options.steps - 1, 1)))
            rate = self.rates * (0.01 + 0.99 * part)
            self.theta, self.m, self.v = adam(theta.detach(), self.m, self.v, int(self.updates), -gradient, rate)
        begin = round(options.steps * (1 - options.average))
        if step >= begin:
            self.average = self.average + (self.theta - self.average) / (step - begin + 1)
        elbo = -self.total * float(objective.detach())
        self.history[step] = elbo
        return elbo

    def _natural(self, step: int, law: GlobalLaw, mean: Tensor, moment: Tensor, shown: int) -> None:
        """Part of the way to the coordinate optimum of the batch, in natural parameters (l m, V + l m m')."""
        options, total = self.options, self.total
        goal = self.hierarchy.prior.updated(total, mean, moment)
        size = 1.0 if shown >= total else (1 + step / options.delay) ** -options.forgetting

        def second(law: GlobalLaw) -> Tensor:
            square = torch.outer(law.mean, law.mean) if self.full else law.mean.square()
            return law.scale + law.count * square

        centre = law.mean + size * (goal.mean - law.mean)
        both = second(law) + size * (second(goal) - second(law))
        square = torch.outer(centre, centre) if self.full else centre.square()
        raw = {"mean": centre, "scale": self._raw_scale(both - goal.count * square)}
        self.theta = torch.cat([raw[name].reshape(-1) for name in self.shapes])

    def _law(self, theta: Tensor) -> tuple[GlobalLaw, Tensor | None]:
        """The global law, and sigma where it is learned."""
        prior = self.hierarchy.prior
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        raw = {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        scale = raw["scale"].exp() if not self.full else _gram(raw["scale"])
        count, df = prior.count + self.total, prior.df + self.total
        if "log_count" in raw:
            count, df = raw["log_count"].exp(), raw["log_df"].exp() + self._least()
        sigma = raw["log_sigma"].exp() if "log_sigma" in raw else None
        return prior.replaced(raw["mean"], count, df, scale), sigma

    def _raw_scale(self, scale: Tensor) -> Tensor:
        """The inverse of what `_law` does to the scale."""
        if not self.full:
            return scale.log()
        lower = torch.linalg.cholesky(scale)
        return lower.tril(-1) + torch.diag(lower.diagonal().log())

    def _least(self) -> float:
        """Degrees of freedom are above this."""
        return self.hierarchy.prior.dim - 1 if self.full else 0

    def result(self, complete: bool) -> FittedMeta:
        """The fit at the averaged numbers, or at the last ones where none were averaged."""
        done = int(torch.isfinite(self.history).sum())
        averaged = done > round(self.options.steps * (1 - self.options.average))
        with torch.no_grad():
            law, sigma = self._law(self.average if averaged else self.theta.detach())
        return FittedMeta(
            self.hierarchy,
            law,
            sigma,
            self.options.local,
            self.options.expectation,
            self.total,
            self.history[:done],
            complete,
        )


def _gram(raw: Tensor) -> Tensor:
    """L L' with L below the diagonal and exp of it on it."""
    lower = raw.tril(-1) + torch.diag(raw.diagonal().exp())
    return lower @ lower.mT

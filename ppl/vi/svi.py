"""Stochastic variational inference: Adam on the evidence lower bound of a guide, or on any objective.

`ppl.vi.ascent` holds the gradient and the state of one fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import OptionError
from ppl.fit_door import ContinuedFitDoor
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.vi.ascent import Ascent
from ppl.vi.fitted import FittedGuide, bound_guide
from ppl.vi.guides import Guide, MeanField

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.program import Program

__all__ = ["SVI", "run_fits"]


@register
@dataclass(frozen=True)
class SVI(ContinuedFitDoor):
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
        return run_fits(self, program, draws=draws, chains=chains, generator=generator, monitor=monitor)

    def _fitted(
        self, program: Program, generator: torch.Generator, monitor: Monitor, start: FittedGuide | None
    ) -> FittedGuide:
        """Maximise the evidence lower bound, or the objective."""
        if self.objective is not None or not isinstance(self.guide, Guide):
            from ppl.objectives.fit import fit_objective

            return fit_objective(self, program, generator, monitor, start)  # type: ignore[return-value]
        flat = program.flat()
        guide = bound_guide(self.guide, flat)
        for remark in getattr(guide, "remarks", ()):
            monitor.note(remark)
        return self.climb(program, flat, guide, generator, monitor, start)

    def climb(
        self,
        program: Program,
        flat: FlatDensity,
        guide: Guide,
        generator: torch.Generator,
        monitor: Monitor,
        start: FittedGuide | None = None,
    ) -> FittedGuide:
        """Fit a guide that is bound already, on a density that may stand in for the program's own.

        Args:
            program: whose learned parameters climb too.
            flat: the density, with `dim`, `value_and_grads` and `prepare`.
            guide: the family of q.
            generator: source of all randomness.
            monitor: progress, checkpoints, Ctrl-C.
            start: a fit to go on from.
        """
        fit = Ascent(self, program, flat, guide, start, generator)
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


def run_fits(
    backend: Any, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
) -> Posterior:
    """One fit per chain of a backend whose `fit` returns a fitted guide, and draws from each."""
    parts: list[Posterior] = []
    for i in range(chains):
        with monitor.section(f"chain {i}"):
            fitted = backend.fit(program, generator=generator, monitor=monitor)
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

r"""RED-diff: fit q(x_0) by stochastic gradients that need the denoiser but not its derivative.

As published, q = N(mu, 0), x = mu + s eps and per draw, with m data and d entries,

    loss = ||y - A(mu)||^2 / (2 m) + lambda w(s) <stop(eps_hat - eps), mu> / d,      eps_hat - eps = (mu - D(x, s)) / s

With the scale of the likelihood, q = N(mu, diag(sd^2)) and the loss is  E_q[-log p(y | x_0)] + KL(q_s || p_s),
s descending, where q_s and p_s are q and the prior with noise s added. With u^2 = s^2 + sd^2 and x = mu + u eps,

    grad_mu KL = E[score_q - score_p],   grad_sd KL = E[(score_q - score_p) sd eps / u],
    score_q = -eps / u,                  score_p = (D(x, s) - x) / s^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inverse.guides.base import likelihood_gradient
from inverse.guides.residual import misfit, residual_fn
from inverse.problem import DiffusionProblem
from inverse.samplers.guided import check_steps, residual_chi
from inverse.samplers.lanes import Noise, check_chunk, run_lanes
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Schedule

__all__ = ["WEIGHTINGS", "REDDiff"]

WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "sqrt": math.sqrt,
    "square": lambda s: s * s,
    "log": math.log1p,
    "trunc_linear": lambda s: min(s, 1.0),
    "power2over3": lambda s: s ** (2 / 3),
    "const": lambda s: 1.0,
}
"""w(s) of the published loss, in the noise-to-signal ratio s."""


@register
@dataclass(frozen=True)
class REDDiff:
    r"""Variational inference with the denoiser as the gradient of the prior; one call per step, no vjp.

    Published form: a regularised point estimate. Every draw is an optimisation of its own with its own noise, so that
    the spread of the draws is that of the optimiser, not of the posterior. Both terms are means over their entries:
    lambda means another thing for every number of data, and the noise level of the data does not enter.

    With `scale="likelihood"`: each draw fits a Gaussian with independent entries to -log p(y | x) + KL at the current
    level and draws once from it. At a low level the loss is the negative evidence bound. [derived] Its optimum is the
    exact posterior for a Gaussian prior with independent entries and data that see entries one by one, up to
    O(sigma_min^2); otherwise the best Gaussian of that form in reverse KL, which is too narrow along correlated
    directions and settles in one mode. An sd moves only once the level is below it: above, the optimum is sd = 0.

    Args:
        steps: steps of the optimiser, one noise level each.
        lr: of Adam with betas (0.9, 0.99), in the prior's units; 0.1 is for data in [-1, 1]. Constant in the published
            form; with the scale of the likelihood it falls to zero linearly, so that the noise of the steps does too.
        lam: lambda of the published form.
        weighting: w of the published form, a name in `WEIGHTINGS`.
        scale: "published" or "likelihood".
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Source: Mardani et al. (2023), algorithm 1, and NVlabs/RED-diff [read]; scale="likelihood" [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.ones(2)), REDDiff(steps=50), draws=3)
        >>> posterior["x"].shape
        torch.Size([1, 3, 2])
    """

    steps: int = 1000
    lr: float = 0.1
    lam: float = 0.25
    weighting: str = "linear"
    scale: Literal["published", "likelihood"] = "published"
    schedule: Schedule | None = None
    chunk: int | None = None

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr must be positive, got {self.lr}")
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise OptionError(f"lam must be zero or more, got {self.lam}")
        if self.weighting not in WEIGHTINGS:
            raise OptionError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}")
        if self.scale not in ("published", "likelihood"):
            raise OptionError(f'scale must be "published" or "likelihood", got {self.scale!r}')

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Optimise all draws side by side."""
        problem = DiffusionProblem.of(program)
        with torch.no_grad(), problem.counting(monitor.cost):
            kind = _Published if self.scale == "published" else _Variational
            x, complete = run_lanes(
                kind(self, problem, monitor.cost),
                problem,
                draws=draws,
                chains=chains,
                chunk=self.chunk,
                generator=generator,
                monitor=monitor,
                label="optimising",
            )
            results = problem.results(x)
        return Posterior(draws=results, info=residual_chi(problem, x), attrs={"complete": complete})


State = dict[str, Tensor]


def _adam(state: State, name: str, gradient: Tensor, lr: float, step: int) -> State:
    """One step of Adam on one entry of a state, its moments included; every lane by itself."""
    beta, gamma, eps = 0.9, 0.99, 1e-8
    first = beta * state[f"{name}.first"] + (1 - beta) * gradient
    second = gamma * state[f"{name}.second"] + (1 - gamma) * gradient.square()
    scale = (second / (1 - gamma ** (step + 1))).sqrt() + eps
    value = state[name] - lr / (1 - beta ** (step + 1)) * first / scale
    return {name: value, f"{name}.first": first, f"{name}.second": second}


def _begun(name: str, value: Tensor) -> State:
    return {name: value, f"{name}.first": torch.zeros_like(value), f"{name}.second": torch.zeros_like(value)}


class _Levels:
    """What both forms share: noise levels and the prior."""

    def __init__(self, options: REDDiff, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        prior = problem.prior
        if options.schedule is None:
            grid = prior.grid(prior.sigma_max, problem.lowest_level, options.steps)
        else:
            grid = options.schedule.grid(options.steps)
        self.levels = [float(s) for s in grid[:-1]]

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        return len(self.levels)

    def _blank(self, lanes: int) -> Tensor:
        """What the prior alone expects: the denoised point at the first level, from its middle."""
        zero = torch.zeros(lanes, *self.problem.shape, dtype=self.problem.dtype, device=self.problem.device)
        start = self.problem.prior.start(zero, self.levels[0])
        return self.problem.prior.denoise(start, self.levels[0])


class _Published(_Levels):
    """Point estimates, all weights as published."""

    def __init__(self, options: REDDiff, problem: DiffusionProblem, cost: Cost) -> None:
        super().__init__(options, problem, cost)
        self._residual = residual_fn(problem)

    def begin(self, lanes: int, noise: Noise) -> State:
        """mu = A^+ y, or what the prior expects where A has no pseudo-inverse."""
        likelihood = self.problem.likelihood
        gaussian = likelihood.gaussian if likelihood.is_gaussian else None
        if gaussian is None or gaussian.stddev is None:
            return _begun("x", self._blank(lanes))
        mu = gaussian.measured.pinv(gaussian.data * gaussian.stddev).to(self.problem.device, self.problem.dtype)
        return _begun("x", mu.expand(lanes, *self.problem.shape).clone())

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam."""
        mu, s = state["x"], self.levels[step]
        eps = noise.normal(self.problem.shape)
        denoised = self.problem.prior.denoise(mu + s * eps, s)
        weight = self.options.lam * WEIGHTINGS[self.options.weighting](s) / self.problem.shape.numel()
        _, gradient = misfit(self._residual, mu)
        self.cost.likelihood_evals += len(mu)
        count = sum(data.numel() for data in self.problem.program.observed_data().values())
        return _adam(state, "x", gradient / count + weight * (mu - denoised) / s, self.options.lr, step)

    def end(self, state: State, noise: Noise) -> Tensor:
        """The points."""
        return state["x"]


class _Variational(_Levels):
    """Gaussians with independent entries, at the scale of the likelihood."""

    def begin(self, lanes: int, noise: Noise) -> State:
        """What the prior expects, and its widest standard deviation."""
        mu = self._blank(lanes)
        return _begun("x", mu) | _begun("log_sd", torch.full_like(mu, math.log(self.problem.prior.data_std)))

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam on mu and log sd."""
        mu, sd, s = state["x"], state["log_sd"].exp(), self.levels[step]
        d_mu, d_sd = self.prior_gradient(mu, sd, s, noise.normal(self.problem.shape))
        l_mu, l_sd = self.likelihood_gradient(mu, sd, noise.normal(self.problem.shape))
        lr = self.options.lr * (1 - step / self.steps)
        widths = _adam(state, "log_sd", (d_sd + l_sd) * sd, lr, step)
        # At a level above sd the prior is flatter than the likelihood makes up for, and sd would fall to zero.
        moving = sd >= s
        return _adam(state, "x", d_mu + l_mu, lr, step) | {
            name: torch.where(moving, value, state[name]) for name, value in widths.items()
        }

    def prior_gradient(self, mu: Tensor, sd: Tensor, s: float, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased gradients of KL(q_s || p_s) in mu and sd."""
        u = (s**2 + sd.square()).sqrt()
        x = mu + u * eps
        gap = -eps / u - (self.problem.prior.denoise(x, s) - x) / s**2
        return gap, gap * sd * eps / u

    def likelihood_gradient(self, mu: Tensor, sd: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased gradients of E_q[-log p(y | x_0)], from an antithetic pair."""
        _, up = likelihood_gradient(self.problem, mu + sd * eps, self.cost)
        _, down = likelihood_gradient(self.problem, mu - sd * eps, self.cost)
        return -(up + down) / 2, -(up - down) / 2 * eps

    def end(self, state: State, noise: Noise) -> Tensor:
        """One draw from every fitted Gaussian."""
        return state["x"] + state["log_sd"].exp() * noise.normal(self.problem.shape)

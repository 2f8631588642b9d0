r"""RED-diff: fit q(x_0) by stochastic gradients that need the denoiser but not its derivative.

As published, q = N(mu, 0), x = mu + s eps and per draw, with m data and d entries,

    loss = ||y - A(mu)||^2 / (2 m) + lambda w(s) <stop(eps_hat - eps), mu> / d,      eps_hat - eps = (mu - D(x, s)) / s

With the scale of the likelihood the loss is  E_q[-log p(y | x_0)] + KL(q_s || p_s): see `red_diff_gaussian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from inverse.guides.residual import misfit, residual_fn
from inverse.problem import DiffusionProblem
from inverse.samplers.door import TrajectorySampler
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import Method, Noise, check_chunk
from inverse.variational.red_diff_gaussian import Diagonal, LowRankFit, Point
from inverse.variational.red_diff_levels import Levels, State, adam, begun
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
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

SMALLEST = 0.03  # singular values below this share of the largest are left out of A^+, as in the authors' operators


@register
@dataclass(frozen=True)
class REDDiff(TrajectorySampler):
    r"""Variational inference with the denoiser as the gradient of the prior; one call per step, no vjp.

    Published form: a regularised point estimate. Every draw is an optimisation of its own with its own noise, so that
    the spread of the draws is that of the optimiser, not of the posterior. Both terms are means over their entries:
    lambda means another thing for every number of data, and the noise level of the data does not enter. The start is
    A^+ y without singular values below 0.03 of the largest.

    With `scale="likelihood"`: each draw fits a Gaussian to -log p(y | x) + KL at the current level and draws once from
    it. At a low level the loss is the negative evidence bound. [derived] Its optimum is the exact posterior, up to
    O(sigma_min^2), for a Gaussian prior and linear Gaussian data where the posterior covariance is of the family's
    form: independent entries for "diagonal", a diagonal plus `rank` directions for "low_rank". Otherwise it is the best
    Gaussian of that form in reverse KL, which is too narrow along directions that it cannot correlate, and settles in
    one mode. A width moves only once the level is below it: above, the optimum is zero. Each draw sees one noise per
    step, so many directions take many steps: with 4 entries the variance was exact to 2 % after 1000 steps, with 16
    and rank 12 it was still 1.5 times the truth after 3000. `ScorePriorVI` fits one q for all draws.

    Args:
        steps: steps of the optimiser, one noise level each.
        lr: of Adam with betas (0.9, 0.99), in the prior's units; 0.1 is for data in [-1, 1]. Constant in the published
            form; with the scale of the likelihood it falls to zero linearly, so that the noise of the steps does too.
        lam: lambda of the published form.
        weighting: w of the published form, a name in `WEIGHTINGS`.
        scale: "published" or "likelihood".
        covariance: "none", "diagonal" or "low_rank"; None takes "none" in the published form, which has no other, and
            "diagonal" at the scale of the likelihood.
        rank: directions of "low_rank".
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Source: Mardani et al. (2023), algorithm 1, and NVlabs/RED-diff [read]; scale="likelihood" [derived].

    Example:
        >>> import ppl, torch, pyro, pyro.distributions as dist
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
    covariance: Literal["none", "diagonal", "low_rank"] | None = None
    rank: int = 8
    schedule: Schedule | None = None
    chunk: int | None = None

    loop: ClassVar[str] = "optimising"

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
        if self.covariance not in (None, "none", "diagonal", "low_rank"):
            raise OptionError(f'covariance must be "none", "diagonal" or "low_rank", got {self.covariance!r}')
        if self.scale == "published" and self.covariance not in (None, "none"):
            raise OptionError(
                f'the published form has no covariance, got {self.covariance!r}; use scale="likelihood" with it'
            )
        if not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError(f'rank must be one or more, got {self.rank!r}; without directions use "diagonal"')

    def remarks(self, methods: Sequence[Any], missed: float) -> Iterator[str]:
        """None: the published weight is not made to reach the noise level."""
        yield from ()

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> Method:
        """The form that the options ask for."""
        cost = Cost() if cost is None else cost
        if self.scale == "published":
            return _Published(self, problem, cost)
        if self.covariance == "low_rank":
            return LowRankFit(self, problem, cost, self.rank)
        return (Point if self.covariance == "none" else Diagonal)(self, problem, cost)


class _Published(Levels):
    """Point estimates, all weights as published."""

    options: REDDiff

    def __init__(self, options: REDDiff, problem: DiffusionProblem, cost: Cost) -> None:
        super().__init__(options, problem, cost)
        self._residual = residual_fn(problem)

    def begin(self, lanes: int, noise: Noise) -> State:
        """mu = A^+ y without the smallest singular values, or what the prior expects where A has no pseudo-inverse.

        Their 1 / s would be noise that Adam, which moves by about lr a step, could not take back.
        """
        likelihood = self.problem.likelihood
        gaussian = likelihood.gaussian if likelihood.is_gaussian else None
        if gaussian is None or gaussian.stddev is None:
            return begun("x", self.blank(lanes))
        rcond = SMALLEST if "svd" in gaussian.measured.capabilities else None
        mu = gaussian.measured.pinv(gaussian.data * gaussian.stddev, rcond=rcond)
        mu = mu.to(self.problem.device, self.problem.dtype)
        return begun("x", mu.expand(lanes, *self.problem.shape).clone())

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam."""
        mu, s = state["x"], self.levels[step]
        eps = noise.normal(self.problem.shape)
        denoised = self.problem.prior.denoise(mu + s * eps, s)
        weight = self.options.lam * WEIGHTINGS[self.options.weighting](s) / self.problem.shape.numel()
        _, gradient = misfit(self._residual, mu)
        self.cost.likelihood_evals += len(mu)
        count = sum(data.numel() for data in self.problem.program.data.values())
        return adam(state, "x", gradient / count + weight * (mu - denoised) / s, self.options.lr, step)

    def end(self, state: State, noise: Noise) -> Tensor:
        """The points."""
        return state["x"]

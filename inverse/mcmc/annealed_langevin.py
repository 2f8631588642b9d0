r"""Annealed Langevin: steps on p_s(x) times the likelihood while s comes down, then draws at the lowest level.

    x' = x + eta M_s g_s(x) + sqrt(2 eta) M_s^{1/2} xi,   g_s = grad log p_s(x) + grad log likelihood at level s

with M_s proportional to s^2 where the data say nothing, each step under the Metropolis test; at s_1 the chain goes on,
and a draw is x_0 ~ p(x_0 | x_{s_1}).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.mcmc.backend import WalkBackend
from inverse.mcmc.chain import positive
from inverse.mcmc.mala import Replicas
from inverse.mcmc.noised_target import NoisedTarget, check_nodes, inner_nodes, lowest_noise, note_likelihood
from inverse.mcmc.reverse import ReverseDiffusion
from inverse.side_by_side import SideBySide
from ppl.backend import register
from ppl.errors import OptionError
from ppl.mcmc.adaptation import DualAveraging, windows
from ppl.monitor import Monitor
from sde import Solver
from sde.schedule import log_grid

__all__ = ["AnnealedLangevin"]

LEARNED = 256  # entries of a site up to which a dense metric is learned
PLAIN = 0.05  # step size without the test: a variance is too large by about half of it


@register
@dataclass(frozen=True)
class AnnealedLangevin(WalkBackend):
    r"""Metropolis-adjusted Langevin chains that come down the noise levels of the prior; any differentiable likelihood.

    For linear data with Gaussian noise the chains' law at the lowest level, with the draw of x_0 that follows, is the
    posterior itself. Other likelihoods are blurred by sigma_min, an error of O(sigma_min^2). Coming down lets chains
    choose a mode, with about the right odds, but at the lowest level they no longer change it: R-hat tells; where odds
    matter take `ParallelTempering`. The Metropolis test integrates the score along the step where the prior knows no
    noised density; a network's score is the gradient of none, an error that no option removes.

    Args:
        levels: noise levels of the way down, from the prior's sigma_max; 10 to 200 published.
        steps: Langevin steps at each.
        warmup: steps at the lowest level, where step size and metric are learned, before draws are kept.
        thin: steps per draw.
        metropolis: test every step; without it, steps have a bias of O(step_size) and the backend is never exact.
        sigma_min: lowest level; None takes 0.7 / ||B|| (0.7 sigma_y / ||A|| for equal noise), at most a fifth of the
            prior's `data_std`; for other likelihoods a tenth of what their curvature resolves.
        step_size: eta, in units of the metric, whose scale is s; None learns it, and takes 0.05 without the test.
        target_accept: acceptance that step sizes are learned for.
        learn_metric: learn a dense metric of up to 256 entries from the chains, each about its own mean.
        nodes: inner nodes of the line integral of a step, each one more denoiser row; None takes the prior's own noised
            density where there is one, else 2.
        denoise_steps: solver steps of the draw of x_0 given x at the lowest level.
        solver: its solver; None takes `CovarianceCorrected` where the prior has an exact covariance, else
            `DPMSolver2MSDE`.
        chunk: most rows of one denoiser call.

    Raises:
        OptionError: an option is out of range; on run, if sigma_min does not suit the data.

    Source: Song & Ermon (2019), algorithm 1 [inferred], Roberts & Tweedie (1996) for the test [inferred]; the
    likelihood at the lowest level and the line integral [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> sampler = AnnealedLangevin(levels=5, steps=5, warmup=100)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), sampler, draws=50, chains=20)
        >>> bool((posterior.mean("x") - torch.tensor([0.8, 0.0])).abs().max() < 0.25)         # the exact mean
        True
    """

    levels: int = 20
    steps: int = 10
    warmup: int = 300
    thin: int = 5
    metropolis: bool = True
    sigma_min: float | None = None
    step_size: float | None = None
    target_accept: float = 0.574
    learn_metric: bool = True
    nodes: int | None = None
    denoise_steps: int = 10
    solver: Solver | None = None
    chunk: int | None = None

    label: ClassVar[str] = "Langevin steps"
    limit: ClassVar[tuple[str, ...]] = ("draws", "denoise_steps", "nodes")
    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    default_chains: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nodes(self.nodes)
        positive(self, "sigma_min", "step_size")
        for name in ("levels", "steps", "denoise_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise OptionError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if not self.metropolis:
            object.__setattr__(self, "exact", "never")

    def walk(self, side: SideBySide, chains: int, monitor: Monitor) -> _Annealed:
        """The chains of one run."""
        return _Annealed(self, side, chains, monitor)

    @property
    def transitions_before(self) -> int:
        """The way down comes before the warmup."""
        return self.levels * self.steps + self.warmup


class _Annealed:
    """The chains of one run."""

    statistics: tuple[str, ...] = ("acceptance_rate", "diverging")
    finishes = True

    def __init__(self, options: AnnealedLangevin, side: SideBySide, chains: int, monitor: Monitor) -> None:
        self.options, self.side, self.chains, problem = options, side, chains, side.first
        self.target = NoisedTarget(side, chains, monitor.cost, options.chunk)
        self.sigmas = lowest_noise(self.target, options.sigma_min)
        note_likelihood(self.target, self.sigmas, monitor)
        self.nodes = inner_nodes(options.nodes, self.target)
        top, levels = problem.prior.sigma_max, options.levels
        lasting = (log_grid(top, s, levels)[:-1].tolist() if levels > 1 else [s] for s in self.sigmas)
        self.grid = torch.tensor(list(lasting), dtype=torch.float64)  # (problem, level)
        self.reverse = ReverseDiffusion(problem, options.solver, options.denoise_steps, side.chunk(options.chunk))
        self.size = problem.shape.numel()
        learn = options.learn_metric and options.metropolis and self.size <= LEARNED
        self.windows = windows(options.warmup) if learn and options.warmup else []
        self.gone = torch.zeros(len(side), chains, dtype=torch.bool, device=problem.device)
        self.adapt = DualAveraging.start(self._first())
        self._forget()

    def _first(self) -> Tensor:
        step = self.options.step_size
        if step is None:
            step = self.size ** (-1 / 3) if self.options.metropolis else PLAIN
        return torch.full((len(self.side),), step, dtype=torch.float64, device=self.side.first.device)

    def _forget(self) -> None:
        """Begin a window: sums of x and of its products, each chain by itself, and their number."""
        like, problems = torch.zeros((), dtype=self.side.first.dtype, device=self.side.first.device), len(self.side)
        width = self.size if self.windows else 0
        self.sums, self.products = like.new_zeros(problems, self.chains, width), like.new_zeros(problems, width, width)
        self.count = 0

    def _enter(self, level: int) -> None:
        """Take the target of a level of the way down."""
        self.target.at(self.grid[:, level], level == self.options.levels - 1)

    def begin(self) -> None:
        """Noise at the highest level."""
        self._enter(0)
        noise, prior = self.side.normal(self.chains, *self.side.first.shape), self.side.first.prior
        tops = self.grid[:, 0].tolist()
        start = torch.stack([prior.start(n, top) for n, top in zip(noise, tops, strict=True)])
        self.replicas = Replicas(self.target, start, self.nodes)

    def advance(self, step: int) -> dict[str, Tensor]:
        """One Langevin step; a level below after `steps` of them."""
        options = self.options
        level, rest = divmod(step, options.steps)
        if 0 < level < options.levels and rest == 0:
            self._enter(level)
            self.replicas.evaluate()
        moved = self.replicas.step(self.adapt.log_step.exp(), self.side.streams, options.metropolis)
        at = step - options.levels * options.steps
        if options.metropolis and options.step_size is None and at < options.warmup:
            self.adapt.update(moved.accept.mean(1).double(), options.target_accept)
            if at == options.warmup - 1:
                self.adapt.log_step = self.adapt.log_average
        if 0 <= at < options.warmup:
            self._learn(at)
        if not options.metropolis:
            self.gone = self.gone | moved.diverging
        accept = moved.accept.flatten()
        return {"acceptance_rate": accept, "diverging": moved.diverging.flatten().to(accept)}

    def _learn(self, at: int) -> None:
        """Keep x inside a window; at its end make a metric of what the chains did, each about its own mean."""
        for start, stop in self.windows:
            if start <= at < stop:
                x = self.replicas.x.flatten(2)  # a level of every problem
                self.sums, self.products, self.count = self.sums + x, self.products + x.mT @ x, self.count + 1
            if at == stop - 1:
                free = self.chains * (self.count - 1)
                if free >= 2 * self.size:
                    inner = (self.products - self.sums.mT @ self.sums / self.count) / free
                    base = self.replicas.metric
                    if base.root is None:
                        self._base = base.dense(self.chains, self.side.first.shape)
                    # Steps in a row are alike: a tenth of them count against the metric of the data alone.
                    share = free / (free + 10 * self.size)
                    base.root = torch.linalg.cholesky(share * inner + (1 - share) * self._base)
                    if self.options.step_size is None:
                        self.adapt = DualAveraging.start(self._first())
                self._forget()

    def value(self) -> Tensor:
        """x at the lowest level."""
        return self.replicas.x.flatten(0, 1)

    def finish(self, x: Tensor) -> Tensor:
        """x_0 given x at the lowest level."""
        return self.reverse(x, self.sigmas, self.side.streams)

    def lost(self) -> Tensor:
        """Chains whose step without a test was not finite."""
        return self.gone.flatten()

    def state(self) -> dict[str, Tensor]:
        """All that the next step needs."""
        own = {"sums": self.sums, "products": self.products, "gone": self.gone, "count": torch.tensor(self.count)}
        if self.replicas.metric.root is not None:
            own["base"] = self._base
        own |= self.adapt.state()
        return own | {f"replicas.{n}": v for n, v in self.replicas.state().items()}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on from `state()`."""
        level = min(max(step - 1, 0) // self.options.steps, self.options.levels - 1)
        self._enter(level)
        inner = {n.removeprefix("replicas."): v for n, v in state.items() if n.startswith("replicas.")}
        self.replicas = Replicas.resumed(self.target, inner, self.nodes)
        self.sums, self.products, self.gone = state["sums"], state["products"], state["gone"]
        self.count = int(state["count"])
        if "base" in state:
            self._base = state["base"]
        self.adapt = DualAveraging.resumed(state)

    def summary(self, index: int) -> dict[str, Tensor]:
        """Step size and the lowest level."""
        return {"step_size": self.adapt.log_step.exp()[index], "sigma_min": torch.tensor(self.sigmas[index])}

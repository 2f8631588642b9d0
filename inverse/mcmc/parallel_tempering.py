r"""Parallel tempering across noise levels: replicas on p_s(x) times the likelihood at s_1 < ... < s_K, and swaps.

    accept a swap of x_i and x_j with min(1, exp(delta)),
    delta = log p_i(x_j) - log p_i(x_i) + log p_j(x_i) - log p_j(x_j)  and the same differences of the likelihood

Every difference is at one level, so no normaliser enters, and the score alone gives it as a line integral. At the top
the density has one mode; what crosses there comes down by swaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.mcmc.backend import WalkBackend
from inverse.mcmc.chain import positive
from inverse.mcmc.line_integral import adaptive_log_ratio
from inverse.mcmc.mala import Replicas
from inverse.mcmc.noised_target import (
    NoisedTarget,
    check_nodes,
    gain,
    inner_nodes,
    lowest_noise,
    note_likelihood,
)
from inverse.mcmc.reverse import ReverseDiffusion
from inverse.side_by_side import SideBySide
from ppl.backend import register
from ppl.errors import OptionError
from ppl.mcmc.adaptation import DualAveraging, windows
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from sde import Solver
from sde.schedule import log_grid

__all__ = ["ParallelTempering"]

WIDE = 1.0
"""Highest level by default, in units of the prior's data_std: two equal modes merge there."""
RARE = 0.02
"""A pair of levels that swaps less often cuts the ladder in two."""


@register
@dataclass(frozen=True)
class ParallelTempering(WalkBackend):
    r"""Chains that change modes: replicas at many noise levels, local Langevin steps with the Metropolis test, swaps.

    For linear data with Gaussian noise the law of the lowest replica, with the draw of x_0 that follows, is the
    posterior itself, mode weights included. Other likelihoods are blurred by sigma_min, an error of O(sigma_min^2).
    Swaps between far points need the density along the line between them: exact where the prior knows it, and else an
    integral with panels that are halved to `tolerance`. Levels have to overlap: their number grows as sqrt(d), which
    makes this a method for tens of dimensions; a note says when pairs no longer swap. `info["round_trips"]` counts the
    chances that a chain had to change its mode; an ESS of a rare mode's share is flattered by chains that never saw it.
    A network's score is the gradient of no density, an error that no option removes.

    Args:
        levels: replicas of every chain.
        steps: Langevin steps between swaps; even and odd pairs of neighbours swap in turn.
        warmup: rounds of steps and a swap in which step sizes are learned and levels moved to where swaps fail.
        thin: rounds per draw.
        sigma_min: lowest level; None takes 0.7 / ||B|| (0.7 sigma_y / ||A|| for equal noise), at most a fifth of the
            prior's `data_std`; for other likelihoods a tenth of what their curvature resolves.
        sigma_max: highest level; None takes the prior's `data_std`, at most its sigma_max.
        adapt_levels: move the inner levels in warmup, so that all pairs swap equally often.
        target_accept: acceptance that step sizes are learned for.
        nodes: inner nodes of the line integral of a Langevin step, each one more denoiser row; None takes the prior's
            own noised density, in swaps too, where there is one, else 2.
        tolerance: error of a swap's line integral, in nats.
        denoise_steps: solver steps of the draw of x_0 given x at the lowest level.
        solver: its solver; None takes `CovarianceCorrected` where the prior has an exact covariance, else
            `DPMSolver2MSDE`.
        chunk: most rows of one denoiser call.

    Raises:
        OptionError: an option is out of range; on run, if the levels do not suit the data.

    Source: Geyer (1991) [inferred]; placing levels by rejection: Syed et al. (2022) [inferred]; noise levels as
    temperatures with ratios at one level only [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-3.0], [3.0]]), torch.ones(2))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 100.0), obs=y)
        >>> sampler = ParallelTempering(levels=4, warmup=50)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(0.0)), sampler, draws=60, chains=20)
        >>> abs((posterior["x"] > 0).double().mean().item() - 0.7) < 0.1
        True
    """

    levels: int = 12
    steps: int = 2
    warmup: int = 300
    thin: int = 1
    sigma_min: float | None = None
    sigma_max: float | None = None
    adapt_levels: bool = True
    target_accept: float = 0.574
    nodes: int | None = None
    tolerance: float = 0.01
    denoise_steps: int = 10
    solver: Solver | None = None
    chunk: int | None = None

    label: ClassVar[str] = "rounds of swaps"
    limit: ClassVar[tuple[str, ...]] = ("draws", "denoise_steps", "nodes")
    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    default_chains: ClassVar[int] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nodes(self.nodes)
        positive(self, "sigma_min", "sigma_max", "tolerance")
        check_integers(self, levels=2, steps=1, denoise_steps=1)

    def walk(self, side: SideBySide, chains: int, monitor: Monitor) -> _Tempered:
        """The chains of one run."""
        return _Tempered(self, side, chains, monitor)


class _Tempered:
    """The replicas of one run, (problem and level, chains), the lowest level of a problem first."""

    statistics: tuple[str, ...] = ("acceptance_rate", "swap_rate", "diverging")
    finishes = True

    def __init__(self, options: ParallelTempering, side: SideBySide, chains: int, monitor: Monitor) -> None:
        self.options, self.side, self.chains, self.monitor = options, side, chains, monitor
        problem, problems, levels = side.first, len(side), options.levels
        self.target = NoisedTarget(side, levels * chains, monitor.cost, options.chunk)
        prior = problem.prior
        self.lowest = lowest_noise(self.target, options.sigma_min)
        top = min(WIDE * prior.data_std, prior.sigma_max) if options.sigma_max is None else options.sigma_max
        for low in self.lowest:
            if not low < top <= prior.sigma_max:
                raise OptionError(
                    f"sigma_max={top:.4g} must lie above the lowest level {low:.4g} and not above the prior's own "
                    f"sigma_max={prior.sigma_max:.4g}"
                )
        note_likelihood(self.target, self.lowest, monitor)
        self.nodes = inner_nodes(options.nodes, self.target)
        self.reverse = ReverseDiffusion(problem, options.solver, options.denoise_steps, side.chunk(options.chunk))
        self.sigmas = torch.stack([log_grid(top, low, levels)[:-1].flip(0) for low in self.lowest])  # (problem, level)
        self.windows = windows(options.warmup) if options.warmup and options.adapt_levels else []
        device = problem.device
        eta = problem.shape.numel() ** (-1 / 3)
        self.adapt = DualAveraging.start(torch.full((problems * levels,), eta, dtype=torch.float64, device=device))
        # Which replica stands at a level; whether it was at the top since it left the bottom; how often it came back.
        self.who = torch.arange(levels, device=device)[:, None].expand(problems, levels, chains).clone()
        self.high = torch.zeros(problems, levels, chains, dtype=torch.bool, device=device)
        self.trips = torch.zeros(problems, chains, dtype=torch.int64, device=device)
        self.tried = torch.zeros(2, problems, levels - 1, dtype=torch.float64, device=device)
        self.error = torch.zeros(problems, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """A prior's path down the ladder, one value at every level."""
        prior, shape, levels = self.side.first.prior, self.side.first.shape, self.options.levels
        self._enter()
        noise = self.side.normal(levels, self.chains, *shape)  # (problem, level, chain, *shape)
        wide = (-1, 1, *[1] * len(shape))
        x = torch.stack([prior.start(n[-1], float(s[-1])) for n, s in zip(noise, self.sigmas, strict=True)])
        path = [x]
        for level in range(levels - 1, 0, -1):
            a, b = (s.to(x.device, x.dtype).reshape(wide) for s in (self.sigmas[:, level], self.sigmas[:, level - 1]))
            keep = (b / a).square()
            own = torch.arange(len(self.side), device=x.device).repeat_interleave(self.chains) * levels + level
            x = keep * x + (1 - keep) * self.target.denoise(x.flatten(0, 1), own).reshape(x.shape)
            x = x + b * (1 - keep).sqrt() * noise[:, level - 1]
            path.append(x)
        self.replicas = Replicas(self.target, torch.stack(path[::-1], 1).flatten(0, 1), self.nodes)

    def _enter(self) -> None:
        """Take the levels as they are."""
        self.target.at(self.sigmas.flatten(), True)

    def advance(self, step: int) -> dict[str, Tensor]:
        """Langevin steps of all replicas, then swaps of the even or of the odd pairs."""
        warming = step < self.options.warmup
        accept = self.replicas.x.new_zeros(len(self.side), self.chains)
        diverging = torch.zeros_like(accept)
        for _ in range(self.options.steps):
            moved = self.replicas.step(self.adapt.log_step.exp(), self.side.streams)
            accept += self._by_problem(moved.accept)[:, 0] / self.options.steps
            diverging += self._by_problem(moved.diverging).any(1) / self.options.steps
            if warming:
                self.adapt.update(moved.accept.mean(1).double(), self.options.target_accept)
        swapped = self._swap(step % 2)
        if warming:
            if any(stop == step + 1 for _, stop in self.windows):
                self._move_levels()
            if step == self.options.warmup - 1:
                self.adapt.log_step = self.adapt.log_average
                self.tried.zero_()
                self.trips.zero_()
        return {"acceptance_rate": accept.flatten(), "swap_rate": swapped.flatten(), "diverging": diverging.flatten()}

    def _by_problem(self, of_level: Tensor) -> Tensor:
        """(problem and level, ...) -> (problem, level, ...)."""
        return of_level.reshape(len(self.side), self.options.levels, *of_level.shape[1:])

    def _swap(self, first: int) -> Tensor:
        """Swap levels (first, first + 1), (first + 2, first + 3), ...; the mean acceptance of each chain."""
        r, target, problems, chains = self.replicas, self.target, len(self.side), self.chains
        below = torch.arange(first, self.options.levels - 1, 2, device=r.x.device)
        uniform = self.side.uniform(len(below), chains)
        if not len(below):
            return r.x.new_ones(problems, chains)
        ladders = self.options.levels * torch.arange(problems, device=r.x.device)[:, None]
        low = (ladders + below).flatten()
        pair = torch.cat([low, low + 1])  # levels, and below the levels whose values come to them
        other = torch.cat([low + 1, low])
        level = pair.repeat_interleave(chains)
        here, there = r.x[pair].flatten(0, 1), r.x[other].flatten(0, 1)
        if r.rule is None:
            log_prior = target.log_prior(there, level)
            ratio = log_prior - r.log_prior[pair].flatten()
        else:
            # The scores of the exchanged values are those of the next steps, if the swap is accepted.
            ends = r.score[pair].flatten(0, 1), target.score(there, level)
            estimate = adaptive_log_ratio(
                lambda x, lane: target.score(x, level[lane]), here, there, ends, self.options.tolerance
            )
            ratio, log_prior = estimate.value, torch.zeros_like(estimate.value)
            error = estimate.stderr.reshape(2, problems, -1).amax((0, 2)).double()
            self.error = torch.maximum(self.error, error)
        raw_here, raw_there = ({n: v[at].flatten(0, 1) for n, v in r.raw.items()} for at in (pair, other))
        new, old = (target.likelihood.value(raw, level) for raw in (raw_there, raw_here))
        delta = (ratio + gain(new, old)).reshape(2, problems, len(below), chains).sum(0)
        accept = torch.where(delta.isnan(), 0.0, delta.clamp(max=0.0).exp())
        keep = uniform < accept
        self.tried[0, :, below] += accept.sum(2).double()
        self.tried[1, :, below] += chains

        both = keep.flatten(0, 1).repeat(2, 1)
        if r.rule is None:
            score = r.score[pair].flatten(0, 1)
            moved = both.flatten().nonzero()[:, 0]
            if len(moved):
                score[moved] = target.score(there[moved], level[moved])
        else:
            score = ends[1]
        size = (len(pair), chains)
        mask = torch.zeros(r.x.shape[:2], dtype=torch.bool, device=r.x.device)
        mask[pair] = both

        def whole(rows: Tensor, like: Tensor) -> Tensor:
            full = like.clone()
            full[pair] = rows.reshape(*size, *rows.shape[1:])
            return full

        r.take(
            mask,
            whole(there, r.x),
            whole(score, r.score),
            {n: whole(v, r.raw[n]) for n, v in raw_there.items()},
            whole(log_prior, r.log_prior),
        )
        who = self.who.flatten(0, 1)
        self.who = self._by_problem(who.index_copy(0, pair, torch.where(both, who[other], who[pair])))
        self._count_trips()
        return accept.mean(1)

    def _count_trips(self) -> None:
        """A round trip is from the bottom to the top and back."""
        self.high.scatter_(1, self.who[:, -1:], True)
        bottom = self.who[:, :1]
        self.trips += self.high.gather(1, bottom)[:, 0]
        self.high.scatter_(1, bottom, False)

    def _move_levels(self) -> None:
        """Levels of every problem at equal shares of its total rejection, interpolated in log s; the ends stay."""
        rejected = 1 - (self.tried[0] / self.tried[1].clamp(min=1.0)).cpu()
        self.sigmas = torch.stack([self._moved(s, lost) for s, lost in zip(self.sigmas, rejected, strict=True)])
        self._enter()
        self.replicas.evaluate()
        self.adapt = DualAveraging.start(self.adapt.log_step.exp())
        self.tried.zero_()

    def _moved(self, sigmas: Tensor, rejected: Tensor) -> Tensor:
        """The levels (levels,) of one problem, given the rejection of each pair (levels - 1,)."""
        # Never an empty stretch: a pair that always swaps still keeps some of the ladder.
        passed = torch.cat([torch.zeros(1, dtype=torch.float64), (rejected + 0.02).cumsum(0)])
        wanted = torch.linspace(0, float(passed[-1]), self.options.levels, dtype=torch.float64)
        before = sigmas.log()
        at = torch.searchsorted(passed, wanted[1:-1]).clamp(1, self.options.levels - 1)
        share = (wanted[1:-1] - passed[at - 1]) / (passed[at] - passed[at - 1])
        inner = (before[at - 1] + share * (before[at] - before[at - 1])).exp()
        return torch.cat([sigmas[:1], inner, sigmas[-1:]])

    def value(self) -> Tensor:
        """x at the lowest level."""
        return self._by_problem(self.replicas.x)[:, 0].flatten(0, 1)

    def finish(self, x: Tensor) -> Tensor:
        """x_0 given x at the lowest level."""
        return self.reverse(x, self.lowest, self.side.streams)

    def lost(self) -> Tensor:
        """None: the test refuses what is not finite."""
        return torch.zeros(len(self.side) * self.chains, dtype=torch.bool, device=self.side.first.device)

    def state(self) -> dict[str, Tensor]:
        """All that the next round needs."""
        own = {n: getattr(self, n) for n in ("sigmas", "who", "high", "trips", "tried", "error")}
        own |= self.adapt.state()
        return own | {f"replicas.{n}": v for n, v in self.replicas.state().items()}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on from `state()`."""
        for name in ("sigmas", "who", "high", "trips", "tried", "error"):
            setattr(self, name, state[name])
        self._enter()
        inner = {n.removeprefix("replicas."): v for n, v in state.items() if n.startswith("replicas.")}
        self.replicas = Replicas.resumed(self.target, inner, self.nodes)
        self.adapt = DualAveraging.resumed(state)

    def summary(self, index: int) -> dict[str, Tensor]:
        """Levels, step sizes, swaps of every pair, round trips of every chain, and the error of line integrals."""
        tried, sigmas, error = self.tried[:, index], self.sigmas[index], self.error[index]
        rates = tried[0] / tried[1].clamp(min=1.0)
        seldom = ((rates < RARE) & (tried[1] > 0)).nonzero()[:, 0].tolist()
        if seldom:
            self.side.note(
                self.monitor,
                index,
                f"{len(seldom)} of {len(rates)} pairs of levels swap less than {RARE:.0%} of the time, the lowest of "
                f"them from s={float(sigmas[seldom[0]]):.3g}: take more levels",
            )
        if float(error) > 10 * self.options.tolerance:
            self.side.note(
                self.monitor,
                index,
                f"a swap's line integral may be off by {float(error):.2g} nats: the score is not smooth there",
            )
        return {
            "sigmas": sigmas,
            "step_size": self._by_problem(self.adapt.log_step.exp())[index],
            "swap_acceptance": rates,
            "round_trips": self.trips[index],
            "line_error": error,
        }

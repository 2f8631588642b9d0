r"""Preconditioned Crank-Nicolson for diffusion priors: noise the value, come back, ask the likelihood alone.

    x_s = x + s n,    x' ~ p(x_0 | x_s) by the reverse diffusion,    accept with min(1, p(y | x') / p(y | x))

The pair (x, x') is exchangeable under the prior, whose density therefore cancels. For a prior N(m, C) this is the move
x' = m + G (x + s n - m) + (G s^2)^{1/2} z with G = C (C + s^2)^{-1}, which is pCN with a rate for every direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.mcmc.backend import WalkBackend
from inverse.mcmc.chain import positive
from inverse.mcmc.noised_target import gain
from inverse.mcmc.reverse import ReverseDiffusion
from inverse.samplers.guided import check_steps
from inverse.side_by_side import SideBySide
from ppl.backend import register
from ppl.errors import OptionError
from ppl.mcmc.adaptation import DualAveraging
from ppl.monitor import Monitor
from sde import Solver

__all__ = ["DiffusionPCN"]

RARE = 0.02


@register
@dataclass(frozen=True)
class DiffusionPCN(WalkBackend):
    r"""Noise to a level and come back, accepted by the likelihood alone: any likelihood, no gradient, no density.

    Exact for an exact reverse diffusion: with the default solver for a Gaussian prior at any number of steps, for other
    priors as steps grow. Steps of the network's own solver have an error that the test does not see, since it believes
    that the proposal leaves the prior as it is. The level falls with the precision of the data: where they are precise
    in several directions the chain is a slow walk, and `AnnealedLangevin` or `TwistedSMC` are the tools.

    Args:
        level: noise level to return from, in units of the prior's `data_std`; None learns it in warmup.
        target_accept: acceptance that the level is learned for.
        jump: share of moves from a level drawn log-uniformly between the level and the prior's sigma_max, which may
            change modes.
        steps: noise levels of the way back.
        warmup: moves before draws are kept.
        thin: moves per draw.
        solver: a stochastic step; None takes `CovarianceCorrected` where the prior has an exact covariance, else
            `DPMSolver2MSDE`.
        chunk: most rows of one denoiser call.

    Raises:
        OptionError: an option is out of range.

    Source: Cotter et al. (2013) for pCN [inferred]; its form for diffusions [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), DiffusionPCN(steps=1), draws=300, chains=20)
        >>> round(posterior.mean("x").item(), 1)                                    # exact
        0.8
    """

    level: float | None = None
    target_accept: float = 0.234
    jump: float = 0.1
    steps: int = 20
    warmup: int = 300
    thin: int = 1
    solver: Solver | None = None
    chunk: int | None = None

    label: ClassVar[str] = "noise and return"
    limit: ClassVar[tuple[str, ...]] = ("draws", "steps")
    exact_when: ClassVar[tuple[str, ...]] = ()
    default_chains: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps)
        positive(self, "level")
        if not 0 <= self.jump <= 1:
            raise OptionError(f"jump must be a share between 0 and 1, got {self.jump!r}")

    def walk(self, side: SideBySide, chains: int, monitor: Monitor) -> _Returning:
        """The chains of one run."""
        return _Returning(self, side, chains, monitor)


class _Returning:
    """The chains of one run."""

    statistics: tuple[str, ...] = ("acceptance_rate", "level", "diverging")
    finishes = False

    def __init__(self, options: DiffusionPCN, side: SideBySide, chains: int, monitor: Monitor) -> None:
        self.options, self.side, self.chains, self.monitor = options, side, chains, monitor
        problem, prior = side.first, side.first.prior
        self.problem = side.rows(chains)
        self.reverse = ReverseDiffusion(problem, options.solver, options.steps, side.chunk(options.chunk))
        # A network denoises nothing below its own sigma_min.
        self.low = 1e-4 * prior.data_std if "exact_covariance" in prior.capabilities else prior.sigma_min
        self.high = prior.sigma_max
        start = options.level if options.level is not None else 0.5
        first = start * prior.data_std
        if not self.low <= first <= self.high:
            raise OptionError(
                f"level={start:.4g} data_std = {first:.4g} must lie between the prior's sigma_min={self.low:.4g} and "
                f"its sigma_max={self.high:.4g}"
            )
        # One for each problem, for they jump at moves of their own.
        level = torch.tensor([first], dtype=torch.float64, device=problem.device)
        self.adapt = [DualAveraging.start(level) for _ in side.singles]
        for adapt in self.adapt:  # averaging would begin with tenfold levels, from which nothing is accepted
            adapt.centre = adapt.log_step.clone()
        self.tally = torch.zeros(len(side), 2, dtype=torch.float64, device=problem.device)
        self.gone = torch.zeros(len(side) * chains, dtype=torch.bool, device=problem.device)

    def begin(self) -> None:
        """Draws of the prior."""
        first = self.side.first
        noise = self.side.noise(self.chains).normal(first.shape)
        x = self.reverse(first.prior.start(noise, first.prior.sigma_max), first.prior.sigma_max, self.side.streams)
        self.gone = ~x.flatten(1).isfinite().all(1)
        self.x = torch.where(self.gone.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
        self.value_of_x = self._log_likelihood(self.x)

    def _log_likelihood(self, x: Tensor) -> Tensor:
        """log p(y | x), -inf where there is none."""
        self.monitor.cost.likelihood_evals += len(x)
        value = self.problem.likelihood.log_prob(x).to(x.dtype)
        return torch.where(value.isnan(), -torch.inf, value)

    def advance(self, step: int) -> dict[str, Tensor]:
        """One move of all chains, those of a problem from one level."""
        options, warming = self.options, step < self.options.warmup
        chosen = self.side.streams.uniform((2,), torch.float64).tolist()
        uniform = self.side.uniform(self.chains).flatten()
        jumps = [which < options.jump for which, _ in chosen]
        levels = [
            self._level(float(adapt.log_step), where if jump else 0.0)
            for adapt, jump, (_, where) in zip(self.adapt, jumps, chosen, strict=True)
        ]
        wide = (-1, *[1] * (self.x.ndim - 1))
        sigma = torch.tensor(levels, dtype=torch.float64).to(self.x).repeat_interleave(self.chains)
        noised = self.x + sigma.reshape(wide) * self.side.noise(self.chains).normal(self.side.first.shape)
        proposal = self.reverse(noised, levels, self.side.streams)
        finite = proposal.isfinite().flatten(1).all(1)
        proposal = torch.where(finite.reshape(wide), proposal, self.x)
        value = self._log_likelihood(proposal)
        ratio = gain(value, self.value_of_x)
        accept = torch.where(finite & ~ratio.isnan(), ratio.clamp(max=0.0).exp(), 0.0)
        keep = uniform < accept
        self.x = torch.where(keep.reshape(wide), proposal, self.x)
        self.value_of_x = torch.where(keep, value, self.value_of_x)
        rates = accept.double().reshape(-1, self.chains).mean(1)
        for i, adapt in enumerate(self.adapt):
            if not jumps[i] and warming and options.level is None:
                adapt.update(rates[i : i + 1], options.target_accept)
            elif not jumps[i] and not warming:
                self.tally[i] += torch.stack([rates[i], torch.ones_like(rates[i])])
            if step == options.warmup - 1 and options.level is None:
                adapt.log_step = adapt.log_average
        return {"acceptance_rate": accept, "level": sigma.to(accept), "diverging": (~finite).to(accept)}

    def _level(self, log_level: float, where: float) -> float:
        """The level of a move, `where` between the chain's own and the highest."""
        log_level = min(max(log_level, math.log(self.low)), math.log(self.high))
        return min(max(math.exp(log_level + where * (math.log(self.high) - log_level)), self.low), self.high)

    def value(self) -> Tensor:
        """Where the chains are."""
        return self.x

    def finish(self, x: Tensor) -> Tensor:
        """The values are draws."""
        return x

    def lost(self) -> Tensor:
        """Chains whose first draw of the prior was not finite; later on, such values are refused."""
        return self.gone

    def state(self) -> dict[str, Tensor]:
        """All that the next move needs."""
        own = {"x": self.x, "value": self.value_of_x, "tally": self.tally, "gone": self.gone}
        for i, adapt in enumerate(self.adapt):
            own |= adapt.state(f"adapt.{i}.")
        return own

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on from `state()`."""
        self.x, self.value_of_x, self.tally, self.gone = (state[n] for n in ("x", "value", "tally", "gone"))
        self.adapt = [DualAveraging.resumed(state, prefix=f"adapt.{i}.") for i in range(len(self.side))]

    def summary(self, index: int) -> dict[str, Tensor]:
        """The level that was used, apart from jumps."""
        accepted, moves = self.tally[index].tolist()
        rate = accepted / max(moves, 1.0)
        if moves > 0 and rate < RARE:
            self.side.note(
                self.monitor,
                index,
                f"{rate:.1%} of the moves were accepted: the data are precise, lower level, or take "
                "inverse.AnnealedLangevin or inverse.TwistedSMC",
            )
        if bool(torch.isinf(self.value_of_x.reshape(-1, self.chains)[index]).any()):
            self.side.note(self.monitor, index, "some chains found no value that the data allow: run a longer warmup")
        return {"base_level": self.adapt[index].log_step.exp()[0]}

"""Fusing measurements one after the other: the posterior of a step, moved, is the prior of the next.

x_t = A x_{t-1} + N(0, Q),   y_t ~ p(y | x_t):   prior_t = moved(posterior_{t-1}),   posterior_t = update(prior_t, y_t)

With linear Gaussian measurements the exact update makes this the Kalman filter; a trained `ppl.DistributionTransformer`
takes any measurement that can be simulated. Motion is not learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.amortised import Mixture
from ppl.errors import OptionError
from ppl.program import Program

__all__ = [
    "Motion",
    "Rangefinder",
    "TrackPriors",
    "WrappedNormal",
    "corrected",
    "kalman_update",
    "particle_filter",
    "range_bearing",
    "range_bearing_data",
    "range_bearing_log_likelihood",
    "recursion",
    "turning_point",
]


@dataclass(frozen=True)
class Motion:
    """x_t = A x_{t-1} + N(0, Q), with the law of x_0.

    Args:
        matrix: A, (dim, dim).
        covariance: Q, (dim, dim).
        start: law of the state before the first motion.
    """

    matrix: Tensor
    covariance: Tensor
    start: Mixture

    def simulate(self, steps: int, rows: int, generator: torch.Generator) -> Tensor:
        """States (steps, rows, dim) after each motion."""
        x = self.start.draw((rows,), generator)
        root = torch.linalg.cholesky(self.covariance)
        states = []
        for _ in range(steps):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x @ self.matrix.mT + noise @ root.mT
            states.append(x)
        return torch.stack(states)


def recursion(update: Callable[[Mixture, Tensor], Mixture], motion: Motion, y: Tensor) -> list[Mixture]:
    """The posterior after each measurement.

    Args:
        update: (prior, data of one step) to posterior, both batches over sequences.
        motion: between measurements.
        y: (steps, rows, m) measurements.

    Returns:
        For each step a batch (rows,) of mixtures.
    """
    rows = y.shape[1]
    law = motion.start
    parts = (law.weights, law.means, law.scale_tril)
    posterior = Mixture(*(v.expand(rows, *v.shape) for v in parts))
    found = []
    for now in y:
        posterior = update(posterior.moved(motion.matrix, motion.covariance), now)
        found.append(posterior)
    return found


def kalman_update(matrix: Tensor, covariance: Tensor) -> Callable[[Mixture, Tensor], Mixture]:
    """The exact update for y = matrix x + N(0, covariance).

    Example:
        >>> one = torch.eye(1)
        >>> start = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> posteriors = recursion(kalman_update(one, one), Motion(one, one, start), torch.ones(60, 1, 1))
        >>> posteriors[-1].covariance                                # the root of p = (p + 1) / (p + 2)
        tensor([[[0.6180]]])
    """
    return lambda prior, y: prior.conditioned(matrix, y, covariance)[0]


def corrected(
    update: Callable[[Mixture, Tensor], Mixture],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    draws: int,
    generator: torch.Generator,
) -> Callable[[Mixture, Tensor], Mixture]:
    """An update whose posterior is fitted again to its own draws, weighted by prior times likelihood.

    Args:
        update: the update to be corrected.
        log_likelihood: (x (draws, rows, dim), data (rows, m)) to (draws, rows).
        draws: for each measurement.
        generator: source of the draws.
    """

    def step(prior: Mixture, y: Tensor) -> Mixture:
        q = update(prior, y)
        proposal = q.defended(prior)
        z = proposal.draw((draws,), generator)
        log_weight = prior.log_prob(z) + log_likelihood(z, y) - proposal.log_prob(z)
        return q.refined(z, log_weight.softmax(0))

    return step


def particle_filter(
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    motion: Motion,
    y: Tensor,
    particles: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The bootstrap filter, resampled at every step by systematic resampling.

    Args:
        log_likelihood: (x (rows, particles, dim), data (rows, m)) to (rows, particles).
        motion: between measurements.
        y: (steps, rows, m).
        particles: of each sequence.
        generator: source of randomness.

    Returns:
        States (steps, rows, particles, dim), equally weighted, and the log evidence (rows,).
    """
    rows = y.shape[1]
    x = motion.start.draw((rows, particles), generator)
    root = torch.linalg.cholesky(motion.covariance)
    evidence = torch.zeros(rows, dtype=y.dtype)
    found = []
    for now in y:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x @ motion.matrix.mT + noise @ root.mT
        log_weight = log_likelihood(x, now)
        evidence = evidence + log_weight.logsumexp(1) - math.log(particles)
        edges = log_weight.softmax(1).cumsum(1)
        comb = (torch.arange(particles) + torch.rand(rows, 1, generator=generator, dtype=y.dtype)) / particles
        index = torch.searchsorted(edges / edges[:, -1:], comb).clamp(max=particles - 1)
        x = x.gather(1, index[..., None].expand(x.shape))
        found.append(x)
    return torch.stack(found), evidence


# A target seen by range and bearing -----------------------------------------------------------------------------------

FAR = 10.0  # largest range
RANGE_SD, BEARING_SD = 0.05, 0.1
SHARES = (0.8, 0.1, 0.1)  # of good ranges, of early echoes, of random ones


class Rangefinder(dist.TorchDistribution):
    """0.8 N(range, (0.05 (range + 1))^2) + 0.1 Exponential(1) + 0.1 Uniform(0, 10). [read, but for clipping: none here]

    Args:
        range_: distance to the target.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"range_": dist.constraints.nonnegative}
    support = dist.constraints.real

    def __init__(self, range_: Tensor, validate_args: bool | None = None) -> None:
        self.range_ = range_
        super().__init__(range_.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Rangefinder:
        """The same over more batch axes."""
        return Rangefinder(self.range_.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape) ranges."""
        loc = self.range_.expand((*sample_shape, *self.batch_shape))
        one = torch.ones_like(loc)
        kind = dist.Uniform(0 * one, one).sample()
        good = dist.Normal(loc, RANGE_SD * (loc + 1)).sample()
        early, random = dist.Exponential(one).sample(), dist.Uniform(0 * one, FAR * one).sample()
        return torch.where(kind < SHARES[0], good, torch.where(kind < SHARES[0] + SHARES[1], early, random))

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log density."""
        sd = RANGE_SD * (self.range_ + 1)
        good = -0.5 * ((value - self.range_) / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)
        never = torch.full_like(good, -math.inf)
        early = torch.where(value >= 0, -value, never)
        inside = (value >= 0) & (value <= FAR)
        random = torch.where(inside, torch.full_like(good, -math.log(FAR)), never)
        parts = [p + math.log(s) for p, s in zip((good, early, random), SHARES, strict=True)]
        return torch.stack(torch.broadcast_tensors(*parts)).logsumexp(0)


class WrappedNormal(dist.TorchDistribution):
    """A normal angle, wrapped to (-pi, pi]; its density counts one turn to each side.

    Args:
        loc: angle.
        sd: standard deviation, well below pi.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": dist.constraints.real}
    support = dist.constraints.real

    def __init__(self, loc: Tensor, sd: float, validate_args: bool | None = None) -> None:
        self.loc, self.sd = loc, sd
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WrappedNormal:
        """The same over more batch axes."""
        return WrappedNormal(self.loc.expand(batch_shape), self.sd, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape) angles."""
        angle = dist.Normal(self.loc, self.sd).sample(sample_shape)
        return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log density."""
        turns = torch.arange(-1, 2, dtype=value.dtype, device=value.device) * (2 * math.pi)
        gap = (value - self.loc)[..., None] + turns
        parts = -0.5 * (gap / self.sd).square() - math.log(self.sd) - 0.5 * math.log(2 * math.pi)
        return parts.logsumexp(-1)


def range_bearing() -> Program:
    """One measurement of a target (x, velocity, y, velocity) from the origin; the prior is to be replaced.

    Example:
        >>> range_bearing()
        Program(seen, latents=['state'], observed=['range', 'bearing'])
    """

    def seen(range: Tensor, bearing: Tensor) -> None:
        center = range.new_tensor([4.0, 0.0, 0.0, 0.0])
        state = pyro.sample("state", dist.Normal(center, range.new_tensor([2.0, 0.7, 2.0, 0.7])).to_event(1))
        across, along = state[..., 2], state[..., 0]
        pyro.sample("range", Rangefinder((along.square() + across.square() + 1e-12).sqrt()), obs=range)
        pyro.sample("bearing", WrappedNormal(torch.atan2(across, along), BEARING_SD), obs=bearing)

    zero = torch.zeros((), dtype=torch.float64)
    return Program(seen, zero + 4.0, zero, compile="never")


def range_bearing_data(states: Tensor, seed: int) -> Tensor:
    """Measurements (*batch, 2), range and bearing, of states (*batch, 4).

    Args:
        states: (x, velocity, y, velocity).
        seed: of all noise; the global generator is left as it was.

    Example:
        >>> range_bearing_data(torch.ones(15, 3, 4), seed=0).shape
        torch.Size([15, 3, 2])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([law.sample() for law in _sensors(states)], -1)


def range_bearing_log_likelihood(states: Tensor, y: Tensor) -> Tensor:
    """log p(y | state): states (*batch, 4) and measurements (*batch, 2), which broadcast -> (*batch,).

    Example:
        >>> state, y = torch.tensor([3.0, 0.0, 4.0, 0.0]), torch.tensor([[5.0, 0.927], [9.0, 0.0]])
        >>> near, far = range_bearing_log_likelihood(state, y)
        >>> bool(near > far)
        True
    """
    distance, bearing = _sensors(states)
    return distance.log_prob(y[..., 0]) + bearing.log_prob(y[..., 1])


def _sensors(states: Tensor) -> tuple[Rangefinder, WrappedNormal]:
    """The laws of range and bearing seen from the origin."""
    along, across = states[..., 0], states[..., 2]
    distance = Rangefinder((along.square() + across.square()).sqrt())
    return distance, WrappedNormal(torch.atan2(across, along), BEARING_SD)


def turning_point(dt: float = 0.2) -> Motion:
    """A target in slow motion four units away: constant velocity with small random accelerations.

    Args:
        dt: time between measurements.
    """
    one = torch.tensor([[1.0, dt], [0.0, 1.0]], dtype=torch.float64)
    noise = 0.1 * torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=torch.float64)
    start = Mixture.of_covariances(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=torch.float64).square())[None],
    )
    return Motion(torch.block_diag(one, one), torch.block_diag(noise, noise), start)


@dataclass(frozen=True)
class TrackPriors:
    """Mixtures as they arise in tracking: components near each other, narrow and wide, copies among them.

    Args:
        apart: standard deviation of the components' means within a mixture, in units of the component's own spread.
        narrow: smallest factor on the scale of the program's prior.
        wide: largest factor.

    Raises:
        OptionError: an option is out of range.
    """

    apart: float = 1.0
    narrow: float = 0.1
    wide: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.narrow < self.wide and self.apart >= 0):
            raise OptionError(f"expected 0 < narrow < wide and apart >= 0, got {self}")

    def sample(self, rows: int, components: int, center: Tensor, scale: Tensor, generator: torch.Generator) -> Mixture:
        """Independent mixtures, see `ppl.amortised.priors.MixtureLaw`."""
        n, k = len(center), components
        own: dict[str, Any] = {"dtype": center.dtype, "generator": generator}
        low, high = math.log(self.narrow), math.log(self.wide)
        size = torch.exp(low + (high - low) * torch.rand(rows, 1, n, **own) + 0.3 * torch.randn(rows, k, n, **own))
        root = torch.randn(rows, k, n, 2 * n, **own) / math.sqrt(2 * n)
        mixed = 0.5 * root @ root.mT + 0.5 * torch.eye(n, dtype=center.dtype)
        spread = (size * scale)[..., None] * mixed * (size * scale)[..., None, :]
        tril = torch.linalg.cholesky(spread)
        means = center + scale * torch.randn(rows, 1, n, **own)
        off = self.apart * torch.rand(rows, 1, 1, **own) * torch.randn(rows, k, n, **own)
        means = means + (tril @ off[..., None])[..., 0]
        weights = torch.softmax(torch.randn(rows, k, **own) * 1.5, -1)
        whole = Mixture(weights, means, tril)
        copies = torch.rand(rows, **own) < 0.15
        one = whole[copies]
        single = Mixture(torch.ones_like(one.weights[:, :1]), one.means[:, :1], one.scale_tril[:, :1]).split(k)
        for mine, theirs in zip(
            (whole.weights, whole.means, whole.scale_tril),
            (single.weights, single.means, single.scale_tril),
            strict=True,
        ):
            mine[copies] = theirs
        return whole

r"""Latent stochastic differential equations of time series, driven by Brownian or fractional noise.

    X_0 ~ N(m, s^2),   dX = f(X) dt + g dB^H,   y_i ~ N(decoder(X(t_i), w), sigma^2),   w ~ N(0, I)

The posterior is a controlled path: dW -> dW + u(X, Y, h(t)) dt, where Y are the factors of the noise and h is what an
encoder reads off the series. Prior and posterior move X and Y by the same exponential steps, so

    log p(y) >= E[sum_i log p(y_i | X(t_i), w)] - E int u^2 dt / 2 - KL(q(X_0) || p) - KL(q(w) || p)

is a true bound for the discretised process at any step. Drift and control are evaluated in one loop. Noise of type I,
of an unknown past, starts from factors Y_0 that are latent as well: Gaussian in the posterior, given X_0, with their
own divergence.

Source: Daems et al. (ICLR 2024), the public code [read]; the discrete chain and its bound [derived]; theirs has no
prior on w, and a squared error without a noise level, which is no bound.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inverse.paths.factors import Factors
from models.controlled_path import Control, ControlledPath, Sight
from models.latent_encoding import Encoding, FirstFactors, divergence, moments
from ppl.errors import OptionError, ShapeError
from sde.fractional import Kind, check_hurst, check_kind
from sde.increments import BrownianNoise, Noise, starts_random
from sde.markov import MarkovNoise
from sde.path import Path
from sde.process import Process

__all__ = ["Bound", "Forecast", "LatentSDE"]


class Bound(NamedTuple):
    """The bound for each series of a batch, and its parts: log_likelihood - path - start - content - factors."""

    value: Tensor  # (batch,)
    log_likelihood: Tensor
    path: Tensor
    start: Tensor
    content: Tensor
    factors: Tensor


class _Drawn(NamedTuple):
    """What a walk starts from: X_0, the content, the numbers of Y_0, and log q - log p of those or its mean."""

    start: Tensor  # (batch, latent)
    content: Tensor | None
    first: Tensor | None  # (batch, latent, K)
    cost: Tensor  # (batch,)


class Forecast(NamedTuple):
    """Draws of what comes after a series."""

    mean: Tensor  # (draws, batch, ahead, *frame), of the likelihood
    latent: Tensor  # (draws, batch, frames + ahead, latent)


class Decoder(Protocol):
    """The mean of a frame from the latent state and the content."""

    def __call__(self, x: Tensor, content: Tensor | None) -> Tensor:
        """(batch, frames, latent) and (batch, content) -> (batch, frames, *frame)."""
        ...


class LatentSDE(nn.Module):
    """A latent process of a series, its posterior and its decoder; `fit` learns all of them together.

    Args:
        encoder: (batch, frames, *frame) -> `Encoding`; its attribute `context` says how many numbers the context has.
        decoder: mean of a frame.
        latent: coordinates of X, each with its own noise.
        horizon: last time that will be asked for, forecasts included.
        frame_step: time between two frames, where no times are given.
        hurst: Hurst index; "learn" starts at 1/2; None is Brownian motion without factors.
        kind: of a fractional noise: "II" starts without a past; "I" has one, inferred, and stationary increments.
        factors: K of a fractional noise.
        substeps: steps of the process between two frames.
        content: numbers that do not change along the series; the encoder gives them too.
        drift: (..., latent) -> (..., latent); None is a network of two hidden layers.
        width: units in a hidden layer of drift and control.
        diffusion: g at first, learned for each coordinate.
        sigma: standard deviation of the likelihood at first, learned unless `fixed_sigma`.
        fixed_sigma: keep sigma.
        scales: the posterior has variances of its own for the driving numbers, as data sharper than a step ask for;
            otherwise 1, as in continuous time, and the divergence is exactly half the sum of u^2 dt.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> from models.latent_encoding import SeriesEncoder
        >>> model = LatentSDE(SeriesEncoder(1, 2), lambda x, w: x[..., :1], latent=2, horizon=2.0, hurst="learn")
        >>> y = torch.zeros(3, 8, 1)
        >>> model.bound(y, torch.Generator().manual_seed(0)).value.shape
        torch.Size([3])
        >>> model.forecast(y, 4, draws=5, generator=torch.Generator().manual_seed(0)).mean.shape
        torch.Size([5, 3, 4, 1])
    """

    log_sigma: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder,
        latent: int,
        horizon: float,
        *,
        frame_step: float = 0.1,
        hurst: float | Literal["learn"] | None = "learn",
        kind: Kind = "II",
        factors: int = 5,
        substeps: int = 1,
        content: int = 0,
        drift: nn.Module | None = None,
        width: int = 64,
        diffusion: float = 1.0,
        sigma: float = 0.2,
        fixed_sigma: bool = False,
        scales: bool = False,
    ) -> None:
        super().__init__()
        if min(latent, substeps, width, factors) < 1 or content < 0:
            raise OptionError(
                f"latent, substeps, width and factors must be positive and content not negative, got {latent}, "
                f"{substeps}, {width}, {factors} and {content}"
            )
        if not (0 < frame_step <= horizon and diffusion > 0 and sigma > 0):
            raise OptionError(
                f"expected 0 < frame_step <= horizon, diffusion > 0 and sigma > 0, got {frame_step}, {horizon}, "
                f"{diffusion} and {sigma}"
            )
        if isinstance(hurst, str) and hurst != "learn":
            raise OptionError(f"hurst must be a number, 'learn' or None (Brownian motion), got {hurst!r}")
        if hurst is not None and hurst != "learn":
            check_hurst(hurst)
        check_kind(kind)
        self.encoder, self.decoder, self.latent, self.horizon = encoder, decoder, latent, horizon
        self.frame_step, self.substeps, self.content, self.factors = frame_step, substeps, content, factors
        self.learns_hurst, self.kind = hurst == "learn", kind
        self.fixed_hurst = float(hurst) if isinstance(hurst, (int, float)) else None
        self.hurst_logit = nn.Parameter(torch.zeros(())) if self.learns_hurst else None
        self.drift = drift if drift is not None else _drift(latent, width)
        size, context = self.noise.size, int(encoder.context)  # type: ignore[arg-type]
        self.control = Control(latent * (1 + size), context, latent, width, scales)
        self.first = FirstFactors(context, latent, size) if starts_random(self.noise) else None
        self.log_diffusion = nn.Parameter(torch.full((latent,), math.log(diffusion)))
        self.start_loc, self.start_log_scale = nn.Parameter(torch.zeros(latent)), nn.Parameter(torch.zeros(latent))
        if fixed_sigma:
            self.register_buffer("log_sigma", torch.tensor(math.log(sigma)))
        else:
            self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    # The prior.

    @property
    def hurst(self) -> Tensor | float:
        """The Hurst index, between 0.02 and 0.98 where it is learned; 1/2 of Brownian motion."""
        if self.hurst_logit is not None:
            return 0.02 + 0.96 * torch.sigmoid(self.hurst_logit)
        return 0.5 if self.fixed_hurst is None else self.fixed_hurst

    @property
    def noise(self) -> Noise:
        """What drives the process."""
        if self.hurst_logit is None and self.fixed_hurst is None:
            return BrownianNoise()
        return MarkovNoise(self.hurst, self.horizon, self.kind, self.factors)

    def path(self, start: Tensor, times: Tensor) -> Path:
        """The prior of X at all steps after the first time, from X_0 (*batch, latent); frames are `substeps` apart."""
        process = Process(lambda x, t: self.drift(x), self.log_diffusion.exp(), self.noise)
        steps = [
            torch.linspace(float(a), float(b), self.substeps + 1, dtype=torch.float64)[1:] for a, b in pairwise(times)
        ]
        return Path(process, torch.cat(steps), start, start=float(times[0]), validate_args=False)

    def times(self, frames: int) -> Tensor:
        """Times of frames, (frames,), from 0."""
        return self.frame_step * torch.arange(frames, dtype=torch.float64)

    # The posterior.

    def _given(self, context: Tensor) -> Tensor:
        """The context at the beginning of every step, on the line between two frames: (batch, steps, units)."""
        share = torch.arange(self.substeps, device=context.device, dtype=context.dtype)[:, None] / self.substeps
        between = context[:, :-1, None] * (1 - share) + context[:, 1:, None] * share
        return self.control.read(between.flatten(1, 2))

    def _walk(
        self,
        start: Tensor,
        eps: Tensor,
        given: Tensor,
        times: Tensor,
        hold: bool = False,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follow X and the factors from X_0 and Y_0; after the last given step the prior goes on.

        Returns:
            X at all steps, the first included, (batch, steps + 1, latent); the divergences of all steps, given what was
            before, and log q - log p of the driving numbers, (batch,) each. Their means are equal. With `hold` the
            second has q's parameters held, which leaves it the gradient along the path alone.
        """
        path = self.path(start, times)
        factors, sight, x = Factors(path, start, first), Sight(path, start), start
        at = torch.from_numpy(path.increments.grid).to(start)
        states, half, log_ratio = [start], start.new_zeros(len(start)), start.new_zeros(len(start))
        held = {n: p.detach() for n, p in self.control.named_parameters()} if hold else {}
        kept, scale = given.detach(), self.control.scale(given)
        for n, dt in enumerate(path.increments.dt.tolist()):
            z = eps[:, n]
            if n < given.shape[1]:
                seen = sight(x, factors)
                u, s = self.control(seen, given[:, n]), scale[:, n]
                z = u + s * z
                half = half + (0.5 * (u.square() + s.square() - 1) - s.log()).sum(1)
                v, r = u, s
                if hold:
                    v = torch.func.functional_call(self.control, held, (seen, kept[:, n]))
                    r = s.detach()
                white = (z - v) / r
                log_ratio = log_ratio + (0.5 * (z.square() - white.square()) - r.log()).sum(1)
            x = path.process.step(x, at[n], dt, factors.move(n, z))
            states.append(x)
        return torch.stack(states, 1), half, log_ratio

    def _encode(self, y: Tensor, generator: torch.Generator | None, pathwise: bool = False) -> tuple[Encoding, _Drawn]:
        """The encoding of series, and draws of X_0, of the content and of what starts the factors."""
        if y.ndim < 3 or y.shape[1] < 2:
            raise ShapeError(f"expected series (batch, frames, *frame) of two frames or more, got {tuple(y.shape)}")
        found: Encoding = self.encoder(y)
        loc, scale = moments(found.start)
        white, content = loc + scale * _normal(loc, loc.shape, generator), None
        if self.content and found.content is None:
            raise ShapeError(f"the encoder must give the content as well, (batch, {2 * self.content}), got None")
        if self.content and found.content is not None:
            loc, scale = moments(found.content)
            content = loc + scale * _normal(loc, loc.shape, generator)
        start, none = self.start_loc + self.start_log_scale.exp() * white, white.new_zeros(len(y))
        if self.first is None:
            return found, _Drawn(start, content, None, none)
        eps = _normal(white, (len(y), *self.first.shape), generator)
        return found, _Drawn(start, content, *self.first.draw(found.context, white, eps, pathwise))

    def bound(
        self,
        y: Tensor,
        generator: torch.Generator | None = None,
        *,
        times: Tensor | None = None,
        pathwise: bool = False,
    ) -> Bound:
        """An unbiased estimate of the evidence bound, in nats, for every series.

        Args:
            y: (batch, frames, *frame).
            generator: source of the driving numbers; None is torch's global one.
            times: (frames,) ascending; None is every `frame_step` from 0.
            pathwise: take log q - log p along the path for its divergence, which leaves value and gradient without
                variance at the best control; otherwise half the sum of u^2 dt.
        """
        times = self.times(y.shape[1]) if times is None else times
        found, drawn = self._encode(y, generator, pathwise)
        eps = _normal(drawn.start, (len(y), (len(times) - 1) * self.substeps, self.latent), generator)
        hold = pathwise and torch.is_grad_enabled()
        states, half, log_ratio = self._walk(drawn.start, eps, self._given(found.context), times, hold, drawn.first)
        mean = self.decoder(states[:, :: self.substeps], drawn.content)
        log_likelihood = dist.Normal(mean, self.log_sigma.exp()).log_prob(y).flatten(1).sum(1)
        path, first = log_ratio if pathwise else half, divergence(found.start)
        fixed = torch.zeros_like(first) if found.content is None else divergence(found.content)
        value = log_likelihood - path - first - fixed - drawn.cost
        return Bound(value, log_likelihood, path, first, fixed, drawn.cost)

    @torch.no_grad()
    def reconstruct(
        self, y: Tensor, draws: int = 1, generator: torch.Generator | None = None, *, times: Tensor | None = None
    ) -> Forecast:
        """Draws of the series without its noise, (draws, batch, frames, *frame), and of X."""
        return self._continue(y, 0, draws, generator, times)

    @torch.no_grad()
    def forecast(
        self,
        y: Tensor,
        ahead: int,
        draws: int = 1,
        generator: torch.Generator | None = None,
        *,
        times: Tensor | None = None,
    ) -> Forecast:
        """Draws of what comes next: the posterior up to the last frame, then the prior, with the noise's own memory.

        Args:
            y: (batch, frames, *frame).
            ahead: frames to come.
            draws: futures of each series.
            generator: source of randomness; None is torch's global one.
            times: (frames + ahead,) ascending; None is every `frame_step` from 0.

        Raises:
            OptionError: no frames to come.
        """
        if ahead < 1:
            raise OptionError(f"ahead must be a positive number of frames, got {ahead}")
        return self._continue(y, ahead, draws, generator, times)

    def _continue(
        self, y: Tensor, ahead: int, draws: int, generator: torch.Generator | None, times: Tensor | None
    ) -> Forecast:
        """Frames from the first one forecast, or all where none is."""
        frames = y.shape[1]
        times = self.times(frames + ahead) if times is None else times
        found, drawn = self._encode(y.repeat(draws, *(1,) * (y.ndim - 1)), generator)
        eps = _normal(drawn.start, (len(drawn.start), (len(times) - 1) * self.substeps, self.latent), generator)
        states, _, _ = self._walk(drawn.start, eps, self._given(found.context), times, first=drawn.first)
        latent = states[:, :: self.substeps]
        mean = self.decoder(latent[:, frames if ahead else 0 :], drawn.content)
        return Forecast(mean.unflatten(0, (draws, len(y))), latent.unflatten(0, (draws, len(y))))

    # The same as Pyro programs.

    def model(self, y: Tensor, times: Tensor | None = None) -> None:
        """The prior and the likelihood as a Pyro program, with a `sde.Path` as its site "x".

        Noise of type I has its start at a site "factors", and "x" is the path given that.
        """
        pyro.module("latent_sde", self)
        times = self.times(y.shape[1]) if times is None else times
        with pyro.plate("series", len(y)):
            scale = self.start_log_scale.exp()
            start = pyro.sample("start", dist.Normal(self.start_loc, scale).to_event(1))
            content = None
            if self.content:
                content = pyro.sample("content", dist.Normal(scale.new_zeros(self.content), 1.0).to_event(1))
            path: dist.TorchDistribution = self.path(start, times)
            if self.first is not None:
                unit = dist.Normal(scale.new_zeros(self.first.shape), 1.0).to_event(2)
                path = ControlledPath(self.path(start, times), None, None, pyro.sample("factors", unit))
            x = pyro.sample("x", path)
            states = torch.cat([start[:, None], x], 1)[:, :: self.substeps]
            likelihood = dist.Normal(self.decoder(states, content), self.log_sigma.exp())
            pyro.sample("y", likelihood.to_event(y.ndim - 1), obs=y)

    def guide(self, y: Tensor, times: Tensor | None = None) -> None:
        """The posterior as a Pyro program: see `model`."""
        pyro.module("latent_sde", self)
        times = self.times(y.shape[1]) if times is None else times
        found: Encoding = self.encoder(y)
        with pyro.plate("series", len(y)):
            loc, scale = moments(found.start)
            unit = self.start_log_scale.exp()
            start = pyro.sample("start", dist.Normal(self.start_loc + unit * loc, unit * scale).to_event(1))
            if found.content is not None:
                pyro.sample("content", dist.Normal(*moments(found.content)).to_event(1))
            first = None
            if self.first is not None:
                loc, lower = self.first(found.context, (start - self.start_loc) / unit)
                first = pyro.sample("factors", dist.MultivariateNormal(loc, scale_tril=lower).to_event(1))
            path, given = self.path(start, times), self._given(found.context)
            pyro.sample("x", ControlledPath(path, self.control, given, first))


def _normal(like: Tensor, shape: torch.Size | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _drift(latent: int, width: int) -> nn.Module:
    """A network of two hidden layers, small at first."""
    last = nn.Linear(width, latent)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return nn.Sequential(nn.Linear(latent, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), last)

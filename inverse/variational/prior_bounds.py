r"""The log density of a diffusion prior for variational fits, from the denoiser alone.

score:   grad log p_s(x) = (D(x, s) - x) / s^2 at one low level s; no derivative of the network.
immse:   log p(x) >= log r(x) + 1/2 \int (E|x - D_r|^2 - E|x - D|^2) dgamma,  gamma = 1 / s^2,  with r a Gaussian and
         D_r its denoiser, both at x + s eps. Equal for the optimal denoiser; for any other a bound on the log density
         of the reverse process that it drives, which is that of r outside (sigma_min, sigma_max).
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Size, Tensor

from sde.log_density import gaussian_reference

__all__ = ["Bound", "PriorDensity"]

Bound = Literal["score", "immse"]
TRACKED = 4  # one draw in so many shows the bound's value while a network is followed by its score alone


@dataclass(frozen=True, eq=False)
class PriorDensity:
    """Log density of one diffusion site, with the gradient of a bound.

    Args:
        prior: a `DiffusionPrior` or a `GaussianMixture`.
        shape: shape of the site, plates first.
        bound: "score" or "immse".
        low: lowest level of the integral, and of the score, whose target is the prior blurred by it.
        levels: noise levels per draw and gradient, two evaluations each, for "immse".
        check: noise levels per draw of `value`, where the prior has no density in closed form.
        floor: lowest level of `value`, that of the prior itself; None takes `low`.

    Example:
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.ones(1).double())
        >>> density = PriorDensity(prior, torch.Size([2]), "score", low=0.1)
        >>> x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        >>> surrogate = density.surrogate(x, torch.Generator())
        >>> torch.autograd.grad(surrogate.sum(), x)[0]                                     # -x / (1 + 0.1^2)
        tensor([[-0.9901, -0.9901]], dtype=torch.float64)
    """

    prior: Any
    shape: Size
    bound: Bound
    low: float
    levels: int = 4
    check: int = 16
    floor: float | None = None
    center: Tensor = field(init=False, repr=False)
    spread: Tensor = field(init=False, repr=False)
    level: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prior = self.prior
        zero = torch.zeros(1, *self.shape, dtype=prior.dtype, device=prior.device)
        with torch.no_grad():
            center, spread = gaussian_reference(prior.denoise, zero, self.low, prior.sigma_max)
        object.__setattr__(self, "center", center[0])
        object.__setattr__(self, "spread", spread[0])
        object.__setattr__(self, "level", self.low)

    def at_level(self, level: float) -> PriorDensity:
        """The same density with its score taken at a level, where that is above the lowest."""
        new = copy.copy(self)
        object.__setattr__(new, "level", max(level, self.low))
        return new

    @property
    def scale(self) -> float:
        """Unit of the coordinates of a fit: the standard deviation of the data along their widest direction."""
        return float(self.prior.data_std)

    @property
    def is_exact(self) -> bool:
        """Whether the prior has a density in closed form."""
        return hasattr(self.prior, "log_prob_at")

    def value(self, x: Tensor) -> Tensor:
        """Log density (lanes,) of x (lanes, *shape): exact, or the bound with noise that is a function of x."""
        if self.is_exact:
            exact = self._exact(x, 0.0)
            return exact if bool(exact.isfinite().all()) else self._exact(x, self.low)  # a degenerate prior has none
        seed = zlib.crc32(x.detach().cpu().contiguous().numpy().tobytes())
        return self.immse(x, self.check, torch.Generator(x.device).manual_seed(seed), self.floor)

    def surrogate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(lanes,) an estimate of the log density whose gradient in x is that of the bound."""
        if self.bound == "immse":
            return self.immse(x, self.levels, generator)
        fixed = x.detach()
        with torch.no_grad():
            if self.is_exact:
                # In closed form, without the cancellation of D - x; one denoiser call is what it stands for.
                for counter in self.prior.counters:
                    counter.calls += 1
                    counter.evals += len(x) * self._plates
                score, value = self.prior.score(fixed, self.level), self._exact(fixed, self.low)
            else:
                score = self.prior.score(fixed, self.level)
                some = fixed[: math.ceil(len(x) / TRACKED)]
                value = self.immse(some, 1, generator).mean().expand(len(x))
        return value + ((x - fixed) * score).flatten(1).sum(1)

    def immse(self, x: Tensor, levels: int, generator: torch.Generator, low: float | None = None) -> Tensor:
        r"""(lanes,) unbiased estimates of the bound, differentiable, by one denoiser call for all levels.

        Levels are stratified with density proportional to 1 / (1 + s^2 / v) in log s, v = data_std^2, in which the
        integrand is bounded; every lane has its own, and so its own error. Noise comes in pairs of opposite sign.

        Args:
            x: (lanes, *shape).
            levels: per lane, two evaluations each.
            generator: source of levels and noise.
            low: lowest level; None takes that of the fit.
        """
        lanes, device, v = len(x), generator.device, self.scale**2
        ends = [math.log(s**2 / (s**2 + v)) for s in (low or self.low, self.prior.sigma_max)]
        shift = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        place = torch.arange(lanes, dtype=torch.float64, device=device) / lanes + shift
        stratum = torch.arange(levels, dtype=torch.float64, device=device)[:, None]
        w = ends[0] + (ends[1] - ends[0]) * (stratum + place % 1.0) / levels
        variance = v * w.exp() / -torch.expm1(w)
        # d log s = (s^2 + v) / (2 v) dw
        weight = (ends[1] - ends[0]) / levels * (variance + v) / (2 * v)
        eps = torch.randn((levels, lanes, *self.shape), generator=generator, dtype=x.dtype, device=device).to(x.device)
        eps = torch.stack([eps, -eps])

        def column(t: Tensor) -> Tensor:
            return t.to(x.device, x.dtype).reshape(levels, lanes, *[1] * len(self.shape))

        sigma, gain = column(variance.sqrt()), column(self.spread.to(device) / (self.spread.to(device) + variance))
        plates = self.shape[: len(self.shape) - len(self.prior.event_shape)]
        noisy = x + sigma * eps
        level = sigma.reshape(levels, lanes, *[1] * len(plates)).expand(2, levels, lanes, *plates)
        error = x - self.prior.denoise(noisy, level)
        centred = x - self.center
        error_r = (1 - gain) * centred - gain * sigma * eps
        # The same noise in both errors: their large common part, sigma^2 |eps|^2, cancels.
        gap = ((error_r.square() - error.square()) / sigma.square()).flatten(3).sum(3).mean(0)
        integral = (gap * weight.to(x.device, x.dtype)).sum(0)
        d = self.shape.numel()
        return integral - 0.5 * (
            centred.square().flatten(1).sum(1) / self.spread + d * (2 * math.pi * self.spread).log()
        )

    @property
    def _plates(self) -> int:
        """Events in one value of the site."""
        return self.shape[: len(self.shape) - len(self.prior.event_shape)].numel()

    def _exact(self, x: Tensor, sigma: float) -> Tensor:
        """log p_sigma(x) (lanes,), summed over plates."""
        return self.prior.log_prob_at(x, sigma).reshape(len(x), -1).sum(1)

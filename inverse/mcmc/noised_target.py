r"""The posterior at a noise level, p_s(x) times a likelihood of x, as a density for Markov chains.

At the lowest level s_1 the draw is x_0 ~ p(x_0 | x), and for whitened linear data d = B x_0 + n with s_1 ||B|| < 1

    pi(x) = p_s(x) N(d; B x, I - s^2 B B^T)

leaves x_0 with the posterior itself: the noise of x is part of the noise of the data. Levels above only lead there:
they take I + s^2 B B^T, what the data say of x_0 + s n. Other likelihoods of curvature h are tempered above, to the
power 1 / (1 + h s^2), and at s_1 stand as they are, which blurs them by s_1.
Source: [derived], as the corrected likelihood of `SplitGibbs`, with z in place of the pair (x, z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inverse.chunks import Chunks
from inverse.guides.base import likelihood_gradient
from inverse.many import Streams, UnlikeError
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import SpectralData
from inverse.side_by_side import ChainNoise, SideBySide
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor

__all__ = ["NoisedTarget", "check_nodes", "inner_nodes", "lowest_noise", "note_likelihood"]

SHARE = 0.7
"""s_1 ||B|| by default: half of the variance of the data is left to the likelihood of x."""

POINTS = 8
"""Points from which the curvature of a likelihood is looked for."""

Raw = dict[str, Tensor]


class NoisedLikelihood(Protocol):
    """log of the likelihood of x at the levels of a ladder, from features of x that no level enters.

    Problems side by side have a ladder each, one after the other in `levels`.
    """

    curvatures: Tensor
    """(problem,) largest curvature of the likelihood of each, float64."""

    def at(self, sigmas: Tensor, final: bool) -> None:
        """Take the levels (levels,), the lowest of a problem first; `final` says that this one is that of the draws."""

    def read(self, x: Tensor) -> Raw:
        """Features of x (rows, *shape), each with the rows in front."""
        ...

    def value(self, raw: Raw, level: Tensor) -> Tensor:
        """(rows,) log likelihood, up to a constant of the level, for levels (rows,) by index."""
        ...

    def gradient(self, raw: Raw, level: Tensor) -> Tensor:
        """(rows, *shape)."""
        ...


class SpectralLikelihood:
    """Linear data with Gaussian noise, in the singular basis."""

    def __init__(self, side: SideBySide, each: int, cost: Cost) -> None:
        self.data, self.cost = SpectralData.of(side.rows(each), "MCMC at a noise level"), cost
        problems = len(side)
        # (problem, r): rows of one problem share them.
        self._s, self._u = (t.expand(problems, -1) if t.ndim == 1 else t[::each] for t in (self.data.s, self.data.u))
        self.curvatures = self._s.new_zeros(problems, dtype=torch.float64)
        if self._s.shape[-1]:
            self.curvatures = self._s.double().amax(1).square()

    def at(self, sigmas: Tensor, final: bool) -> None:
        """The data and their variance at every level, (levels, r)."""
        problems = len(self._s)
        sign = torch.ones_like(sigmas)
        sign[:: len(sigmas) // problems] = -1.0 if final else 1.0
        self.s, self.u = (t.repeat_interleave(len(sigmas) // problems, 0) for t in (self._s, self._u))
        self.variance = 1 + (sign * sigmas.square())[:, None] * self.s.square()

    def read(self, x: Tensor) -> Raw:
        """V^T x."""
        self.cost.likelihood_evals += len(x)
        return {"seen": self.data.of_x(x)}

    def value(self, raw: Raw, level: Tensor) -> Tensor:
        """-|u - s V^T x|^2 / 2, weighted by the variance of the level."""
        gap = self.u[level] - self.s[level] * raw["seen"]
        return -0.5 * (gap.square() / self.variance[level]).sum(-1)

    def gradient(self, raw: Raw, level: Tensor) -> Tensor:
        """V s (u - s V^T x), weighted likewise."""
        s = self.s[level]
        return self.data.svd.from_spectral(s * (self.u[level] - s * raw["seen"]) / self.variance[level])


class TemperedLikelihood:
    """Any differentiable likelihood; where it is not finite, it is zero and pulls nowhere."""

    def __init__(self, side: SideBySide, each: int, cost: Cost) -> None:
        self.problem, self.cost = side.rows(each), cost
        self.curvatures = self._curvatures(side)

    def at(self, sigmas: Tensor, final: bool) -> None:
        """The exponent of every level, (levels,)."""
        each = len(sigmas) // len(self.curvatures)
        self.curvature = self.curvatures.to(sigmas).repeat_interleave(each)
        self.weight = 1 / (1 + self.curvature * sigmas.square())
        if final:
            self.weight[::each] = 1.0

    def read(self, x: Tensor) -> Raw:
        """log p(y | x) and its gradient."""
        value, gradient = likelihood_gradient(self.problem, x, self.cost)
        fine = value.isfinite() & gradient.flatten(1).isfinite().all(1)
        wide = fine.reshape(-1, *[1] * (gradient.ndim - 1))
        return {"value": torch.where(fine, value, -torch.inf), "gradient": torch.where(wide, gradient, 0.0)}

    def value(self, raw: Raw, level: Tensor) -> Tensor:
        """The exponent times log p(y | x)."""
        return self.weight[level] * raw["value"]

    def gradient(self, raw: Raw, level: Tensor) -> Tensor:
        """The exponent times its gradient."""
        g = raw["gradient"]
        return self.weight[level].reshape(-1, *[1] * (g.ndim - 1)) * g

    def _curvatures(self, side: SideBySide) -> Tensor:
        """Largest curvature met by power iterations from points about the prior's mean; a scale, not a bound."""
        prior, problem = side.first.prior, side.rows(POINTS)
        own = ChainNoise(problem, POINTS, Streams.of([0] * len(side), problem.device))
        noise, v = (own.normal(problem.shape) for _ in range(2))
        centre = prior.denoise(prior.start(torch.zeros_like(noise)), prior.sigma_max)
        x, step = centre + 0.5 * prior.data_std * noise, 1e-3 * prior.data_std
        base = likelihood_gradient(problem, x, self.cost)[1]
        found = torch.zeros(len(side), dtype=torch.float64, device=problem.device)
        for _ in range(5):
            norm = v.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(-1, *[1] * (v.ndim - 1))
            v = (likelihood_gradient(problem, x + step * v / norm, self.cost)[1] - base).nan_to_num(0.0, 0.0, 0.0)
            found = v.flatten(1).norm(dim=1).reshape(len(side), -1).amax(1).double() / step
        return found


def lowest_noise(target: NoisedTarget, wanted: float | None) -> list[float]:
    """The level that draws of every problem are made from.

    Raises:
        OptionError: the level that was asked for, or the only one left, does not exist.
    """
    spectral = isinstance(target.likelihood, SpectralLikelihood)
    return [_lowest(target.side.first.prior, c, spectral, wanted) for c in target.likelihood.curvatures.tolist()]


def _lowest(prior: Any, curvature: float, spectral: bool, wanted: float | None) -> float:
    """That of one problem."""
    exact = "exact_covariance" in prior.capabilities
    top = math.sqrt(1 / curvature) if curvature > 0 else math.inf
    sigma = wanted
    if sigma is None:
        sigma = min((SHARE if spectral else 0.1) * top, 0.2 * prior.data_std)
        sigma = sigma if exact else max(sigma, prior.sigma_min)
    if spectral and sigma >= top:
        raise OptionError(
            f"sigma_min={sigma:.4g} is not below 1 / ||B|| = {top:.4g} (sigma_y / ||A|| for equal noise), where the "
            "likelihood of x at that level does not exist; lower it, or, if the prior knows no lower level than "
            f"{prior.sigma_min:.4g}, use inverse.TwistedSMC"
        )
    if not (exact or sigma >= prior.sigma_min) or sigma >= prior.sigma_max:
        raise OptionError(
            f"sigma_min={sigma:.4g} must lie between the prior's own sigma_min={prior.sigma_min:.4g} and its "
            f"sigma_max={prior.sigma_max:.4g}"
        )
    return sigma


class NoisedTarget:
    """The prior's score and the likelihood at the levels of a ladder; rows carry the index of their level.

    Args:
        side: the problems; each has a ladder of its own, one after the other.
        each: rows of every problem, those of all its levels.
        cost: counts likelihood evaluations.
        chunk: most rows of one denoiser call.

    Raises:
        UnlikeError: some of the problems can be decomposed and others not.
    """

    def __init__(self, side: SideBySide, each: int, cost: Cost, chunk: int | None) -> None:
        self.side, self.cost, self._chunks = side, cost, Chunks(side.chunk(chunk))
        self.problem = problem = side.first
        self.likelihood: NoisedLikelihood
        known = [_decomposed(single) for single in side.singles]
        if any(known) and not all(known):
            raise UnlikeError("the operators of some can be decomposed, and of others not")
        self.likelihood = SpectralLikelihood(side, each, cost) if known[0] else TemperedLikelihood(side, each, cost)
        self.plates = problem.shape[: len(problem.shape) - len(problem.prior.event_shape)]
        self.knows_density = hasattr(problem.prior, "log_prob_at")

    def at(self, sigmas: Tensor, final: bool) -> None:
        """Take the levels (levels,), float64, the lowest of a problem first; `final`: that one is of the draws."""
        self.sigmas = sigmas.to(self.problem.device, self.problem.dtype)
        self.likelihood.at(self.sigmas, final)

    def denoise(self, x: Tensor, level: Tensor) -> Tensor:
        """E[x_0 | x], rows (rows, *shape) at levels (rows,) by index, in one denoiser call."""
        sigma = self.sigmas[level].reshape(-1, *[1] * len(self.plates))
        return self._chunks(self.problem.prior.denoise, x, sigma)

    def score(self, x: Tensor, level: Tensor) -> Tensor:
        """grad log p_s(x) likewise."""
        return (self.denoise(x, level) - x) / self.sigmas[level].square().reshape(-1, *[1] * (x.ndim - 1))

    def log_prior(self, x: Tensor, level: Tensor) -> Tensor:
        """log p_s(x), (rows,), where the prior knows it."""
        sigma = self.sigmas[level].reshape(-1, *[1] * len(self.plates))
        return self.problem.prior.log_prob_at(x, sigma).reshape(len(x), -1).sum(1)


def gain(new: Tensor, old: Tensor) -> Tensor:
    """new - old for log likelihoods; 0 where both are -inf, so that a chain outside the support walks by the prior."""
    return torch.where((new == -torch.inf) & (old == -torch.inf), 0.0, new - old)


def check_nodes(nodes: int | None) -> None:
    """Raise OptionError unless nodes is None or a number of inner nodes."""
    if nodes is not None and (not isinstance(nodes, int) or nodes < 0):
        raise OptionError(f"nodes must be an integer of zero or more, or None, got {nodes!r}")


def inner_nodes(nodes: int | None, target: NoisedTarget) -> int | None:
    """Inner nodes of line integrals, or None for the exact density."""
    return (None if target.knows_density else 2) if nodes is None else nodes


def note_likelihood(target: NoisedTarget, sigmas: Sequence[float], monitor: Monitor) -> None:
    """Say when the draws are blurred."""
    if not isinstance(target.likelihood, SpectralLikelihood):
        for i, (sigma, curvature) in enumerate(zip(sigmas, target.likelihood.curvatures.tolist(), strict=True)):
            target.side.note(
                monitor,
                i,
                "the likelihood is not linear and Gaussian with a decomposition of its operator: it is blurred by "
                f"sigma_min={sigma:.3g}, about {sigma**2 * curvature:.1%} of its variance",
            )


def _decomposed(problem: DiffusionProblem) -> bool:
    """Whether the likelihood is linear and Gaussian, with a singular basis."""
    return problem.likelihood.is_gaussian and "svd" in problem.likelihood.gaussian.operator.capabilities

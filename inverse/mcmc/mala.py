r"""Metropolis-adjusted Langevin steps for replicas at several noise levels, with no density but a score.

    x' = x + eta M g(x) + sqrt(2 eta) M^{1/2} xi,   g = grad log pi,   accept with min(1, exp(delta))
    delta = log pi(x') - log pi(x) - |xi'|^2 / 2 + |xi|^2 / 2,         xi' = xi + sqrt(eta / 2) M^{1/2}^T (g(x) + g(x'))

M^{1/2}^T g is cut to a length of 5 sqrt(d), in both places: the test makes up for it.

log p_s(x') - log p_s(x) is exact where the prior knows its noised density, and a line integral of the score elsewhere:
its inner nodes go through the network together with x', and the scores at both ends are those of the drift.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Size, Tensor

from inverse.many import Streams
from inverse.mcmc.line_integral import LineRule
from inverse.mcmc.noised_target import NoisedTarget, SpectralLikelihood, TemperedLikelihood, gain

__all__ = ["Metric", "Moved", "Replicas"]

State = dict[str, Tensor]

PULL = 5.0  # longest whitened gradient, over sqrt(d)


class Moved(NamedTuple):
    """Of every replica (levels, chains): acceptance probability, and whether the proposal was not finite."""

    accept: Tensor
    diverging: Tensor


class Metric:
    """M^{1/2} of every level: what the data fix, tau elsewhere; or a matrix that was learned.

    M = (B^T R^{-1} B + I / tau^2)^{-1} with tau^2 = s^2 + sigma_min^2, and for other likelihoods their curvature in
    place of B^T R^{-1} B.
    """

    def __init__(self, target: NoisedTarget) -> None:
        self.target = target
        self.root: Tensor | None = None
        self.seen: Tensor | None = None
        likelihood, narrow = target.likelihood, target.problem.prior.sigma_min
        inverse = 1 / (target.sigmas.square() + narrow**2)
        if isinstance(likelihood, SpectralLikelihood):
            self.tau = inverse.rsqrt()
            self.seen = (likelihood.s.square() / likelihood.variance + inverse[:, None]).rsqrt()
        else:
            assert isinstance(likelihood, TemperedLikelihood)
            self.tau = (likelihood.curvature * likelihood.weight + inverse).rsqrt()

    def apply(self, v: Tensor, transpose: bool = False) -> Tensor:
        """M^{1/2} v or its transpose, (levels, chains, *shape)."""
        if self.root is not None:
            root = self.root.mT if transpose else self.root
            return (v.flatten(2) @ root.mT).reshape(v.shape)
        tau = self.tau.reshape(-1, *[1] * (v.ndim - 1))
        if self.seen is None:
            return tau * v
        assert isinstance(self.target.likelihood, SpectralLikelihood)
        data = self.target.likelihood.data
        seen = data.of_x(v.flatten(0, 1)).reshape(*v.shape[:2], -1)
        inside = ((self.seen - self.tau[:, None])[:, None] * seen).flatten(0, 1)
        return tau * v + data.svd.from_spectral(inside).reshape(v.shape)

    def dense(self, chains: int, shape: Size) -> Tensor:
        """(levels, d, d) the matrices M, by parts of as many columns as there are chains."""
        size, levels = shape.numel(), len(self.target.sigmas)
        columns = torch.zeros(math.ceil(size / chains) * chains, size, dtype=self.tau.dtype, device=self.tau.device)
        columns[:size] = torch.eye(size)
        parts = [
            self.apply(part.reshape(1, chains, *shape).expand(levels, -1, *shape)) for part in columns.split(chains)
        ]
        half = torch.cat(parts, 1)[:, :size].flatten(2)
        return half @ half.mT


class Replicas:
    """Chains at every level of a target, with all that was evaluated where they stand.

    Args:
        target: the densities; of many problems, the levels of each after those of another.
        x: (levels, chains, *shape).
        nodes: inner nodes of the line integral; None takes the exact density.
    """

    def __init__(self, target: NoisedTarget, x: Tensor, nodes: int | None, state: State | None = None) -> None:
        self.target = target
        self.x = x
        self.rule = None if nodes is None else LineRule.lobatto(nodes)
        levels, chains = x.shape[:2]
        self.level = torch.arange(levels, device=x.device).repeat_interleave(chains)
        if state is None:
            self.evaluate()
            return
        self.score, self.log_prior = state["score"], state["log_prior"]
        self.raw = {n.removeprefix("raw."): v for n, v in state.items() if n.startswith("raw.")}
        self.metric = Metric(target)
        self.metric.root = state.get("root")

    @classmethod
    def resumed(cls, target: NoisedTarget, state: State, nodes: int | None) -> Replicas:
        """Go on from `state()`, at the same levels."""
        return cls(target, state["x"], nodes, state)

    def evaluate(self) -> None:
        """Score, likelihood and density where the replicas stand, for new levels."""
        rows = self.x.flatten(0, 1)
        self.score = self.fold(self.target.score(rows, self.level))
        self.raw = {n: self.fold(v) for n, v in self.target.likelihood.read(rows).items()}
        self.metric = Metric(self.target)
        self.log_prior = self.x.new_zeros(self.x.shape[:2])
        if self.rule is None:
            self.log_prior = self.fold(self.target.log_prior(rows, self.level))

    def fold(self, rows: Tensor) -> Tensor:
        """(levels * chains, ...) -> (levels, chains, ...)."""
        return rows.reshape(*self.x.shape[:2], *rows.shape[1:])

    def step(self, eta: Tensor, source: torch.Generator | Streams, metropolis: bool = True) -> Moved:
        """One step of all replicas with step sizes (levels,), in one denoiser call; each problem has its stream."""
        target, x = self.target, self.x
        like, axes = target.likelihood, tuple(range(2, x.ndim))
        streams = Streams.around(source)
        each = (len(x) // len(streams), x.shape[1])
        xi = streams.normal((*each, *x.shape[2:]), x.dtype).flatten(0, 1).to(x.device)
        uniform = streams.uniform(each, x.dtype).flatten(0, 1).to(x.device)
        wide = eta.to(x).reshape(-1, *[1] * (x.ndim - 1))
        here = self.score + self.fold(like.gradient(self._flat(self.raw), self.level))
        pull = self._pull(here)
        moved = x + self.metric.apply(wide * pull + (2 * wide).sqrt() * xi)
        finite = moved.isfinite().flatten(2).all(2)
        moved = torch.where(_like(finite, x), moved, x)

        rows, start = moved.flatten(0, 1), x.flatten(0, 1)
        inner = rows.new_zeros((0, *rows.shape))
        if metropolis and self.rule is not None:
            inner = self.rule.points(start, rows)
        level = self.level.repeat(1 + len(inner))
        scores = target.score(torch.cat([rows, *inner]), level).reshape(1 + len(inner), *rows.shape)
        raw, log_prior = like.read(rows), self.log_prior
        score = self.fold(scores[0])
        finite &= score.isfinite().flatten(2).all(2)
        if not metropolis:
            accept = finite.to(x.dtype)
        else:
            if self.rule is None:
                log_prior = self.fold(target.log_prior(rows, self.level))
                ratio = log_prior - self.log_prior
            else:
                ratio = self.fold(self.rule.integrate(start, rows, scores[1:], self.score.flatten(0, 1), scores[0]))
            old, new = (like.value(r, self.level) for r in (self._flat(self.raw), raw))
            there = score + self.fold(like.gradient(raw, self.level))
            back = xi + (wide / 2).sqrt() * (pull + self._pull(there))
            delta = ratio + self.fold(gain(new, old)) + (xi.square() - back.square()).sum(axes) / 2
            finite &= ~delta.isnan()
            accept = torch.where(finite, delta.clamp(max=0.0).exp(), 0.0)
        self.take(uniform < accept, moved, score, {n: self.fold(v) for n, v in raw.items()}, log_prior)
        return Moved(accept, ~finite)

    def _pull(self, gradient: Tensor) -> Tensor:
        """M^{1/2}^T g, no longer than a few times what it is in the bulk, sqrt(d): far out steps stay steps."""
        v = self.metric.apply(gradient, transpose=True)
        most = PULL * math.sqrt(v[0, 0].numel())
        length = v.flatten(2).norm(dim=2).reshape(*v.shape[:2], *[1] * (v.ndim - 2))
        return v * (most / length.clamp(min=most))

    def take(self, keep: Tensor, x: Tensor, score: Tensor, raw: State, log_prior: Tensor) -> None:
        """Go to other values where `keep` (levels, chains)."""
        self.x = torch.where(_like(keep, x), x, self.x)
        self.score = torch.where(_like(keep, score), score, self.score)
        self.raw = {n: torch.where(_like(keep, v), v, self.raw[n]) for n, v in raw.items()}
        self.log_prior = torch.where(keep, log_prior, self.log_prior)

    def _flat(self, raw: State) -> State:
        return {n: v.flatten(0, 1) for n, v in raw.items()}

    def state(self) -> State:
        """All that `resumed` needs."""
        state = {"x": self.x, "score": self.score, "log_prior": self.log_prior}
        state |= {f"raw.{n}": v for n, v in self.raw.items()}
        return state if self.metric.root is None else state | {"root": self.metric.root}


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """(levels, chains) with ones behind, to go with x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))

r"""Gaussians fitted at the scale of the likelihood: E_q[-log p(y | x_0)] + KL(q_s || p_s), s descending.

q_s and p_s are q and the prior with noise s added. With x a draw of q_s, x = t(phi, noise),

    grad_phi KL = E[(score_q - score_p) dt/dphi],   score_p = (D(x, s) - x) / s^2.

Independent entries, q = N(mu, diag(sd^2)):  x = mu + u eps,         score_q = -eps / u,    u^2 = s^2 + sd^2
Low rank, q = N(mu, diag(sd^2) + U U'):      x = mu + u eps + U xi,  score_q = -(diag(u^2) + U U')^{-1} (x - mu)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.guides.base import likelihood_gradient
from inverse.problem import DiffusionProblem
from inverse.samplers.lanes import Noise
from inverse.variational.red_diff_levels import Levels, Options, State, adam, begun
from ppl.cost import Cost

__all__ = ["Diagonal", "LowRankFit", "Point"]

LATE = 0.8  # share of the steps after which gradients keep the noise that cancels at the optimum


class Diagonal(Levels):
    """Gaussians with independent entries, at the scale of the likelihood."""

    def begin(self, lanes: int, noise: Noise) -> State:
        """What the prior expects, and its widest standard deviation."""
        mu = self.blank(lanes)
        return begun("x", mu) | begun("log_sd", torch.full_like(mu, math.log(self.problem.prior.data_std)))

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam on mu and log sd."""
        mu, sd, s = state["x"], state["log_sd"].exp(), self.levels[step]
        d_mu, d_sd = self.prior_gradient(mu, sd, s, noise.normal(self.problem.shape))
        l_mu, l_sd = self.likelihood_gradient(mu, sd, noise.normal(self.problem.shape))
        lr = self.options.lr * (1 - step / self.steps)
        widths = adam(state, "log_sd", (d_sd + l_sd) * sd, lr, step)
        # At a level above sd the prior is flatter than the likelihood makes up for, and sd would fall to zero.
        moving = sd >= s
        return adam(state, "x", d_mu + l_mu, lr, step) | {
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


class Point(Diagonal):
    """No spread: q_s = N(mu, s^2 I), and the loss is -log p(y | mu) + KL."""

    def begin(self, lanes: int, noise: Noise) -> State:
        """What the prior expects."""
        return begun("x", self.blank(lanes))

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam on mu."""
        mu, s = state["x"], self.levels[step]
        gradient, _ = self.prior_gradient(mu, torch.zeros_like(mu), s, noise.normal(self.problem.shape))
        _, up = likelihood_gradient(self.problem, mu, self.cost)
        return adam(state, "x", gradient - up, self.options.lr * (1 - step / self.steps), step)

    def end(self, state: State, noise: Noise) -> Tensor:
        """The points."""
        return state["x"]


class LowRankFit(Levels):
    """Gaussians whose covariance is a diagonal plus `rank` directions, which are columns of U.

    One noise serves both terms, so that at a low level their gradients cancel draw by draw where q is the posterior.
    """

    def __init__(self, options: Options, problem: DiffusionProblem, cost: Cost, rank: int) -> None:
        super().__init__(options, problem, cost)
        self.rank = min(rank, problem.shape.numel())

    def begin(self, lanes: int, noise: Noise) -> State:
        """What the prior expects, its widest standard deviation, and random directions of that length."""
        mu, scale = self.blank(lanes), self.problem.prior.data_std
        d = self.problem.shape.numel()
        factor = noise.normal((*self.problem.shape, self.rank)) * (scale / math.sqrt(d))
        return begun("x", mu) | begun("log_sd", torch.full_like(mu, math.log(scale))) | begun("factor", factor)

    def advance(self, step: int, state: State, noise: Noise) -> State:
        """One step of Adam on mu, log sd and U."""
        mu, sd, factor, s = state["x"], state["log_sd"].exp(), state["factor"], self.levels[step]
        eps, xi = noise.normal(self.problem.shape), noise.normal((self.rank,))
        d_mu, d_sd, d_factor = self.gradients(mu, sd, factor, s, eps, xi, late=step >= LATE * self.steps)
        lr = self.options.lr * (1 - step / self.steps)
        # As for independent entries, a width moves only once the level is below it; that of a direction is its length.
        wide = sd >= s
        long = (factor.flatten(1, -2).norm(dim=1) >= s).reshape(len(mu), *[1] * len(self.problem.shape), self.rank)
        widths = adam(state, "log_sd", d_sd * sd, lr, step)
        turned = adam(state, "factor", d_factor, lr, step)
        return (
            adam(state, "x", d_mu, lr, step)
            | {name: torch.where(wide, value, state[name]) for name, value in widths.items()}
            | {name: torch.where(long, value, state[name]) for name, value in turned.items()}
        )

    def gradients(
        self, mu: Tensor, sd: Tensor, factor: Tensor, s: float, eps: Tensor, xi: Tensor, *, late: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unbiased gradients of the loss in mu and sd (lanes, *shape) and U (lanes, *shape, rank).

        Those parts of the terms that are odd in the noise have no mean in mu, those that are even none in sd and U.
        Left out, they do not drown the gradient while q is far off; kept, both terms cancel draw by draw where q is
        the posterior.
        """
        along = (factor.flatten(1, -2) @ xi[..., None]).reshape(mu.shape)
        u = (s**2 + sd.square()).sqrt()
        move, clean = u * eps + along, sd * eps + along
        x = mu + move
        score_p = (self.problem.prior.denoise(x, s) - x) / s**2
        gap = self._score(move, u, factor) - score_p
        _, up = likelihood_gradient(self.problem, mu + clean, self.cost)
        if late:
            d_mu, odd = gap - up, up
        else:
            _, down = likelihood_gradient(self.problem, mu - clean, self.cost)
            d_mu, odd = -score_p - (up + down) / 2, (up - down) / 2
        across = xi.reshape(len(mu), *[1] * len(self.problem.shape), self.rank)
        return d_mu, gap * sd * eps / u - odd * eps, (gap - odd)[..., None] * across

    def _score(self, move: Tensor, u: Tensor, factor: Tensor) -> Tensor:
        """-(diag(u^2) + U U')^{-1} move, by Woodbury's identity."""
        flat, scaled = (move / u).flatten(1)[..., None], factor.flatten(1, -2) / u.flatten(1)[..., None]
        small = scaled.mT @ scaled + torch.eye(self.rank, dtype=u.dtype, device=u.device)
        inside = scaled @ torch.linalg.solve(small, scaled.mT @ flat)
        return -(flat - inside)[..., 0].reshape(move.shape) / u

    def end(self, state: State, noise: Noise) -> Tensor:
        """One draw from every fitted Gaussian."""
        eps, xi = noise.normal(self.problem.shape), noise.normal((self.rank,))
        along = (state["factor"].flatten(1, -2) @ xi[..., None]).reshape(eps.shape)
        return state["x"] + state["log_sd"].exp() * eps + along

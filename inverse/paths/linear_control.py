r"""The exact control of a linear path with Gaussian data: the optimal twist of every driving number, in closed form.

    s_n = (X_n, Y_n),   s_{n+1} = M_n s_n + c_n + B_n z_n,   z_n ~ N(0, I)
    p(y after n | s_n) proportional to exp(-s' L_n s / 2 + r_n' s)                       (backward information filter)
    p(z_n | s_n, y)  =  N(P^-1 B' (r - L (M s_n + c)), P^-1),   P = I + B' L B,          L, r of step n + 1

B_n carries the gains m_k of `MarkovNoise.transition`, so this is the posterior of the discretised process itself: drawn
so, log p(z, y) - log q(z) is log p(y) for every path.

Source: the continuous control u = G' grad log p(y after t | z) of linear Gaussian systems [inferred]; the discrete
chain with its own covariance and the start of type I [derived].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from inverse.paths.factors import Factors
from inverse.problem import DiffusionProblem
from ppl.errors import CapabilityError, ShapeError
from ppl.program import Program
from ppl.sites import unwrap
from sde.incomplete_gamma import constant
from sde.increments import starts_random
from sde.path import Path

__all__ = ["LinearControl", "linear_control", "linear_control_of", "linearised_control"]


@dataclass(frozen=True, eq=False)
class LinearControl:
    """What the data say of every driving number, given the state before its step.

    z_n ~ N(gain_n (X_n, Y_n) + offset_n, factor_n factor_n') is the exact posterior. The factors come after the state,
    (m K) of them noise by noise, in their own units.

    Args:
        gain: (steps, m, d + m K).
        offset: (steps, m).
        factor: (steps, m, m) lower triangular.
        start_mean: (m K,) of the normal numbers that start the factors of type I; none for others.
        start_factor: (m K, m K) lower triangular, likewise.
        log_evidence: 0-d, log p(y).
        precision: (steps + 1, d + m K, d + m K), L_n; zero after the last step.
        right: (steps + 1, d + m K), r_n.
    """

    gain: Tensor
    offset: Tensor
    factor: Tensor
    start_mean: Tensor
    start_factor: Tensor
    log_evidence: Tensor
    precision: Tensor
    right: Tensor

    def mean(self, n: int, x: Tensor, y: Tensor) -> Tensor:
        """Mean of the driving numbers of step n: (*batch, d) states and (*batch, m, K) factors -> (*batch, m)."""
        return torch.cat([x, y.flatten(-2)], -1) @ self.gain[n].mT + self.offset[n]

    def log_prob(self, n: int, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Log density of the driving numbers of step n, (*batch, m) -> (*batch)."""
        white = torch.linalg.solve_triangular(self.factor[n], (z - self.mean(n, x, y))[..., None], upper=False)[..., 0]
        half = self.factor[n].diagonal().log() + 0.5 * math.log(2 * math.pi)
        return -(0.5 * white.square() + half).sum(-1)

    def log_twist(self, n: int, x: Tensor, y: Tensor) -> Tensor:
        """log p(data after step n | state before it), up to one number for all states: (*batch)."""
        state = torch.cat([x, y.flatten(-2)], -1)
        return state @ self.right[n] - 0.5 * ((state @ self.precision[n]) * state).sum(-1)


def linear_control(path: Path, rows: Tensor, data: Tensor, variance: Tensor | float) -> LinearControl:
    r"""The exact control for data y = rows . X + noise, each of one time of the path.

    Differentiable in the parameters of the process and in the data; float64 throughout.

    Args:
        path: linear, without a batch shape.
        rows: (obs, n, d) or (obs, n d), what each datum measures.
        data: (obs,).
        variance: of the data's noise, one number or (obs,).

    Returns:
        Gains, offsets and covariances of the driving numbers, the start's law, and log p(y).

    Raises:
        CapabilityError: the path is not linear, or has a batch shape.
        ShapeError: shapes that do not fit.
        ValueError: a datum that measures several times, or a variance that is not positive.

    Example:
        >>> from sde import Process
        >>> path = Path(Process(), torch.tensor([0.5, 1.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        >>> control = linear_control(path, torch.tensor([[0.0, 1.0]]), torch.tensor([2.0]), 0.25)
        >>> round(float(control.log_evidence), 6), round(float(control.offset[0, 0]), 6)   # log N(2; 0, 1.25)
        (-2.63051, 1.131371)
    """
    if path.batch_shape or not path.is_linear:
        raise CapabilityError(
            "a control in closed form needs a path that is linear in its noise, without a batch shape, got batch "
            f"shape {tuple(path.batch_shape)}; use inverse.paths.ControlGuide(path), which learns one"
        )
    n, d = path.event_shape
    rows, data = rows.double().reshape(len(rows), n, -1), data.double().reshape(-1)
    if rows.shape != (len(data), n, d):
        raise ShapeError(f"rows must be (obs, {n}, {d}) for {len(data)} data, got {tuple(rows.shape)}")
    variance = torch.as_tensor(variance, dtype=torch.float64, device=data.device).expand(data.shape)
    if not bool((variance > 0).all()):
        raise ValueError(
            "the variance of every datum must be positive; an exact value has no density, give it a small one"
        )
    if not single_times(rows):
        raise ValueError(
            "a datum measures several times of the path at once; a control looks at the present state only, so give "
            "each datum one time, or use inverse.Exact, which takes any linear data"
        )
    return _Backward(path, rows, data, variance).run()


def single_times(rows: Tensor) -> bool:
    """Whether each of the rows (obs, n, d) sees one time of the path at most."""
    return not bool(((rows != 0).any(-1).sum(1) > 1).any())


def linearised_control(path: Path, rows: Tensor, data: Tensor, variance: Tensor, rounds: int = 1) -> LinearControl:
    """The control of a path linearised about the mean that the control before it makes, the first about no noise.

    Exact for linear paths after one round. Nothing is checked, so that it can run inside a map over draws.

    Args:
        path: any path without a batch shape.
        rows: (obs, n, d), each of one time.
        data: (obs,).
        variance: (obs,) of the data's noise.
        rounds: how often.

    Source: the iterated extended Kalman smoother [inferred].
    """
    control: LinearControl | None = None
    for _ in range(rounds):
        control = _Backward(path, rows, data, variance, mean_states(path, control, data)).run()
    assert control is not None
    return control


def mean_states(path: Path, control: LinearControl | None, like: Tensor) -> Tensor:
    """(steps, d) states before every step, all driving numbers at their mean under a control; zero without one."""
    x, found = path.initial.to(like)[None], []
    start = None if control is None else control.start_mean.to(like)[None]
    factors = Factors(path, x, start)
    times, dts = constant(path.increments.grid, like).to(like), path.increments.dt.tolist()
    for n in range(path.steps):
        found.append(x)
        z = x.new_zeros(1, path.noises) if control is None else control.mean(n, x, factors.y)
        x = path.process.step(x.to(path.dtype), times[n].to(path.dtype), dts[n], factors.move(n, z).to(path.dtype)).to(
            x
        )
    return torch.cat(found)


def linear_control_of(program: Program, site: str | None = None) -> LinearControl:
    """The exact control of a program with one linear path and linear Gaussian data of single times.

    Args:
        program: the program, with no latent but the path.
        site: name of the path; None where there is one.

    Raises:
        CapabilityError: the path is not linear, or the data are not linear and Gaussian.
    """
    problem = DiffusionProblem.of(program, site)
    path = unwrap(program.sites[problem.sites[0]].distribution)
    if len(problem.sites) != 1 or not isinstance(path, Path):
        raise CapabilityError(
            f"a control needs one sde.Path among the latents, got {list(problem.sites)}; name its site"
        )
    gaussian = problem.likelihood.gaussian  # whitened: unit variances, and what that does to the density
    rows = gaussian.operator.dense(dtype=torch.float64)
    found = linear_control(path, rows, gaussian.data.reshape(-1), 1.0)
    extra = gaussian.log_normaliser.double() + 0.5 * gaussian.size * math.log(2 * math.pi)
    return replace(found, log_evidence=found.log_evidence + extra)


class _Backward:
    """The recursion from the last step to the first."""

    def __init__(self, path: Path, rows: Tensor, data: Tensor, variance: Tensor, about: Tensor | None = None) -> None:
        self.path, self.rows, self.data, self.variance, self.about = path, rows, data, variance, about
        noise, increments = path.process.noise, path.increments
        self.d, self.m, self.k = path.event_shape[1], path.noises, noise.size
        like = self.data
        decay, gain = noise.transition(increments.dt)
        self.decay, self.kick = constant(decay, like), constant(gain * np.sqrt(increments.dt)[:, None], like)
        before, after = (w.to(like) for w in increments.weights(like))
        lead = (self.m, path.steps, self.k)
        self.before, self.after = (w.expand(lead) if self.k else like.new_zeros(lead) for w in (before, after))

    def run(self) -> LinearControl:
        """Gains of all steps, last first, then the law of the start."""
        size, like = self.d + self.m * self.k, self.data
        precision, right, level = like.new_zeros(size, size), like.new_zeros(size), like.new_zeros(())
        gains, offsets, factors, precisions, rights = [], [], [], [precision], [right]
        asked = {int(end): j for j, end in enumerate(self.path.ends)}
        for n in reversed(range(self.path.steps)):
            if n in asked:
                precision, right, level = self._measure(asked[n], precision, right, level)
            move, shift, push = self._step(n)
            to_noise = push.mT @ precision
            lower = torch.linalg.cholesky(torch.eye(self.m, dtype=like.dtype, device=like.device) + to_noise @ push)
            ahead = right - precision @ shift
            offset = torch.cholesky_solve((push.mT @ ahead)[:, None], lower)[:, 0]
            gain = -torch.cholesky_solve(to_noise @ move, lower)
            gains.append(gain)
            offsets.append(offset)
            factors.append(torch.linalg.cholesky(torch.cholesky_inverse(lower)))
            level = level + 0.5 * (offset @ (push.mT @ ahead)) - lower.diagonal().log().sum()
            level = level + right @ shift - 0.5 * shift @ precision @ shift
            right = move.mT @ (ahead - precision @ push @ offset)
            precision = move.mT @ precision @ (move + push @ gain)
            precision = (precision + precision.mT) / 2
            precisions.append(precision)
            rights.append(right)
        parts = (gains, offsets, factors, precisions, rights)
        gain, offset, factor, forms, slopes = (torch.stack(part[::-1]) for part in parts)
        return LinearControl(gain, offset, factor, *self._start(precision, right, level), forms, slopes)

    def _measure(self, time: int, precision: Tensor, right: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the data of one time."""
        seen = (self.rows[:, time] != 0).any(-1)
        if not bool(seen.any()):
            return precision, right, level
        extra = self.data.new_zeros(int(seen.sum()), self.m * self.k)
        rows, weight = torch.cat([self.rows[seen, time], extra], 1), 1 / self.variance[seen]
        data = self.data[seen]
        level = level - 0.5 * (weight * data.square() - (weight / (2 * math.pi)).log()).sum()
        return precision + rows.mT @ (weight[:, None] * rows), right + rows.mT @ (weight * data), level

    def _step(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """M, c, B of one step of the augmented state."""
        path, d, m, k = self.path, self.d, self.m, self.k
        like, t = self.data, self.data.new_tensor(path.increments.grid[n])
        dt = float(path.increments.dt[n])
        shift, of_x, x = self._drift(n, t)
        g = path.process.g(x.to(path.dtype), t.to(path.dtype)).to(like)
        g = g if path.process.general else torch.diag_embed(g)
        of_x = torch.eye(d, dtype=like.dtype, device=like.device) + dt * of_x
        if not k:
            return of_x, dt * shift, g * math.sqrt(dt)
        carried = self.after[:, n] * self.decay[n] - self.before[:, n]  # (m, K), what B's increment takes from Y
        moved = (self.after[:, n] * self.kick[n]).sum(-1)  # (m,), and from the driving number
        kick = self.kick[n].expand(m, k)
        above = torch.cat([of_x, g @ torch.block_diag(*carried[:, None])], 1)
        below = torch.cat([like.new_zeros(m * k, d), torch.diag(self.decay[n].repeat(m))], 1)
        push = torch.cat([g * moved, torch.block_diag(*kick[..., None])])
        return torch.cat([above, below]), torch.cat([dt * shift, like.new_zeros(m * k)]), push

    def _drift(self, n: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(x) = shift + F x at step n, and where: from unit vectors where it is linear, else about a state."""
        process, like, dtype = self.path.process, self.data, self.path.dtype
        zero = like.new_zeros(self.d)
        if self.about is None:
            points = torch.cat([zero[None], torch.eye(self.d, dtype=like.dtype, device=like.device)])
            drift = process.f(points.to(dtype), t.to(dtype)).to(like)
            return drift[0], (drift[1:] - drift[0]).mT, zero
        x = self.about[n]
        if not callable(process.drift):
            return process.f(x.to(dtype), t.to(dtype)).to(like), torch.diag_embed(zero), x

        def f(x: Tensor) -> tuple[Tensor, Tensor]:
            value = process.f(x.to(dtype)[None], t.to(dtype))[0].to(like)
            return value, value

        slope, value = torch.func.jacrev(f, has_aux=True)(x)
        return value - slope @ x, slope, x

    def _start(self, precision: Tensor, right: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The law of the numbers that start the factors, and log p(y)."""
        like, x = self.data, self.path.initial.double()
        inner, own = precision[: self.d, : self.d], right[: self.d]
        level = level + own @ x - 0.5 * x @ inner @ x - self._unmeasured()
        if not starts_random(self.path.process.noise):
            return like.new_zeros(0), like.new_zeros(0, 0), level
        one = constant(self.path.process.noise.initial_factor, like)  # type: ignore[attr-defined]
        root = torch.block_diag(*[one] * self.m)
        eye = torch.eye(len(root), dtype=like.dtype, device=like.device)
        lower = torch.linalg.cholesky(eye + root.mT @ precision[self.d :, self.d :] @ root)
        ahead = root.mT @ (right[self.d :] - precision[self.d :, : self.d] @ x)
        mean = torch.cholesky_solve(ahead[:, None], lower)[:, 0]
        level = level + 0.5 * ahead @ mean - lower.diagonal().log().sum()
        return mean, torch.linalg.cholesky(torch.cholesky_inverse(lower)), level

    def _unmeasured(self) -> Tensor:
        """Minus log density of data whose row is zero: they measure nothing but their own noise."""
        empty = ~(self.rows != 0).any(-1).any(-1)
        weight = 1 / self.variance[empty]
        return 0.5 * (weight * self.data[empty].square() - (weight / (2 * math.pi)).log()).sum()

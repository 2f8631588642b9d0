r"""Fractional Brownian motion as a weighted sum of Ornstein-Uhlenbeck processes on one Brownian motion.

    dY_k = -gamma_k Y_k dt + dW,   B(t) = sum_k w_k (Y_k(t) - Y_k(0)),   k = 1 .. K

The weights minimise E int_0^T (B^H - B)^2 dt with the same W in both, in closed form for both types, and so is the
error that is left. Type I starts its factors from their stationary law, Cov(Y_i(0), Y_j(0)) = 1 / (gamma_i + gamma_j);
type II at 0. A factor of rate 0 is Brownian motion itself. With an index that depends on time, w_k = w_k(H(t)): the
multifractional motion whose value at t is that of B^{H(t)}. Type I then keeps its Y_k(0) as factors that do not move.

Source: Daems et al. (ICLR 2024), the public code [read]; closed forms in stable float64 and grids [derived].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sde.fractional import Kind, check_hurst, check_kind, unit_scale
from sde.incomplete_gamma import Array, constant
from sde.markov_weights import MarkovWeights
from sde.prior import can_look
from sde.rate_grids import WIDE, best_grid, geometric, paper_grid, with_zero

__all__ = ["MarkovNoise"]

Hurst = Tensor | float | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MarkovNoise:
    r"""Fractional Brownian motion that a program can simulate step by step, with its error in closed form.

    Args:
        hurst: in (0, 1): a number, a tensor (learnable; any batch shape), or a function from times to indices.
        horizon: T, the last time; weights are the best over (0, T).
        kind: "I", stationary increments, or "II", from 0 without a past. II needs fewer factors and no initial state.
        factors: K, positive rates; type I adds Brownian motion itself as a factor of rate 0.
        grid: "auto" takes the best two ends for a fixed Hurst index and "wide" for a learnable one; "wide" serves all
            indices; "paper" is the published one, [1/20, 20] in absolute units; or (lowest, highest) rate times
            horizon.
        unit: Var B(1) = 1; otherwise the kernel normalisation, whose weights the literature prints.
        zero: add the factor of rate 0; None for type I alone.
        ridge: added to the scaled normal equations; 1e-6 keeps weights small for float32 at some cost in accuracy.
        max_error: refuse when the predicted relative error of the path is above this.

    Raises:
        ValueError: a Hurst index outside (0, 1), a grid that cannot represent the horizon, rates too close together.

    Source: Daems et al. (2024) [read]; rates of 0, grids and the error for any weights [derived].

    Example:
        >>> noise = MarkovNoise(0.3, horizon=1.0, kind="II")
        >>> noise.weights().shape, bool(noise.relative_error() < 0.02)
        (torch.Size([8]), True)
    """

    hurst: Hurst
    horizon: float
    kind: Kind = "II"
    factors: int = 8
    grid: str | tuple[float, float] = "auto"
    unit: bool = True
    zero: bool | None = None
    ridge: float = 1e-12
    max_error: float = 0.5
    fitted: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not (isinstance(self.factors, int) and self.factors >= 1):
            raise ValueError(f"factors must be a positive integer, got {self.factors!r}; for K = 0 use BrownianNoise()")
        if not (math.isfinite(self.horizon) and self.horizon > 0):
            raise ValueError(f"horizon must be positive and finite, got {self.horizon!r}")
        if isinstance(self.grid, str):
            if self.grid not in ("auto", "wide", "paper"):
                raise ValueError(f"grid must be 'auto', 'wide', 'paper' or two rates times horizon, got {self.grid!r}")
        elif not (len(self.grid) == 2 and 0 < self.grid[0] <= self.grid[1] < math.inf):
            raise ValueError(
                f"a grid is (lowest, highest) rate times horizon, 0 < lowest <= highest, got {self.grid!r}"
            )
        if not callable(self.hurst):
            if not isinstance(self.hurst, Tensor | float | int):
                raise ValueError(f"hurst must be a number, a tensor or a function of times, got {self.hurst!r}")
            check_hurst(self.hurst)
            self._check_error()

    def _check_error(self) -> None:
        """Refuse a grid whose best weights miss the process."""
        value = torch.as_tensor(self.hurst)
        if not can_look(value):
            return
        with torch.no_grad():
            error = self.relative_error()
        if bool((error > self.max_error).any()):
            worst = float(value.reshape(-1)[error.reshape(-1).argmax()])
            order = torch.tensor(worst + 0.5, dtype=torch.float64)
            for factors in range(self.factors, self.factors + 9):  # the fewest with which a grid is good enough
                rates = best_grid(worst, self.kind, factors, self._has_zero)
                best = MarkovWeights(tuple(rates.tolist()), self.kind, self.ridge)
                left = float(best.relative_error(order, best.weights(order)))
                if left <= self.max_error:
                    break
            more = "" if factors == self.factors else f"factors={factors} with "
            raise ValueError(
                f"these {self.factors} factors miss fractional Brownian motion of type {self.kind}, H = {worst:.3g}, "
                f"over horizon {self.horizon:g}: predicted relative error {float(error.max()):.2f}, at most "
                f"{self.max_error} is allowed. {more}grid=({float(rates[rates > 0][0]):.3g}, {float(rates[-1]):.3g}), "
                f"in rate times horizon, leaves {left:.2f}; more factors leave less; max_error allows more"
            )

    def check(self, start: float, end: float, noises: int, device: torch.device) -> None:
        """Refuse what a path from `start` to `end` on that many noises cannot use.

        Raises:
            ValueError: Hurst indices of another shape, outside (0, 1) at some time, or that the grid misses; a horizon
                so much longer than the path that its weights miss the process over the path.
        """
        if callable(self.hurst):
            times = torch.linspace(start, end, 5, dtype=torch.float64, device=device)
            value = torch.as_tensor(self.hurst(times)).detach()
            if value.shape != times.shape:
                raise ValueError(
                    f"a Hurst index that depends on time maps times of shape {tuple(times.shape)} to as many indices, "
                    f"got shape {tuple(value.shape)}"
                )
            if can_look(value):
                check_hurst(value, times)
                replace(self, hurst=value)
            return
        value = torch.as_tensor(self.hurst)
        if value.ndim and value.shape[-1] != noises:
            raise ValueError(f"{noises} noises need one Hurst index or {noises}, got shape {tuple(value.shape)}")
        if 0 < end < self.horizon / 2 and self.fitted is None and can_look(value):
            with torch.no_grad():
                error = float(self.relative_error(until=end).max())
            if error > self.max_error:
                raise ValueError(
                    f"the noise was approximated for a horizon of {self.horizon:g}, and over {end:g}, where the path "
                    f"ends, its relative error is {error:.2f}, at most {self.max_error} is allowed; give "
                    f"MarkovNoise(..., horizon={end:g})"
                )

    @property
    def _has_zero(self) -> bool:
        """Whether Brownian motion itself is a factor."""
        return self.kind == "I" if self.zero is None else self.zero

    @cached_property
    def _grid(self) -> MarkovWeights:
        """Rates times horizon and what follows from them alone."""
        if self.grid == "auto" and isinstance(self.hurst, float):
            rates = best_grid(self.hurst, self.kind, self.factors, self._has_zero)
        elif self.grid == "paper":
            rates = with_zero(paper_grid(self.factors, self.horizon), self._has_zero)
        else:
            ends = self.grid if isinstance(self.grid, tuple) else WIDE[self.kind]
            rates = with_zero(geometric(*ends, self.factors), self._has_zero)
        return MarkovWeights(tuple(rates.tolist()), self.kind, self.ridge)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and factors."""
        return self.hurst.dtype if isinstance(self.hurst, Tensor) else torch.get_default_dtype()

    @property
    def _keeps_start(self) -> bool:
        """Whether Y(0) joins the factors, at rate 0 and without noise: its weights change with time."""
        return self.kind == "I" and callable(self.hurst)

    @property
    def size(self) -> int:
        """How many factors there are, that of rate 0 counted, and Y(0) where it is kept."""
        return len(self._grid.rates) * (2 if self._keeps_start else 1)

    @property
    def rates(self) -> Array:
        """gamma, (size,) per unit of time, ascending; then zeros for Y(0) where it is kept."""
        moving = np.array(self._grid.rates) / self.horizon
        return np.concatenate([moving, np.zeros(self.size - len(moving))])

    def _index(self, times: Tensor | None) -> Tensor:
        """H in float64, at times when it depends on them."""
        if callable(self.hurst):
            if times is None:
                raise ValueError("the Hurst index depends on time: give the times at which it is wanted")
            value = self.hurst(times)
            check_hurst(value, times)
            return value.double()
        return torch.as_tensor(self.hurst, dtype=torch.float64)

    def _kernel_weights(self, hurst: Tensor) -> Tensor:
        """A^-1 b for horizon T in the kernel normalisation, (*hurst, size)."""
        return self._grid.weights(hurst + 0.5) * (math.log(self.horizon) * (hurst - 0.5)).exp()[..., None]

    def weights(self, times: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """w, differentiable in the Hurst index.

        Args:
            times: (steps,) where the index depends on time; None otherwise.
            dtype: of the result; None is that of the index. They are computed in float64.

        Returns:
            (*hurst, size), or (steps, size).
        """
        if self.fitted is not None:
            return self.fitted.to(dtype or self.dtype)
        hurst = self._index(times)
        found = self._kernel_weights(hurst)
        if self.unit:
            found = found * unit_scale(hurst, self.kind)[..., None]
        if self._keeps_start:
            found = torch.cat([found, -found], -1)
        return found.to(dtype or self.dtype)

    def relative_error(self, times: Tensor | None = None, *, until: float | None = None) -> Tensor:
        """sqrt(E int (B^H - B)^2 dt / E int (B^H)^2 dt) over the horizon, in closed form: (*hurst).

        Args:
            times: (steps,) where the index depends on time; None otherwise.
            until: over (0, until) instead, with the weights of the whole horizon.

        Example:
            >>> paper = MarkovNoise(0.7, horizon=1.0, kind="I", factors=5, grid="paper", zero=False)
            >>> round(paper.relative_error().item(), 4)
            0.3128
        """
        hurst = self._index(times)
        weights = self.weights(times, dtype=torch.float64)[..., : len(self._grid.rates)]
        if self.unit:
            weights = weights / unit_scale(hurst, self.kind)[..., None]
        horizon = self.horizon if until is None else until
        grid = (
            self._grid if until is None else MarkovWeights(tuple((self.rates * until).tolist()), self.kind, self.ridge)
        )
        scaled = weights * (math.log(horizon) * (0.5 - hurst)).exp()[..., None]
        return grid.relative_error(hurst + 0.5, scaled)

    def describe(self, dt: float | None = None) -> str:
        """What the approximation is and how far it is from the process, in words.

        Args:
            dt: time step; adds the variance of one increment over that of the process.

        Example:
            >>> print(MarkovNoise(0.5, horizon=1.0, kind="I").describe())  # doctest: +ELLIPSIS
            type I, H 0.5, 9 factors with rates 0 and ... .. ... over horizon 1: relative error of the path ...
        """
        if callable(self.hurst):
            index = self._index(torch.linspace(0, self.horizon, 5, dtype=torch.float64))
            error = MarkovNoise(
                index, self.horizon, self.kind, self.factors, self.grid, self.unit, self.zero
            ).relative_error()
            shown = f"{float(index.min()):.3g} .. {float(index.max()):.3g}"
        else:
            index, error = self._index(None), self.relative_error()
            shown = " ".join(f"{h:.3g}" for h in index.reshape(-1).tolist())
        positive = self.rates[self.rates > 0]
        zero = "0 and " if self._has_zero else ""
        text = (
            f"type {self.kind}, H {shown}, {len(self._grid.rates)} factors with rates {zero}"
            f"{float(positive[0]):.3g} .. {float(positive[-1]):.3g} over horizon {self.horizon:g}: "
            f"relative error of the path {float(error.max()):.2g}"
        )
        if dt is not None and not callable(self.hurst):
            ratio = self.step_variance(dt) / (
                dt ** (2 * index) * (1 if self.unit else unit_scale(index, self.kind) ** -2)
            )
            text += (
                f", variance of an increment over {dt:g} times that of the process {float(ratio.reshape(-1)[0]):.2f}"
            )
        return text

    # Steps.

    def transition(self, dt: Array | float) -> tuple[Array, Array]:
        r"""e^(-gamma dt) and m = (1 - e^(-gamma dt)) / (gamma dt), for Y+ = e^(-gamma dt) Y + m (u dt + sqrt(dt) eps).

        m sqrt(dt) eps is the projection of the exact noise on that of W, so that control and noise enter alike and the
        divergence of a controlled step is exactly u^2 dt / 2 [derived].

        Args:
            dt: time step, any shape.

        Returns:
            Decay and gain, (*dt, size); arrays, which a trace takes as constants. Y(0), where it is kept, has decay 1
            and gain 0.
        """
        x = self.rates * np.asarray(dt, dtype=np.float64)[..., None]
        safe = np.where(x < 1e-8, 1.0, x)
        gain = np.where(x < 1e-8, 1 - x / 2, -np.expm1(-safe) / safe)
        gain[..., len(self._grid.rates) :] = 0.0
        return np.exp(-x), gain

    def step_variance(self, dt: float) -> Tensor:
        """Variance of a late increment over dt, as simulated and of the process: (2, *hurst)."""
        _, gain = self.transition(dt)
        hurst, weights = self._index(None), self.weights(dtype=torch.float64)
        moved = weights * constant(np.expm1(-self.rates * dt), weights)
        found = dt * (weights * constant(gain, weights)).sum(-1) ** 2
        found = found + ((moved @ constant(self._stationary, weights)) * moved).sum(-1)
        scale = unit_scale(hurst, self.kind) ** 2 if self.unit else 1.0
        return torch.stack([found, dt ** (2 * hurst) * scale / unit_scale(hurst, "I") ** 2])

    @property
    def _stationary(self) -> Array:
        """1 / (gamma_i + gamma_j), zero for rate 0: (size, size), twice each way where Y(0) is kept."""
        rates = np.array(self._grid.rates) / self.horizon
        both, moving = rates[:, None] + rates, rates > 0
        law = np.where(moving[:, None] & moving, 1 / np.maximum(both, 1e-300), 0.0)
        return np.tile(law, (2, 2)) if self._keeps_start else law

    @property
    def initial_covariance(self) -> Array:
        """Cov(Y_i(0), Y_j(0)) = 1 / (gamma_i + gamma_j) for type I, zero for II and for rate 0: (size, size)."""
        return self._stationary if self.kind == "I" else np.zeros_like(self._stationary)

    @cached_property
    def initial_factor(self) -> Array:
        """L with L L^T the initial covariance, lower triangular, for Y(0) = L eps: (size, size)."""
        factor = np.zeros((self.size, self.size))
        if self.kind == "I":
            inside = np.flatnonzero(np.array(self._grid.rates) > 0)
            scale = np.sqrt(2 * self.rates[inside])  # to correlations, which are well scaled over many decades
            block = np.ix_(inside, inside)
            correlation = self._stationary[block] * scale[:, None] * scale
            factor[block] = np.linalg.cholesky(correlation + 1e-12 * np.eye(len(inside))) / scale[:, None]
        if self._keeps_start:
            moving = len(self._grid.rates)
            factor[moving:, :moving] = factor[:moving, :moving]
        return factor

    # Laws.

    def covariance(self, s: Tensor, t: Tensor) -> Tensor:
        """Cov(B(s), B(t)) of the approximation in continuous time, of the broadcast shape, float64."""
        low, high = torch.minimum(s, t).double()[..., None, None], torch.maximum(s, t).double()[..., None, None]
        g = constant(self.rates, low)
        both = (g[:, None] + g).clamp_min(1e-300)
        decay_gap, ones = (-g * (high - low))[..., 0, :].exp()[..., :, None], torch.ones_like(both)
        if self.kind == "II":
            shared = torch.where(g[:, None] + g > 0, -torch.expm1(-(g[:, None] + g) * low) / both, low)
            kernel = decay_gap * shared
        else:
            h, lo = high[..., 0, :], low[..., 0, :]
            kernel = decay_gap - (-g * h).exp()[..., :, None] - (-g * lo).exp()[..., None, :] + ones
            kernel = torch.where(g[:, None] + g > 0, kernel / both, low)
        weights = self.weights(dtype=torch.float64)
        return (kernel * weights[..., :, None] * weights[..., None, :]).sum((-1, -2))

    def refit(self, dt: float, steps: int) -> MarkovNoise:
        """The same factors with weights for one regular grid, where the variance of an increment is exact.

        The discrete response sqrt(dt) sum_k w_k m_k e^(-gamma_k dt lag) is fitted to the Cholesky factor of the exact
        covariance, lag by lag [derived]. For a fixed Hurst index, type II.

        Args:
            dt: time step.
            steps: how many.

        Returns:
            A noise with fixed weights.
        """
        from sde.fractional import fbm_covariance

        if self.kind != "II" or callable(self.hurst) or torch.as_tensor(self.hurst).ndim:
            raise ValueError(
                "weights are refitted for type II and one fixed Hurst index; sde.refitted_noise takes type I and "
                "indices that are learned"
            )
        times = dt * torch.arange(1, steps + 1, dtype=torch.float64)
        exact = fbm_covariance(times[:, None], times, float(self.hurst), "II", unit=self.unit)
        response = torch.linalg.cholesky(exact)
        lags = (times[:, None] - times).div(dt).round().long()
        keep = lags >= 0
        count = torch.zeros(steps, dtype=torch.float64).index_add_(0, lags[keep], torch.ones(int(keep.sum())).double())
        wanted = torch.zeros(steps, dtype=torch.float64).index_add_(0, lags[keep], response[keep]) / count
        decay, gain = (torch.from_numpy(part) for part in self.transition(dt))
        design = math.sqrt(dt) * gain * decay ** torch.arange(steps, dtype=torch.float64)[:, None]
        normal, right = design.mT @ (count[:, None] * design), design.mT @ (count * wanted)
        scale = normal.diagonal().rsqrt()
        eye = torch.eye(self.size, dtype=torch.float64)
        factor = torch.linalg.cholesky(scale[:, None] * normal * scale + self.ridge * eye)
        weights = scale * torch.cholesky_solve((scale * right)[:, None], factor)[:, 0]
        return replace(self, fitted=weights)

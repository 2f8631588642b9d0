r"""Gaussian mixtures as diffusion priors: every quantity in closed form.

A mixture is kept in a subspace (`mixture_form`), from which come what x at noise s says of x_0 (`mixture_given`) and
what linear data say of it (`mixture_condition`).
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import Size, Tensor

from sde.covariance import SubspaceCovariance, symmetric_root
from sde.log_density import Estimate
from sde.mixture_condition import condition, log_joint, observed
from sde.mixture_form import MixtureForm
from sde.mixture_given import GivenNoised
from sde.prior import DenoisingPrior
from sde.solvers.transition import Solver

__all__ = ["GaussianMixture"]


class GaussianMixture(DenoisingPrior):
    r"""sum_k w_k N(m_k, C_k), with exact denoiser, score, Tweedie covariance, posterior and evidence.

    Args:
        weights: (K,) positive, normalised here.
        means: (K, *event).
        covariances: (K,) or 0-d variances of isotropic components; (K, *event) variances of every entry; or (K, d, d)
            matrices over the flattened event.
        sigma_min: lowest noise level of the grid; by default half the smallest standard deviation of a component.
        sigma_max: highest noise level; by default five times `data_std`.
        steps: default number of steps of `sigmas`.
        noise_steps: steps of the deterministic sampler in `from_noise` (K > 1), down to sigma_min / 100.
        noise_solver: that sampler; None takes `DPMSolver2M`.
        validate_args: as in all distributions.

    Raises:
        ValueError: if shapes disagree, a weight is not positive or a covariance not positive semi-definite.

    Source: closed forms [derived]; Tweedie's formula, Efron (2011) [read].

    Example:
        >>> prior = GaussianMixture(torch.ones(2), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.ones(2))
        >>> prior.denoise(torch.tensor([[0.0, 1.0]]), 1.0).tolist()
        [[0.0, 0.5]]
        >>> prior.condition_linear(torch.eye(2)[:1], torch.tensor([2.0]), 0.1).mean.tolist()[0] > 1.7
        True
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        steps: int = 50,
        noise_steps: int = 50,
        noise_solver: Solver | None = None,
        validate_args: bool | None = None,
    ) -> None:
        weights, means, covariances = (torch.as_tensor(t) for t in (weights, means, covariances))
        dtype = torch.promote_types(torch.promote_types(weights.dtype, means.dtype), covariances.dtype)
        weights, means, covariances = (t.to(dtype) for t in (weights, means, covariances))
        form = MixtureForm.of(weights, means, covariances)
        self._setup(means.shape[1:], form, sigma_min, sigma_max, steps, noise_steps, noise_solver, validate_args)

    def _setup(
        self,
        event: Size,
        form: MixtureForm,
        sigma_min: float | None,
        sigma_max: float | None,
        steps: int,
        noise_steps: int,
        noise_solver: Solver | None,
        validate_args: bool | None,
    ) -> None:
        """Finish construction from the internal form."""
        self._form = form
        data_std = math.sqrt(float(form.largest_variance()))
        top = 5 * data_std if sigma_max is None else sigma_max
        # A posterior may be degenerate in some direction; the grid must stay positive.
        low = max(0.5 * math.sqrt(form.smallest_variance), 1e-5 * data_std) if sigma_min is None else sigma_min
        super().__init__(
            event,
            sigma_min=low,
            sigma_max=top,
            data_std=data_std,
            steps=steps,
            noise_steps=noise_steps,
            noise_solver=noise_solver,
            validate_args=validate_args,
        )

    @classmethod
    def _from_form(cls, event: Size, form: MixtureForm, **options: Any) -> GaussianMixture:
        """Build from the internal form."""
        new = cls.__new__(cls)
        new._setup(event, form, **options)
        return new

    def _options(self) -> dict[str, Any]:
        """Options that a derived mixture keeps."""
        return {"steps": self.steps, "noise_steps": self.noise_steps, "noise_solver": self.noise_solver}

    # What it is.

    @property
    def dtype(self) -> torch.dtype:
        """Data type of draws."""
        return self._form.center.dtype

    @property
    def device(self) -> torch.device:
        """Device of draws."""
        return self._form.center.device

    @property
    def capabilities(self) -> frozenset[str]:
        """All that a diffusion prior can do, exactly."""
        exact = {"denoiser", "noise_space", "log_prob", "exact_covariance", "condition_linear"}
        return frozenset(exact | {"gaussian"} if self.components == 1 else exact)

    @property
    def components(self) -> int:
        """Number of components, K."""
        return self._form.components

    @property
    def weights(self) -> Tensor:
        """(K,) normalised weights."""
        return self._form.weights

    @property
    def means(self) -> Tensor:
        """(K, *event) means of the components."""
        return (self._form.center + self._form.lift(self._form.places)).reshape(-1, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """(*batch_shape, *event) mean of the mixture."""
        return self._form.mean.reshape(self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """(*batch_shape, *event) variance of every entry."""
        basis, core, outside = self._form.basis, self._form.total_core(), self.weights @ self._form.outside
        if basis is None:
            variance = core.diagonal()
        else:
            variance = ((basis @ core) * basis).sum(1) + outside * (1 - basis.square().sum(1))
        return variance.reshape(self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """(d, d) covariance of the mixture, over the flattened event."""
        return self._form.dense(self._form.total_core(), self.weights @ self._form.outside)

    @property
    def covariances(self) -> Tensor:
        """(K, d, d) covariances of the components, over the flattened event."""
        form = self._form
        cores = form.core(form.values)
        return torch.stack([form.dense(core, outside) for core, outside in zip(cores, form.outside, strict=True)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same mixture elsewhere or in another precision."""
        new = copy.copy(self)
        new._form = self._form.to(device, dtype)
        return new

    # Exact conditionals given x_sigma.

    def _given(self, rows: Tensor, variance: Tensor) -> GivenNoised:
        return GivenNoised.of(self._form, rows, variance)

    def _count(self, rows: int) -> None:
        """One denoiser call."""
        for count in self.counters:
            count.calls += 1
            count.evals += rows

    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Denoise x: (rows, *event) at sigma: 0-d or (rows,)."""
        _no_label(label)
        self._count(x.shape[0])
        variance = self._variance(sigma)
        return self._given(x.reshape(len(x), self.event_shape.numel()), variance).denoised().reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """grad log p_sigma(x), without the cancellation of (D - x) / sigma^2 at low noise."""
        _no_label(label)
        rows, variance, _ = self._rows(x, self._checked(x, sigma))
        return self._given(rows, variance).score().reshape(x.shape)

    def _variance(self, sigma: Tensor) -> Tensor:
        """(rows or 1, 1) noise variance from 0-d or (rows,) sigma."""
        return sigma.square().reshape(-1, 1)

    def _rows(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Size]:
        """(rows, d) values, (rows or 1, 1) variances and the batch shape."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        if sigma.ndim:
            sigma = sigma.expand(batch).reshape(-1)
        return x.reshape(batch.numel(), self.event_shape.numel()), self._variance(sigma), batch

    def responsibilities(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """(*batch, K) probability of every component given x at noise sigma."""
        rows, variance, batch = self._rows(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device))
        return self._given(rows, variance).responsibilities.reshape(*batch, -1)

    def covariance(self, x: Tensor, sigma: Tensor | float) -> SubspaceCovariance:
        """Cov[x_0 | x_0 + sigma n = x] as an operator whose `mean` is D(x, sigma).

        Args:
            x: (*batch, *event).
            sigma: positive; 0-d, or broadcastable over the batch axes.

        Returns:
            the operator; isotropic outside a subspace of q (+ 1) dimensions, so nothing of size d x d is built for
            isotropic components.
        """
        rows, variance, _ = self._rows(x, self._checked(x, sigma))
        self._count(len(rows))
        mean, core, outside, extra = self._given(rows, variance).moments()
        return SubspaceCovariance(mean.reshape(x.shape), self.event_shape, core, outside, self._form.basis, extra)

    # Densities.

    def log_prob_at(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log p_sigma(x), the density of x_0 + sigma n; sigma may be 0.

        Args:
            x: (*batch, *event).
            sigma: zero or more; 0-d, or broadcastable over the batch axes.

        Returns:
            (*batch) normalised log densities.
        """
        dims = len(self.event_shape)
        if x.ndim < dims or x.shape[x.ndim - dims :] != self.event_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, but events have shape {tuple(self.event_shape)}")
        rows, variance, batch = self._rows(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device))
        return self._given(rows, variance).log_prob().reshape(batch)

    def log_prob(self, value: Tensor) -> Tensor:
        """(*batch) normalised log density of x_0."""
        if self._validate_args:
            self._validate_sample(value)
        return _over_batch(self.log_prob_at(value, 0.0), self.batch_shape)

    def log_prob_estimate(
        self, value: Tensor, generator: torch.Generator | None = None, *, levels: int = 32, repeats: int = 8
    ) -> Estimate:
        """Log density from denoising errors, as for any diffusion prior; `log_prob` is exact.

        The integral runs two decades beyond the grid, whose sigma_min is made for solvers that know the covariance.
        """
        wide = copy.copy(self)
        wide.sigma_min, wide.sigma_max = self.sigma_min / 100, self.sigma_max * 100
        return super(GaussianMixture, wide).log_prob_estimate(value, generator, levels=levels, repeats=repeats)

    # Draws.

    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch_shape, *event_shape) exact draws; the generator None is torch's global one."""
        lead = Size(shape) + self.batch_shape
        device = self.device if generator is None else generator.device
        with torch.no_grad():
            uniform = torch.rand(lead.numel(), generator=generator, dtype=self.dtype, device=device)
            noise = torch.randn(
                (lead.numel(), self.event_shape.numel()), generator=generator, dtype=self.dtype, device=device
            ).to(self.device)
            edges = self.weights.cumsum(0).to(device)
            chosen = torch.searchsorted(edges / edges[-1], uniform, right=True).clamp(max=self.components - 1)
            return self._form.color(noise, chosen.to(self.device)).reshape(lead + self.event_shape)

    def start(self, noise: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x at noise sigma with the mean and covariance of p_sigma; exact in law for one component.

        Args:
            noise: (*batch, *event) standard normal.
            sigma: noise level, sigma_max by default.
        """
        variance = (self.sigma_max if sigma is None else sigma) ** 2
        form = self._form
        core, outside = form.total_core(), self.weights @ form.outside + variance
        eye = torch.eye(len(core), dtype=self.dtype, device=self.device)
        root = symmetric_root((core + variance * eye)[None])[0]
        flat = noise.reshape(-1, self.event_shape.numel())
        coordinates = flat if form.basis is None else flat @ form.basis
        x = form.mean + form.lift(coordinates @ root.T)
        if form.outside_dim:
            x = x + outside.sqrt() * (flat - form.lift(coordinates))
        return x.reshape(noise.shape)

    def from_noise(self, z: Tensor) -> Tensor:
        """The draw that standard normal noise makes; affine and exact for one component.

        Args:
            z: (*batch, *event).

        Returns:
            (*batch, *event).
        """
        return self.start(z, 0.0) if self.components == 1 else super().from_noise(z)

    def _noise_sigmas(self) -> Tensor:
        """The grid goes on far below sigma_min, which is made for solvers that know the covariance."""
        return self.grid(self.sigma_max, self.sigma_min / 100, self.noise_steps)

    # Linear-Gaussian observations y = A x_0 + e, e ~ N(0, R).

    def log_evidence(self, A: Tensor, y: Tensor, R: Tensor | float) -> Tensor:
        """log p(y) = log sum_k w_k N(y; A m_k, A C_k A^T + R).

        Args:
            A: (m, d) or (m, *event).
            y: (m,).
            R: noise variance, (m,) variances or (m, m) covariance.

        Returns:
            0-d normalised log density of y.
        """
        return log_joint(self._form, *observed(self._form, self.event_shape, A, y, R)).logsumexp(0)

    def condition_linear(self, A: Tensor, y: Tensor, R: Tensor | float) -> GaussianMixture:
        """The exact posterior of x_0 given y = A x_0 + N(0, R): again a mixture, with its own grid.

        Args:
            A: (m, d) or (m, *event).
            y: (m,).
            R: noise variance, (m,) variances or (m, m) covariance.

        Returns:
            the posterior; its subspace grows by at most m directions.

        Raises:
            ValueError: if shapes disagree or the prediction of y is degenerate.
        """
        form = condition(self._form, *observed(self._form, self.event_shape, A, y, R))
        return GaussianMixture._from_form(
            self.event_shape, form, sigma_min=None, sigma_max=None, validate_args=None, **self._options()
        )


def _no_label(label: Tensor | None) -> None:
    """A mixture has no classes."""
    if label is not None:
        raise ValueError("a GaussianMixture has no labels; drop label=, or build one mixture per class")


def _over_batch(log_prob: Tensor, batch_shape: Size) -> Tensor:
    """Broadcast over the batch shape of the distribution."""
    return log_prob.expand(torch.broadcast_shapes(log_prob.shape, batch_shape))

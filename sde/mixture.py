r"""Gaussian mixtures as diffusion priors: every quantity in closed form.

p_s(x) = sum_k w_k N(x; m_k, C_k + s^2 I),  r_k = softmax_k log(w_k N(...)),  mu_k = m_k + C_k (C_k + s^2 I)^{-1} (x -
m_k), D = sum_k r_k mu_k,  Cov[x_0 | x] = sum_k r_k (V_k + (mu_k - D)(mu_k - D)^T),  V_k = s^2 C_k (C_k + s^2 I)^{-1}.

A mixture is kept as  x_0 = c + Q xi + (I - Q Q^T) eta  with orthonormal Q: d x q that holds all differences of means
and all
directions in which some C_k is not isotropic; xi | k ~ N(a_k, R_k diag(lambda_k) R_k^T) and eta | k ~ N(0, v_k I).
Isotropic
components at d = 800 then cost q < K numbers per row, full ones q = d, and conditioning on y in R^m adds at most m to
q.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import Size, Tensor

from sde.covariance import SubspaceCovariance, symmetric_root
from sde.log_density import Estimate
from sde.prior import DenoisingPrior
from sde.solvers.transition import Solver

__all__ = ["GaussianMixture"]

LOG_2PI = math.log(2 * math.pi)


def _orthonormal(vectors: Tensor) -> Tensor:
    """(d, q) orthonormal columns that span the rows of (n, d), without directions lost in rounding."""
    if not len(vectors):
        return vectors.new_zeros(vectors.shape[1], 0)
    _, values, rows = torch.linalg.svd(vectors, full_matrices=False)
    cutoff = values.max() * max(vectors.shape) * torch.finfo(vectors.dtype).eps
    return rows[values > cutoff].T.contiguous()


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
        _check_mixture(weights, means, covariances)
        event = means.shape[1:]
        k, d = len(means), event.numel()
        weights = weights / weights.sum()
        flat = means.reshape(k, d)
        center = weights @ flat
        deviations = flat - center
        basis: Tensor | None
        rotations: Tensor | None = None
        if covariances.ndim < 2 and covariances.shape in ((), (k,)):
            outside = covariances.expand(k)
            basis = _orthonormal(deviations)
            places = deviations @ basis
            values = outside[:, None].expand(places.shape)
        else:
            basis, places, outside = None, deviations, means.new_zeros(k)
            if covariances.shape == means.shape:
                values = covariances.reshape(k, d)
            else:
                values, rotations = torch.linalg.eigh(covariances)
                values = values.clamp(min=0)
        parts = (weights.log(), center, basis, places, values, rotations, outside)
        self._setup(event, parts, sigma_min, sigma_max, steps, noise_steps, noise_solver, validate_args)

    def _setup(
        self,
        event: Size,
        parts: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor],
        sigma_min: float | None,
        sigma_max: float | None,
        steps: int,
        noise_steps: int,
        noise_solver: Solver | None,
        validate_args: bool | None,
    ) -> None:
        """Finish construction from the internal form."""
        self._log_weights, self._center, self._basis, self._places, self._values, self._rotations, self._outside = parts
        # Outside the subspace there is nothing when Q is everything.
        self._outside_dim = 0 if self._basis is None else event.numel() - self._basis.shape[1]
        self._one_gain = self._outside_dim == 0 or bool((self._outside == self._outside[0]).all())
        data_std = math.sqrt(float(self._largest_variance()))
        smallest = float(self._values.min()) if self._values.numel() else math.inf
        if self._outside_dim:
            smallest = min(smallest, float(self._outside.min()))
        top = 5 * data_std if sigma_max is None else sigma_max
        # A posterior may be degenerate in some direction; the grid must stay positive.
        low = max(0.5 * math.sqrt(smallest), 1e-5 * data_std) if sigma_min is None else sigma_min
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
    def _from_parts(
        cls,
        event: Size,
        parts: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor],
        **options: Any,
    ) -> GaussianMixture:
        """Build from the internal form."""
        new = cls.__new__(cls)
        new._setup(event, parts, **options)
        return new

    def _options(self) -> dict[str, Any]:
        """Options that a derived mixture keeps."""
        return {"steps": self.steps, "noise_steps": self.noise_steps, "noise_solver": self.noise_solver}

    # What it is.

    @property
    def dtype(self) -> torch.dtype:
        """Data type of draws."""
        return self._center.dtype

    @property
    def device(self) -> torch.device:
        """Device of draws."""
        return self._center.device

    @property
    def capabilities(self) -> frozenset[str]:
        """All that a diffusion prior can do, exactly."""
        exact = {"denoiser", "noise_space", "log_prob", "exact_covariance", "condition_linear"}
        return frozenset(exact | {"gaussian"} if self.components == 1 else exact)

    @property
    def components(self) -> int:
        """Number of components, K."""
        return len(self._log_weights)

    @property
    def weights(self) -> Tensor:
        """(K,) normalised weights."""
        return self._log_weights.exp()

    @property
    def means(self) -> Tensor:
        """(K, *event) means of the components."""
        return (self._center + self._lift(self._places)).reshape(-1, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """(*batch_shape, *event) mean of the mixture."""
        mean = self._center + self._lift(self.weights @ self._places)
        return mean.reshape(self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """(*batch_shape, *event) variance of every entry."""
        core, outside = self._total_core(), self.weights @ self._outside
        if self._basis is None:
            variance = core.diagonal()
        else:
            inside = ((self._basis @ core) * self._basis).sum(1)
            variance = inside + outside * (1 - self._basis.square().sum(1))
        return variance.reshape(self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """(d, d) covariance of the mixture, over the flattened event."""
        return self._dense(self._total_core(), self.weights @ self._outside)

    @property
    def covariances(self) -> Tensor:
        """(K, d, d) covariances of the components, over the flattened event."""
        cores = self._core(self._values)
        return torch.stack([self._dense(core, outside) for core, outside in zip(cores, self._outside, strict=True)])

    def _dense(self, core: Tensor, outside: Tensor) -> Tensor:
        """a I + Q (core - a I) Q^T."""
        if self._basis is None:
            return core
        eye = torch.eye(self.event_shape.numel(), dtype=self.dtype, device=self.device)
        return outside * (eye - self._basis @ self._basis.T) + self._basis @ core @ self._basis.T

    def _core(self, values: Tensor) -> Tensor:
        """R_k diag(values) R_k^T: (..., K, q) to (..., K, q, q)."""
        if self._rotations is None:
            return torch.diag_embed(values)
        return (self._rotations * values[..., None, :]) @ self._rotations.mT

    def _total_core(self) -> Tensor:
        """(q, q) covariance of xi under the whole mixture, as a centred sum."""
        deviation = self._places - self.weights @ self._places
        within = torch.einsum("k,kij->ij", self.weights, self._core(self._values))
        return within + torch.einsum("k,ki,kj->ij", self.weights, deviation, deviation)

    def _largest_variance(self) -> Tensor:
        """Variance of the mixture along its widest direction."""
        core = self._total_core()
        inside = torch.linalg.eigvalsh(core).max() if len(core) else core.new_zeros(())
        return torch.maximum(inside, self.weights @ self._outside) if self._outside_dim else inside

    def _lift(self, coordinates: Tensor) -> Tensor:
        """Q times coordinates."""
        return coordinates if self._basis is None else coordinates @ self._basis.T

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same mixture elsewhere or in another precision."""
        new = copy.copy(self)
        for name in ("_log_weights", "_center", "_basis", "_places", "_values", "_rotations", "_outside"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value.to(device=device, dtype=dtype))
        return new

    # Exact conditionals given x_sigma.

    def _posterior(self, x: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the closed forms share, for x: (rows, d) and noise variance: (rows or 1, 1).

        Returns:
            log w_k N_k: (rows, K); z = R_k^T (Q^T (x - c) - a_k): (rows, K, q); the part of x - c outside Q: (rows, d);
            its squared length: (rows, 1).
        """
        shifted = x - self._center
        if self._basis is None:
            coordinates, rest = shifted, torch.zeros_like(shifted)
            length = shifted.new_zeros(len(x), 1)
        else:
            coordinates = shifted @ self._basis
            rest = shifted - self._lift(coordinates)
            length = rest.square().sum(-1, keepdim=True)
        z = coordinates[:, None, :] - self._places
        if self._rotations is not None:
            z = torch.einsum("nkq,kqr->nkr", z, self._rotations)
        inside = self._values + variance[..., None]
        log = -0.5 * (z.square() / inside + inside.log()).sum(-1) - 0.5 * self.event_shape.numel() * LOG_2PI
        if self._outside_dim:
            outside = self._outside + variance
            log = log - 0.5 * (length / outside + self._outside_dim * outside.log())
        return self._log_weights + log, z, rest, length

    def _variance(self, sigma: Tensor) -> Tensor:
        """(rows or 1, 1) noise variance from 0-d or (rows,) sigma."""
        return sigma.square().reshape(-1, 1)

    def _inside_means(self, z: Tensor, gains: Tensor) -> Tensor:
        """(rows, K, q) coordinates of mu_k in Q."""
        moved = gains * z
        if self._rotations is not None:
            moved = torch.einsum("nkr,kqr->nkq", moved, self._rotations)
        return self._places + moved

    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Denoise x: (rows, *event) at sigma: 0-d or (rows,)."""
        _no_label(label)
        for count in self.counters:
            count.calls += 1
            count.evals += x.shape[0]
        variance = self._variance(sigma)
        log, z, rest, _ = self._posterior(x.reshape(len(x), self.event_shape.numel()), variance)
        r = log.softmax(-1)
        gains = self._values / (self._values + variance[..., None])
        inside = torch.einsum("nk,nkq->nq", r, self._inside_means(z, gains))
        denoised = self._center + self._lift(inside)
        if self._outside_dim:
            denoised = denoised + (r * (self._outside / (self._outside + variance))).sum(-1, keepdim=True) * rest
        return denoised.reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """grad log p_sigma(x), without the cancellation of (D - x) / sigma^2 at low noise."""
        _no_label(label)
        sigma = self._checked(x, sigma)
        rows, variance, _ = self._rows(x, sigma)
        log, z, rest, _ = self._posterior(rows, variance)
        r = log.softmax(-1)
        pull = z / (self._values + variance[..., None])
        if self._rotations is not None:
            pull = torch.einsum("nkr,kqr->nkq", pull, self._rotations)
        score = -self._lift(torch.einsum("nk,nkq->nq", r, pull))
        if self._outside_dim:
            score = score - (r / (self._outside + variance)).sum(-1, keepdim=True) * rest
        return score.reshape(x.shape)

    def _rows(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Size]:
        """(rows, d) values, (rows or 1, 1) variances and the batch shape."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        if sigma.ndim:
            sigma = sigma.expand(batch).reshape(-1)
        return x.reshape(batch.numel(), self.event_shape.numel()), self._variance(sigma), batch

    def responsibilities(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """(*batch, K) probability of every component given x at noise sigma."""
        rows, variance, batch = self._rows(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device))
        return self._posterior(rows, variance)[0].softmax(-1).reshape(*batch, -1)

    def covariance(self, x: Tensor, sigma: Tensor | float) -> SubspaceCovariance:
        """Cov[x_0 | x_0 + sigma n = x] as an operator whose `mean` is D(x, sigma).

        Args:
            x: (*batch, *event).
            sigma: positive; 0-d, or broadcastable over the batch axes.

        Returns:
            the operator; isotropic outside a subspace of q (+ 1) dimensions, so nothing of size d x d is built for
            isotropic components.
        """
        sigma = self._checked(x, sigma)
        rows, variance, _ = self._rows(x, sigma)
        for count in self.counters:
            count.calls += 1
            count.evals += len(rows)
        log, z, rest, length = self._posterior(rows, variance)
        r = log.softmax(-1)
        gains = self._values / (self._values + variance[..., None])
        means = self._inside_means(z, gains)
        inside = torch.einsum("nk,nkq->nq", r, means)
        denoised = self._center + self._lift(inside)
        spread = gains * variance[..., None]
        if self.components == 1:
            core = self._core(spread)[:, 0]
        else:
            deviation = r.sqrt()[..., None] * (means - inside[:, None, :])
            core = deviation.mT @ deviation + self._average_core(r, spread)
        extra: Tensor | None = None
        outside = variance[:, 0] * 0
        if self._outside_dim:
            gain = self._outside / (self._outside + variance)
            average = (r * gain).sum(-1, keepdim=True)
            denoised = denoised + average * rest
            outside = (average * variance)[:, 0] if not self._one_gain else (gain[:, 0] * variance[:, 0])
            if not self._one_gain:
                core, extra = self._with_rest(
                    core, r, gain - average, means - inside[:, None, :], rest, length, outside
                )
        return SubspaceCovariance(denoised.reshape(x.shape), self.event_shape, core, outside, self._basis, extra)

    def _average_core(self, r: Tensor, spread: Tensor) -> Tensor:
        """sum_k r_k R_k diag(spread_k) R_k^T: (rows, q, q)."""
        if self._rotations is None:
            return torch.diag_embed(torch.einsum("nk,nkq->nq", r, spread.expand(len(r), -1, -1)))
        if len(spread) == 1:
            return torch.einsum("nk,kij->nij", r, self._core(spread[0]))
        weighted = r[..., None] * spread
        return torch.einsum("kir,nkr,kjr->nij", self._rotations, weighted, self._rotations)

    @staticmethod
    def _with_rest(
        core: Tensor, r: Tensor, excess: Tensor, deviation: Tensor, rest: Tensor, length: Tensor, outside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Core and extra direction when components shrink the outside part of x by different factors."""
        norm = length.sqrt()
        cross = torch.einsum("nk,nk,nkq->nq", r, excess, deviation) * norm
        corner = outside[:, None] + (r * excess.square()).sum(-1, keepdim=True) * length
        top = torch.cat([core.expand(len(rest), -1, -1), cross[..., None]], -1)
        bottom = torch.cat([cross, corner], -1)[:, None, :]
        unit = torch.where(norm > 0, rest / norm.clamp(min=torch.finfo(norm.dtype).tiny), torch.zeros_like(rest))
        return torch.cat([top, bottom], 1), unit

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
        return self._posterior(rows, variance)[0].logsumexp(-1).reshape(batch)

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
            return self._color(noise, chosen.to(self.device)).reshape(lead + self.event_shape)

    def _color(self, noise: Tensor, chosen: Tensor) -> Tensor:
        """(rows, d) draws of the chosen components from standard normal noise."""
        coordinates = noise if self._basis is None else noise @ self._basis
        if self._rotations is None:
            inside = self._values[chosen].sqrt() * coordinates
        else:
            inside = torch.zeros_like(coordinates)
            # One component at a time: gathering a q x q matrix for every row would cost rows x q^2.
            for k in range(self.components):
                at = (chosen == k).nonzero()[:, 0]
                rotated = coordinates[at] @ self._rotations[k] * self._values[k].sqrt()
                inside[at] = rotated @ self._rotations[k].T
        draws = self._center + self._lift(self._places[chosen] + inside)
        if self._outside_dim:
            draws = draws + self._outside[chosen].sqrt()[:, None] * (noise - self._lift(coordinates))
        return draws

    def start(self, noise: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x at noise sigma with the mean and covariance of p_sigma; exact in law for one component.

        Args:
            noise: (*batch, *event) standard normal.
            sigma: noise level, sigma_max by default.
        """
        variance = (self.sigma_max if sigma is None else sigma) ** 2
        core, outside = self._total_core(), self.weights @ self._outside + variance
        eye = torch.eye(len(core), dtype=self.dtype, device=self.device)
        root = symmetric_root((core + variance * eye)[None])[0]
        flat = noise.reshape(-1, self.event_shape.numel())
        coordinates = flat if self._basis is None else flat @ self._basis
        x = self._mean + self._lift(coordinates @ root.T)
        if self._outside_dim:
            x = x + outside.sqrt() * (flat - self._lift(coordinates))
        return x.reshape(noise.shape)

    @property
    def _mean(self) -> Tensor:
        """(d,) mean of the mixture."""
        return self._center + self._lift(self.weights @ self._places)

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

    def _observed(self, A: Tensor, y: Tensor, R: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """A over the flattened event, y - A c, and R as a matrix; checked."""
        d = self.event_shape.numel()
        # The dtype goes in at once: a Python number would pass through float32.
        A, y = (torch.as_tensor(t, dtype=self.dtype, device=self.device) for t in (A, y))
        if A.ndim < 1 or A.numel() != A.shape[0] * d:
            raise ValueError(
                f"A has shape {tuple(A.shape)}, expected (m, {d}) or (m, *{tuple(self.event_shape)}) for this event"
            )
        A = A.reshape(-1, d)
        m = len(A)
        y = y.reshape(-1)
        if len(y) != m:
            raise ValueError(f"y has {len(y)} entries, but A has {m} rows")
        noise = torch.as_tensor(R, dtype=self.dtype, device=self.device)
        if noise.ndim < 2 and noise.shape in ((), (1,), (m,)):
            noise = torch.diag(noise.expand(m))
        if noise.shape != (m, m):
            raise ValueError(f"R has shape {tuple(noise.shape)}, expected a variance, ({m},) variances or ({m}, {m})")
        if not (bool(torch.isfinite(A).all()) and bool(torch.isfinite(y).all()) and bool(torch.isfinite(noise).all())):
            raise ValueError("A, y and R must be finite; look for NaN in the data")
        return A, y - A @ self._center, noise

    def _predictive(self, A: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """A Q: (m, q), and A C_k A^T + R: (K, m, m)."""
        inside = A if self._basis is None else A @ self._basis
        covariance = inside @ self._core(self._values) @ inside.T + R
        if self._outside_dim:
            rest = A - self._lift(inside)
            covariance = covariance + self._outside[:, None, None] * (rest @ rest.T)
        return inside, covariance

    def log_evidence(self, A: Tensor, y: Tensor, R: Tensor | float) -> Tensor:
        """log p(y) = log sum_k w_k N(y; A m_k, A C_k A^T + R).

        Args:
            A: (m, d) or (m, *event).
            y: (m,).
            R: noise variance, (m,) variances or (m, m) covariance.

        Returns:
            0-d normalised log density of y.
        """
        return self._log_joint(*self._observed(A, y, R)).logsumexp(0)

    def _log_joint(self, A: Tensor, residual: Tensor, R: Tensor) -> Tensor:
        """(K,) log w_k N(y; A m_k, A C_k A^T + R)."""
        inside, covariance = self._predictive(A, R)
        error = residual - self._places @ inside.T
        root, info = torch.linalg.cholesky_ex(covariance)
        if bool((info > 0).any()):
            raise ValueError(
                "A C A^T + R is not positive definite; drop redundant rows of A, or give R a positive variance"
            )
        scaled = torch.linalg.solve_triangular(root, error[..., None], upper=False).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self._log_weights - 0.5 * scaled.square().sum(-1) - log_det - 0.5 * len(residual) * LOG_2PI

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
        A, residual, R = self._observed(A, y, R)
        log_weights = self._log_joint(A, residual, R)
        wide = self._widened(A)
        inside, predictive = wide._predictive(A, R)
        prior = wide._core(wide._values)
        gain = torch.linalg.solve(predictive, inside @ prior).mT
        places = wide._places + torch.einsum("kqm,km->kq", gain, residual - wide._places @ inside.T)
        # Joseph's form stays positive semi-definite in rounding.
        left = torch.eye(inside.shape[1], dtype=self.dtype, device=self.device) - gain @ inside
        core = left @ prior @ left.mT + gain @ R @ gain.mT
        values, rotations = torch.linalg.eigh((core + core.mT) / 2)
        parts = (
            log_weights - log_weights.logsumexp(0),
            wide._center,
            wide._basis,
            places,
            values.clamp(min=0),
            rotations,
            wide._outside,
        )
        return GaussianMixture._from_parts(
            self.event_shape, parts, sigma_min=None, sigma_max=None, validate_args=None, **self._options()
        )

    def _widened(self, A: Tensor) -> GaussianMixture:
        """The same mixture with the rows of A inside its subspace."""
        if self._basis is None:
            return self
        new = copy.copy(self)
        added = _orthonormal(A - self._lift(A @ self._basis))
        # Twice is enough: the first pass leaves rounding along Q.
        added = _orthonormal((added - self._basis @ (self._basis.T @ added)).T)
        k = self.components
        new._basis = torch.cat([self._basis, added], 1)
        new._places = torch.cat([self._places, self._places.new_zeros(k, added.shape[1])], 1)
        new._values = torch.cat([self._values, self._outside[:, None].expand(k, added.shape[1])], 1)
        if self._rotations is not None:
            q = self._basis.shape[1]
            new._rotations = torch.eye(q + added.shape[1], dtype=self.dtype, device=self.device).repeat(k, 1, 1)
            new._rotations[:, :q, :q] = self._rotations
        new._outside_dim = self.event_shape.numel() - new._basis.shape[1]
        return new


def _no_label(label: Tensor | None) -> None:
    """A mixture has no classes."""
    if label is not None:
        raise ValueError("a GaussianMixture has no labels; drop label=, or build one mixture per class")


def _over_batch(log_prob: Tensor, batch_shape: Size) -> Tensor:
    """Broadcast over the batch shape of the distribution."""
    return log_prob.expand(torch.broadcast_shapes(log_prob.shape, batch_shape))


def _check_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    """Shapes and values of the arguments of a mixture."""
    if not weights.is_floating_point():
        raise ValueError(f"weights, means and covariances must be floating point, got {weights.dtype}")
    if weights.ndim != 1 or means.ndim < 1 or means.shape[0] != len(weights) or not len(weights):
        raise ValueError(
            f"expected weights (K,) and means (K, *event), got {tuple(weights.shape)} and {tuple(means.shape)}"
        )
    if not bool((weights > 0).all() & weights.isfinite().all()):
        raise ValueError(f"weights must be positive and finite, got a smallest weight of {float(weights.min())}")
    k, d = len(means), means.shape[1:].numel()
    if covariances.shape not in ((), (k,), means.shape, (k, d, d)):
        raise ValueError(
            f"covariances have shape {tuple(covariances.shape)}, expected ({k},) variances, "
            f"{tuple(means.shape)} variances of entries, or ({k}, {d}, {d}) matrices"
        )
    if not (bool(means.isfinite().all()) and bool(covariances.isfinite().all())):
        raise ValueError("means and covariances must be finite")
    if covariances.shape == (k, d, d) and covariances.shape != means.shape:
        if not torch.allclose(covariances, covariances.mT, rtol=1e-4, atol=1e-6 * float(covariances.abs().max())):
            raise ValueError("covariance matrices must be symmetric")
        lowest = float(torch.linalg.eigvalsh(covariances).min())
        if lowest < -1e-6 * float(covariances.abs().max()):
            raise ValueError(f"covariances must be positive semi-definite, got an eigenvalue of {lowest:.3g}")
    elif bool((covariances < 0).any()):
        raise ValueError(f"variances must be zero or more, got {float(covariances.min()):.3g}")

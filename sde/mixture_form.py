r"""Gaussian mixtures in a subspace: x_0 = c + Q xi + (I - Q Q^T) eta.

Q: d x q is orthonormal and holds all differences of means and all directions in which some C_k is not isotropic;
xi | k ~ N(a_k, R_k diag(lambda_k) R_k^T) and eta | k ~ N(0, v_k I). Isotropic components at d = 800 then cost q < K
numbers per row, full ones q = d, and conditioning on y in R^m adds at most m to q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["LOG_2PI", "MixtureForm", "check_mixture", "orthonormal"]

LOG_2PI = math.log(2 * math.pi)


def orthonormal(vectors: Tensor) -> Tensor:
    """(d, q) orthonormal columns that span the rows of (n, d), without directions lost in rounding."""
    if not len(vectors):
        return vectors.new_zeros(vectors.shape[1], 0)
    _, values, rows = torch.linalg.svd(vectors, full_matrices=False)
    cutoff = values.max() * max(vectors.shape) * torch.finfo(vectors.dtype).eps
    return rows[values > cutoff].T.contiguous()


@dataclass(frozen=True, eq=False)
class MixtureForm:
    """The parts of a mixture of K Gaussians in R^d.

    Args:
        log_weights: (K,) normalised.
        center: (d,) c.
        basis: (d, q) Q; None for the whole space.
        places: (K, q) a_k.
        values: (K, q) lambda_k, zero or more.
        rotations: (K, q, q) R_k; None for the identity.
        outside: (K,) v_k.
    """

    log_weights: Tensor
    center: Tensor
    basis: Tensor | None
    places: Tensor
    values: Tensor
    rotations: Tensor | None
    outside: Tensor
    one_gain: bool = field(init=False)
    """Whether all components shrink the part outside of Q alike."""

    def __post_init__(self) -> None:
        # Outside the subspace there is nothing when Q is everything.
        alike = self.outside_dim == 0 or bool((self.outside == self.outside[0]).all())
        object.__setattr__(self, "one_gain", alike)

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, covariances: Tensor) -> Self:
        """The parts, from weights (K,), means (K, *event) and covariances as `GaussianMixture` takes them, checked."""
        check_mixture(weights, means, covariances)
        k, d = len(means), means.shape[1:].numel()
        weights = weights / weights.sum()
        flat = means.reshape(k, d)
        center = weights @ flat
        deviations = flat - center
        basis: Tensor | None
        rotations: Tensor | None = None
        if covariances.ndim < 2 and covariances.shape in ((), (k,)):
            outside = covariances.expand(k)
            basis = orthonormal(deviations)
            places = deviations @ basis
            values = outside[:, None].expand(places.shape)
        else:
            basis, places, outside = None, deviations, means.new_zeros(k)
            if covariances.shape == means.shape:
                values = covariances.reshape(k, d)
            else:
                values, rotations = torch.linalg.eigh(covariances)
                values = values.clamp(min=0)
        return cls(weights.log(), center, basis, places, values, rotations, outside)

    @property
    def components(self) -> int:
        """K."""
        return len(self.log_weights)

    @property
    def dim(self) -> int:
        """d."""
        return len(self.center)

    @property
    def outside_dim(self) -> int:
        """d - q."""
        return 0 if self.basis is None else self.dim - self.basis.shape[1]

    @property
    def weights(self) -> Tensor:
        """(K,) normalised weights."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """(d,) mean of the mixture."""
        return self.center + self.lift(self.weights @ self.places)

    @property
    def smallest_variance(self) -> float:
        """Of any component in any direction."""
        inside = float(self.values.min()) if self.values.numel() else math.inf
        return min(inside, float(self.outside.min())) if self.outside_dim else inside

    def largest_variance(self) -> Tensor:
        """Variance of the mixture along its widest direction."""
        core = self.total_core()
        inside = torch.linalg.eigvalsh(core).max() if len(core) else core.new_zeros(())
        return torch.maximum(inside, self.weights @ self.outside) if self.outside_dim else inside

    def lift(self, coordinates: Tensor) -> Tensor:
        """Q times coordinates."""
        return coordinates if self.basis is None else coordinates @ self.basis.T

    def core(self, values: Tensor) -> Tensor:
        """R_k diag(values) R_k^T: (..., K, q) to (..., K, q, q)."""
        if self.rotations is None:
            return torch.diag_embed(values)
        return (self.rotations * values[..., None, :]) @ self.rotations.mT

    def total_core(self) -> Tensor:
        """(q, q) covariance of xi under the whole mixture, as a centred sum."""
        deviation = self.places - self.weights @ self.places
        within = torch.einsum("k,kij->ij", self.weights, self.core(self.values))
        return within + torch.einsum("k,ki,kj->ij", self.weights, deviation, deviation)

    def dense(self, core: Tensor, outside: Tensor) -> Tensor:
        """a I + Q (core - a I) Q^T."""
        if self.basis is None:
            return core
        eye = torch.eye(self.dim, dtype=self.center.dtype, device=self.center.device)
        return outside * (eye - self.basis @ self.basis.T) + self.basis @ core @ self.basis.T

    def color(self, noise: Tensor, chosen: Tensor) -> Tensor:
        """(rows, d) draws of the chosen components from standard normal noise."""
        coordinates = noise if self.basis is None else noise @ self.basis
        if self.rotations is None:
            inside = self.values[chosen].sqrt() * coordinates
        else:
            inside = torch.zeros_like(coordinates)
            # One component at a time: gathering a q x q matrix for every row would cost rows x q^2.
            for k in range(self.components):
                at = (chosen == k).nonzero()[:, 0]
                rotated = coordinates[at] @ self.rotations[k] * self.values[k].sqrt()
                inside[at] = rotated @ self.rotations[k].T
        draws = self.center + self.lift(self.places[chosen] + inside)
        if self.outside_dim:
            draws = draws + self.outside[chosen].sqrt()[:, None] * (noise - self.lift(coordinates))
        return draws

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same mixture elsewhere or in another precision."""
        moved: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.init):
            part = getattr(self, name)
            moved[name] = None if part is None else part.to(device=device, dtype=dtype)
        return type(self)(**moved)


def check_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
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

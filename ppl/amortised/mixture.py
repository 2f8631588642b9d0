"""Mixtures of Gaussians on R^n, one or a batch of them: what a Distribution Transformer reads and writes.

q(z) = sum_k w_k N(z; m_k, L_k L_k^T)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.sites import unwrap

__all__ = ["Mixture"]

SUM_ERROR = 1e-4  # largest distance of the sum of the weights from one
DEFENCE = (0.9, 0.05, 0.05)  # shares of a posterior, of its widened form and of the prior in weighted draws
WIDER = 2.0
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Mixture:
    """One mixture of Gaussians, or a batch.

    Args:
        weights: (*batch, components), zero or more, with sum one.
        means: (*batch, components, dim).
        scale_tril: (*batch, components, dim, dim), lower triangular with a positive diagonal.

    Raises:
        ShapeError: shapes that do not belong together.
        OptionError: weights that do not sum to one, or values that are not finite.

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> mixture = Mixture.of_covariances(torch.tensor([0.5, 0.5]), means, torch.ones(2, 1, 1))
        >>> mixture.mean, mixture.covariance, mixture.log_prob(torch.zeros(1))
        (tensor([0.]), tensor([[2.]]), tensor(-1.4189))
    """

    weights: Tensor
    means: Tensor
    scale_tril: Tensor

    def __post_init__(self) -> None:
        w, m, s = self.weights, self.means, self.scale_tril
        fit = w.ndim > 0 and m.ndim > 1 and m.shape[:-1] == w.shape and s.shape == (*m.shape, m.shape[-1])
        if not fit or 0 in m.shape[-2:]:
            raise ShapeError(
                f"expected weights (*batch, k), means (*batch, k, n) and scale_tril (*batch, k, n, n), got "
                f"{tuple(w.shape)}, {tuple(m.shape)} and {tuple(s.shape)}"
            )
        if not all(bool(v.isfinite().all()) for v in (w, m, s)):
            raise OptionError("weights, means and scales of a mixture must be finite; look for NaN")
        if not w.numel():  # a batch of none
            return
        off = float((w.sum(-1) - 1).abs().max())
        if off > SUM_ERROR or bool((w < 0).any()):
            raise OptionError(
                f"weights of a mixture must be zero or more and sum to one, got a sum off by {off:.3g} and a smallest "
                f"weight of {float(w.min()):.3g}; divide them by their sum"
            )
        if not bool((s.diagonal(dim1=-2, dim2=-1) > 0).all()):
            raise OptionError("scale_tril must have a positive diagonal: no component may be flat in any direction")

    @classmethod
    def of_covariances(cls, weights: Tensor, means: Tensor, covariances: Tensor) -> Mixture:
        """From covariance matrices (*batch, components, dim, dim).

        Raises:
            OptionError: a covariance is not positive definite.
        """
        root, info = torch.linalg.cholesky_ex(covariances)
        if bool((info > 0).any()):
            raise OptionError(
                "covariances of a mixture must be positive definite; add a small multiple of the identity"
            )
        return cls(weights, means, root)

    @classmethod
    def of(cls, distribution: Any) -> Mixture:
        """From a distribution of torch, Pyro or `sde` that is a Gaussian, or a mixture of Gaussians, over vectors.

        Args:
            distribution: `Normal` (scalar or `to_event(1)`), `MultivariateNormal`, `MixtureSameFamily` of these, or any
                object with `weights`, `means` and dense `covariances`.

        Raises:
            OptionError: it is none of these.
        """
        found = gaussian_parts(distribution)
        if found is None:
            raise OptionError(
                f"{type(distribution).__name__} is not a mixture of Gaussians: give a ppl.Mixture, a Normal, a "
                "MultivariateNormal, or a MixtureSameFamily of these"
            )
        return cls.of_covariances(*found)

    @property
    def components(self) -> int:
        """Number of components."""
        return self.weights.shape[-1]

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.means.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading axes; empty for one mixture."""
        return self.weights.shape[:-1]

    @property
    def covariances(self) -> Tensor:
        """(*batch, components, dim, dim)."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def mean(self) -> Tensor:
        """(*batch, dim)."""
        return (self.weights[..., None] * self.means).sum(-2)

    @property
    def covariance(self) -> Tensor:
        """(*batch, dim, dim)."""
        off = self.means - self.mean[..., None, :]
        spread = self.covariances + off[..., None] * off[..., None, :]
        return (self.weights[..., None, None] * spread).sum(-3)

    def __getitem__(self, index: Any) -> Mixture:
        """Some mixtures of a batch."""
        return Mixture(self.weights[index], self.means[index], self.scale_tril[index])

    def to(self, *args: Any, **kwargs: Any) -> Mixture:
        """The same mixture on another device or in another floating type."""
        return Mixture(*(v.to(*args, **kwargs) for v in (self.weights, self.means, self.scale_tril)))

    # Density and draws -----------------------------------------------------------------------------------------------

    def component_log_prob(self, z: Tensor) -> Tensor:
        """Log w_k N(z; m_k, L_k L_k^T): (*lead, *batch, dim) -> (*lead, *batch, components)."""
        if z.shape[-1] != self.dim:
            raise ShapeError(f"the mixture is over vectors of length {self.dim}, got {tuple(z.shape)}")
        gap = z[..., None, :] - self.means
        root = self.scale_tril.expand(*gap.shape, self.dim)
        white = torch.linalg.solve_triangular(root, gap[..., None], upper=False)[..., 0]
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.weights.log() - 0.5 * white.square().sum(-1) - log_det - 0.5 * self.dim * LOG_2PI

    def log_prob(self, z: Tensor) -> Tensor:
        """Normalised log density: (*lead, *batch, dim) -> (*lead, *batch)."""
        return self.component_log_prob(z).logsumexp(-1)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Independent draws (*shape, *batch, dim)."""
        lead = (*shape, *self.batch_shape)
        own: dict[str, Any] = {"generator": generator, "dtype": self.weights.dtype, "device": generator.device}
        uniform, noise = torch.rand(*lead, 1, **own), torch.randn(*lead, self.dim, **own)
        edges = self.weights.cumsum(-1)
        chosen = (uniform * edges[..., -1:] > edges).sum(-1).clamp(max=self.components - 1)
        means = self.means.expand(*lead, -1, -1).gather(-2, chosen[..., None, None].expand(*lead, 1, self.dim))
        index = chosen[..., None, None, None].expand(*lead, 1, self.dim, self.dim)
        root = self.scale_tril.expand(*lead, -1, -1, -1).gather(-3, index)
        return means[..., 0, :] + (root[..., 0, :, :] @ noise[..., None])[..., 0]

    # Other mixtures --------------------------------------------------------------------------------------------------

    def affine(self, scale: Tensor, shift: Tensor) -> Mixture:
        """The law of scale * z + shift, entry by entry, scale positive."""
        return Mixture(self.weights, self.means * scale + shift, self.scale_tril * scale[..., None])

    def moved(self, matrix: Tensor, covariance: Tensor, shift: Tensor | float = 0.0) -> Mixture:
        """The law of matrix z + shift + N(0, covariance): each component on its own, the weights as they are.

        Args:
            matrix: (dim, dim).
            covariance: (dim, dim) of the noise.
            shift: (dim,).
        """
        spread = matrix @ self.covariances @ matrix.mT + covariance
        return Mixture.of_covariances(self.weights, self.means @ matrix.mT + shift, spread)

    def conditioned(self, matrix: Tensor, y: Tensor, covariance: Tensor) -> tuple[Mixture, Tensor]:
        """The exact posterior given y = matrix z + N(0, covariance), and log p(y).

        Args:
            matrix: (m, dim).
            y: (*batch, m).
            covariance: (m, m).

        Returns:
            a mixture of as many components, and (*batch,).

        Example:
            >>> prior = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
            >>> posterior, evidence = prior.conditioned(torch.ones(1, 1), torch.tensor([2.0]), torch.eye(1))
            >>> posterior.mean, posterior.covariance, evidence
            (tensor([1.0000]), tensor([[0.5000]]), tensor(-2.2655))
        """
        cross = matrix @ self.covariances
        seen = cross @ matrix.mT + covariance
        gap = y[..., None, :] - self.means @ matrix.mT
        root = torch.linalg.cholesky(seen)
        white = torch.linalg.solve_triangular(root, torch.cat([gap[..., None], cross], -1), upper=False)
        residual, gain = white[..., 0], white[..., 1:]
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_joint = self.weights.log() - 0.5 * residual.square().sum(-1) - log_det - 0.5 * y.shape[-1] * LOG_2PI
        means = self.means + (gain.mT @ residual[..., None])[..., 0]
        spread = self.covariances - gain.mT @ gain
        return Mixture.of_covariances(log_joint.softmax(-1), means, spread), log_joint.logsumexp(-1)

    def split(self, components: int) -> Mixture:
        """The same law by more components: the heaviest one in copies whose weights are as 1 : 2 : ...

        Unequal, because tokens that are equal stay equal in a network that does not count them.

        Raises:
            OptionError: the mixture has more components than that.
        """
        extra = components - self.components
        if extra < 0:
            raise OptionError(
                f"the mixture has {self.components} components, the network was trained on {components}: merge some, "
                "or train with more"
            )
        if not extra:
            return self
        top = self.weights.argmax(-1, keepdim=True)
        share = torch.arange(1, extra + 2, dtype=self.weights.dtype, device=self.weights.device)
        parts = self.weights.gather(-1, top) * share / share.sum()
        weights = torch.cat([self.weights.scatter(-1, top, parts[..., :1]), parts[..., 1:]], -1)
        index = top[..., None].expand(*self.batch_shape, extra, self.dim)
        means = torch.cat([self.means, self.means.gather(-2, index)], -2)
        index = top[..., None, None].expand(*self.batch_shape, extra, self.dim, self.dim)
        return Mixture(weights, means, torch.cat([self.scale_tril, self.scale_tril.gather(-3, index)], -3))

    def widened(self, factor: float) -> Mixture:
        """Every component with its standard deviations times a factor."""
        return Mixture(self.weights, self.means, self.scale_tril * factor)

    @staticmethod
    def joined(shares: Sequence[float], mixtures: Sequence[Mixture]) -> Mixture:
        """The mixture of mixtures, with shares that sum to one."""
        return Mixture(
            torch.cat([s * m.weights for s, m in zip(shares, mixtures, strict=True)], -1),
            torch.cat([m.means for m in mixtures], -2),
            torch.cat([m.scale_tril for m in mixtures], -3),
        )

    def defended(self, prior: Mixture) -> Mixture:
        """Nine parts of this posterior, half a part of its widened form, half a part of the prior: to draw from.

        Weights of its draws stay bounded where the likelihood is, however thin the tails of the posterior.

        Source: defensive mixtures, Hesterberg (1995) [inferred].
        """
        return Mixture.joined(DEFENCE, (self, self.widened(WIDER), prior))

    def refined(self, z: Tensor, weights: Tensor) -> Mixture:
        """One step of weighted EM: the mixture that fits weighted draws best, from this one's responsibilities.

        A component on which fewer than 2 (dim + 1) draws lie keeps its place and form.

        Args:
            z: (draws, *batch, dim).
            weights: (draws, *batch), of sum one over the draws.

        Source: Cappe et al. (2008), population Monte Carlo with mixtures [inferred].
        """
        shared = torch.softmax(self.component_log_prob(z), -1) * weights[..., None]
        mass = shared.sum(0)
        part = shared / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        means = (part[..., None] * z[..., None, :]).sum(0)
        gap = z[..., None, :] - means
        spread = torch.einsum("d...k,d...ki,d...kj->...kij", part, gap, gap)
        root, info = torch.linalg.cholesky_ex(spread)
        enough = (1 / part.square().sum(0).clamp(min=1e-30) >= 2 * (self.dim + 1)) & (info == 0) & (mass > 1e-12)
        return Mixture(
            (mass + 1e-12) / (mass + 1e-12).sum(-1, keepdim=True),
            torch.where(enough[..., None], means, self.means),
            torch.where(enough[..., None, None], root, self.scale_tril),
        )

    # As one vector ---------------------------------------------------------------------------------------------------

    def packed(self) -> Tensor:
        """Weights, means and lower triangles as vectors (*batch, `packed_size`)."""
        row, column = torch.tril_indices(self.dim, self.dim)
        parts = (self.weights, self.means.flatten(-2), self.scale_tril[..., row, column].flatten(-2))
        return torch.cat(parts, -1)

    @staticmethod
    def packed_size(components: int, dim: int) -> int:
        """Length of `packed`."""
        return components * (1 + dim + dim * (dim + 1) // 2)

    @staticmethod
    def unpacked(vector: Tensor, components: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `packed`, unchecked: weights, means, scale_tril."""
        lower = dim * (dim + 1) // 2
        weights, means, entries = vector.split([components, components * dim, components * lower], -1)
        lead = vector.shape[:-1]
        row, column = torch.tril_indices(dim, dim)
        root = vector.new_zeros(*lead, components, dim, dim)
        root[..., row, column] = entries.reshape(*lead, components, lower)
        return weights, means.reshape(*lead, components, dim), root


def gaussian_parts(distribution: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weights (k,), means (k, n) and covariances (k, n, n) of a Gaussian or a mixture; None for anything else."""
    if isinstance(distribution, Mixture):
        return distribution.weights, distribution.means, distribution.covariances
    whole = distribution
    base = unwrap(distribution)
    if isinstance(base, torch.distributions.MixtureSameFamily) and not base.batch_shape:
        inner = _gaussian(base.component_distribution, 1)
        return None if inner is None else (base.mixture_distribution.probs, *inner)
    named: list[Any] = [getattr(base, n, None) for n in ("weights", "means", "covariances")]
    if all(isinstance(v, Tensor) for v in named):
        weights, means, spread = named
        k = len(weights)
        means = means.reshape(k, -1)
        n = means.shape[1]
        if spread.shape == (k,) or spread.ndim == 0:
            spread = torch.eye(n, dtype=means.dtype, device=means.device) * spread.expand(k)[:, None, None]
        elif spread.numel() == k * n and spread.shape != (k, n, n):
            spread = torch.diag_embed(spread.reshape(k, n))
        return weights, means, spread.reshape(k, n, n)
    one = _gaussian(whole, 0)
    return None if one is None else (one[0].new_ones(1), one[0][None], one[1][None])


def _gaussian(distribution: Any, lead: int) -> tuple[Tensor, Tensor] | None:
    """Mean (*lead, n) and covariance (*lead, n, n) of a Gaussian of any shape; the first `lead` axes are kept."""
    base = unwrap(distribution)
    shape = (*distribution.batch_shape, *distribution.event_shape)
    kept, n = shape[:lead], math.prod(shape[lead:])
    if isinstance(base, torch.distributions.Normal):
        mean, sd = (v.expand(shape).reshape(*kept, n) for v in (base.loc, base.scale))
        return mean, torch.diag_embed(sd.square())
    if isinstance(base, torch.distributions.MultivariateNormal):
        d = base.event_shape[0]
        mean = base.loc.expand(shape).reshape(*kept, n // d, d)
        spread = base.covariance_matrix.expand(*shape, d).reshape(*kept, n // d, d, d)
        if n == d:
            return mean.reshape(*kept, n), spread.reshape(*kept, n, n)
        if not lead:
            return mean.reshape(n), torch.block_diag(*spread)
    return None

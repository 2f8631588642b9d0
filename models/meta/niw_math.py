"""Normal-Inverse-Wishart algebra, and its per-coordinate relaxation, in closed form.

mu | Sigma ~ N(m, Sigma / l),   Sigma ~ InverseWishart(n, V),   E[Sigma^-1] = n V^-1,   E[Sigma] = V / (n - d - 1)
relaxed:  mu_j | s_j ~ N(m_j, s_j / l),   1 / s_j ~ Gamma(n / 2, V_j / 2)   for each coordinate j
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = [
    "GlobalLaw",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "expected_log_det",
    "kl_inverse_gamma",
    "kl_inverse_wishart",
    "multivariate_digamma",
]


def multivariate_digamma(a: Tensor, dim: int) -> Tensor:
    """psi_d(a) = sum_{j < d} digamma(a - j / 2), the derivative of log Gamma_d.

    Example:
        >>> a = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        >>> torch.special.multigammaln(a, 3).backward()
        >>> bool(torch.isclose(multivariate_digamma(a, 3), a.grad))
        True
    """
    return torch.digamma(a[..., None] - 0.5 * torch.arange(dim, dtype=a.dtype, device=a.device)).sum(-1)


def expected_log_det(df: Tensor, scale: Tensor) -> Tensor:
    """E log |Sigma| for Sigma ~ InverseWishart(df, scale): log |V| - d log 2 - psi_d(n / 2)."""
    d = scale.shape[-1]
    return torch.logdet(scale) - d * math.log(2) - multivariate_digamma(df / 2, d)


def kl_inverse_wishart(df: Tensor, scale: Tensor, other_df: Tensor, other_scale: Tensor) -> Tensor:
    """KL( IW(n, V) || IW(nu, Psi) ).

    nu/2 (log|V| - log|Psi|) + log Gamma_d(nu/2) - log Gamma_d(n/2) + (n - nu)/2 psi_d(n/2) + n/2 (tr(Psi V^-1) - d)

    Args:
        df: n, 0-d.
        scale: V, (d, d).
        other_df: nu, 0-d.
        other_scale: Psi, (d, d).

    Source: [derived]

    Example:
        >>> eye = torch.eye(2)
        >>> kl_inverse_wishart(torch.tensor(5.0), eye, torch.tensor(5.0), eye)
        tensor(0.)
    """
    d = scale.shape[-1]
    gamma = torch.special.multigammaln
    return (
        other_df / 2 * (torch.logdet(scale) - torch.logdet(other_scale))
        + gamma(other_df / 2, d)
        - gamma(df / 2, d)
        + (df - other_df) / 2 * multivariate_digamma(df / 2, d)
        + df / 2 * (torch.linalg.solve(scale, other_scale).diagonal().sum() - d)
    )


def kl_inverse_gamma(df: Tensor, scale: Tensor, other_df: Tensor, other_scale: Tensor) -> Tensor:
    """(d,) KL of InverseGamma(n/2, V_j/2) from InverseGamma(nu/2, Psi_j/2): `kl_inverse_wishart` with d = 1.

    Source: [derived]
    """
    return (
        other_df / 2 * (scale.log() - other_scale.log())
        + torch.lgamma(other_df / 2)
        - torch.lgamma(df / 2)
        + (df - other_df) / 2 * torch.digamma(df / 2)
        + df / 2 * (other_scale / scale - 1)
    )


@dataclass(frozen=True, eq=False)
class GlobalLaw(ABC):
    """The law of mu and Sigma, a prior or a variational posterior; its numbers may carry gradients.

    Args:
        mean: (d,) m.
        count: l, pseudo-episodes that the mean is worth.
        df: n, degrees of freedom.
        scale: V: (d, d), or (d,) where coordinates are independent.
    """

    mean: Tensor
    count: Tensor
    df: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        mean = self.mean
        if not isinstance(mean, Tensor) or not mean.is_floating_point() or mean.ndim != 1 or not len(mean):
            raise ShapeError(f"mean is a floating vector (d,), one number for each coordinate of theta, got {mean!r}")
        if not bool(torch.isfinite(mean).all()):
            raise OptionError(f"mean has {int((~torch.isfinite(mean)).sum())} coordinates that are not finite")
        for name in ("count", "df", "scale"):
            value = torch.as_tensor(getattr(self, name), dtype=mean.dtype, device=mean.device)
            object.__setattr__(self, name, value)
        if not (bool(torch.isfinite(self.count)) and float(self.count) > 0):
            raise OptionError(f"count (lambda_0) is a number of pseudo-episodes and must be positive, got {self.count}")
        self._check()

    @classmethod
    def around(cls, mean: Tensor, count: float, df: float, variance: float) -> Self:
        """The law about a mean whose expected precision is 1 / variance for every coordinate.

        Args:
            mean: (d,), such as `network.start`.
            count: l, pseudo-episodes that the mean is worth.
            df: n, pseudo-episodes that the variance is worth; above d - 1 for the full law.
            variance: of a coordinate of theta between episodes.
        """
        one = cls._unit(mean)
        return cls(mean, mean.new_tensor(count), mean.new_tensor(df), df * variance * one)

    @property
    def dim(self) -> int:
        """Number of coordinates of theta."""
        return len(self.mean)

    def replaced(self, mean: Tensor, count: Tensor, df: Tensor, scale: Tensor) -> Self:
        """A law of this kind with other numbers, unchecked: they are right by construction."""
        law = object.__new__(type(self))
        for name, value in (("mean", mean), ("count", count), ("df", df), ("scale", scale)):
            object.__setattr__(law, name, value)
        return law

    @abstractmethod
    def _check(self) -> None:
        """Raise for numbers that this kind cannot have."""

    @staticmethod
    @abstractmethod
    def _unit(mean: Tensor) -> Tensor:
        """The scale whose coordinates are independent and one."""

    @abstractmethod
    def precision(self) -> Tensor:
        """E[Sigma^-1]: (d, d), or (d,) where coordinates are independent."""

    @abstractmethod
    def expected_kl(self, mean: Tensor, covariance: Tensor, log_det: Tensor) -> Tensor:
        """E KL(N(m_i, V_i) || N(mu, Sigma)): means (b, d), V_i (b, d, d) or its diagonal (b, d), log |V_i| -> (b,)."""

    @abstractmethod
    def kl(self, prior: GlobalLaw) -> Tensor:
        """KL of this law from another of its kind, 0-d."""

    @abstractmethod
    def mode(self) -> tuple[Tensor, Tensor]:
        """mu and Sigma at the joint mode."""

    @abstractmethod
    def predictive(self) -> dist.TorchDistribution:
        """The law of theta of a new episode: Student's t."""

    @abstractmethod
    def updated(self, total: float, mean: Tensor, scatter: Tensor) -> Self:
        """This law after `total` vectors theta_i of which mean and scatter are known; see `NormalInverseWishart`."""

    @abstractmethod
    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws of mu (draws, d) and of Sigma^-1, (draws, d, d) or its diagonal (draws, d)."""


@dataclass(frozen=True, eq=False)
class NormalInverseWishart(GlobalLaw):
    """The full law: Sigma has all correlations; for few coordinates.

    Args:
        mean: (d,) m.
        count: l, pseudo-episodes that the mean is worth.
        df: n, degrees of freedom; above d - 1.
        scale: (d, d) V, positive definite.

    Raises:
        OptionError: a number is out of range; too few degrees of freedom name the relaxation.
        ShapeError: shapes do not fit.

    Example:
        >>> law = NormalInverseWishart(torch.tensor([0.5, -1.0]), 3.0, 7.0, torch.diag(torch.tensor([2.0, 3.0])))
        >>> other = torch.diag(torch.tensor([0.3, 0.7]))
        >>> law.expected_kl(torch.tensor([[1.0, 0.0]]), other[None], other.logdet()[None])
        tensor([2.2493])
    """

    def _check(self) -> None:
        d = self.dim
        if self.scale.shape != (d, d):
            raise ShapeError(f"scale must be ({d}, {d}) for a mean of {d} coordinates, got {tuple(self.scale.shape)}")
        if not float(self.df) > d - 1:
            raise OptionError(
                f"df is {float(self.df):g}, but an inverse Wishart of {d} coordinates needs more than {d - 1}; raise "
                "df, or use NormalInverseGamma, the per-coordinate relaxation that networks need and that holds for "
                "every df above 0"
            )
        if not bool(torch.isfinite(self.df) & torch.isfinite(self.scale).all()):
            wrong = int((~torch.isfinite(self.scale)).sum())
            raise OptionError(
                f"df and scale must be finite, got df {float(self.df):g} and a scale with {wrong} values that are not"
            )
        symmetric = torch.allclose(self.scale, self.scale.mT, rtol=1e-4, atol=1e-6 * float(self.scale.abs().max()))
        if not symmetric or int(torch.linalg.cholesky_ex(self.scale.detach()).info):
            raise OptionError("scale must be symmetric and positive definite; give a covariance matrix times df")

    @staticmethod
    def _unit(mean: Tensor) -> Tensor:
        return torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def precision(self) -> Tensor:
        """See `GlobalLaw`."""
        return self.df * torch.cholesky_inverse(torch.linalg.cholesky(self.scale))

    def expected_kl(self, mean: Tensor, covariance: Tensor, log_det: Tensor) -> Tensor:
        """See `GlobalLaw`. Source: [derived], checked by Monte Carlo."""
        d, precision = self.dim, self.precision()
        off = mean - self.mean
        return 0.5 * (
            expected_log_det(self.df, self.scale)
            - log_det
            + (precision * covariance).sum((-2, -1))
            + ((off @ precision) * off).sum(-1)
            + d / self.count
            - d
        )

    def kl(self, prior: GlobalLaw) -> Tensor:
        """See `GlobalLaw`. Source: [derived]."""
        d, off = self.dim, self.mean - prior.mean
        ratio = prior.count / self.count
        normal = d * ratio - d - d * ratio.log() + prior.count * (off @ self.precision() @ off)
        return 0.5 * normal + kl_inverse_wishart(self.df, self.scale, prior.df, prior.scale)

    def mode(self) -> tuple[Tensor, Tensor]:
        """See `GlobalLaw`: m and V / (n + d + 2). Source: [derived]."""
        return self.mean, self.scale / (self.df + self.dim + 2)

    def predictive(self) -> dist.TorchDistribution:
        """See `GlobalLaw`: t with n - d + 1 degrees of freedom, V (l + 1) / (l (n - d + 1)). Source: [derived]."""
        freedom = self.df - self.dim + 1
        root = torch.linalg.cholesky(self.scale * (self.count + 1) / (self.count * freedom))
        return dist.MultivariateStudentT(freedom, self.mean, root)

    def updated(self, total: float, mean: Tensor, scatter: Tensor) -> NormalInverseWishart:
        """The law after `total` vectors theta_i with uncertainty.

        l' = l + N,  n' = n + N,  m' = (l m + N mean) / l',  V' = V + l (m' - m)(m' - m)' + sum_i E(theta_i - m')(..)'

        Args:
            total: N, how many.
            mean: (d,) their average.
            scatter: average of V_i + m_i m_i' over them, (d, d), or its diagonal (d,) for the relaxation.

        Source: [derived]
        """
        count = self.count + total
        new = (self.count * self.mean + total * mean) / count
        # Scatter about the new mean, from moments about zero.
        cross = torch.outer(mean, new)
        about = scatter - cross - cross.mT + torch.outer(new, new)
        scale = self.scale + self.count * torch.outer(new - self.mean, new - self.mean) + total * about
        return self.replaced(new, count, self.df + total, 0.5 * (scale + scale.mT))

    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `GlobalLaw`; Bartlett's decomposition."""
        d = self.dim
        diagonal, lower = bartlett(self, draws, generator)
        a = torch.diag_embed(diagonal.sqrt())
        rows, columns = torch.tril_indices(d, d, -1)
        a[:, rows, columns] = lower
        root = precision_root(self.scale) @ a  # precision = root root'
        noise = torch.randn(draws, d, 1, generator=generator, dtype=root.dtype, device=root.device)
        mu = self.mean + torch.linalg.solve_triangular(root.mT, noise, upper=True)[..., 0] / self.count.sqrt()
        return mu, root @ root.mT


@dataclass(frozen=True, eq=False)
class NormalInverseGamma(GlobalLaw):
    """The relaxation: every coordinate of theta has a mean and a variance of its own; any df above 0, any dimension.

    Args:
        mean: (d,) m.
        count: l, pseudo-episodes that the mean is worth.
        df: n, twice the shape of the gamma law of the precision.
        scale: (d,) V, positive; or one number for all coordinates.

    Raises:
        OptionError: a number is out of range.
        ShapeError: shapes do not fit.

    Example:
        >>> law = NormalInverseGamma(torch.zeros(1000), 0.1, 3.0, torch.ones(1000))
        >>> law.precision()[0], law.predictive().event_shape
        (tensor(3.), torch.Size([1000]))
    """

    def _check(self) -> None:
        scale = self.scale
        if scale.ndim == 0:
            scale = scale.expand(self.dim).clone()
        object.__setattr__(self, "scale", scale)
        if scale.shape != self.mean.shape:
            raise ShapeError(f"scale must be ({self.dim},), one number for each coordinate, got {tuple(scale.shape)}")
        if not (bool(torch.isfinite(self.df)) and float(self.df) > 0):
            raise OptionError(f"df must be positive and finite, got {self.df}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise OptionError(f"scale must be positive and finite, got a smallest value of {float(scale.min()):g}")

    @staticmethod
    def _unit(mean: Tensor) -> Tensor:
        return torch.ones_like(mean)

    def precision(self) -> Tensor:
        """See `GlobalLaw`."""
        return self.df / self.scale

    def expected_kl(self, mean: Tensor, covariance: Tensor, log_det: Tensor) -> Tensor:
        """See `GlobalLaw`; V_i may be full, its diagonal is what counts. Source: [derived]."""
        log_variance = (self.scale.log() - math.log(2) - torch.digamma(self.df / 2)).sum()
        if covariance.ndim > mean.ndim:
            covariance = covariance.diagonal(dim1=-2, dim2=-1)
        square = ((covariance + (mean - self.mean).square()) * self.precision()).sum(-1)
        return 0.5 * (log_variance - log_det + square + self.dim / self.count - self.dim)

    def kl(self, prior: GlobalLaw) -> Tensor:
        """See `GlobalLaw`. Source: [derived]."""
        ratio = prior.count / self.count
        square = (prior.count * self.precision() * (self.mean - prior.mean).square()).sum()
        normal = self.dim * (ratio - 1 - ratio.log()) + square
        return 0.5 * normal + kl_inverse_gamma(self.df, self.scale, prior.df, prior.scale).sum()

    def mode(self) -> tuple[Tensor, Tensor]:
        """See `GlobalLaw`: m and V / (n + 3). Source: [derived]."""
        return self.mean, self.scale / (self.df + 3)

    def predictive(self) -> dist.TorchDistribution:
        """See `GlobalLaw`: for each coordinate t with n degrees of freedom, V (l + 1) / (l n). Source: [derived]."""
        spread = (self.scale * (self.count + 1) / (self.count * self.df)).sqrt()
        return dist.StudentT(self.df.expand(self.dim), self.mean, spread).to_event(1)

    def updated(self, total: float, mean: Tensor, scatter: Tensor) -> NormalInverseGamma:
        """See `NormalInverseWishart.updated`; scatter is the diagonal (d,)."""
        count = self.count + total
        new = (self.count * self.mean + total * mean) / count
        about = scatter - 2 * mean * new + new.square()
        scale = self.scale + self.count * (new - self.mean).square() + total * about
        return self.replaced(new, count, self.df + total, scale)

    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `GlobalLaw`."""
        shape = (self.df / 2).expand(draws, self.dim).contiguous()
        precision = torch._standard_gamma(shape, generator=generator) * 2 / self.scale
        noise = torch.randn(draws, self.dim, generator=generator, dtype=shape.dtype, device=shape.device)
        return self.mean + noise / (self.count * precision).sqrt(), precision


def bartlett(law: NormalInverseWishart, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws of the squared diagonal (draws, d) and of what is below it (draws, d (d - 1) / 2), see `precision_root`."""
    d = law.dim
    shape = (law.df - torch.arange(d, dtype=law.mean.dtype, device=law.mean.device)) / 2
    diagonal = 2 * torch._standard_gamma(shape.expand(draws, d).contiguous(), generator=generator)
    lower = torch.randn(draws, d * (d - 1) // 2, generator=generator, dtype=shape.dtype, device=shape.device)
    return diagonal, lower


def precision_root(scale: Tensor) -> Tensor:
    """Lower triangular C with C C' = scale^-1: Sigma^-1 = C A A' C' is Wishart(n, V^-1) for Bartlett's A."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(scale)))

"""A normal with any covariance: z = loc + L eps, L = diag(s) (I + strictly lower)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.vi.guides.guide import LOG_2PI, Params, check_init_scale, detached, standard_normal

__all__ = ["FullRank"]


@dataclass(frozen=True)
class FullRank:
    """q(z) = N(loc, L L') with L lower triangular and a positive diagonal; exact for a Gaussian posterior.

    The scales are a factor of their own, so that one step of the optimiser moves correlations as far as the
    coordinates' units let it.

    Args:
        init_scale: standard deviation at the start, without correlation.

    Example:
        >>> guide, generator = FullRank(), torch.Generator().manual_seed(0)
        >>> params = guide.init(3, torch.float64, torch.device("cpu"), generator)
        >>> z, log_q = guide.rsample_and_log_prob(params, guide.noise(5, 3, torch.float64, generator))
        >>> z.shape, torch.allclose(log_q, guide.log_prob(params, z))
        (torch.Size([5, 3]), True)
    """

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        check_init_scale(self.init_scale)

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Centre zero, all scales equal, no correlation."""
        return {
            "loc": torch.zeros(dim, dtype=dtype, device=device),
            "log_scale": torch.full((dim,), self.init_scale, dtype=dtype, device=device).log(),
            "lower": torch.zeros(dim, dim, dtype=dtype, device=device),
        }

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        mixed = noise + noise @ params["lower"].tril(-1).mT
        z = params["loc"] + params["log_scale"].exp() * mixed
        return z, self.log_prob(detached(params) if path else params, z)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        u = (z - params["loc"]) * (-params["log_scale"]).exp()
        u = torch.linalg.solve_triangular(params["lower"].mT, u, upper=True, left=False, unitriangular=True)
        return -0.5 * u.square().sum(1) - params["log_scale"].sum() - 0.5 * z.shape[1] * LOG_2PI

    def covariance(self, params: Params) -> Tensor:
        """(dim, dim) covariance L L'."""
        factor = params["lower"].tril(-1) + torch.eye(len(params["loc"])).to(params["loc"])
        factor = params["log_scale"].exp()[:, None] * factor
        return factor @ factor.mT

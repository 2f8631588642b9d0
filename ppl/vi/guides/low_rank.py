"""A normal whose covariance is a diagonal plus a few directions: Sigma = S (I + W W') S, S = diag(s)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.vi.guides.guide import LOG_2PI, Params, check_init_scale, detached, standard_normal

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank:
    """q(z) = N(loc, S (I + W W') S) with W of shape (dim, rank); memory and time are linear in dim.

    Exact for a Gaussian posterior whose covariance is a diagonal plus a matrix of that rank.

    Args:
        rank: number of directions; capped at dim.
        init_scale: standard deviation at the start.

    Source: Ong, Nott & Smith (2018), section 3 [inferred]; log density by Woodbury's identity [derived].

    Example:
        >>> guide, generator = LowRank(2), torch.Generator().manual_seed(0)
        >>> params = guide.init(3, torch.float64, torch.device("cpu"), generator)
        >>> z, log_q = guide.rsample_and_log_prob(params, guide.noise(5, 3, torch.float64, generator))
        >>> z.shape, torch.allclose(log_q, guide.log_prob(params, z))
        (torch.Size([5, 3]), True)
    """

    rank: int = 8
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        check_init_scale(self.init_scale)
        if self.rank < 1:
            raise OptionError(f"rank must be one or more, got {self.rank}; without directions use MeanField()")

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Centre zero, equal scales, small random directions (zero ones would have no gradient)."""
        rank = min(self.rank, dim)
        return {
            "loc": torch.zeros(dim, dtype=dtype, device=device),
            "log_scale": torch.full((dim,), self.init_scale, dtype=dtype, device=device).log(),
            "factor": 0.1 * standard_normal(dim, rank, dtype, generator).to(device) / rank**0.5,
        }

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim + rank) standard normal."""
        return standard_normal(lanes, dim + min(self.rank, dim), dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        dim = len(params["loc"])
        mixed = noise[:, :dim] + noise[:, dim:] @ params["factor"].mT
        z = params["loc"] + params["log_scale"].exp() * mixed
        return z, self.log_prob(detached(params) if path else params, z)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        u = (z - params["loc"]) * (-params["log_scale"]).exp()
        factor = params["factor"]
        capacity = factor.mT @ factor + torch.eye(factor.shape[1], dtype=z.dtype, device=z.device)
        root = torch.linalg.cholesky(capacity)
        inside = torch.linalg.solve_triangular(root, (u @ factor).mT, upper=False)
        log_det = params["log_scale"].sum() + root.diagonal().log().sum()
        return -0.5 * (u.square().sum(1) - inside.square().sum(0)) - log_det - 0.5 * z.shape[1] * LOG_2PI

    def covariance(self, params: Params) -> Tensor:
        """(dim, dim) covariance."""
        scale, factor = params["log_scale"].exp(), params["factor"]
        inner = torch.eye(len(scale), dtype=scale.dtype, device=scale.device) + factor @ factor.mT
        return scale[:, None] * inner * scale

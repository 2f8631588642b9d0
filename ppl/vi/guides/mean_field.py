"""Independent normals: z_i = loc_i + s_i eps_i."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.vi.guides.guide import LOG_2PI, Params, check_init_scale, detached, standard_normal

__all__ = ["MeanField"]


@dataclass(frozen=True)
class MeanField:
    """q(z) = prod_i N(z_i; loc_i, s_i^2).

    At its optimum for a Gaussian posterior with precision matrix Lambda it has the right mean and the variances
    1 / Lambda_ii, which are too small wherever coordinates are correlated.

    Args:
        init_scale: standard deviation at the start.

    Source: Kucukelbir et al. (2017), section 2 [inferred]; the variances are [derived].

    Example:
        >>> guide, generator = MeanField(), torch.Generator().manual_seed(0)
        >>> params = guide.init(3, torch.float64, torch.device("cpu"), generator)
        >>> z, log_q = guide.rsample_and_log_prob(params, guide.noise(5, 3, torch.float64, generator))
        >>> z.shape, torch.allclose(log_q, guide.log_prob(params, z))
        (torch.Size([5, 3]), True)
    """

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        check_init_scale(self.init_scale)

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Centre zero, all scales equal."""
        log_scale = torch.full((dim,), self.init_scale, dtype=dtype, device=device).log()
        return {"loc": torch.zeros(dim, dtype=dtype, device=device), "log_scale": log_scale}

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        z = params["loc"] + params["log_scale"].exp() * noise
        return z, self.log_prob(detached(params) if path else params, z)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        return self.log_prob_each(params, z).sum(1)

    def log_prob_each(self, params: Params, z: Tensor) -> Tensor:
        """Log density of each coordinate, (lanes, dim) -> (lanes, dim)."""
        u = (z - params["loc"]) * (-params["log_scale"]).exp()
        return -0.5 * u.square() - params["log_scale"] - 0.5 * LOG_2PI

r"""A normal with any covariance: z = loc + L eps, L = diag(s) (I + strictly lower).

Its natural gradient, in coordinates where q is standard, w = L' grad log p(z) + eps and r the learning rate:

    S = E[(w eps' + eps w') / 2],   Cov <- L (I - r S)^{-1} L',   loc <- loc + r L (I - r S)^{-1} E[w]

For log p quadratic with precision H, S = I - L' H L and E[w] vanish together at the posterior, draw by draw, and the
way there is the same in all linear coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    natural_limit: ClassVar[int] = 256  # dimensions up to which a factorisation at every step is cheap

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

    def natural_step(
        self, params: Params, noise: Tensor, gradient: Tensor, rate: float, trust: float = 1.0
    ) -> dict[str, Tensor]:
        """Parameters after one step of the natural gradient.

        Args:
            params: the parameters that made the draws.
            noise: (lanes, dim) noise of the draws.
            gradient: (lanes, dim) gradient of log p at the draws.
            rate: learning rate, below 1.
            trust: bound on what the noise of one step may do to the logarithm of the covariance (Frobenius norm).

        Source: Khan & Nielsen (2018) for the rule [inferred]; in these coordinates, and its bounds [derived].
        """
        scale = params["log_scale"].exp()
        lower = params["lower"].tril(-1)
        factor = scale[:, None] * (lower + torch.eye(len(scale)).to(scale))
        w = gradient @ factor + noise
        mean = w.mean(0)
        lanes = len(noise)
        centred = noise - noise.mean(0) if lanes > 1 else noise
        w = w - mean if lanes > 1 else w
        slope = w.mT @ centred / max(lanes - 1, 1)
        # Few draws in many dimensions see a slope that is mostly noise. Its standard error, all entries together, is
        # what a step adds to the logarithm of the covariance by chance: at most `trust`.
        each = (w.square().sum(1) * centred.square().sum(1)).mean()
        error = ((each - slope.square().sum()).clamp_min(0) / max(lanes - 1, 1)).sqrt()
        rate = min(rate, trust / float(error.clamp_min(torch.finfo(error.dtype).tiny)))
        values, vectors = torch.linalg.eigh((slope + slope.mT) / 2)
        # Far from the posterior a step may be asked to do anything: a variance moves by at most a factor of two, and
        # the centre by at most about one standard deviation in each direction.
        precision = (1 - rate * values).clamp(0.5, 2.0)
        move = vectors @ ((vectors.mT @ (rate * mean)) / precision)
        move = move * (len(move) ** 0.5 / move.norm().clamp_min(torch.finfo(move.dtype).tiny)).clamp_max(1.0)
        new = factor @ torch.linalg.cholesky((vectors / precision) @ vectors.mT)
        diagonal = new.diagonal()
        return {
            "loc": params["loc"] + factor @ move,
            "log_scale": diagonal.log(),
            "lower": (new / diagonal[:, None]).tril(-1),
        }

    def covariance(self, params: Params) -> Tensor:
        """(dim, dim) covariance L L'."""
        factor = params["lower"].tril(-1) + torch.eye(len(params["loc"])).to(params["loc"])
        factor = params["log_scale"].exp()[:, None] * factor
        return factor @ factor.mT

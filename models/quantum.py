"""A parameter of a two-level quantum system from ten measurements, with the exact posterior on a grid.

H = delta sigma_x + (1 - delta) sigma_z,  psi(t) = exp(-i t H) psi_0,  z ~ Bernoulli(|psi_0-component of psi(t)|^2)

psi_0 = (c, s) is prepared and t is kept with errors. Both are integrated out: with r^2 = delta^2 + (1 - delta)^2,

P(z = 1) = E[c^2] (1 + C) / 2 + E[((1 - delta) c + delta s)^2] (1 - C) / (2 r^2),   C = cos(2 r t) exp(-2 r^2 sd_t^2)
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.conjugate import gamma_parameters
from ppl.program import Program

__all__ = ["grid_posterior", "log_joint", "success_probability", "two_level_system"]

# Mean of the prepared state and time of each measurement: Whittle et al. (2025), code [read].
STATES = ((1.0, 0.0),) * 5 + ((0.0, 1.0),) * 2 + ((1.0, 1.0),) * 3
TIMES = (1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 1.0, 2.0, 3.0)
STATE_SD, TIME_SD = 0.1, 0.05
NODES = 40


def success_probability(delta: Tensor) -> Tensor:
    """P(z = 1) of each measurement: (*batch,) -> (*batch, 10). [derived]

    Example:
        >>> success_probability(torch.tensor(0.0))[:2]                 # a field along z leaves (1, 0) alone
        tensor([0.9900, 0.9900])
    """
    cc, cs, ss = _state_moments().to(delta).unbind(-1)
    times = torch.tensor(TIMES, dtype=delta.dtype, device=delta.device)
    delta = delta[..., None]
    square = delta.square() + (1 - delta).square()
    swing = torch.cos(2 * square.sqrt() * times) * torch.exp(-2 * square * TIME_SD**2)
    turned = (1 - delta).square() * cc + 2 * delta * (1 - delta) * cs + delta.square() * ss
    return 0.5 * (1 + swing) * cc + 0.5 * (1 - swing) * turned / square


def _state_moments() -> Tensor:
    """E c^2, E c s, E s^2 of each prepared state, (10, 3), by Gauss-Hermite quadrature."""
    import numpy as np

    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
    weight = weights[:, None] * weights / (2 * math.pi)
    rows = []
    for first, second in STATES:
        c, s = torch.broadcast_tensors((first + STATE_SD * nodes)[:, None], second + STATE_SD * nodes)
        norm = c.square() + s.square()
        rows.append(torch.stack([(weight * v / norm).sum() for v in (c.square(), c * s, s.square())]))
    return torch.stack(rows)


def two_level_system() -> Program:
    """delta ~ Beta(a, b) with a and b as data, ten binary measurements.

    Example:
        >>> two_level_system()
        Program(two_levels, latents=['delta'], observed=['a', 'b', 'z'])
    """

    def two_levels(a: Tensor, b: Tensor, z: Tensor) -> None:
        a, b = gamma_parameters(a, b, z)
        delta = pyro.sample("delta", dist.Beta(a, b))
        pyro.sample("z", dist.Bernoulli(success_probability(delta)).to_event(1), obs=z)

    one = torch.tensor(0.7, dtype=torch.float64)
    return Program(two_levels, one, one, torch.zeros(10, dtype=torch.float64), compile="never")


def log_joint(u: Tensor, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """log p(u, z | a, b) of u = logit(delta): u (*lead, batch), a and b (batch,), z (batch, 10) -> (*lead, batch)."""
    log_one, log_zero = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
    norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    chance = success_probability(u.sigmoid())
    likelihood = (z * chance.log() + (1 - z) * (-chance).log1p()).sum(-1)
    return a * log_one + b * log_zero + norm + likelihood


def grid_posterior(a: Tensor, b: Tensor, z: Tensor, points: int = 4001) -> tuple[Tensor, Tensor, Tensor]:
    """The exact posterior of u = logit(delta) on a grid.

    Args:
        a: (batch,) first concentration.
        b: (batch,) second.
        z: (batch, 10) zeros and ones.
        points: of the grid, over [-40, 40].

    Returns:
        grid (points,), log density (batch, points), log p(z) (batch,).

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> grid, log_density, _ = grid_posterior(one, one, torch.zeros(1, 10, dtype=torch.float64))
        >>> round(float(log_density.exp().sum() * (grid[1] - grid[0])), 6)
        1.0
    """
    grid = torch.linspace(-40.0, 40.0, points, dtype=torch.float64)
    joint = log_joint(grid[:, None].expand(points, len(a)), a, b, z).T
    evidence = joint.logsumexp(1) + math.log(float(grid[1] - grid[0]))
    return grid, joint - evidence[:, None], evidence

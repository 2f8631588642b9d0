"""The small network of an amortised posterior: a residual MLP of (x_sigma, y), modulated by the noise level.

h_0 = A x + B c asinh(y / c),   h_{k+1} = h_k + W_k silu(V_k [(1 + a_k) h_k + b_k]),   F = W [(1 + a_K) h_K + b_K]

The gains a, b depend on the level: they are what a Gaussian posterior needs, whose denoiser is linear in (x, y) at
every level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["ResidualMLP", "Shaped"]

FREQUENCIES = 6
EMBEDDING = 32
LINEAR = 5.0  # standard deviations up to which data enter as they are, and beyond which by their logarithm


class ResidualMLP(nn.Module):
    """F(c_in x, ln(sigma) / 4, y), to be preconditioned by `sde.EDMDenoiser`.

    Args:
        dim: entries of x.
        data_dim: entries of y.
        width: hidden units.
        depth: residual blocks.

    Example:
        >>> ResidualMLP(2, 3, 16, 1)(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, data_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.into = nn.Linear(dim + data_dim, width)
        self.embed = nn.Linear(1 + 2 * FREQUENCIES, EMBEDDING)
        self.gains = nn.Linear(EMBEDDING, 2 * width * (depth + 1))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, dim)
        with torch.no_grad():
            # The blocks start as the identity, and the network where the preconditioning puts it: at zero.
            for layer in (*self.second, self.out):
                layer.weight.zero_()
                layer.bias.zero_()

    def forward(self, x: Tensor, level: Tensor, data: Tensor) -> Tensor:
        """The residual of the denoiser.

        Args:
            x: (rows, dim).
            level: (rows,), ln(sigma) / 4.
            data: (rows, data_dim), standardised.

        Returns:
            (rows, dim).
        """
        angles = level[:, None] * (math.pi * torch.arange(1, FREQUENCIES + 1, dtype=level.dtype, device=level.device))
        embedded = nn.functional.silu(self.embed(torch.cat([level[:, None], angles.sin(), angles.cos()], 1)))
        gains = self.gains(embedded).chunk(2 * (len(self.first) + 1), 1)
        # Data of heavy tails would blow up a network that was trained on few of them.
        h = self.into(torch.cat([x, LINEAR * (data / LINEAR).asinh()], 1))
        for k, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            h = h + second(nn.functional.silu(first((1 + gains[2 * k]) * h + gains[2 * k + 1])))
        return self.out((1 + gains[-2]) * h + gains[-1])


class Shaped(nn.Module):
    """A network of arrays as one of vectors.

    Args:
        network: maps (x: (rows, *shape), level: (rows,), y: (rows, *data_shape)) to (rows, *shape).
        shape: of x; a vector is left as it is.
        data_shape: of y.

    Example:
        >>> network = Shaped(lambda x, level, y: x + y, (2, 2), (1, 2))
        >>> network(torch.zeros(3, 4), torch.zeros(3), torch.ones(3, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape, self.data_shape = network, shape, data_shape

    def forward(self, x: Tensor, level: Tensor, data: Tensor) -> Tensor:
        """Vectors in, vectors out."""
        rows = len(x)
        out = self.network(x.reshape(rows, *self.shape), level, data.reshape(rows, *self.data_shape))
        return out.reshape(x.shape)

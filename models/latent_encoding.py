"""What an encoder reads off a batch of series for the posterior of a latent process."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Encoding", "FirstFactors", "SeriesEncoder", "divergence", "moments"]


class Encoding(NamedTuple):
    """What an encoder reads off a batch of series."""

    context: Tensor  # (batch, frames, context), seen by the control
    start: Tensor  # (batch, 2 latent), location and raw scale of X_0 in units of its prior
    content: Tensor | None = None  # (batch, 2 content), likewise for w


class SeriesEncoder(nn.Module):
    """An encoder of series of vectors: a recurrent network from both ends.

    Args:
        observed: numbers in a frame.
        latent: coordinates of X.
        width: units of the network; the context has twice as many.
    """

    def __init__(self, observed: int, latent: int, width: int = 32) -> None:
        super().__init__()
        self.context = 2 * width
        self.recur = nn.GRU(observed, width, batch_first=True, bidirectional=True)
        self.start = nn.Linear(2 * width, 2 * latent)
        nn.init.zeros_(self.start.weight)

    def forward(self, y: Tensor) -> Encoding:
        """Read (batch, frames, observed)."""
        context, _ = self.recur(y)
        return Encoding(context, self.start(context[:, 0]))


class FirstFactors(nn.Module):
    """The posterior of the normal numbers that start the factors of a noise of type I: N(m + S x, L L').

    A full covariance for the factors of each coordinate, and a mean that follows X_0, read off the context of the first
    frame and its mean over all. The standard normal at first.

    Args:
        context: numbers of a frame's context.
        latent: coordinates of X.
        size: factors of each.

    Source: a Gaussian of Y(0) with its own divergence, for type I [derived].

    Example:
        >>> loc, lower = FirstFactors(3, latent=2, size=4)(torch.zeros(5, 6, 3), torch.zeros(5, 2))
        >>> loc.shape, bool((lower == torch.eye(4)).all())
        (torch.Size([5, 2, 4]), True)
    """

    def __init__(self, context: int, latent: int, size: int) -> None:
        super().__init__()
        self.shape = (latent, size)
        self.read = nn.Linear(2 * context, latent * size * (1 + latent + size))
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, context: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
        """m + S x and L from (batch, frames, units) and X_0 in units of its prior, (batch, latent)."""
        latent, size = self.shape
        found = self.read(torch.cat([context[:, 0], context.mean(1)], -1)).unflatten(-1, (latent, size, -1))
        loc, slope, raw = found.split([1, latent, size], -1)
        lower = raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
        return loc[..., 0] + (slope @ white[:, None, :, None])[..., 0], lower

    def draw(self, context: Tensor, white: Tensor, eps: Tensor, pathwise: bool) -> tuple[Tensor, Tensor]:
        """The numbers that eps (batch, latent, size) makes, and their divergence from the standard normal, (batch,).

        With `pathwise` it is log q - log p of the draw, without the gradient in q's own parameters, whose mean is zero.
        """
        loc, lower = self(context, white)
        drawn = loc + (lower @ eps[..., None])[..., 0]
        if not pathwise:
            half = 0.5 * (loc.square().sum((1, 2)) + lower.square().sum((1, 2, 3)) - eps[0].numel())
            return drawn, half - lower.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        if torch.is_grad_enabled():
            held = {n: p.detach() for n, p in self.named_parameters()}
            loc, lower = torch.func.functional_call(self, held, (context.detach(), white))
        own = torch.linalg.solve_triangular(lower, (drawn - loc)[..., None], upper=False)[..., 0]
        log_scale = lower.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        return drawn, 0.5 * (drawn.square() - own.square()).sum((1, 2)) - log_scale


def moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale from what an encoder gives; zeros are the standard normal."""
    loc, scale = raw.chunk(2, -1)
    return loc, softplus(scale + math.log(math.e - 1))


def divergence(raw: Tensor) -> Tensor:
    """KL from the standard normal, (batch,)."""
    loc, scale = moments(raw)
    return (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)

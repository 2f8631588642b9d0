"""What an encoder reads off a batch of series for the posterior of a latent process."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Encoding", "SeriesEncoder", "divergence", "moments"]


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


def moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale from what an encoder gives; zeros are the standard normal."""
    loc, scale = raw.chunk(2, -1)
    return loc, softplus(scale + math.log(math.e - 1))


def divergence(raw: Tensor) -> Tensor:
    """KL from the standard normal, (batch,)."""
    loc, scale = moments(raw)
    return (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)

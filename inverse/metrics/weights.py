"""Weights of draws for the metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.errors import ShapeError
from ppl.weighted import normalise

__all__ = ["draw_weights"]


def draw_weights(draws: Tensor, log_weight: Tensor | None) -> Tensor:
    """(draws,) float64, sum one."""
    if log_weight is None:
        return torch.full((len(draws),), 1 / len(draws), dtype=torch.float64, device=draws.device)
    if log_weight.shape != draws.shape[:1]:
        raise ShapeError(f"log_weight has shape {tuple(log_weight.shape)}, expected {(len(draws),)}")
    return normalise(log_weight).to(draws.device)

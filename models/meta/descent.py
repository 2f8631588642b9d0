"""Training of the peers: one parameter vector, batches of episodes, and a downhill direction for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from models.meta.episodes import Episodes, EpisodeSource, drawn
from models.meta.network import Likelihood, Network, check_fit
from ppl.errors import DataError
from ppl.monitor import Monitor
from ppl.vi.ascent import adam

__all__ = ["Direction", "check_of", "descend", "slope_of"]

Direction = Callable[[Tensor, Episodes, torch.Generator], tuple[Tensor, Tensor]]
"""(theta, episodes, generator) -> loss () and what to go against, (d,)."""


class Schedule(Protocol):
    """Options of a fit."""

    @property
    def steps(self) -> int:
        """Of the whole fit."""
        ...

    @property
    def batch(self) -> int:
        """Episodes for each step."""
        ...

    @property
    def lr(self) -> float:
        """At the start; it falls as a cosine to a hundredth."""
        ...


def descend(
    options: Schedule,
    theta: Tensor,
    direction: Direction,
    episodes: Episodes | EpisodeSource,
    *,
    check: Callable[[Episodes], None],
    generator: torch.Generator | None = None,
    seed: int = 0,
    monitor: Monitor | None = None,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adam, or plain steps, against the directions of batches of episodes.

    Args:
        options: steps, batch and learning rate.
        theta: (d,) where to begin.
        direction: see `Direction`.
        episodes: a set of them with query sets, or an endless source.
        check: called once, with the first batch.
        generator: source of all randomness; made from the seed when None.
        seed: see generator.
        monitor: progress, checkpoints, Ctrl-C; a quiet one when None.
        plain: theta - rate * direction in place of Adam.

    Returns:
        theta at the end, and the losses (steps,).

    Raises:
        DataError: episodes without queries.
        OptionError: neither a set of episodes nor a source of them.
        NotFiniteError: a direction is not finite.
    """
    generator = generator or torch.Generator(theta.device).manual_seed(seed)
    monitor = monitor or Monitor(generator=generator)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    history = torch.full((options.steps,), math.nan, dtype=torch.float64)
    saved, first = monitor.resume(), 0
    if saved is not None:
        first = int(saved["step"])
        theta, m, v, history = (saved[name] for name in ("theta", "m", "v", "history"))
    for step in monitor.steps(options.steps, "fit", start=first):
        batch = drawn(episodes, options.batch, generator)
        if not bool(batch.query.mask.any()):
            raise DataError("training is by query sets, and these episodes have none; split off some points")
        if step == first:
            check(batch)
        history[step], against = direction(theta, batch, generator)
        monitor.check_finite("direction of the common parameters", against, step)
        rate = options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / max(options.steps - 1, 1))))
        if plain:
            theta = theta - rate * against
        else:
            theta, m, v = adam(theta, m, v, step + 1, -against, rate)
        monitor.report(loss=history[step])
        monitor.checkpoint(step + 1, {"theta": theta, "m": m, "v": v, "history": history})
    return theta, history[torch.isfinite(history)]


def slope_of(loss: Callable[[Tensor, Episodes, torch.Generator], Tensor]) -> Direction:
    """The direction of a loss that is differentiable in theta."""

    def direction(theta: Tensor, episodes: Episodes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = theta.detach().requires_grad_()
        value = loss(at, episodes, generator)
        (gradient,) = torch.autograd.grad(value, at)
        return value.detach(), gradient

    return direction


def check_of(network: Network, likelihood: Likelihood) -> Callable[[Episodes], None]:
    """Whether the targets suit the likelihood and the inputs the network."""

    return lambda batch: check_fit(network, likelihood, batch.points)

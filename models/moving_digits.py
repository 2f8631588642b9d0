r"""Videos of a handwritten digit that moves at random through a small frame.

Places are fractional Brownian motion (exact, by Davies and Harte) folded into the frame, so that velocities stay
correlated for long where H is above 1/2; or straight lines with a new random velocity wherever the digit meets an edge.
Digits are drawn between pixels bilinearly.

Source: Stochastic Moving MNIST, Denton and Fergus (2018) [inferred]; smaller here, and fractional motion is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.errors import OptionError
from sde.davies_harte import davies_harte
from sde.fractional import check_hurst, fgn_autocovariance

__all__ = ["bouncing_places", "fractional_places", "moving_digits", "render"]


def fractional_places(
    count: int, frames: int, room: float, generator: torch.Generator, *, hurst: float = 0.8, speed: float = 1.0
) -> Tensor:
    """Places in [0, room]^2 that follow fractional Brownian motion of type I, reflected at the edges.

    Args:
        count: videos.
        frames: of each.
        room: pixels between the edges.
        generator: source of first places and moves.
        hurst: index of the motion.
        speed: standard deviation of a move from one frame to the next, along each axis.

    Returns:
        (count, frames, 2) rows and columns.

    Example:
        >>> places = fractional_places(3, 10, 8.0, torch.Generator().manual_seed(0))
        >>> places.shape, bool(((places >= 0) & (places <= 8)).all())
        (torch.Size([3, 10, 2]), True)
    """
    check_hurst(hurst)
    moves = max(frames - 1, 1)
    autocovariance = fgn_autocovariance(torch.arange(moves + 1, dtype=torch.float64), hurst)
    noise = torch.randn(2, count, 2 * moves, generator=generator, dtype=torch.float64)
    steps = speed * torch.stack(davies_harte(autocovariance, noise), -1)[:, : frames - 1]
    first = room * torch.rand(count, 1, 2, generator=generator, dtype=torch.float64)
    return _folded(torch.cat([first, first + steps.cumsum(1)], 1), room).float()


def bouncing_places(count: int, frames: int, room: float, generator: torch.Generator, *, speed: float = 2.0) -> Tensor:
    """Places in [0, room]^2 on straight lines; at an edge the digit leaves with a new random velocity.

    Args:
        count: videos.
        frames: of each.
        room: pixels between the edges.
        generator: source of first places and velocities.
        speed: largest velocity along an axis, pixels in a frame; each is uniform below it, both ways.

    Returns:
        (count, frames, 2) rows and columns.
    """
    place = room * torch.rand(count, 2, generator=generator)
    velocity = speed * (2 * torch.rand(count, 2, generator=generator) - 1)
    found = [place]
    for _ in range(frames - 1):
        place = place + velocity
        low, high = place < 0, place > room
        fresh = speed * (2 * torch.rand(count, 2, generator=generator) - 1)
        met = (low | high).any(1, keepdim=True)
        # Away from the edge that was met, anything along the other axis.
        fresh = torch.where(low, fresh.abs(), torch.where(high, -fresh.abs(), fresh))
        velocity = torch.where(met, fresh, velocity)
        place = place.clamp(0, room)
        found.append(place)
    return torch.stack(found, 1)


def render(images: Tensor, places: Tensor, size: int) -> Tensor:
    """Images put into empty frames with their upper left corners at places between pixels.

    Args:
        images: (count, window, window).
        places: (count, frames, 2), rows and columns from 0 to size - window.
        size: pixels along an edge of a frame.

    Returns:
        (count, frames, size, size).

    Example:
        >>> render(torch.ones(1, 1, 1), torch.tensor([[[0.0, 1.25]]]), 3)[0, 0]
        tensor([[0.0000, 0.7500, 0.2500],
                [0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    window = images.shape[-1]
    at = places[..., None, None] + torch.arange(window).to(places)  # (count, frames, 2, 1, window)
    pixel = torch.arange(size).to(places)[:, None]
    weights = (1 - (pixel - at).abs()).clamp_min(0)
    return weights[:, :, 0] @ images[:, None] @ weights[:, :, 1].mT


def moving_digits(
    images: Tensor,
    count: int,
    frames: int,
    generator: torch.Generator,
    *,
    motion: str = "fractional",
    hurst: float = 0.8,
    speed: float | None = None,
    size: int = 16,
) -> Tensor:
    """Videos of one digit each.

    Args:
        images: (digits, window, window) to choose from, pixels in [0, 1].
        count: videos.
        frames: of each.
        generator: source of choices and motion.
        motion: "fractional" or "bouncing".
        hurst: index of fractional motion.
        speed: see `fractional_places` and `bouncing_places`; None is 1 and 2 pixels.
        size: pixels along an edge.

    Returns:
        (count, frames, size, size), pixels in [0, 1].

    Raises:
        OptionError: a motion that is not known, or a frame without room to move.

    Example:
        >>> videos = moving_digits(torch.ones(5, 8, 8), 2, 6, torch.Generator().manual_seed(0), motion="bouncing")
        >>> videos.shape, videos.sum((-1, -2)).round().unique().tolist()
        (torch.Size([2, 6, 16, 16]), [64.0])
    """
    room = size - images.shape[-1]
    if room < 1 or frames < 1:
        raise OptionError(
            f"expected frames of more than {images.shape[-1]} pixels and one or more of them, got {size} and {frames}"
        )
    if motion == "fractional":
        places = fractional_places(count, frames, room, generator, hurst=hurst, speed=speed or 1.0)
    elif motion == "bouncing":
        places = bouncing_places(count, frames, room, generator, speed=speed or 2.0)
    else:
        raise OptionError(f"motion must be 'fractional' or 'bouncing', got {motion!r}")
    chosen = torch.randint(len(images), (count,), generator=generator)
    return render(images[chosen], places, size)


def _folded(x: Tensor, room: float) -> Tensor:
    """Reflected at 0 and at room, any number of times."""
    return room - (x.remainder(2 * room) - room).abs()

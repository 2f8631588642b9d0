"""Attend, infer, repeat: a scene is a few objects, each with a place and an appearance, found one after another.

    present_t ~ Bernoulli(p present_{t-1}),   where_t = (scale, x, y),   what_t ~ N(0, I)
    image ~ N(sum_t present_t write(decoder(what_t), where_t), sigma^2)

The guide reads the image, step by step, with a recurrent network: whether there is another object, where it is, and,
from a glimpse at that place, what it looks like. Counting is a discrete latent, so its estimator matters.
Source: Eslami et al. (2016), figure 3 [inferred]; the networks are smaller than theirs.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["AIR", "scenes"]


RARE = 0.03  # least chance of another object and of none: what is never tried is never learned


class AIR(nn.Module):
    """Model and guide, two Pyro programs on one set of networks; both broadcast over axes to the left.

    Args:
        size: pixels along an edge of the image.
        window: pixels along an edge of an object.
        steps: most objects in one image.
        what: numbers that describe an object's appearance.
        hidden: width of the networks.
        more: prior probability of another object.
        sigma: standard deviation of the pixel noise.

    Example:
        >>> import ppl
        >>> images = torch.rand(6, 20, 20)
        >>> air = AIR(size=20, window=8, hidden=16)
        >>> program = ppl.Program(air.model, images, 3)            # minibatches of three
        >>> fitted = ppl.SVI(guide=air.guide, steps=2, particles=1).fit(program)
        >>> fitted.history.shape
        torch.Size([2])
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        size: int = 24,
        window: int = 8,
        steps: int = 3,
        what: int = 10,
        hidden: int = 128,
        more: float = 0.5,
        sigma: float = 0.3,
    ) -> None:
        super().__init__()
        self.size, self.window, self.steps, self.what, self.hidden = size, window, steps, what, hidden
        self.more, self.sigma = more, sigma
        self.decoder = nn.Sequential(nn.Linear(what, hidden), nn.Softplus(), nn.Linear(hidden, window**2), nn.Sigmoid())
        self.glimpse = nn.Sequential(nn.Linear(window**2, hidden), nn.Softplus(), nn.Linear(hidden, 2 * what))
        self.image = nn.Sequential(nn.Linear(size**2, hidden), nn.Softplus(), nn.Linear(hidden, 4 * hidden))
        self.recur = nn.Linear(hidden, 4 * hidden)
        self.seen = nn.Linear(3 + what, 4 * hidden)
        self.head = nn.Linear(hidden, 7)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.decoder[2].bias.sub_(1.0)  # type: ignore[operator]
        self.register_buffer("centre", torch.tensor([size / window, 0.0, 0.0]))
        self.register_buffer("spread", torch.tensor([0.2, 0.4, 0.4]))

    def enumeration(self) -> dict[str, Any]:
        """Estimators, `ppl.SVI(estimators=...)`, that sum over how many objects there are: steps + 1 states.

        Example:
            >>> AIR(steps=2).enumeration()["present_1"].after
            'present_0'
        """
        from ppl.objectives import Enumerate

        before = [None, *(f"present_{t}" for t in range(self.steps - 1))]
        return {f"present_{t}": Enumerate(after=name) for t, name in enumerate(before)}

    # The model -------------------------------------------------------------------------------------------------------

    def model(self, images: Tensor, batch: int | None = None) -> None:
        """Scenes of at most `steps` objects.

        Args:
            images: (images, size, size), pixels in [0, 1].
            batch: images in a minibatch; all without it.
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(images), batch) as rows:
            canvas, present = torch.zeros_like(images[rows]), images.new_ones(())
            for t in range(self.steps):
                present = pyro.sample(f"present_{t}", dist.Bernoulli(self.more * present))
                there = present > 0
                where = pyro.sample(f"where_{t}", dist.Normal(self.centre, self.spread).to_event(1).mask(there))
                what = pyro.sample(f"what_{t}", self.appearance(images).mask(there))
                canvas = canvas + present[..., None, None] * self.write(self.decoder(what), where)
            pyro.sample("image", dist.Normal(canvas, self.sigma).to_event(2), obs=images[rows])

    def appearance(self, like: Tensor) -> Any:
        """The prior of an object's appearance."""
        return dist.Normal(like.new_zeros(self.what), like.new_ones(self.what)).to_event(1)

    # The guide -------------------------------------------------------------------------------------------------------

    def guide(self, images: Tensor, batch: int | None = None) -> None:
        """Objects one after another; see `model` for the arguments."""
        for name in ("glimpse", "image", "recur", "seen", "head"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", len(images), batch) as rows:
            shown = images[rows]
            state = self.start(shown)
            present = images.new_ones(())
            for t in range(self.steps):
                state, chance, where_loc, where_scale = self.attend(state)
                present = pyro.sample(f"present_{t}", dist.Bernoulli(chance * present))
                there = present > 0
                where = pyro.sample(f"where_{t}", dist.Normal(where_loc, where_scale).to_event(1).mask(there))
                loc, scale = self.look(shown, where)
                what = pyro.sample(f"what_{t}", dist.Normal(loc, scale).to_event(1).mask(there))
                state = self.remember(state, where, what)

    def start(self, images: Tensor) -> tuple[Tensor, ...]:
        """State before the first step: what the image says, hidden units, cell, and what the last object says."""
        given = self.image(images.flatten(-2))
        zeros = images.new_zeros(self.hidden)
        return given, zeros, zeros, given.new_zeros(4 * self.hidden)

    def attend(self, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """One step of the LSTM; the chance of another object, and where it is."""
        given, h, cell, last = state
        i, f, g, o = (given + self.recur(h) + last).chunk(4, -1)
        cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(cell)
        out = self.head(h)
        loc = self.centre + self.spread * out[..., 1:4] * 3
        scale = self.spread * nn.functional.softplus(out[..., 4:7])
        chance = RARE + (1 - 2 * RARE) * torch.sigmoid(out[..., 0])
        return (given, h, cell, last), chance, loc, scale

    def look(self, images: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of an object's appearance, from a glimpse at its place."""
        loc, scale = self.glimpse(self.read(images, where).flatten(-2)).chunk(2, -1)
        return loc, nn.functional.softplus(scale)

    def remember(self, state: tuple[Tensor, ...], where: Tensor, what: Tensor) -> tuple[Tensor, ...]:
        """The state with what was found."""
        where, what = (x.expand(*torch.broadcast_shapes(where.shape[:-1], what.shape[:-1]), -1) for x in (where, what))
        return (*state[:3], self.seen(torch.cat([(where - self.centre) / self.spread, what], -1)))

    # Places ----------------------------------------------------------------------------------------------------------

    def write(self, flat: Tensor, where: Tensor) -> Tensor:
        """An object (..., window^2) put into an empty image, bilinearly: (..., size, size)."""
        rows, columns = self._weights(where, to_image=True)
        return rows @ flat.unflatten(-1, (self.window, self.window)) @ columns.mT

    def read(self, images: Tensor, where: Tensor) -> Tensor:
        """The window of an image at a place: (..., window, window)."""
        rows, columns = self._weights(where, to_image=False)
        return rows @ images @ columns.mT

    def _weights(self, where: Tensor, to_image: bool) -> tuple[Tensor, Tensor]:
        """Bilinear weights of rows and columns: (..., out, in) each."""
        near, far = (self.size, self.window) if to_image else (self.window, self.size)
        scale, at = where[..., :1, None], where[..., 1:, None]
        grid = torch.linspace(-1, 1, near, dtype=where.dtype, device=where.device)
        place = scale * (grid - at) if to_image else at + grid / scale  # (..., 2, near) in the coordinates of the other
        pixel = (place + 1) / 2 * (far - 1)
        weights = nn.functional.relu(
            1 - (pixel[..., None] - torch.arange(far, dtype=where.dtype, device=where.device)).abs()
        )
        return weights[..., 1, :, :], weights[..., 0, :, :]


def scenes(
    images: Tensor, count: int, generator: torch.Generator, size: int = 24, most: int = 2
) -> tuple[Tensor, Tensor]:
    """Images with up to `most` objects that do not overlap, and how many each has.

    Args:
        images: (objects, window, window) to choose from, pixels in [0, 1].
        count: scenes.
        generator: source of choices and places.
        size: pixels along an edge.
        most: most objects.

    Raises:
        ValueError: so many objects have no room.

    Example:
        >>> pictures, numbers = scenes(torch.ones(3, 8, 8), 5, torch.Generator().manual_seed(0))
        >>> pictures.shape, bool((pictures.sum((1, 2)) == 64 * numbers).all())
        (torch.Size([5, 24, 24]), True)
    """
    window = images.shape[-1]
    if (size // window) ** 2 < most:
        raise ValueError(f"{most} objects of {window} pixels need a larger image than {size} pixels; raise size=")
    out = images.new_zeros(count, size, size)
    numbers = torch.randint(most + 1, (count,), generator=generator)
    for i, number in enumerate(numbers.tolist()):
        while True:  # all places anew: a first object in the middle may leave no room for a second
            places = torch.randint(size - window + 1, (number, 2), generator=generator).tolist()
            if all(max(abs(x - a), abs(y - b)) >= window for (x, y), (a, b) in combinations(places, 2)):
                break
        chosen = torch.randint(len(images), (number,), generator=generator).tolist()
        for which, (x, y) in zip(chosen, places, strict=True):
            out[i, y : y + window, x : x + window] = images[which]
    return out, numbers

"""Moving digits: the law of the motion, where the digit is drawn, and what bouncing means."""

from __future__ import annotations

import math

import pytest
import torch

from models.moving_digits import bouncing_places, fractional_places, moving_digits, render
from ppl.errors import OptionError


@pytest.mark.parametrize("hurst", [0.3, 0.8])
def test_fractional_motion_has_its_variance(hurst: float) -> None:
    """Without edges in reach, E of the square of a move over n frames is speed^2 n^2H; six standard errors."""
    places = fractional_places(4000, 20, 1e6, torch.Generator().manual_seed(0), hurst=hurst, speed=50.0).double()
    for n in (1, 4, 19):
        move = (places[:, n] - places[:, 0]).flatten()
        ratio = float(move.square().mean()) / (50.0**2 * n ** (2 * hurst))
        assert abs(ratio - 1) < 6 * math.sqrt(2 / len(move))


def test_fractional_motion_stays_in_the_room_and_is_reflected() -> None:
    """Moves are never longer than those without edges, and both edges are met."""
    inside = fractional_places(50, 40, 4.0, torch.Generator().manual_seed(1), speed=2.0)
    assert float(inside.min()) >= 0
    assert float(inside.max()) <= 4
    assert float(inside.min()) < 0.1
    assert float(inside.max()) > 3.9
    one = fractional_places(3, 1, 4.0, torch.Generator().manual_seed(1))
    assert one.shape == (3, 1, 2)


def test_bouncing_keeps_its_velocity_between_edges_and_leaves_them() -> None:
    places = bouncing_places(200, 60, 8.0, torch.Generator().manual_seed(0), speed=1.5).double()
    assert float(places.min()) == 0
    assert float(places.max()) == 8
    velocity = places.diff(dim=1)
    assert float(velocity.abs().max()) <= 1.5 + 1e-5
    edge = ((places == 0) | (places == 8)).any(-1)
    free = ~edge[:, 1:-1]  # frames between two moves that did not meet an edge
    free &= ~edge[:, 2:]  # a move that is cut short by an edge is another one
    same = (velocity[:, 1:] - velocity[:, :-1]).abs().amax(-1) < 1e-5
    assert bool(same[free].all())
    met = edge[:, 1:-1] & ~edge[:, 2:]
    assert float((~same[met]).double().mean()) > 0.95
    after = places[:, 2:][met]
    assert bool(((after > 0) & (after < 8)).all())


def test_a_digit_is_drawn_where_it_is() -> None:
    """The centre of mass moves by as much as the place, also between pixels, and nothing is lost."""
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.tensor([[[0.0, 0.0], [3.25, 7.5], [8.0, 8.0]]], dtype=torch.float64)
    frames = render(image, places, 16)[0]
    torch.testing.assert_close(frames.sum((1, 2)), image.sum().expand(3))
    torch.testing.assert_close(frames[0, :8, :8], image[0])
    at = torch.arange(16, dtype=torch.float64)
    centre = torch.stack([(frames.sum(2) * at).sum(1), (frames.sum(1) * at).sum(1)], 1) / image.sum()
    torch.testing.assert_close(centre - centre[0], places[0])


def test_videos_depend_on_the_generator_alone() -> None:
    images = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    one, same, other = (moving_digits(images, 3, 6, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1


def test_errors_say_what_to_do() -> None:
    images = torch.ones(1, 8, 8)
    with pytest.raises(OptionError, match="more than 8 pixels"):
        moving_digits(images, 1, 4, torch.Generator(), size=8)
    with pytest.raises(OptionError, match="bouncing"):
        moving_digits(images, 1, 4, torch.Generator(), motion="straight")

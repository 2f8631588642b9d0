"""Attend, infer, repeat: places, scenes, and programs that objectives take as they are."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

import ppl
from models.air import AIR, scenes
from ppl.objectives import ELBO, Engine


def test_an_object_is_written_where_it_is_read() -> None:
    """A window of the image's own resolution lands on whole pixels, and is read back as it was."""
    air = AIR(size=21, window=7)
    patch = torch.rand(49, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([20 / 6, 0.4, -0.3])  # 20 and 6 steps between the pixels of image and window
    image = air.write(patch, where)
    x, y = (round(float(10 + 10 * c)) for c in where[1:])
    torch.testing.assert_close(image[y - 3 : y + 4, x - 3 : x + 4], patch.reshape(7, 7), rtol=0, atol=1e-5)
    assert abs(float(image.sum() - patch.sum())) < 1e-4
    torch.testing.assert_close(air.read(image, where), patch.reshape(7, 7), rtol=0, atol=1e-5)


def test_places_broadcast_and_have_gradients() -> None:
    air = AIR(size=12, window=4)
    where = torch.tensor([3.0, 0.1, -0.2]).expand(5, 2, 3).clone().requires_grad_()
    image = air.write(torch.rand(2, 16), where)
    assert image.shape == (5, 2, 12, 12)
    (grad,) = torch.autograd.grad(image.square().sum(), where)
    assert bool((grad.abs().sum((0, 1)) > 0).all())


def test_scenes_hold_what_they_say() -> None:
    """In an image so small that an object in its middle would leave no room for a second."""
    pictures, numbers = scenes(torch.ones(2, 4, 4), 300, torch.Generator().manual_seed(0), size=9)
    assert bool((pictures.sum((1, 2)) == 16 * numbers).all())
    assert float(pictures.max()) == 1.0
    for n in range(3):  # a third each, within four standard errors
        assert abs(float((numbers == n).double().mean()) - 1 / 3) < 4 * math.sqrt(2 / 9 / 300)


def test_scenes_without_room() -> None:
    with pytest.raises(ValueError, match="raise size="):
        scenes(torch.ones(2, 4, 4), 1, torch.Generator(), size=7)


def test_absent_objects_leave_no_trace() -> None:
    """Once an object is absent all later ones are, and what is not there counts for nothing."""
    air = AIR(size=12, window=4, hidden=8)
    images = torch.rand(200, 12, 12, generator=torch.Generator().manual_seed(0))
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = pyro.poutine.trace(air.guide).get_trace(images)
        trace.compute_log_prob()
    present = torch.stack([trace.nodes[f"present_{t}"]["value"] for t in range(3)])
    assert bool((present[1:] <= present[:-1]).all())
    assert 0 < float(present[2].mean()) < 1
    for t in range(3):
        assert bool((trace.nodes[f"what_{t}"]["log_prob"][present[t] == 0] == 0).all())


def test_programs_run_in_one_batch() -> None:
    """Model and guide broadcast over the joint states of all coins."""
    air = AIR(size=12, window=4, hidden=8)
    images = torch.rand(6, 12, 12, generator=torch.Generator().manual_seed(0))
    coins = {f"present_{t}": "enum" for t in range(3)}
    engine = Engine(ELBO(), ppl.Program(air.model, images, 3), air.guide, policy=coins)
    assert not engine.loop
    assert engine.plan.joint == 8
    assert all(torch.isfinite(g).all() for g in engine.gradient().gradient.values())

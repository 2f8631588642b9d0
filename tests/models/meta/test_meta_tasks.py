"""Sources of episodes: laws of the tasks, exact answers, and few-shot sets that cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.meta.episodes import Episodes
from models.meta.tasks import LinearRegressions, LineSine, Sinusoids
from models.meta.tasks_images import FewShot, few_shot_digits, few_shot_fashion, few_shot_omniglot
from ppl.errors import DataError, OptionError, ShapeError

F: dict[str, Any] = {"dtype": torch.float64}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sinusoids_are_sinusoids() -> None:
    """Least squares on (sin x, cos x) leaves nothing; amplitudes and phases fill their ranges."""
    points = Sinusoids(shots=5, queries=25)(400, seeded()).points
    x, y = points.x[..., 0].double(), points.y.double()
    design = torch.stack([x.sin(), x.cos()], -1)
    a, b = torch.linalg.lstsq(design, y[..., None]).solution[..., 0].unbind(-1)
    left = y - (design @ torch.stack([a, b], -1)[..., None])[..., 0]
    assert float(left.abs().max()) < 1e-4
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    # P(no draw of 400 in an outer twentieth) < 2e-9 at each end.
    for value, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        margin = (high - low) / 20
        assert low - 1e-3 <= float(value.min()) < low + margin
        assert high + 1e-3 >= float(value.max()) > high - margin


def test_line_sine_is_half_lines() -> None:
    """Without noise a straight line fits some tasks exactly: 400 +- 4 sd of the binomial, false alarm below 1e-4."""
    points = LineSine(shots=10, queries=0, noise=0.0)(800, seeded()).points
    x, y = points.x.double(), points.y.double()
    design = torch.cat([x, torch.ones_like(x)], -1)
    fit = torch.linalg.lstsq(design, y[..., None]).solution
    straight = ((design @ fit)[..., 0] - y).abs().amax(1) < 1e-3
    assert abs(int(straight.sum()) - 400) < 4 * math.sqrt(200)
    assert float(fit[straight].abs().max()) <= 3.001


def test_noise_of_line_sine() -> None:
    """The same generator with and without noise: the difference has the standard deviation; 4 sd of 16000 draws."""
    loud, quiet = (LineSine(8, 8, noise)(1000, seeded()).points.y for noise in (0.25, 0.0))
    assert float((loud - quiet).std()) == pytest.approx(0.25, rel=4 / math.sqrt(2 * 16000))


def test_exact_answers_of_linear_regressions() -> None:
    """Predictive by the joint normal of support and query targets, without theta; a masked point is not seen."""
    tasks = LinearRegressions(torch.tensor([2.0, -1.0, 0.5], **F), torch.tensor([0.5, 0.3, 0.8], **F), 0.2, 4, 3)
    episodes = tasks(2, seeded())
    whole = Episodes(
        episodes.x_support,
        episodes.y_support,
        episodes.x_query,
        episodes.y_query,
        torch.tensor([[True] * 3 + [False]] * 2),
    )
    mean, variance = tasks.predictive(whole)
    for i in range(2):
        x = torch.cat([episodes.x_support[i, :3], episodes.query.x[i]])
        design = torch.cat([x, torch.ones(6, 1, **F)], 1)
        joint = design @ torch.diag(tasks.spread**2) @ design.T + 0.04 * torch.eye(6, **F)
        gain = joint[3:, :3] @ torch.linalg.inv(joint[:3, :3])
        off = episodes.y_support[i, :3] - design[:3] @ tasks.mean
        assert torch.allclose(mean[i], design[3:] @ tasks.mean + gain @ off)
        assert torch.allclose(variance[i], (joint[3:, 3:] - gain @ joint[:3, 3:]).diagonal())


def test_linear_regressions_are_calibrated() -> None:
    """Standardised errors of fresh tasks are N(0, 1): variance of 2000 independent ones within 4 standard errors."""
    tasks = LinearRegressions(torch.tensor([2.0, 0.5], **F), torch.tensor([0.5, 0.8], **F), 0.2, 3, 1)
    episodes = tasks(2000, seeded())
    mean, variance = tasks.predictive(episodes)
    z = (episodes.query.y - mean) / variance.sqrt()
    assert abs(float(z.mean())) < 4 / math.sqrt(2000)
    assert float(z.square().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 2000))


def test_few_shot_labels_are_classes() -> None:
    """Images that carry their class: one class for each label, no image twice, all classes and orders come up."""
    images = torch.arange(60.0)[:, None]
    labels = torch.arange(60) % 6 + 10
    episodes = FewShot(images, labels, way=3, shots=2, queries=4, classes=[10, 11, 13, 15])(200, seeded())
    points = episodes.points
    assert all(len(set(row.tolist())) == 18 for row in points.x[..., 0])
    origin = points.x[..., 0].long() % 6 + 10
    for label in range(3):
        own = torch.where(points.y == label, origin, -1)
        assert all(len(set(row[row >= 0].tolist())) == 1 for row in own)
        assert set(own[own >= 0].tolist()) == {10, 11, 13, 15}
    assert (episodes.support.y == torch.tensor([0, 0, 1, 1, 2, 2])).all()


def test_same_generator_same_episodes() -> None:
    tasks = few_shot_digits(way=5, shots=1, queries=2, held_out=True)
    one, two, other = (tasks(4, seeded(seed)).points.x for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_omniglot_file(tmp_path: Path) -> None:
    """Two alphabets with characters of the same names are different classes; ink is 1, paper -1."""
    ink = np.zeros((24, 9), dtype=np.uint8)
    ink[12:] = 1
    alphabet, character = np.repeat(["A", "B"], 12), np.tile(np.repeat(["c1", "c2"], 6), 2)
    path = tmp_path / "small.npz"
    np.savez(path, ink_packed=np.packbits(ink, axis=1), height=3, width=3, alphabet=alphabet, character=character)
    episodes = few_shot_omniglot(path, way=4, shots=1, queries=5, size=3)(2, seeded())
    assert episodes.points.x.shape == (2, 24, 1, 3, 3)
    assert episodes.points.x.unique().tolist() == [-1, 1]
    assert float(few_shot_omniglot(path, 2, 1, 1, alphabets=["B"], size=3)(1, seeded()).points.x.min()) == 1
    with pytest.raises(OptionError, match="5-way episodes need"):
        few_shot_omniglot(path, way=5)
    with pytest.raises(DataError, match="alphabets"):
        few_shot_omniglot(path, way=2, alphabets=["Greek"])
    with pytest.raises(DataError, match="missing"):
        few_shot_omniglot(tmp_path / "none.npz")
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a packed"):
        few_shot_omniglot(path)


def test_more_shots_than_images() -> None:
    images, labels = torch.zeros(10, 2), torch.arange(10) % 2
    with pytest.raises(DataError, match="class 0 has 5 images, fewer than 4 shots and 2 queries"):
        FewShot(images, labels, way=2, shots=4, queries=2)
    with pytest.raises(DataError, match="not there"):
        FewShot(images, labels, way=2, shots=1, queries=1, classes=[0, 7])
    with pytest.raises(OptionError, match="3-way"):
        FewShot(images, labels, way=3, shots=1, queries=1)
    with pytest.raises(DataError, match="integers"):
        FewShot(images, labels.float(), way=2)
    with pytest.raises(ShapeError, match="labels"):
        FewShot(images, labels[:5], way=2)
    with pytest.raises(DataError, match="missing"):
        few_shot_fashion(folder="/nowhere")


def test_labels_outside_the_way() -> None:
    with pytest.raises(DataError, match="way=2"):
        Episodes(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 2]]), way=2)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="shots"):
        Sinusoids(shots=0)
    with pytest.raises(OptionError, match="noise"):
        LineSine(noise=-1.0)
    two = torch.ones(2)
    with pytest.raises(OptionError, match="spread"):
        LinearRegressions(two, 0 * two)
    with pytest.raises(ShapeError, match="mean and spread"):
        LinearRegressions(two, torch.ones(3))


def test_omniglot_subset() -> None:
    """All 8 alphabets, 242 characters and 20 drawers: each class has 20 images, most of which is paper."""
    path = Path(__file__).parents[4] / "shared" / "data" / "omniglot" / "omniglot_small1_small2.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tasks = few_shot_omniglot(path, way=5, shots=5, queries=15, size=28)
    assert [len(own) for own in tasks.members] == [20] * 242
    x = tasks(2, seeded()).support.x
    assert x.shape == (2, 25, 1, 28, 28)
    assert -1 < float(x.mean()) < -0.7
    with pytest.raises(DataError, match="20 images, fewer than 10 shots and 15 queries"):
        few_shot_omniglot(path, shots=10)

"""The feature network and the two distances of a model card, against exact values."""

from __future__ import annotations

import pytest
import torch

import models
from models.features import frechet_distance, nearest_distance, train_classifier
from ppl.errors import ShapeError


def exact_moments(samples: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """A sample whose mean and covariance are exactly these."""
    z = torch.randn(samples, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_frechet_distance_of_gaussians():
    """Covariances that commute: |dm|^2 + sum (sd_a - sd_b)^2; and one pair that does not, in closed form for 2 x 2."""
    mean, other = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    a = exact_moments(50, mean, torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64)))
    b = exact_moments(70, other, torch.diag(torch.tensor([1.0, 25.0], dtype=torch.float64)))
    assert frechet_distance(a, b) == pytest.approx(8 + 1 + 4)
    c = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    d = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for a 2 x 2 matrix with positive eigenvalues.
    cross = torch.sqrt((c @ d).trace() + 2 * torch.sqrt(torch.det(c @ d)))
    expected = c.trace() + d.trace() - 2 * cross
    assert frechet_distance(exact_moments(50, mean, c), exact_moments(60, mean, d)) == pytest.approx(float(expected))
    with pytest.raises(ShapeError):
        frechet_distance(a, b[:, :1])


def test_nearest_distance():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(30, 1, 4, 4, generator=generator)
    x = torch.cat([bank[7:8] + 0.25 / 4, bank[3:4], torch.randn(100, 1, 4, 4, generator=generator)])
    found = nearest_distance(x, bank)
    assert found[0] == pytest.approx(0.25, rel=1e-5)
    assert found[1] == 0
    expected = (x[:, None] - bank[None]).flatten(2).norm(dim=2).amin(1)
    torch.testing.assert_close(found, expected)


def test_classifier_learns_the_digits_and_is_always_the_same():
    """80 % of held-out digits after 80 steps; chance is 10 %."""
    data = models.digits()
    classifier = train_classifier(data, steps=80, batch=64)
    assert (classifier.predict(data.held_out) == data.held_out_label).double().mean() > 0.8
    assert classifier.embed(data.held_out).shape == (297, 64)
    a, b, c = (train_classifier(data, steps=2, seed=seed).hidden.weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)

"""A small classifier of images, whose last hidden layer serves as features for comparing draws with data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.data import ImageData
from ppl.errors import ShapeError

__all__ = ["Classifier", "frechet_distance", "nearest_distance", "train_classifier"]


class Classifier(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        event_shape: (channels, height, width); height and width are multiples of 4.
        classes: number of classes.
        width: features in the last hidden layer.
    """

    def __init__(self, event_shape: tuple[int, int, int], classes: int, width: int = 64) -> None:
        super().__init__()
        channels, rows, columns = event_shape
        self.first = nn.Conv2d(channels, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * (rows // 4) * (columns // 4), width)
        self.logits = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """(batch, width) last hidden layer."""
        h = F.max_pool2d(F.relu(self.first(x)), 2)
        h = F.max_pool2d(F.relu(self.second(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, classes) logits."""
        return self.logits(self.features(x))

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """(images, width) features of many images, in float64."""
        return torch.cat([self.features(part).double() for part in x.split(1000)])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(images,) classes of many images."""
        return torch.cat([self(part).argmax(1) for part in x.split(1000)])


def train_classifier(data: ImageData, steps: int, batch: int = 128, seed: int = 0) -> Classifier:
    """Train a classifier on the training images, the same weights every time.

    Args:
        data: images with labels.
        steps: of Adam, learning rate 1e-3 falling linearly to 0.
        batch: images per step.
        seed: of weights and batches.

    Returns:
        The classifier, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(data.event_shape, len(data.classes))
    optimiser = torch.optim.Adam(classifier.parameters())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        index = torch.randint(len(data.train), (batch,), generator=generator)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(classifier(data.train[index]), data.train_label[index]).backward()
        optimiser.step()
    return classifier.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}), between Gaussians fitted to two samples.

    It is biased upwards for small samples; compare it only with the value for two samples of data of the same sizes.

    Args:
        a: (n, features) float64.
        b: (m, features) float64.

    Raises:
        ShapeError: if the samples have different features, or fewer than two rows.

    Source: Heusel et al. (2017), eq. 6 [inferred].

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + 2), 6)
        12.0
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ShapeError(
            f"expected two samples (n, features) of two rows or more, got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def nearest_distance(x: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance of each image to the nearest one of a bank.

    Args:
        x: (images, *event).
        bank: (others, *event).

    Returns:
        (images,) distances.

    Example:
        >>> nearest_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        tensor([5.])
    """
    flat = bank.flatten(1)
    # Exact differences: the quick expansion of |a - b|^2 loses the digits that tell a copy from a neighbour.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, flat, compute_mode=mode).amin(1) for part in x.flatten(1).split(50)])

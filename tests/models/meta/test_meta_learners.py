"""Every learner keeps one contract, `check_learner`, and the check catches who breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from models.meta import (
    MAML,
    Categorical,
    CoordinateAscent,
    Episodes,
    Fisher,
    Gaussian,
    GaussNewton,
    Hierarchy,
    LinearRegressions,
    Network,
    NIWMeta,
    NormalInverseGamma,
    few_shot_digits,
    mlp,
)
from models.meta.abml import ABML
from models.meta.conditional_neural_process import ConditionalNeuralProcess
from models.meta.predictive import Predictive
from models.meta.prototypical import Prototypical
from models.meta.reptile import Reptile
from models.meta.ridge_head import RidgeHead
from models.meta.testing import check_learner
from ppl.errors import OptionError

LINES = LinearRegressions(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), 0.2, 5, 4)
IMAGES = few_shot_digits(way=3, shots=2, queries=2)
NETWORK, LINE, NOISE = mlp([64, 8, 3]), mlp([1, 1]), Gaussian(0.2)
FEW: dict[str, Any] = {"steps": 3, "batch": 4}


def hierarchy(classes: bool) -> Hierarchy:
    network = NETWORK if classes else LINE
    return Hierarchy(
        network,
        Categorical() if classes else NOISE,
        NormalInverseGamma.around(network.start, 1.0, 10.0, 0.1),
    )


def twelve() -> Episodes:
    return LINES(12, torch.Generator().manual_seed(1))


# Name -> a fitted learner of lines, and of images.
REGRESSION: dict[str, Callable[[], Any]] = {
    "MAML": lambda: MAML(**FEW).fit(LINE, NOISE, LINES),
    "Reptile": lambda: Reptile(**FEW).fit(LINE, NOISE, LINES),
    "ABML": lambda: ABML(**FEW).fit(LINE, NOISE, LINES),
    "neural process": lambda: ConditionalNeuralProcess(width=8, **FEW).fit(LINES),
    "ridge head": lambda: RidgeHead(**FEW).fit(mlp([1, 8]), LINES),
    "NIWMeta": lambda: NIWMeta(**FEW).fit(hierarchy(False), LINES),
    "NIWMeta, Fisher": lambda: NIWMeta(Fisher(3), **FEW).fit(hierarchy(False), LINES),
    "CoordinateAscent": lambda: CoordinateAscent().fit(hierarchy(False).program(twelve())),
}
CLASSES: dict[str, Callable[[], Any]] = {
    "MAML": lambda: MAML(**FEW).fit(NETWORK, Categorical(), IMAGES),
    "Reptile": lambda: Reptile(**FEW).fit(NETWORK, Categorical(), IMAGES),
    "ABML": lambda: ABML(**FEW).fit(NETWORK, Categorical(), IMAGES),
    "prototypes": lambda: Prototypical(**FEW).fit(mlp([64, 8]), IMAGES),
    "ridge head": lambda: RidgeHead(**FEW).fit(mlp([64, 8]), IMAGES),
    "NIWMeta": lambda: NIWMeta(GaussNewton(2), **FEW).fit(hierarchy(True), IMAGES),
    "NIWMeta, Fisher": lambda: NIWMeta(Fisher(3), **FEW).fit(hierarchy(True), IMAGES),
}


@pytest.mark.parametrize("name", REGRESSION)
def test_learners_of_lines(name: str) -> None:
    check_learner(REGRESSION[name](), LINES(6, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("name", CLASSES)
def test_learners_of_classes(name: str) -> None:
    check_learner(CLASSES[name](), IMAGES(6, torch.Generator().manual_seed(2)))


@dataclass
class Shifted:
    """Predicts the mean of the support targets, and what is asked of it besides."""

    fault: Callable[[Episodes], Any]

    def predict(self, episodes: Episodes) -> Predictive:
        support = episodes.support
        mean = (support.y.sum(1) / support.counts)[:, None].expand_as(episodes.query.y) + self.fault(episodes)
        return Predictive(dist.Normal(mean[None], 1.0))


FAULTS: dict[str, Callable[[Episodes], Any]] = {
    "targets of the queries": lambda e: 1e-2 * e.query.y.mean(1, keepdim=True),
    "other queries": lambda e: e.query.x[..., 0].mean(1, keepdim=True),
    "mask hides": lambda e: e.support.x.shape[1] * torch.ones(1),
    "on the others": lambda e: e.support.y[:, 0].mean(),
    "global generator": lambda e: 1e-9 * torch.randn(1),
    "two calls": lambda e: next(COUNTER),
    "graph": lambda e: torch.zeros((), requires_grad=True),
    "changed the episodes": lambda e: e.x_query.zero_()[..., 0],  # type: ignore[union-attr]
    "not finite": lambda e: torch.full((), torch.inf),
}
COUNTER = iter(range(1000))


def test_an_honest_learner_passes() -> None:
    check_learner(Shifted(lambda e: 0.0), LINES(6, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named(text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check_learner(Shifted(FAULTS[text]), LINES(6, torch.Generator().manual_seed(2)))


def test_wrong_returns_are_named() -> None:
    class Plain:
        def predict(self, episodes: Episodes) -> Any:
            return episodes.query.y

    episodes = LINES(6, torch.Generator().manual_seed(2))
    with pytest.raises(AssertionError, match="returned Tensor"):
        check_learner(Plain(), episodes)
    with pytest.raises(AssertionError, match="laws of classes"):
        check_learner(Shifted(lambda e: 0.0), IMAGES(2, torch.Generator().manual_seed(0)))
    one = replace(episodes, x_query=episodes.query.x[:, :1], y_query=episodes.query.y[:, :1])
    with pytest.raises(OptionError, match="two queries"):
        check_learner(Shifted(lambda e: 0.0), one)


def test_embeddings_of_images_with_axes() -> None:
    """A module that flattens an image sees one image at a time: prototypes and ridge heads of vectors and of images."""
    vectors = IMAGES(6, torch.Generator().manual_seed(2))
    x, query = vectors.support.x, vectors.query.x
    images = replace(vectors, x_support=x.unflatten(2, (1, 8, 8)), x_query=query.unflatten(2, (1, 8, 8)))
    plain = mlp([64, 8])
    deep = Network(torch.nn.Sequential(torch.nn.Flatten(), plain.module))
    for learner in (Prototypical(**FEW), RidgeHead(**FEW)):
        one, two = (learner.fit(n, e).predict(e).mean for n, e in ((plain, vectors), (deep, images)))
        assert torch.allclose(one, two, atol=1e-5)

"""Peers of NIW-Meta against formulas by hand, and their gain by training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from models.meta import Episodes, Gaussian, LinearRegressions, LineSine, mlp
from models.meta.conditional_neural_process import ConditionalNeuralProcess
from models.meta.network import Network
from models.meta.predictive import Predictive, expected_calibration_error, pit_error
from models.meta.prototypical import Prototypical, logits
from models.meta.reptile import Reptile
from models.meta.ridge_head import RidgeHead
from models.meta.tasks_images import few_shot_digits
from ppl.errors import DataError, OptionError, ShapeError
from ppl.monitor import Monitor

F: dict[str, Any] = {"dtype": torch.float64}
LINES = LinearRegressions(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.5]), 0.1, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_reptile_step_by_hand() -> None:
    """One weight, targets s: two inner steps leave 0.81 of the distance, and the start goes half of the way."""
    network = Network(torch.nn.Linear(1, 1, bias=False).double())
    one = torch.ones(2, 1, 1, **F)
    y = torch.tensor([[1.0], [4.0]], **F)
    fitted = Reptile(inner_steps=2, inner_lr=0.1, steps=1, batch=2, lr=0.5).fit(
        network, Gaussian(1.0), Episodes(one, y, one, y)
    )
    expected = network.start + 0.5 * 0.19 * (2.5 - network.start)
    assert torch.allclose(fitted.theta, expected)


def test_reptile_learns_lines() -> None:
    fitted = Reptile(inner_steps=5, inner_lr=0.2, test_steps=10, steps=60, lr=0.5).fit(mlp([1, 1]), Gaussian(), LINES)
    assert float((fitted.theta - LINES.mean).abs().max()) < 0.25
    new = LINES(128, seeded(1))
    after = (fitted.predict(new).mean - new.query.y).square().mean()
    start = (new.query.x[..., 0] * fitted.theta[0] + fitted.theta[1] - new.query.y).square().mean()
    assert float(after) < 0.5 * float(start)


def test_neural_process_does_not_mind_order_or_padding() -> None:
    """A permuted support set, and one with a masked point of any value, give the same prediction."""
    fitted = ConditionalNeuralProcess(steps=1).fit(LINES)
    new = LINES(3, seeded(1))
    x, y = new.x_support, new.y_support
    shuffled = Episodes(x.flip(1), y.flip(1), new.x_query, new.y_query)
    more = torch.cat([x, 7 + x[:, :1]], 1), torch.cat([y, 9 + y[:, :1]], 1)
    mask = torch.tensor([[True] * 4 + [False]] * 3)
    padded = Episodes(*more, new.x_query, new.y_query, mask)
    unmasked = Episodes(*more, new.x_query, new.y_query)
    for other, same in ((shuffled, True), (padded, True), (unmasked, False)):
        assert torch.allclose(fitted.predict(other).mean, fitted.predict(new).mean, atol=1e-5) is same


def test_neural_process_reads_the_support_set() -> None:
    """Lines of random slope: far better than the law of all lines, and never better than the exact answer."""
    fitted = ConditionalNeuralProcess(steps=600, lr=5e-3).fit(LINES)
    new = LINES(512, seeded(1))
    mean, variance = LINES.predictive(new)
    exact = dist.Normal(mean, variance.sqrt()).log_prob(new.query.y).mean()
    x = new.query.x[..., 0]
    blind = dist.Normal(2 * x, (x.square() + 0.26).sqrt()).log_prob(new.query.y).mean()
    found = fitted.predict(new).log_prob(new.query.y).mean()
    assert float(blind) + 0.2 < float(found) < float(exact)


def test_prototypes_by_hand() -> None:
    """Identity embedding: class means (0.5, 0) and (0, 2), the masked point counts for nothing."""
    network = Network(torch.nn.Linear(2, 2, bias=False).double())
    theta = torch.eye(2, **F).flatten()
    support = torch.tensor([[[0.0, 0], [1, 0], [0, 2], [9, 9]]], **F)
    query = torch.tensor([[[0.0, 0]]], **F)
    mask = torch.tensor([[True, True, True, False]])
    labels = torch.tensor([[0, 0, 1, 1]])
    episodes = Episodes(support, labels, query, torch.tensor([[0]]), mask, way=2)
    assert torch.allclose(logits(network, theta, episodes), torch.tensor([[[-0.25, -4.0]]], **F))
    with pytest.raises(DataError, match="no support image"):
        logits(network, theta, Episodes(support, 0 * labels, query, torch.tensor([[0]]), way=2))
    with pytest.raises(DataError, match="way"):
        logits(network, theta, LINES(1, seeded()))


def test_prototypes_learn_digits() -> None:
    """Three digits never trained on: above the untrained embedding and far above chance."""
    tasks = few_shot_digits(way=4, shots=3, queries=4, classes=range(7))(60, seeded())
    new = few_shot_digits(way=3, shots=3, queries=8, classes=range(7, 10), held_out=True)(30, seeded(1))
    fitted = Prototypical(steps=60, batch=8, lr=5e-3).fit(mlp([64, 32, 16]), tasks)
    right = (fitted.predict(new).mean.argmax(-1) == new.query.y).double().mean()
    assert float(right) > 0.7
    assert float(fitted.history[-10:].mean()) < 0.7 * float(fitted.history[:10].mean())


def test_predictive_of_normals() -> None:
    """Against an equal mixture by pyro, and its variance by quadrature of the distribution function."""
    loc, scale = torch.tensor([-1.0, 0.5, 2.0], **F), torch.tensor([0.5, 1.0, 0.2], **F)
    ours = Predictive(dist.Normal(loc.reshape(3, 1, 1), scale.reshape(3, 1, 1)))
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, **F)), torch.distributions.Normal(loc, scale)
    )
    y = torch.tensor([[0.3]], **F)
    assert torch.allclose(ours.log_prob(y), mixture.log_prob(y))
    assert torch.allclose(ours.cdf(y), mixture.cdf(y))
    assert torch.allclose(ours.mean, mixture.mean)
    assert torch.allclose(ours.variance, mixture.variance)
    with pytest.raises(ShapeError, match="draws, episodes"):
        Predictive(dist.Normal(loc, scale))


def test_calibration_errors() -> None:
    """Labels drawn from their probabilities leave little; twice the log odds leave what the gap is."""
    p = torch.rand(20000, generator=seeded(), **F)
    labels = (torch.rand(20000, generator=seeded(1), **F) > p).long()
    both = torch.stack([p, 1 - p], -1)
    # Each of at most 15 bins is off by about sqrt(n_b) / 2 of n: below 0.014 in sum, with 4 times the spread.
    assert float(expected_calibration_error(both, labels)) < 0.03
    wrong = both.square() / both.square().sum(-1, keepdim=True)
    gap = (wrong.max(-1).values - both.max(-1).values).mean()
    assert float(expected_calibration_error(wrong, labels)) == pytest.approx(float(gap), abs=0.02)
    # Too narrow by half: the distribution function of N(0, 1/4) at draws of N(0, 1).
    z = torch.randn(20000, generator=seeded(), **F)
    assert float(pit_error(dist.Normal(0.0, 1.0).cdf(z))) < 4 / math.sqrt(20000)
    assert float(pit_error(dist.Normal(0.0, 0.5).cdf(z))) > 0.05


def test_training_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    """Stopped after some steps and resumed, a fit ends at the same numbers, bit for bit."""
    options = ConditionalNeuralProcess(steps=6, batch=2)

    def fit(monitor: Callable[[torch.Generator], Monitor] | None) -> torch.Tensor:
        g = seeded(3)
        return options.fit(LINES, generator=g, monitor=monitor(g) if monitor else None).theta

    class Stopped(Exception):
        """Raised half way."""

    def stop(progress: Any) -> None:
        if progress.step >= 3:
            raise Stopped

    whole = fit(None)
    path = tmp_path / "fit"
    with pytest.raises(Stopped):
        fit(lambda g: Monitor(generator=g, checkpoint=path, checkpoint_every=0, callback=stop))
    assert torch.equal(fit(lambda g: Monitor(generator=g, checkpoint=path, checkpoint_every=0)), whole)


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="inner_lr"):
        Reptile(inner_lr=-1.0)
    with pytest.raises(OptionError, match="floor"):
        ConditionalNeuralProcess(floor=0.0)
    with pytest.raises(ShapeError, match="expected"):
        ConditionalNeuralProcess(steps=1).fit(LineSine(), inputs=2)
    with pytest.raises(OptionError, match="returned tuple"):
        RidgeHead(steps=1).fit(mlp([1, 4]), lambda number, generator: (torch.ones(number, 5, 1),))  # type: ignore
    with pytest.raises(OptionError, match="got NoneType"):
        Reptile(steps=1).fit(mlp([1, 1]), Gaussian(), None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="query sets"):
        Prototypical(steps=1).fit(mlp([64, 4]), few_shot_digits(queries=0))

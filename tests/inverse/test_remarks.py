"""What a problem says of itself: data that no x explains, images with the same data, noise that cannot be inverted."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.operators import Clip, Dense, PhaseRetrieval, SaturatingBlur
from inverse.operators.blur import GaussianBlur
from inverse.remarks import remarks
from ppl.errors import CapabilityError, DataError
from sde import GaussianMixture

F64 = torch.float64


def prior(*shape: int) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, *shape, dtype=F64), torch.ones(1, dtype=F64))


def program(operator: Any, y: Tensor, sigma: float, *shape: int) -> ppl.Program:
    own = prior(*shape)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", own)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(y.ndim), obs=y)

    return ppl.Program(model, y)


def said(operator: Any, y: Tensor, sigma: float, *shape: int) -> list[str]:
    return remarks(inverse.read_likelihood(program(operator, y, sigma, *shape)))


def test_data_outside_the_span_of_an_operator() -> None:
    """Two sensors for one number: their difference is noise alone. False alarm 2e-8."""
    twice = Dense(torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=F64))
    assert said(twice, torch.tensor([1.0, 1.2], dtype=F64), 0.1, 2) == []
    (text,) = said(twice, torch.tensor([1.0, 3.0], dtype=F64), 0.1, 2)
    assert "outside the range of the operator: 1 of 2" in text
    assert "14.1 noise levels" in text  # 2 / (0.1 sqrt 2)
    posterior = ppl.infer(program(twice, torch.tensor([1.0, 3.0], dtype=F64), 0.1, 2), inverse.PiGDM(steps=3), draws=4)
    assert any("outside the range" in note for note in posterior.attrs["notes"])


def test_right_data_of_a_flat_operator_pass() -> None:
    """400 data sets of 6 data and rank 2, from the model itself; one false alarm has a chance of 6e-6."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 2, generator=generator, dtype=F64)
    operator = Dense(root @ torch.randn(2, 3, generator=generator, dtype=F64))
    x, noise = (torch.randn(400, n, generator=generator, dtype=F64) for n in (3, 6))
    first = program(operator, torch.zeros(6, dtype=F64), 0.2, 3)
    for y in operator(x) + 0.2 * noise:
        assert remarks(inverse.read_likelihood(first.with_data(y=y))) == []


def test_images_with_the_same_data_are_reported() -> None:
    operator = PhaseRetrieval((1, 3, 3))
    y = operator(torch.ones(1, 3, 3, dtype=F64))
    (text,) = said(operator, y, 0.1, 1, 3, 3)
    assert "same data for 4 images" in text
    posterior = ppl.infer(program(operator, y, 0.1, 1, 3, 3), inverse.DPS(steps=3, weight="likelihood"), draws=2)
    assert any("PhaseRetrieval.align" in note for note in posterior.attrs["notes"])
    assert any("outside the range of PhaseRetrieval" in t for t in said(operator, y - 1.0, 0.1, 1, 3, 3))


@pytest.mark.parametrize(
    ("operator", "limits"),
    [
        (Clip((1, 2, 2), -1.0, 1.0), "[-1, 1]"),
        (SaturatingBlur(GaussianBlur(0.5, (1, 2, 2)), level=2.0), "[-2, 2]"),
    ],
)
def test_data_beyond_a_sensor(operator: Any, limits: str) -> None:
    y = torch.tensor([[[0.0, 1.05], [-0.9, 0.3]]], dtype=F64)
    assert said(operator, y, 0.1, 1, 2, 2) == []
    (text,) = said(operator, y * 4, 0.1, 1, 2, 2)
    assert f"outside the range of {type(operator).__name__}, {limits}" in text


def test_noise_that_cannot_be_inverted() -> None:
    own = prior(2)
    scale = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", own)
        pyro.sample("y", dist.MultivariateNormal(x, scale_tril=scale), obs=y)

    likelihood = inverse.read_likelihood(ppl.Program(model, torch.zeros(2, dtype=F64)))
    with pytest.raises(DataError, match=r"rank-deficient or badly scaled.*independent noise"):
        _ = likelihood.gaussian


def curved(mean: Any) -> ppl.Program:
    own = prior(2)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", own)
        pyro.sample("y", dist.Normal(mean(x), 0.3).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([2.0, 1.0], dtype=F64))


@pytest.mark.parametrize(
    "backend",
    [
        inverse.DPS(steps=2),
        inverse.DPS(steps=2, weight="likelihood"),
        inverse.REDDiff(steps=2),
        inverse.DAPS(steps=2),
        inverse.AnnealedLangevin(levels=2, steps=1, warmup=1),
    ],
    ids=repr,
)
def test_a_likelihood_that_is_cut_off_from_the_site_guides_nothing_and_says_so(backend: Any) -> None:
    """x.detach() in a model that is not linear; a linear one is read as a matrix and loses nothing."""
    with pytest.raises(CapabilityError, match=r"through a differentiable path.*DiffusionPCN"):
        ppl.infer(curved(lambda x: x.detach().exp()), backend, draws=2)
    assert ppl.infer(curved(lambda x: x.detach()), inverse.PiGDM(steps=20), draws=50).mean("x")[0] > 1.5


def test_entries_without_a_gradient_are_noted() -> None:
    for mean, entries in (
        (lambda x: x.round(), 2),
        (lambda x: torch.stack([x[..., 0].exp(), x[..., 1].detach().exp()], -1), 1),
    ):
        (note,) = ppl.infer(curved(mean), inverse.DPS(steps=2), draws=2).attrs["notes"]
        assert f"no gradient, in {entries} of 2 entries" in note
    assert remarks(inverse.read_likelihood(curved(lambda x: torch.stack([x[..., 0].exp(), 0 * x[..., 1]], -1)))) == []
    assert remarks(inverse.read_likelihood(curved(torch.exp))) == []

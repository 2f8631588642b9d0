"""What is read off a program is what it says: log p(y | x) agrees at fresh points, in every form it can take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inverse import read_likelihood
from inverse.likelihood import diffusion_sites
from inverse.operators import Compose, Dense, FunctionOperator, GaussianBlur, Identity, Mask
from ppl import Program
from ppl.errors import CapabilityError, DataError
from sde import GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_of(*shape: int) -> GaussianMixture:
    return GaussianMixture(
        torch.ones(2, dtype=F64), torch.randn(2, *shape, generator=seeded(1), dtype=F64), torch.ones(2, dtype=F64)
    )


PRIOR = prior_of(3)
MATRIX = torch.randn(2, 3, generator=seeded(2), dtype=F64)
DENSE = Dense(MATRIX)
Y2 = torch.tensor([0.3, -1.2], dtype=F64)
Y3 = torch.tensor([0.3, -1.2, 2.0], dtype=F64)


def sites(*observed: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A model that observes one distribution of x after the other."""

    def model(*ys: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        for i, (fn, y) in enumerate(zip(observed, ys, strict=True)):
            pyro.sample(f"y{i}", fn(x), obs=y)

    return model


def plain(x: Tensor) -> Any:
    return dist.Normal(DENSE(x), 0.5).to_event(1)


def scaled_model(y: Tensor) -> None:
    x = pyro.sample("x", PRIOR)
    with pyro.poutine.scale(scale=2.5):
        pyro.sample("y", dist.Normal(DENSE(x), 0.5).to_event(1), obs=y)


def subsampled_scale(y: Tensor) -> None:
    x = pyro.sample("x", PRIOR)
    with pyro.plate("rows", 2), pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(DENSE(x), torch.tensor([0.5, 0.1], dtype=F64)), obs=y)


def masked_model(y: Tensor) -> None:
    x = pyro.sample("x", PRIOR)
    with pyro.plate("entries", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def in_a_plate(y: Tensor) -> None:
    with pyro.plate("copies", 4):
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x @ MATRIX.T, 0.5).to_event(1), obs=y)


ROOT = torch.tensor([[0.5, 0.0], [0.4, 0.2]], dtype=F64)

FORMS: dict[str, tuple[Callable[..., None], tuple[Tensor, ...]]] = {
    "operator": (sites(plain), (Y2,)),
    "matrix product": (sites(lambda x: dist.Normal(x @ MATRIX.T, 0.5).to_event(1)), (Y2,)),
    "identity": (sites(lambda x: dist.Normal(x, 0.5).to_event(1)), (Y3,)),
    "one entry": (sites(lambda x: dist.Normal(x[..., 1], 0.5)), (Y2[0],)),
    "offset": (sites(lambda x: dist.Normal(DENSE(x) + 7.0, 0.5).to_event(1)), (Y2,)),
    "scaled operator": (sites(lambda x: dist.Normal(3 * DENSE(x) - x[..., :2], 0.5).to_event(1)), (Y2,)),
    "composed calls": (sites(lambda x: dist.Normal(DENSE(Dense(torch.eye(3, dtype=F64))(x)), 0.5).to_event(1)), (Y2,)),
    "unequal noise": (sites(lambda x: dist.Normal(DENSE(x), torch.tensor([0.1, 2.0])).to_event(1)), (Y2,)),
    "correlated noise": (sites(lambda x: dist.MultivariateNormal(DENSE(x) + 1, scale_tril=ROOT)), (Y2,)),
    "several sites": (sites(plain, lambda x: dist.Normal(x - 2, 0.1).to_event(1)), (Y2, Y3)),
    "correlated and plain": (
        sites(lambda x: dist.MultivariateNormal(DENSE(x), scale_tril=ROOT), lambda x: dist.Normal(x[..., 0], 1.0)),
        (Y2, Y3[0]),
    ),
    "scale": (scaled_model, (Y2,)),
    "scale in a plate": (subsampled_scale, (Y2,)),
    "poutine.mask": (masked_model, (Y3,)),
    "mask method": (
        sites(lambda x: dist.Normal(x, 0.5).mask(torch.tensor([True, False, True])).to_event(1)),
        (Y3,),
    ),
    "plate": (in_a_plate, (torch.randn(4, 2, generator=seeded(5), dtype=F64),)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_whitened_form_is_the_likelihood_of_the_program(form: str) -> None:
    model, data = FORMS[form]
    program = Program(model, *data)
    likelihood = read_likelihood(program)
    assert likelihood.is_gaussian
    x = torch.randn(5, *likelihood.shape, generator=seeded(7), dtype=F64)
    expected = program.log_likelihood({"x": x})
    found = likelihood.gaussian.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(likelihood.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    gaussian = likelihood.gaussian
    assert gaussian.size == gaussian.data.numel()
    torch.testing.assert_close(gaussian.residual(x), gaussian.data - gaussian.operator(x))


def test_recognised_operators_keep_their_structure() -> None:
    image = prior_of(1, 8, 8)
    blur = GaussianBlur(1.0, (1, 8, 8))
    mask = Mask(torch.rand(1, 8, 8, generator=seeded()) > 0.4)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", image)
        pyro.sample("y", dist.Normal(mask(blur(x)) + 1.0, 0.1).to_event(1), obs=y)

    measured = read_likelihood(Program(model, torch.zeros(mask.out_shape, dtype=F64))).gaussian.measured
    assert isinstance(measured, Compose)
    assert measured.outer is mask
    assert measured.inner is blur
    assert read_likelihood(Program(*_pack("operator"))).gaussian.measured is DENSE
    assert isinstance(read_likelihood(Program(*_pack("identity"))).gaussian.measured, Identity)
    assert "fast_svd" in read_likelihood(Program(*_pack("identity"))).gaussian.operator.capabilities


def _pack(form: str) -> tuple[Any, ...]:
    model, data = FORMS[form]
    return (model, *data)


def test_a_function_that_declares_itself_linear_is_kept_or_written_down() -> None:
    declared = FunctionOperator(lambda x: x.flip(-1) * 2, (3,), linear=True, dtype=F64)
    program = Program(sites(lambda x: dist.Normal(declared(x), 0.5).to_event(1)), Y3)
    assert read_likelihood(program).gaussian.measured is declared


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        (lambda x: dist.Poisson(x.exp()).to_event(1), "Poisson"),
        (lambda x: dist.Normal(x.square(), 0.5).to_event(1), "not linear"),
        (lambda x: dist.Normal(x.clamp(-30, 30), 0.5).to_event(1), "not linear"),
        (lambda x: dist.Normal(x.abs(), 0.5).to_event(1), "not linear"),
        (lambda x: dist.Normal(x, 0.1 + x.abs()).to_event(1), "noise"),
        (lambda x: dist.StudentT(3.0, x, 0.5).to_event(1), "StudentT"),
    ],
    ids=["Poisson", "square", "clamp", "abs", "noise", "StudentT"],
)
def test_what_is_not_linear_and_gaussian_says_why(observed: Any, message: str) -> None:
    program = Program(sites(observed), torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    likelihood = read_likelihood(program)
    assert not likelihood.is_gaussian
    with pytest.raises(CapabilityError, match=message) as error:
        _ = likelihood.gaussian
    assert "inverse.DPS" in str(error.value)
    x = torch.randn(4, 3, generator=seeded(), dtype=F64)
    torch.testing.assert_close(likelihood.log_prob(x), program.log_likelihood({"x": x}))
    assert likelihood.log_prob(x[:0]).shape == (0,)


def test_a_factor_has_no_known_form() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        pyro.factor("f", -x.square().sum(-1))

    with pytest.raises(CapabilityError, match="factor"):
        _ = read_likelihood(Program(model, Y3)).gaussian


def test_correlated_noise_under_a_scale_is_not_taken_for_plain() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        with pyro.poutine.scale(scale=2.0):
            pyro.sample("y", dist.MultivariateNormal(DENSE(x), scale_tril=ROOT), obs=y)

    with pytest.raises(CapabilityError, match="correlated"):
        _ = read_likelihood(Program(model, Y2)).gaussian


@pytest.mark.parametrize("sigma", [0.0, -0.5])
def test_noise_must_be_positive(sigma: float) -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, sigma, validate_args=False).to_event(1), obs=y)

    with pytest.raises((DataError, ValueError)):
        _ = read_likelihood(Program(model, Y3)).gaussian


def test_nuisance_latents_need_a_value_or_a_block() -> None:
    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(DENSE(x), sigma).to_event(1), obs=y)

    program = Program(model, Y2)
    with pytest.raises(CapabilityError) as error:
        read_likelihood(program)
    for cure in ("ppl.Gibbs", "ppl.NoiseSpace", "pyro.condition", "'sigma'"):
        assert cure in str(error.value)
    x = torch.randn(4, 3, generator=seeded(), dtype=F64)
    for sigma in (0.5, 2.0):
        likelihood = read_likelihood(program, given={"sigma": torch.tensor(sigma, dtype=F64)})
        expected = dist.Normal(x @ MATRIX.T, sigma).log_prob(Y2).sum(-1)
        torch.testing.assert_close(likelihood.gaussian.log_prob(x), expected)
        torch.testing.assert_close(likelihood.gaussian.stddev, torch.full((2,), sigma, dtype=F64))


def test_the_diffusion_sites_are_found_or_named() -> None:
    def two(y: Tensor) -> None:
        a = pyro.sample("a", PRIOR)
        b = pyro.sample("b", PRIOR)
        pyro.sample("y", dist.Normal(a + 2 * b, 0.5).to_event(1), obs=y)

    program = Program(two, Y3)
    assert diffusion_sites(program) == ["a", "b"]
    both = read_likelihood(program)
    assert (both.sites, both.shape) == (("a", "b"), (6,))
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(both.gaussian.operator.dense(), torch.cat([2 * eye, 4 * eye], 1))
    given = {"a": Y3}
    gaussian = read_likelihood(program, "b", given).gaussian
    torch.testing.assert_close(gaussian.operator.dense(), 4 * torch.eye(3, dtype=F64))
    torch.testing.assert_close(gaussian.data, torch.zeros(3, dtype=F64))

    def none(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    with pytest.raises(CapabilityError, match=r"ppl\.NUTS"):
        read_likelihood(Program(none, torch.tensor(1.0)))


def test_the_normaliser_of_correlated_noise() -> None:
    gaussian = read_likelihood(Program(*_pack("correlated noise"))).gaussian
    expected = -0.5 * math.log((2 * math.pi) ** 2 * 0.5**2 * 0.2**2)
    torch.testing.assert_close(gaussian.log_normaliser, torch.tensor(expected, dtype=F64))
    assert gaussian.stddev is None

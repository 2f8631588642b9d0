"""Mixtures of Gaussians: densities, draws, exact conditioning and motion, and priors read off programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from ppl import Mixture, MixturePriors
from ppl.amortised.priors import prior_of
from ppl.diagnostics import z_bound
from ppl.errors import OptionError, ProgramError, ShapeError
from sde import GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(rows: int = 3, components: int = 4, dim: int = 2) -> Mixture:
    center = torch.zeros(dim, dtype=F64)
    return MixturePriors().sample(rows, components, center, center + 1, seeded())


def test_density_is_that_of_torch() -> None:
    mixture = some()
    z = torch.randn(5, 3, 2, dtype=F64, generator=seeded(1))
    parts = dist.MultivariateNormal(mixture.means, scale_tril=mixture.scale_tril)
    law = dist.MixtureSameFamily(dist.Categorical(mixture.weights), parts)
    torch.testing.assert_close(mixture.log_prob(z), law.log_prob(z))


def test_draws_have_the_moments() -> None:
    """Mean and second moments of 40,000 draws within their standard errors; false alarm 1e-5 in all."""
    mixture = some()
    z = mixture.draw((40_000,), seeded(2))
    values = torch.cat([z, z.square(), z.prod(-1, keepdim=True)], -1)
    second = mixture.covariance + mixture.mean[..., None] * mixture.mean[..., None, :]
    exact = torch.cat([mixture.mean, second.diagonal(dim1=-2, dim2=-1), second[..., 0, 1:]], -1)
    off = (values.mean(0) - exact) / values.std(0) * 200
    assert float(off.abs().max()) < z_bound(1e-5, off.numel())


def test_conditioning_is_that_of_sde() -> None:
    """Also the evidence; and a batch is its members."""
    prior = some(2)
    matrix = torch.tensor([[1.0, -0.5]], dtype=F64)
    y = torch.tensor([[0.3], [-2.0]], dtype=F64)
    found, evidence = prior.conditioned(matrix, y, 0.2 * torch.eye(1, dtype=F64))
    for i in range(2):
        exact = GaussianMixture(prior.weights[i], prior.means[i], prior.covariances[i])
        posterior = exact.condition_linear(matrix, y[i], 0.2)
        z = torch.randn(6, 2, dtype=F64, generator=seeded(3))
        torch.testing.assert_close(found[i].log_prob(z), posterior.log_prob(z))
        torch.testing.assert_close(evidence[i], exact.log_evidence(matrix, y[i], 0.2))


def test_motion_moves_the_moments() -> None:
    mixture = some(1)[0]
    matrix = torch.tensor([[1.0, 0.3], [0.0, 0.9]], dtype=F64)
    noise = torch.tensor([[0.2, 0.1], [0.1, 0.3]], dtype=F64)
    moved = mixture.moved(matrix, noise, torch.ones(2, dtype=F64))
    torch.testing.assert_close(moved.mean, matrix @ mixture.mean + 1)
    torch.testing.assert_close(moved.covariance, matrix @ mixture.covariance @ matrix.T + noise)


def test_copies_are_the_same_law_with_unequal_weights() -> None:
    mixture = some(2, 2)
    more = mixture.split(5)
    z = torch.randn(7, 2, 2, dtype=F64, generator=seeded(4))
    torch.testing.assert_close(more.log_prob(z), mixture.log_prob(z))
    assert all(len(set(row.tolist())) == 5 for row in more.weights)
    with pytest.raises(OptionError, match="merge some"):
        more.split(4)


def test_packed_and_back() -> None:
    mixture = some(3, 4, 3)
    vector = mixture.packed()
    assert vector.shape == (3, Mixture.packed_size(4, 3))
    for ours, theirs in zip(
        (mixture.weights, mixture.means, mixture.scale_tril), Mixture.unpacked(vector, 4, 3), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_weighted_refit_finds_the_target() -> None:
    """One step of EM on 20,000 weighted draws of a wide proposal: KL to the target falls from 0.6 to below 0.01."""
    target = Mixture.of_covariances(
        torch.ones(1, dtype=F64), torch.ones(1, 1, dtype=F64), torch.full((1, 1, 1), 0.3, dtype=F64)
    )
    wide = Mixture.of_covariances(
        torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.full((1, 1, 1), 2.0, dtype=F64)
    )
    z = wide.draw((20_000,), seeded(5))
    weights = torch.softmax(target.log_prob(z) - wide.log_prob(z), 0)
    fitted = wide.refined(z, weights)
    x = target.draw((5000,), seeded(6))
    assert float((target.log_prob(x) - wide.log_prob(x)).mean()) > 0.5
    assert float((target.log_prob(x) - fitted.log_prob(x)).mean()) < 0.01


@pytest.mark.parametrize(
    ("law", "mean", "variance"),
    [
        (dist.Normal(1.0, 2.0), [1.0], [[4.0]]),
        (dist.Normal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).to_event(1), [1.0, 2.0], [[1.0, 0], [0, 9.0]]),
        (dist.MultivariateNormal(torch.ones(2), 2 * torch.eye(2)), [1.0, 1.0], [[2.0, 0.0], [0.0, 2.0]]),
        (GaussianMixture(torch.ones(1), torch.ones(1, 2), torch.full((1,), 2.0)), [1.0, 1.0], [[2.0, 0], [0, 2.0]]),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
            ),
            [0.0],
            [[2.0]],
        ),
    ],
)
def test_mixtures_of_distributions(law: object, mean: list[float], variance: list[list[float]]) -> None:
    mixture = Mixture.of(law)
    torch.testing.assert_close(mixture.mean, torch.tensor(mean))
    torch.testing.assert_close(mixture.covariance, torch.tensor(variance))


def test_prior_of_a_program() -> None:
    """Independent sites make one mixture over all coordinates; log-normals are normal there."""

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(y.new_tensor(0.5), 2.0))
        inner = dist.MultivariateNormal(torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64), torch.eye(2, dtype=F64))
        x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.25, 0.75], dtype=F64)), inner))
        pyro.sample("y", dist.Normal(x[..., 0], s), obs=y)

    program = ppl.Program(model, torch.zeros((), dtype=F64), compile="never")
    prior = prior_of(program)
    z = torch.randn(4, 3, dtype=F64, generator=seeded(7))
    log_prior = program.flat().log_density(z) - program.log_likelihood(program.flat().constrain(z))
    torch.testing.assert_close(prior.log_prob(z), log_prior)


def test_priors_that_are_no_mixtures() -> None:
    def gamma(y: Tensor) -> None:
        s = pyro.sample("s", dist.Gamma(y.new_tensor(2.0), 2.0))
        pyro.sample("y", dist.Normal(0.0, s), obs=y)

    def tree(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    one = torch.ones((), dtype=F64)
    with pytest.raises(ProgramError, match="'s' is Gamma"):
        prior_of(ppl.Program(gamma, one))
    with pytest.raises(ProgramError, match="'b' depends"):
        prior_of(ppl.Program(tree, one))


@pytest.mark.parametrize(
    ("weights", "means", "root", "error", "message"),
    [
        (torch.tensor([0.5, 0.4]), torch.zeros(2, 1), torch.ones(2, 1, 1), OptionError, "sum off by 0.1"),
        (torch.tensor([1.5, -0.5]), torch.zeros(2, 1), torch.ones(2, 1, 1), OptionError, "smallest weight of -0.5"),
        (torch.ones(1), torch.full((1, 1), math.nan), torch.ones(1, 1, 1), OptionError, "finite"),
        (torch.ones(1), torch.zeros(1, 1), torch.zeros(1, 1, 1), OptionError, "positive diagonal"),
        (torch.ones(1), torch.zeros(1, 2), torch.ones(1, 1, 1), ShapeError, "scale_tril"),
    ],
)
def test_bad_mixtures(weights: Tensor, means: Tensor, root: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Mixture(weights, means, root)


def test_more_bad_mixtures() -> None:
    with pytest.raises(OptionError, match="positive definite"):
        Mixture.of_covariances(torch.ones(1), torch.zeros(1, 1), -torch.ones(1, 1, 1))
    with pytest.raises(OptionError, match="Gamma is not a mixture"):
        Mixture.of(dist.Gamma(1.0, 1.0))
    with pytest.raises(ShapeError, match="length 2"):
        some(1).log_prob(torch.zeros(3, dtype=F64))
    with pytest.raises(OptionError, match="degrees"):
        MixturePriors(degrees=0.5)
    with pytest.raises(OptionError, match="copies"):
        MixturePriors(copies=2.0)

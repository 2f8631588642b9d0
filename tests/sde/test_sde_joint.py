"""A joint prior is the product of its members: against the product mixture in closed form, and call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Size, Tensor

from sde import (
    BlockCovariance,
    DiffusionPrior,
    GaussianMixture,
    JointPrior,
    NetworkCovariance,
    count_calls,
    log_grid,
)

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def isotropic() -> GaussianMixture:
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), 2 * randn(2, 3), torch.tensor([0.5, 1.5], dtype=F64))


def full() -> GaussianMixture:
    root = randn(3, 2, 2, seed=1)
    covariances = root @ root.mT + 0.2 * torch.eye(2, dtype=F64)
    return GaussianMixture(torch.tensor([0.2, 0.3, 0.5], dtype=F64), 2 * randn(3, 2, seed=2), covariances)


def network(prior: GaussianMixture, **options: Any) -> DiffusionPrior:
    """The same law with nothing but a denoiser."""
    own: dict[str, Any] = {"sigma_min": 0.01, "sigma_max": 5 * prior.data_std, "data_std": prior.data_std}
    return DiffusionPrior(prior.denoise, prior.event_shape, dtype=F64, **(own | options))


def plated() -> tuple[JointPrior, GaussianMixture]:
    """Two copies of one prior and one of another, and their product written down by hand."""
    joint = JointPrior([isotropic().expand([2]), full()])
    a, b = isotropic(), full()
    weights, means, covariances = [], [], []
    for i in range(2):
        for j in range(2):
            for k in range(3):
                weights.append(a.weights[i] * a.weights[j] * b.weights[k])
                means.append(torch.cat([a.means[i], a.means[j], b.means[k]]))
                covariances.append(torch.block_diag(a.covariances[i], a.covariances[j], b.covariances[k]))
    product = GaussianMixture(torch.stack(weights), torch.stack(means), torch.stack(covariances))
    return joint, product


@pytest.mark.parametrize("sigma", [0.1, 1.3, torch.tensor([0.2, 1.0, 3.0, 0.5, 0.7], dtype=F64)], ids=str)
def test_denoiser_score_and_covariance_are_those_of_the_product(sigma: Any) -> None:
    joint, product = plated()
    x = 2 * randn(5, 8, seed=3)
    torch.testing.assert_close(joint.denoise(x, sigma), product.denoise(x, sigma))
    torch.testing.assert_close(joint.score(x, sigma), product.score(x, sigma))
    found, expected = joint.covariance(x, sigma), product.covariance(x, sigma)
    assert isinstance(found, BlockCovariance)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.dense(), expected.dense())
    v = randn(4, 5, 8, seed=4)
    torch.testing.assert_close(found.solve(v, 0.3), expected.solve(v, 0.3))
    torch.testing.assert_close(found.affine(2.0, 0.1).matvec(v), expected.affine(2.0, 0.1).matvec(v))
    eye = torch.eye(8, dtype=F64)[:, None].expand(8, 5, 8)
    root = found.sample(eye).movedim(0, -1)  # columns of L
    torch.testing.assert_close(root @ root.mT, expected.dense())
    index = torch.tensor([4, 0, 0])
    torch.testing.assert_close(found.select(index).matvec(v[:, index]), expected.matvec(v)[:, index])


def test_densities_and_exact_conditioning_are_those_of_the_product() -> None:
    joint, product = plated()
    x = 2 * randn(5, 8, seed=3)
    torch.testing.assert_close(joint.log_prob(x), product.log_prob(x))
    torch.testing.assert_close(joint.mixture().log_prob(x), product.log_prob(x))
    A, y = randn(2, 8, seed=5), randn(2, seed=6)
    torch.testing.assert_close(joint.log_evidence(A, y, 0.3), product.log_evidence(A, y, 0.3))
    torch.testing.assert_close(joint.condition_linear(A, y, 0.3).mean, product.condition_linear(A, y, 0.3).mean)
    estimate = joint.log_prob_estimate(x[:2], seeded(), levels=64, repeats=16)
    assert ((estimate.value - product.log_prob(x[:2])).abs() < 5 * estimate.stderr).all()  # four in a million


def test_starts_and_draws_have_the_moments_of_the_product() -> None:
    """Starts are affine in the noise: exact. 20,000 draws; 16 means and variances at 5 standard errors: 1e-5."""
    joint, product = plated()
    center = joint.start(torch.zeros(8, dtype=F64), 2.0)
    root = joint.start(torch.eye(8, dtype=F64), 2.0) - center
    torch.testing.assert_close(center, product.mean)
    torch.testing.assert_close(root.T @ root, product.covariance_matrix + 4.0 * torch.eye(8, dtype=F64))
    draws = joint.draw((20_000,), seeded())
    d = draws - product.mean
    assert (d.mean(0).abs() < 5 * (product.variance / 20_000).sqrt()).all()
    spread = (d.square().var(0) / 20_000).sqrt()
    assert ((d.square().mean(0) - product.variance).abs() < 5 * spread).all()
    assert torch.equal(joint.draw((2,), seeded()), joint.draw((2,), seeded()))
    assert joint.expand([4]).draw((3,), seeded()).shape == (3, 4, 8)


def test_noise_space_is_that_of_the_members() -> None:
    joint, _ = plated()
    z = randn(3, 8, seed=9)
    a, b = joint.priors
    expected = torch.cat([a.from_noise(z[:, :6].reshape(3, 2, 3)).flatten(1), b.from_noise(z[:, 6:])], 1)
    assert joint.noise_shape == (8,)
    torch.testing.assert_close(joint.from_noise(z), expected)


def test_each_member_is_called_once() -> None:
    """Also where two members are one prior, and in chunks; labels reach their member."""
    one = network(isotropic())
    joint = JointPrior([one, one, network(full(), chunk=2)])
    with count_calls(joint) as count:
        joint.denoise(randn(4, 8), 1.0)
    assert (count.calls, count.evals) == (2 + 2, 12)
    with count_calls(joint.priors[2]) as count:
        joint.denoise(randn(4, 8), 1.0)
    assert (count.calls, count.evals) == (2, 4)
    assert not one.counters
    shifted = DiffusionPrior(lambda x, sigma, label: x + label[:, None], (2,), dtype=F64)
    labelled = JointPrior([shifted(label=torch.tensor([1, 5])), full()])
    x = randn(3, 6)
    torch.testing.assert_close(labelled.denoise(x, 1.0)[:, :4], x[:, :4] + torch.tensor([1, 1, 5, 5]))


def test_networks_share_one_jacobian_and_mixed_members_keep_their_own() -> None:
    x, sigma = 2 * randn(5, 5, seed=3), 0.7
    exact = JointPrior([isotropic(), full()])
    reference = exact.covariance(x, sigma)
    v = randn(2, 5, 5, seed=4)
    learned = JointPrior([network(isotropic()), network(full())])
    with count_calls(learned) as count:
        found = learned.covariance(x, sigma)
        assert isinstance(found, NetworkCovariance)
        torch.testing.assert_close(found.matvec(v), reference.matvec(v))
    assert count.vjps == 2 * 2 * 2 * 5  # two vectors, a jvp and a vjp each, two members, five rows
    torch.testing.assert_close(found.dense(), reference.dense())
    index = torch.tensor([3, 3])
    torch.testing.assert_close(found.select(index).matvec(v[:, index]), reference.matvec(v)[:, index])
    mixed = JointPrior([network(isotropic()), full()]).covariance(x, sigma)
    torch.testing.assert_close(mixed.matvec(v), reference.matvec(v))
    torch.testing.assert_close(mixed.select(index).matvec(v[:, index]), reference.matvec(v)[:, index])
    gradient = torch.func.vjp(lambda x: learned.denoise(x, sigma), x)[1](v[0])[0]
    torch.testing.assert_close(sigma**2 * gradient, reference.matvec(v[0]))


def test_capabilities_and_grid() -> None:
    exact, wide = JointPrior([isotropic(), full()]), network(full(), sigma_max=200.0, sigma_min=0.001, steps=40)
    assert {"exact_covariance", "condition_linear", "denoiser"} <= exact.capabilities
    assert "gaussian" not in exact.capabilities
    assert "exact_covariance" not in JointPrior([isotropic(), wide]).capabilities
    one = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64))
    assert "gaussian" in JointPrior([one, one]).capabilities
    many = GaussianMixture(torch.ones(60), torch.randn(60, 40, generator=seeded()), torch.ones(60))
    assert "condition_linear" not in JointPrior([many, many]).capabilities
    with pytest.raises(ValueError, match="too large"):
        JointPrior([many, many]).mixture()
    joint = JointPrior([isotropic(), wide])
    assert (joint.sigma_min, joint.sigma_max, joint.data_std) == (
        0.001,
        200.0,
        max(isotropic().data_std, wide.data_std),
    )
    assert joint.steps == 50  # the most of any member
    torch.testing.assert_close(joint.sigmas(7), log_grid(200.0, 0.001, 7))
    apart = JointPrior(
        [network(full(), sigma_max=1.0, sigma_min=0.01), network(full(), sigma_max=100.0, sigma_min=1.0)]
    )
    assert apart.steps == 100  # twice the range of either
    assert JointPrior([isotropic(), full()], steps=9).sigmas().shape == (10,)


def test_moved_priors_and_bad_members() -> None:
    joint, _ = plated()
    low = joint.to(dtype=torch.float32)
    assert low.dtype == torch.float32
    x = 2 * randn(5, 8)
    torch.testing.assert_close(low.denoise(x.float(), 1.0), joint.denoise(x, 1.0).float(), rtol=1e-4, atol=1e-4)
    assert [p.shape for p in joint.split(x)] == [Size([5, 2, 3]), Size([5, 2])]
    torch.testing.assert_close(joint.join(joint.split(x)), x)
    with pytest.raises(ValueError, match="one diffusion prior or more"):
        JointPrior([])
    with pytest.raises(ValueError, match="one diffusion prior or more"):
        JointPrior([torch.distributions.Normal(0.0, 1.0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"prior\.to"):
        JointPrior([isotropic(), full().to(dtype=torch.float32)])
    with pytest.raises(ValueError, match="label"):
        joint.denoise(x, 1.0, torch.zeros(5))
    with pytest.raises(ValueError, match="label"):
        joint.score(x, 1.0, torch.zeros(5))
    with pytest.raises(ValueError, match="shape"):
        joint.denoise(x[:, :7], 1.0)
    with pytest.raises(ValueError, match="product"):
        JointPrior([network(full()), full()]).mixture()

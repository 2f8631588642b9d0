"""The mixture against formulas written out with dense matrices, for every form of covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from sde import GaussianMixture, TweedieCovariance

F64 = torch.float64
EYE = torch.eye(6, dtype=F64)


@dataclass
class Reference:
    """A mixture as plain tensors, and its closed forms with dense matrices."""

    w: Tensor
    m: Tensor
    C: Tensor

    def log_joint(self, x: Tensor, s: float) -> Tensor:
        return dist.MultivariateNormal(self.m, self.C + s**2 * EYE).log_prob(x[:, None]) + self.w.log()

    def moments(self, x: Tensor, s: float) -> tuple[Tensor, Tensor]:
        r = self.log_joint(x, s).softmax(-1)
        gain = self.C @ torch.linalg.inv(self.C + s**2 * EYE)
        mu = self.m + torch.einsum("kij,nkj->nki", gain, x[:, None] - self.m)
        mean = torch.einsum("nk,nki->ni", r, mu)
        spread = mu - mean[:, None]
        between = torch.einsum("nk,nki,nkj->nij", r, spread, spread)
        return mean, torch.einsum("nk,kij->nij", r, self.C - gain @ self.C) + between

    def posterior(self, A: Tensor, y: Tensor, R: Tensor) -> tuple[Reference, Tensor]:
        S = A @ self.C @ A.T + R
        joint = dist.MultivariateNormal(self.m @ A.T, S).log_prob(y) + self.w.log()
        gain = self.C @ A.T @ torch.linalg.inv(S)
        C = self.C - gain @ A @ self.C
        m = self.m + torch.einsum("kij,kj->ki", gain, y - self.m @ A.T)
        return Reference(joint.softmax(0), m, (C + C.mT) / 2), joint.logsumexp(0)


def build(form: str) -> tuple[GaussianMixture, Reference]:
    """A mixture with event shape (2, 3) in a given form, and its dense twin."""
    k = 1 if form.startswith("one") else 3
    g = torch.Generator().manual_seed(5)
    w = torch.rand(k, generator=g, dtype=F64) + 0.2
    m = 2 * torch.randn(k, 6, generator=g, dtype=F64)
    variances = torch.rand(k, generator=g, dtype=F64) + 0.1
    entries = torch.rand(k, 6, generator=g, dtype=F64) + 0.1
    factor = torch.randn(k, 6, 6, generator=g, dtype=F64)
    full = factor @ factor.mT + 0.05 * EYE
    given, C = {
        "equal": (variances[:1].expand(k), variances[:1, None, None] * EYE.expand(k, 6, 6)),
        "isotropic": (variances, variances[:, None, None] * EYE),
        "diagonal": (entries.reshape(k, 2, 3), torch.diag_embed(entries)),
        "full": (full, full),
    }[form.removeprefix("one ")]
    return GaussianMixture(w, m.reshape(k, 2, 3), given), Reference(w / w.sum(), m, C)


FORMS = ["equal", "isotropic", "diagonal", "full", "one isotropic", "one diagonal", "one full"]


def points(n: int = 7, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def check_against(mixture: GaussianMixture, reference: Reference, s: float) -> None:
    """Every answer at one noise level."""
    x = points()
    flat = x.flatten(1)
    mean, covariance = reference.moments(flat, s)
    agree(mixture.log_prob_at(x, s), reference.log_joint(flat, s).logsumexp(-1))
    agree(mixture.responsibilities(x, s), reference.log_joint(flat, s).softmax(-1))
    agree(mixture.denoise(x, s), mean.reshape(x.shape))
    agree(mixture.score(x, s), ((mean - flat) / s**2).reshape(x.shape))
    operator = mixture.covariance(x, s)
    assert isinstance(operator, TweedieCovariance)
    agree(operator.mean, mean.reshape(x.shape))
    check_operator(operator, covariance)
    check_operator(operator.affine(0.3, 0.1), 0.3 * covariance + 0.1 * EYE)


def check_operator(operator: TweedieCovariance, covariance: Tensor) -> None:
    """All verbs of a covariance, against matrices."""
    agree(operator.dense(), covariance)
    v = torch.stack([points(7, 1), points(7, 2)])
    column = v.flatten(2)[..., None]
    agree(operator.matvec(v), (covariance @ column).reshape(v.shape))
    agree(operator.solve(v, 0.3), torch.linalg.solve(covariance + 0.3 * EYE, column).reshape(v.shape))
    noise = EYE.reshape(6, 1, *operator.noise_shape).expand(6, 7, *operator.noise_shape)
    root = operator.sample(noise).reshape(6, 7, 6).movedim(0, -1)
    agree(root @ root.mT, covariance)
    with pytest.raises(ValueError, match="expand them to the batch"):
        operator.matvec(v[0, :3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("s", [0.05, 0.8, 20.0])
def test_closed_forms(form: str, s: float) -> None:
    mixture, reference = build(form)
    check_against(mixture, reference, s)


@pytest.mark.parametrize("form", FORMS)
def test_conditioning_and_evidence(form: str) -> None:
    """The posterior is a mixture like any other; conditioning twice is conditioning once on both."""
    mixture, reference = build(form)
    g = torch.Generator().manual_seed(8)
    A, y = torch.randn(3, 6, generator=g, dtype=F64), torch.randn(3, generator=g, dtype=F64)
    R = torch.tensor([[0.3, 0.1, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.05]], dtype=F64)
    expected, evidence = reference.posterior(A, y, R)
    posterior = mixture.condition_linear(A.reshape(3, 2, 3), y, R)
    agree(mixture.log_evidence(A, y, R), evidence)
    agree(posterior.weights, expected.w)
    agree(posterior.means.flatten(1), expected.m)
    agree(posterior.covariances, expected.C)
    check_against(posterior, expected, 0.4)
    first = mixture.condition_linear(A[:2], y[:2], R[:2, :2])
    second = first.condition_linear(A[2:], y[2:], 0.05)
    agree(second.weights, expected.w)
    agree(second.covariance_matrix, posterior.covariance_matrix)
    agree(mixture.log_evidence(A[:2], y[:2], R[:2, :2]) + first.log_evidence(A[2:], y[2:], 0.05), evidence)
    agree(
        mixture.log_evidence(A, y, torch.tensor([0.1, 0.2, 0.3])),
        mixture.log_evidence(A, y, torch.diag(torch.tensor([0.1, 0.2, 0.3], dtype=F64))),
    )


@pytest.mark.parametrize("form", FORMS)
def test_total_moments_and_scale(form: str) -> None:
    mixture, reference = build(form)
    mean = reference.w @ reference.m
    spread = reference.m - mean
    total = torch.einsum("k,kij->ij", reference.w, reference.C + spread[:, :, None] * spread[:, None, :])
    agree(mixture.mean.flatten(), mean)
    agree(mixture.covariance_matrix, total)
    agree(mixture.variance.flatten(), total.diagonal())
    widest = float(torch.linalg.eigvalsh(total).max()) ** 0.5
    narrowest = float(torch.linalg.eigvalsh(reference.C).min()) ** 0.5
    assert mixture.data_std == pytest.approx(widest)
    assert mixture.sigma_max == pytest.approx(5 * widest)
    assert mixture.sigma_min == pytest.approx(0.5 * narrowest)
    assert mixture.sigmas(9).shape == (10,)


@pytest.mark.parametrize("form", FORMS)
def test_draws_have_the_moments_of_the_mixture(form: str) -> None:
    """Means and covariances, 27 z-scores at 5.2, with their own fourth moments: false alarm below 1e-5 each form."""
    mixture, n = build(form)[0], 40_000
    x = mixture.draw((n,), torch.Generator().manual_seed(0)).flatten(1)
    centred = x - mixture.mean.flatten()
    products = centred[:, :, None] * centred[:, None, :]
    z_mean = centred.mean(0) / (x.std(0) / n**0.5)
    z_cov = (products.mean(0) - mixture.covariance_matrix) / (products.std(0) / n**0.5)
    assert float(torch.cat([z_mean, z_cov.flatten()]).abs().max()) < 5.2
    share = (
        torch.bincount(mixture.responsibilities(x.reshape(n, 2, 3), 1e-9).argmax(-1), minlength=mixture.components) / n
    )
    assert float((share - mixture.weights).abs().max()) < 0.05


def test_rows_may_have_their_own_noise_level_and_any_batch_shape() -> None:
    for form in FORMS:
        mixture, _ = build(form)
        x = points(6)
        s = torch.tensor([0.1, 0.2, 0.5, 1.0, 3.0, 9.0], dtype=F64)
        one = torch.stack([mixture.denoise(x[i], s[i]) for i in range(6)])
        agree(mixture.denoise(x, s), one)
        agree(mixture.denoise(x.reshape(2, 3, 2, 3), s.reshape(2, 3)), one.reshape(2, 3, 2, 3))
        agree(mixture.score(x, s), torch.stack([mixture.score(x[i], s[i]) for i in range(6)]))
        operator = mixture.covariance(x.reshape(2, 3, 2, 3), s.reshape(2, 3))
        agree(
            operator.dense().reshape(6, 6, 6), torch.stack([mixture.covariance(x[i], s[i]).dense() for i in range(6)])
        )
        assert mixture.denoise(x[:0], 1.0).shape == (0, 2, 3)


def test_score_is_the_gradient_and_the_covariance_the_jacobian() -> None:
    """Tweedie's formulas by autograd, and through vmap: sigma^2 dD/dx = C."""
    for form in FORMS:
        mixture, _ = build(form)
        x = points()
        gradient = torch.func.vmap(torch.func.grad(lambda v: mixture.log_prob_at(v, 0.7)))(x)  # noqa: B023
        agree(gradient, mixture.score(x, 0.7))
        jacobian = torch.func.vmap(torch.func.jacfwd(lambda v: mixture.denoise(v, 0.7)))(x).reshape(7, 6, 6)  # noqa: B023
        agree(0.49 * jacobian, mixture.covariance(x, 0.7).dense())


def test_low_noise_keeps_its_digits() -> None:
    """At sigma = 1e-8 the score is still that of the clean density, where (D - x) / sigma^2 has lost all digits."""
    mixture, _ = build("full")
    clean = torch.func.vmap(torch.func.grad(lambda v: mixture.log_prob_at(v, 0.0)))(points())
    torch.testing.assert_close(mixture.score(points(), 1e-8), clean, rtol=1e-9, atol=1e-9)


def test_large_isotropic_problem_builds_nothing_of_size_d_by_d() -> None:
    """The standard problem at d = 800, K = 25 lives in a plane: exact against the problem there."""
    grid = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    means = torch.tensor([[8.0 * i, 8.0 * j] * 400 for i, j in grid], dtype=F64)
    g = torch.Generator().manual_seed(0)
    w = torch.rand(25, generator=g, dtype=F64)
    mixture = GaussianMixture(w, means, torch.ones(25, dtype=F64))
    x = mixture.draw((200,), g) + 40 * torch.randn(200, 800, generator=g, dtype=F64)
    operator = mixture.covariance(x, 40.0)
    assert operator.core.shape == (200, 2, 2)
    assert operator.extra is None
    # In the plane of the means: coordinates are sums over the even and the odd entries, scaled.
    plane = torch.stack([x[:, ::2].sum(1), x[:, 1::2].sum(1)], 1) / 20
    small = GaussianMixture(w, means[:, :2] * 20, torch.ones(25, dtype=F64))
    even = mixture.denoise(x, 40.0)[:, ::2].sum(1) / 20
    agree(even, small.denoise(plane, 40.0)[:, 0])
    v = torch.zeros(200, 800, dtype=F64)
    v[:, ::2] = 1 / 20
    agree((operator.matvec(v) * v).sum(1), small.covariance(plane, 40.0).dense()[:, 0, 0])
    agree(operator.matvec(operator.solve(v, 0.5)) + 0.5 * operator.solve(v, 0.5), v)
    A = torch.randn(4, 800, generator=g, dtype=F64) / 30
    posterior = mixture.condition_linear(A, torch.zeros(4, dtype=F64), 0.1)
    assert posterior.covariance(x, 1.0).core.shape[-1] == 6


def test_one_component_makes_noise_space_affine_and_exact() -> None:
    for form in FORMS:
        mixture, _ = build(form)
        assert ("gaussian" in mixture.capabilities) == (mixture.components == 1)
        if mixture.components == 1:
            z = EYE.reshape(6, 2, 3)
            root = (mixture.from_noise(z) - mixture.mean).flatten(1)
            agree(root.T @ root, mixture.covariance_matrix)
            agree(mixture.from_noise(torch.zeros(2, 3, dtype=F64)), mixture.mean)


def test_noise_space_of_a_mixture_flows_to_the_mixture() -> None:
    """Quantiles map to quantiles in one dimension.

    The flow of a one-dimensional density is monotone, so that x(z) = F^{-1}(Phi(z)); what is left is the solver.
    """
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-2.0], [1.0]], dtype=F64),
        torch.tensor([0.5, 1.0], dtype=F64),
        noise_steps=200,
    )
    z = torch.linspace(-2.5, 2.5, 21, dtype=F64)[:, None]
    x = mixture.from_noise(z)
    normal = dist.Normal(torch.zeros((), dtype=F64), 1.0)
    cdf = (mixture.weights * normal.cdf((x - mixture.means[:, 0]) / mixture.covariances[:, 0, 0].sqrt())).sum(-1)
    assert float((cdf - normal.cdf(z[:, 0])).abs().max()) < 2e-3
    z.requires_grad_()
    (slope,) = torch.autograd.grad(mixture.from_noise(z).sum(), z)
    density = (normal.log_prob(z[:, 0]) - mixture.log_prob(x)).exp()
    torch.testing.assert_close(slope[:, 0], density, rtol=0.02, atol=1e-3)


def test_start_has_the_law_of_the_noised_prior() -> None:
    for form in ("isotropic", "one full"):
        mixture, _ = build(form)
        root = (mixture.start(EYE.reshape(6, 2, 3), 3.0) - mixture.mean).flatten(1)
        agree(root.T @ root, mixture.covariance_matrix + 9 * EYE)


def test_pyro_contract() -> None:
    """expand, to_event, plates, log_prob shapes, seeding."""
    mixture, _ = build("isotropic")
    assert mixture.expand((4,)).log_prob(points(1)[0]).shape == (4,)
    assert mixture.expand((4,)).to_event(1).log_prob(points(4)).shape == ()
    assert mixture.expand((4,)).sample((3,)).shape == (3, 4, 2, 3)
    assert mixture.expand((4,)).mean.shape == (4, 2, 3)

    def model() -> Tensor:
        with pyro.plate("items", 5):
            return pyro.sample("x", mixture)

    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (5, 2, 3)
    agree(trace.log_prob_sum(), mixture.log_prob(trace.nodes["x"]["value"]).sum())
    pyro.set_rng_seed(0)
    assert torch.equal(model(), trace.nodes["x"]["value"])
    state = torch.get_rng_state()
    mixture.draw((2,), torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_density_can_be_traced_and_compiled_into_a_graph() -> None:
    """make_fx over vmap(grad) meets no branch on values once validation is off."""
    from torch.fx.experimental.proxy_tensor import make_fx

    for form in FORMS:
        mixture, _ = build(form)
        with pyro.validation_enabled(False):
            graph = make_fx(lambda x: torch.func.vmap(torch.func.grad(mixture.log_prob))(x))(points(3, 1))  # noqa: B023
        agree(graph(points(3, 2)), mixture.score(points(3, 2), 1e-12))


def test_to_moves_and_converts() -> None:
    mixture, _ = build("full")
    small = mixture.to(dtype=torch.float32)
    assert small.dtype == torch.float32
    assert mixture.dtype == F64
    torch.testing.assert_close(
        small.denoise(points().float(), 0.5), mixture.denoise(points(), 0.5).float(), rtol=1e-4, atol=1e-4
    )
    assert small.draw((2,), torch.Generator().manual_seed(0)).dtype == torch.float32


NAN = torch.full((1, 2, 3), torch.nan, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.denoise(points(), 0.0), "sigma must be positive and finite, got 0"),
        (lambda p: p.denoise(points(), -1.0), "sigma must be positive"),
        (lambda p: p.denoise(points(), float("nan")), "sigma must be positive"),
        (lambda p: p.denoise(NAN, 1.0), "6 entries that are not finite"),
        (lambda p: p.denoise(points().flatten(1), 1.0), r"events of this prior have shape \(2, 3\)"),
        (lambda p: p.denoise(points().float(), 1.0), "x is torch.float32"),
        (lambda p: p.denoise(points(), torch.ones(4)), "does not broadcast over the batch axes"),
        (lambda p: p.denoise(points(), torch.ones(7, 1, 1)), "does not broadcast over the batch axes"),
        (lambda p: p.covariance(points(), 0.0), "sigma must be positive"),
        (lambda p: p.score(NAN, 1.0), "not finite"),
        (lambda p: p.denoise(points(), 1.0, label=torch.tensor(1)), "has no labels"),
        (lambda p: p.log_prob_at(torch.zeros(3, dtype=F64), 1.0), "x has shape"),
        (lambda p: p.condition_linear(torch.zeros(2, 5), torch.zeros(2), 1.0), "A has shape"),
        (lambda p: p.condition_linear(torch.zeros(2, 6), torch.zeros(3), 1.0), "y has 3 entries"),
        (lambda p: p.condition_linear(torch.zeros(2, 6), torch.zeros(2), torch.ones(3)), "R has shape"),
        (lambda p: p.condition_linear(torch.zeros(2, 6), torch.zeros(2), 0.0), "not positive definite"),
        (lambda p: p.log_evidence(torch.zeros(2, 6), torch.full((2,), torch.nan), 1.0), "must be finite"),
        (lambda p: GaussianMixture(torch.ones(2), torch.zeros(3, 1), torch.ones(3)), "expected weights"),
        (
            lambda p: GaussianMixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2)),
            "weights must be positive",
        ),
        (lambda p: GaussianMixture(torch.ones(2), torch.zeros(2, 3), torch.ones(4)), "covariances have shape"),
        (lambda p: GaussianMixture(torch.ones(1), torch.zeros(1, 3), -torch.ones(1)), "variances must be zero or more"),
        (
            lambda p: GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])),
            "symmetric",
        ),
        (
            lambda p: GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2], [2, 1.0]]])),
            "eigenvalue",
        ),
        (lambda p: GaussianMixture(torch.ones(1), torch.full((1, 2), torch.nan), torch.ones(1)), "must be finite"),
        (
            lambda p: GaussianMixture(torch.ones(1, dtype=torch.long), torch.zeros(1, 2).long(), torch.ones(1).long()),
            "floating",
        ),
    ],
)
def test_errors_at_the_door(call: Callable[[GaussianMixture], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build("isotropic")[0])

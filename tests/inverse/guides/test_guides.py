"""Guides against closed forms: everything here is deterministic, so there is no false alarm."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inverse.guides import DPSGuide, Guided, MomentMatchingGuide, PiGDMGuide, TMPDGuide, as_denoiser
from inverse.guides.closure import floored_cholesky
from inverse.guides.spectrum import GramSpectrum
from inverse.guides.testing import check_guide, exact_guidance
from inverse.operators import Dense, FunctionOperator
from inverse.problem import DiffusionProblem
from models.references import linear_problem
from ppl import Program
from ppl.cost import Cost
from ppl.errors import CapabilityError, OptionError
from sde import DiffusionPrior, GaussianMixture, VariancePreserving

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(d: int = 3) -> GaussianMixture:
    g = seeded(1)
    root = torch.randn(d, d, generator=g, dtype=F64)
    mean = torch.randn(1, d, generator=g, dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (root @ root.T + 0.2 * torch.eye(d, dtype=F64))[None])


def isotropic(d: int = 3, sd: float = 0.7) -> GaussianMixture:
    mean = torch.linspace(-1, 1, d, dtype=F64)[None]
    return GaussianMixture(torch.ones(1, dtype=F64), mean, torch.tensor([sd**2], dtype=F64))


def mixture(d: int = 3) -> GaussianMixture:
    means = 2 * torch.randn(3, d, generator=seeded(2), dtype=F64)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), means, torch.tensor([0.5, 1.0, 0.3], dtype=F64))


def problem_of(prior: object, m: int = 2, sigma: float = 0.3, d: int = 3) -> DiffusionProblem:
    matrix = torch.randn(m, d, generator=seeded(3), dtype=F64)
    y = torch.randn(m, generator=seeded(4), dtype=F64)
    operator = Dense(matrix)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=y)

    return DiffusionProblem.of(Program(model, y))


PRIORS = {"gaussian": gaussian, "isotropic": isotropic, "mixture": mixture}
GUIDES = [
    DPSGuide(),
    DPSGuide(weight="likelihood"),
    PiGDMGuide(),
    PiGDMGuide(jacobian=False),
    PiGDMGuide(data_std=2.0),
    MomentMatchingGuide(),
    TMPDGuide(),
    TMPDGuide(jacobian=False),
]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("guide", GUIDES, ids=repr)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_guides_keep_their_contract(guide: object, prior: str, sigma: float) -> None:
    check_guide(guide, problem_of(PRIORS[prior]()), seeded(5), sigma=sigma)


class Broken:
    """A guide with one fault."""

    exact_when = ("gaussian_prior", "linear_gaussian_likelihood")
    acts_in = "denoiser"
    gradient = True

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> object:
        inner = MomentMatchingGuide().bind(problem, cost)

        def guide(x: Tensor, sigma: Tensor, sigma_next: object = None, state: object = None) -> Guided:
            g = inner(x, sigma)
            if self.fault == "sign":
                return Guided(g.prior, 2 * g.prior - g.posterior, g.log_twist)
            if self.fault == "twist":
                return Guided(g.prior, g.posterior, 1.01 * g.log_twist)
            if self.fault == "normaliser":
                return Guided(g.prior, g.posterior, g.log_twist + 1e-3)
            if self.fault == "batch" and len(x):
                return Guided(g.prior, g.posterior, g.log_twist - g.log_twist.mean())
            if self.fault == "calls":
                problem.prior.denoise(x, sigma)
            if self.fault == "in place":
                x.add_(1.0)
            if self.fault == "dtype":
                return Guided(g.prior, g.posterior.float(), g.log_twist)
            return g

        return guide


@pytest.mark.parametrize("fault", ["sign", "twist", "normaliser", "batch", "calls", "in place", "dtype"])
def test_the_contract_catches_faults(fault: str) -> None:
    check_guide(Broken("none"), problem_of(gaussian()), seeded(5))
    with pytest.raises(AssertionError):
        check_guide(Broken(fault), problem_of(gaussian()), seeded(5))


@pytest.mark.parametrize(("m", "limit"), [(2, 1), (5, 4), (9, 2)])
def test_conjugate_gradients_agree_with_the_exact_path(m: int, limit: int) -> None:
    problem = problem_of(gaussian(), m=m)
    x = problem.prior.start(problem.noise(4, seeded()), 1.0)
    exact = MomentMatchingGuide().bind(problem)(x, 1.0)
    found = MomentMatchingGuide(exact_limit=limit, cg_steps=m + 2).bind(problem)(x, 1.0)
    torch.testing.assert_close(found.posterior, exact.posterior, rtol=1e-7, atol=1e-9)
    # The determinant is that of C = v I: the same for all lanes, so differences are exact.
    torch.testing.assert_close(
        found.log_twist - found.log_twist[0], exact.log_twist - exact.log_twist[0], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("m", [4, 30])
def test_more_measurements_than_entries_are_compressed_without_loss(m: int) -> None:
    problem = problem_of(gaussian(), m=m)
    guide = MomentMatchingGuide(exact_limit=3).bind(problem)
    assert guide.small
    assert guide.data.numel() == 3
    x = problem.prior.start(problem.noise(4, seeded()), 1.0)
    mean, log_twist = exact_guidance(problem, x, 1.0)
    found = guide(x, 1.0)
    torch.testing.assert_close(found.posterior, mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.log_twist, log_twist, rtol=1e-8, atol=1e-8)


def conditional_covariance(problem: DiffusionProblem, x: Tensor, sigma: float) -> Tensor:
    """Cov[x_0 | x, y] of a Gaussian prior, from the definition."""
    B = problem.likelihood.gaussian.operator.dense()
    precision = torch.linalg.inv(problem.prior.covariance_matrix) + torch.eye(B.shape[1], dtype=F64) / sigma**2
    return torch.linalg.inv(precision + B.T @ B).expand(len(x), -1, -1)


@pytest.mark.parametrize("limit", [64, 1])
def test_the_conditioned_covariance_is_that_of_a_gaussian(limit: int) -> None:
    problem = problem_of(gaussian())
    x = problem.prior.start(problem.noise(4, seeded()), 0.8)
    found = MomentMatchingGuide(exact_limit=limit).bind(problem)(x, 0.8).covariance
    expected = conditional_covariance(problem, x, 0.8)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-7, atol=1e-9)
    moved = found.affine(0.5, 0.3).affine(2.0, 0.1)
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(moved.dense(), expected + 0.7 * eye, rtol=1e-7, atol=1e-9)
    v = torch.randn(2, *x.shape, generator=seeded(), dtype=F64)
    solved = torch.linalg.solve(expected + 0.2 * eye, v[..., None])[..., 0]
    torch.testing.assert_close(found.solve(v, 0.2), solved, rtol=1e-7, atol=1e-9)
    # The map from noise to draws is linear: its square is the covariance, with no Monte Carlo.
    size = moved.noise_shape.numel()
    basis = torch.eye(size, dtype=F64)[:, None].expand(size, len(x), size)
    columns = moved.sample(basis)
    torch.testing.assert_close(torch.einsum("zli,zlj->lij", columns, columns), moved.dense(), rtol=1e-7, atol=1e-9)


def test_plates_are_independent_copies() -> None:
    prior, matrix = gaussian(), torch.randn(2, 3, generator=seeded(3), dtype=F64)
    y = torch.randn(4, 2, generator=seeded(4), dtype=F64)

    def plated(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x @ matrix.T, 0.3).to_event(1), obs=y)

    def single(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T, 0.3).to_event(1), obs=y)

    problem = DiffusionProblem.of(Program(plated, y))
    assert problem.shape == (4, 3)
    x = torch.randn(5, 4, 3, generator=seeded(), dtype=F64)
    for guide in (*GUIDES[1:], MomentMatchingGuide(exact_limit=2, cg_steps=30)):
        check_shape = guide.bind(problem)(x, torch.tensor(1.0), torch.tensor(0.5))
        parts = [guide.bind(DiffusionProblem.of(Program(single, y[i])))(x[:, i], 1.0, 0.5) for i in range(4)]
        torch.testing.assert_close(
            check_shape.posterior, torch.stack([p.posterior for p in parts], 1), rtol=1e-7, atol=0
        )
        if not (isinstance(guide, MomentMatchingGuide) and guide.exact_limit == 2):
            total = torch.stack([p.log_twist for p in parts]).sum(0)
            torch.testing.assert_close(check_shape.log_twist, total, rtol=1e-9, atol=1e-9)
    found = MomentMatchingGuide().bind(problem)(x, 1.0).covariance
    assert found.sample(torch.zeros(5, *found.noise_shape, dtype=F64)).shape == x.shape
    blocks = found.dense().reshape(5, 4, 3, 4, 3)
    torch.testing.assert_close(blocks[:, 0, :, 0], blocks[:, 3, :, 3])
    assert blocks[:, 0, :, 1].abs().max() < 1e-12


class Shear(torch.nn.Module):
    """The denoiser of a Gaussian with an antisymmetric error, as a network's Jacobian has."""

    def __init__(self, scale: float = 1.0, twist: float = 0.0) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(3, dtype=F64) * scale)
        self.twist = twist * torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]], dtype=F64)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x @ (self.matrix + self.twist).T / (1 + sigma.square())


def test_network_costs_are_one_call_and_one_vjp_per_measurement() -> None:
    problem = problem_of(DiffusionPrior(Shear(), (3,)))
    x = torch.randn(5, 3, generator=seeded(), dtype=F64)
    for guide, calls, vjps in (
        (DPSGuide(), 1, 5),
        (PiGDMGuide(), 1, 5),
        (PiGDMGuide(jacobian=False), 1, 0),
        (MomentMatchingGuide(), 1, 10),
        (MomentMatchingGuide(exact_limit=1, cg_steps=3), 1, 15),
        (MomentMatchingGuide(exact_limit=1, cg_steps=3, symmetric=True), 4, 30),
    ):
        cost = Cost()
        with problem.counting(cost):
            guided = guide.bind(problem, cost)(x, 1.0, 0.5)
        assert (cost.denoiser_calls, cost.denoiser_evals, cost.vjps) == (calls, 5 * calls, vjps)
        assert not guided.posterior.requires_grad


def test_a_network_equal_to_the_exact_denoiser_gives_the_exact_guide() -> None:
    exact = problem_of(isotropic(sd=1.0))
    prior = exact.prior
    network = problem_of(DiffusionPrior(lambda x, sigma: prior.denoise(x, sigma), (3,), data_std=1.0, dtype=F64))
    x = torch.randn(5, 3, generator=seeded(), dtype=F64)
    for guide in (*GUIDES, MomentMatchingGuide(dense=True), MomentMatchingGuide(exact_limit=1)):
        a, b = guide.bind(exact)(x, 1.0, 0.5), guide.bind(network)(x, 1.0, 0.5)
        torch.testing.assert_close(a.posterior, b.posterior, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.log_twist, b.log_twist, rtol=1e-9, atol=1e-12)


def test_conjugate_gradients_symmetrise_a_network_where_asked() -> None:
    """Two products end the solve of two measurements, with what C is taken to be."""
    problem = problem_of(DiffusionPrior(Shear(twist=0.5), (3,)))
    x = torch.randn(2, 3, generator=seeded(), dtype=F64)
    exact = MomentMatchingGuide().bind(problem)(x, 1.0).posterior
    lopsided = MomentMatchingGuide(exact_limit=1, cg_steps=2).bind(problem)(x, 1.0).posterior
    even = MomentMatchingGuide(exact_limit=1, cg_steps=2, symmetric=True).bind(problem)(x, 1.0).posterior
    B, D = problem.likelihood.gaussian.operator.dense(), problem.prior.denoise(x, 1.0)
    r = problem.likelihood.gaussian.data - D @ B.T
    J = Shear(twist=0.5).matrix.detach() / 2  # the symmetric part
    solved = torch.linalg.solve(torch.eye(2, dtype=F64) + B @ J @ B.T, r.T).T
    torch.testing.assert_close(even, D + solved @ B @ J)
    assert (lopsided - even).abs().max() > 1e-3
    # The written-down form symmetrises S and takes the way back as it is.
    assert (exact - even).abs().max() > 1e-3


def test_the_data_covariance_of_a_network_is_symmetrised_and_floored() -> None:
    problem = problem_of(DiffusionPrior(Shear(twist=0.5), (3,)))
    x = torch.randn(2, 3, generator=seeded(), dtype=F64)
    guided = MomentMatchingGuide().bind(problem)(x, 1.0)
    B, D = problem.likelihood.gaussian.operator.dense(), problem.prior.denoise(x, 1.0)
    S = torch.eye(2, dtype=F64) + B @ B.T / 2  # the antisymmetric part of the Jacobian drops out
    r = problem.likelihood.gaussian.data - D @ B.T
    expected = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), S).log_prob(r)
    shift = problem.likelihood.gaussian.log_normaliser + math.log(2 * math.pi)
    torch.testing.assert_close(guided.log_twist, expected + shift)
    bound = MomentMatchingGuide().bind(problem_of(DiffusionPrior(Shear(scale=-5.0), (3,))))
    assert torch.isfinite(bound(x, 1.0).posterior).all()
    assert bound.floored == 2
    factor, failed = floored_cholesky(torch.tensor([[[-3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    assert failed.tolist() == [True, False]
    torch.testing.assert_close(factor[0] @ factor[0].T, torch.diag(torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize(("a", "b"), [(0.9, 0.7), (0.2, 0.0)])
def test_published_dps_is_the_published_step(a: float, b: float) -> None:
    """x_{i-1} = DDPM step - zeta grad_{x_i} ||y - A x0_hat(x_i)||, all in variance-preserving coordinates."""
    problem = problem_of(mixture())
    schedule = VariancePreserving()
    t, u = torch.tensor([a, b], dtype=F64)
    alpha, alpha_next = schedule.alpha(t), schedule.alpha(u)
    s, s_next = schedule.noise_to_signal(t), schedule.noise_to_signal(u)
    gaussian_data = problem.likelihood.gaussian
    y, matrix = gaussian_data.data * 0.3, gaussian_data.measured.dense()
    x = torch.randn(4, 3, generator=seeded(), dtype=F64).requires_grad_()  # x_i, not divided by alpha
    clean = problem.prior.denoise(x / alpha, s)
    (slope,) = torch.autograd.grad((y - clean @ matrix.T).norm(dim=1).sum(), x)
    beta = 1 - (alpha / alpha_next) ** 2
    mean = (alpha / alpha_next) * (1 - alpha_next**2) / (1 - alpha**2) * x
    mean = mean + alpha_next * beta / (1 - alpha**2) * clean - 0.3 * slope
    from sde import Ancestral

    guided = DPSGuide(zeta=0.3).bind(problem)(x.detach() / alpha, s, s_next)
    found = Ancestral().step(x.detach() / alpha, s, s_next, guided.posterior).mean
    torch.testing.assert_close(found, (mean / alpha_next).detach(), rtol=1e-9, atol=1e-12)


def test_dps_at_zero_misfit_does_not_move() -> None:
    problem = problem_of(isotropic(sd=1.0), m=3)
    y = problem.likelihood.gaussian.data * 0.3
    exact = torch.linalg.solve(problem.likelihood.gaussian.measured.dense(), y)
    x = (2 * exact - problem.prior.mean)[None]  # D(x, 1) is half way between x and the mean
    guided = DPSGuide().bind(problem)(x, 1.0, 0.5)
    assert torch.isfinite(guided.posterior).all()


def test_dps_takes_any_differentiable_likelihood() -> None:
    prior = isotropic()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(torch.exp(x)).to_event(1), obs=y)

    y = torch.tensor([1.0, 0.0, 4.0], dtype=F64)
    problem = DiffusionProblem.of(Program(model, y))
    x = torch.randn(4, 3, generator=seeded(), dtype=F64)
    check_guide(DPSGuide(weight="likelihood"), problem, seeded())
    guided = DPSGuide(weight="likelihood").bind(problem)(x, 1.0)
    leaf = x.clone().requires_grad_()
    value = dist.Poisson(prior.denoise(leaf, 1.0).exp()).log_prob(y).sum(-1)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(guided.log_twist, value.detach())
    torch.testing.assert_close(guided.posterior, prior.denoise(x, 1.0) + gradient)
    published = DPSGuide(zeta=1.0).bind(problem)(x, 1.0, 0.0)
    norm = (y - prior.denoise(leaf, 1.0).exp()).norm(dim=1)
    (slope,) = torch.autograd.grad(norm.sum(), leaf)
    torch.testing.assert_close(published.posterior, prior.denoise(x, 1.0) - math.sqrt(2) * slope)
    for guide in (PiGDMGuide(), MomentMatchingGuide()):
        with pytest.raises(CapabilityError, match="Poisson"):
            guide.bind(problem)


def test_dps_clips_when_asked() -> None:
    problem = problem_of(isotropic(sd=1.0))
    x = torch.tensor([[4.0, 0.0, -9.0]], dtype=F64)
    guided = DPSGuide(zeta=1e-9, clip=(-1.0, 1.0)).bind(problem)(x, 1.0, 0.5)
    assert guided.posterior.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(guided.prior, problem.prior.denoise(x, 1.0))


def test_a_masked_residual_leaves_masked_entries_out() -> None:
    prior, keep = isotropic(), torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(torch.exp(x)).mask(keep).to_event(1), obs=y)

    from inverse.guides.residual import residual_fn

    problem = DiffusionProblem.of(Program(model, torch.tensor([1.0, 50.0, 4.0], dtype=F64)))
    found = residual_fn(problem)(torch.zeros(2, 3, dtype=F64))
    assert found.tolist() == [[0.0, 0.0, 3.0]] * 2


def test_spectrum_of_dense_and_matrix_free_operators() -> None:
    matrix = torch.randn(20, 30, generator=seeded(), dtype=F64)
    expected = torch.linalg.slogdet(torch.eye(20, dtype=F64) + 0.7 * matrix @ matrix.T)[1]
    exact = GramSpectrum.of(Dense(matrix))
    assert exact.exact
    torch.testing.assert_close(exact.log_det(0.7), expected)

    class Large(FunctionOperator):
        """The same, which does not let itself be decomposed."""

        capabilities = frozenset({"linear"})

    large = Large(lambda x: x @ matrix.T, (30,), linear=True, dtype=F64)
    estimate = GramSpectrum.of(large)
    assert not estimate.exact
    # 16 Hutchinson probes: the standard deviation is |off-diagonal of log S| sqrt(2 / 16), 6 of them is 2e-9 in a tail.
    S = torch.eye(20, dtype=F64) + 0.7 * matrix @ matrix.T
    values, vectors = torch.linalg.eigh(S)
    log_S = vectors @ values.log().diag() @ vectors.T
    off = (log_S - log_S.diagonal().diag()).norm()
    assert abs(estimate.log_det(0.7) - expected) < 6 * off * math.sqrt(2 / 16)
    many = GramSpectrum.of(large, probes=4000)
    assert abs(many.log_det(0.7) - expected) < 6 * off * math.sqrt(2 / 4000)


def test_options_are_checked() -> None:
    for make in (
        lambda: DPSGuide(zeta=0.0),
        lambda: DPSGuide(weight="none"),
        lambda: DPSGuide(clip=(1.0, -1.0)),
        lambda: PiGDMGuide(data_std=-1.0),
        lambda: MomentMatchingGuide(exact_limit=-1),
        lambda: MomentMatchingGuide(cg_steps=0),
    ):
        with pytest.raises(OptionError):
            make()
    problem = problem_of(isotropic())
    with pytest.raises(OptionError, match="sigma_next"):
        DPSGuide().bind(problem)(torch.zeros(1, 3, dtype=F64), 1.0)
    with pytest.raises(CapabilityError, match="step"):
        as_denoiser(DPSGuide().bind(problem))(torch.zeros(1, 3, dtype=F64), 1.0)


def test_reference_problems_fit() -> None:
    reference = linear_problem(gaussian(), torch.randn(2, 3, generator=seeded(3), dtype=F64), 0.4, seeded())
    check_guide(MomentMatchingGuide(), DiffusionProblem.of(reference.program), seeded())

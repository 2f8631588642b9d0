"""DiffusionPrior around exact denoisers, and around a small network for what is about networks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from sde import (
    DDIM,
    CovarianceCorrected,
    DiffusionPrior,
    EDMDenoiser,
    GaussianMixture,
    NetworkCovariance,
    count_calls,
    edm_grid,
)

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-2.0, 0.5, 0.0], [1.0, 0.0, 2.0]], dtype=F64),
    torch.tensor([0.4, 0.8], dtype=F64),
)
GAUSSIAN = GaussianMixture(
    torch.ones(1, dtype=F64),
    torch.tensor([[0.5, -1.0]], dtype=F64),
    torch.tensor([[[1.0, 0.4], [0.4, 0.5]]], dtype=F64),
)


class Net(nn.Module):
    """A small smooth network with classes."""

    def __init__(self, event: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(event + 1, 16), nn.Tanh(), nn.Linear(16, event))
        self.embedding = nn.Embedding(3, 16)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None) -> Tensor:
        hidden = self.layers[0](torch.cat([x.flatten(1), level[:, None]], 1))
        if label is not None:
            hidden = hidden + self.embedding(label)
        return self.layers[2](torch.tanh(hidden)).reshape(x.shape)


@pytest.fixture
def network() -> EDMDenoiser:
    with torch.random.fork_rng():
        return EDMDenoiser(Net()).double().eval()


def points(n: int = 5, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def wrap(prior: GaussianMixture, **options: Any) -> DiffusionPrior:
    """A prior that knows nothing but the exact denoiser; the start is wide enough not to matter."""
    options = {"sigma_min": 1e-3, "sigma_max": 500.0, **options}
    return DiffusionPrior(prior.denoise, prior.event_shape, **options)


def test_draws_follow_the_mixture() -> None:
    """Mean, covariance and share of modes, 13 z-scores at 5: false alarm below 1e-5. 200 steps: bias below 1e-3."""
    n = 8000
    x = wrap(MIXTURE, steps=200).draw((n,), torch.Generator().manual_seed(0))
    centred = x - MIXTURE.mean
    products = centred[:, :, None] * centred[:, None, :]
    z_mean = centred.mean(0) / (x.std(0) / n**0.5)
    z_cov = (products.mean(0) - MIXTURE.covariance_matrix) / (products.std(0) / n**0.5)
    inside = MIXTURE.responsibilities(x, 0.01)[:, 0]
    z_share = (inside.mean() - 0.3) / (inside.std() / n**0.5)
    assert float(torch.cat([z_mean, z_cov.flatten(), z_share[None]]).abs().max()) < 5


def test_noise_space_is_the_flow_of_a_gaussian() -> None:
    """For N(m, C) the flow is m + (C / (C + s^2))^(1/2) (x_s - m): exact reference for the deterministic sampler."""
    prior = wrap(GAUSSIAN, noise_steps=400)
    z = points(6, 2)
    values, vectors = torch.linalg.eigh(GAUSSIAN.covariance_matrix)
    root = vectors * (values / (values + 500.0**2)).sqrt() @ vectors.T
    expected = GAUSSIAN.mean + (500 * z - GAUSSIAN.mean) @ root
    torch.testing.assert_close(prior.from_noise(z), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(prior.from_noise(z.reshape(2, 3, 2)), prior.from_noise(z).reshape(2, 3, 2))
    z.requires_grad_()
    jacobian = torch.stack([torch.autograd.grad(prior.from_noise(z)[0, i], z)[0][0] for i in range(2)])
    torch.testing.assert_close(jacobian, 500 * root, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("reference", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_log_prob_by_the_flow_is_exact(reference: GaussianMixture) -> None:
    """What is left is the shape of the start, of order (sd / sigma_max)^2, sigma_min and the solver."""
    prior = wrap(reference, log_prob_steps=80, sigma_max=2000.0)
    x = 2 * points(20, reference.event_shape[0])
    torch.testing.assert_close(prior.log_prob(x), reference.log_prob(x), rtol=0, atol=2e-4)
    assert prior.expand((20,)).log_prob(x).shape == (20,)
    assert prior.expand((4,)).log_prob(x[0]).shape == (4,)
    assert torch.equal(prior.log_prob(x), prior.log_prob(x))


def test_log_prob_has_the_score_as_gradient() -> None:
    """By autograd and through torch.func, as engines need it."""
    prior = wrap(MIXTURE, log_prob_steps=60)
    x = points(4).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    expected = MIXTURE.score(x.detach(), 1e-3)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    with pyro.validation_enabled(False):
        through = torch.func.vmap(torch.func.grad(prior.log_prob))(x.detach())
    torch.testing.assert_close(through, gradient, rtol=1e-8, atol=1e-8)


def test_probes_are_unbiased_and_fixed() -> None:
    """Hutchinson's trace over 50 seeds of one vector: z-score at 5, false alarm below 1e-5."""
    x = points(1)
    exact = wrap(MIXTURE, log_prob_steps=8, probes=0).log_prob(x)
    values = torch.stack([wrap(MIXTURE, log_prob_steps=8, probes=1, probe_seed=i).log_prob(x) for i in range(50)])
    spread = values.std()
    assert spread > 1e-3
    assert float(((values.mean() - exact) / (spread / 50**0.5)).abs()) < 5
    several = wrap(MIXTURE, log_prob_steps=8, probes=4)
    assert torch.equal(several.log_prob(x), several.log_prob(x))


@pytest.mark.parametrize("reference", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_i_mmse_agrees_within_its_own_error(reference: GaussianMixture) -> None:
    """Ten points, 32 repeats each: |t| < 6 with 31 degrees of freedom, false alarm about 1e-5."""
    x = 2 * points(10, reference.event_shape[0])
    generator = torch.Generator().manual_seed(0)
    for prior in (wrap(reference), reference):
        estimate = prior.log_prob_estimate(x, generator, levels=64, repeats=32)
        assert estimate.value.shape == estimate.stderr.shape == (10,)
        t = (estimate.value - reference.log_prob(x)) / estimate.stderr
        assert float(t.abs().max()) < 6
        assert float(estimate.stderr.max()) < 0.25


def test_i_mmse_standard_error_is_honest() -> None:
    """Over 40 independent runs of 8 repeats the t-statistics have the spread of t with 7 degrees of freedom.

    Its variance is 7/5, and the mean of 40 squares has sd near 0.44: false alarm below 1e-3.
    """
    x = points(1)
    generator = torch.Generator().manual_seed(1)
    runs = [wrap(MIXTURE).log_prob_estimate(x, generator, levels=16, repeats=8) for _ in range(40)]
    t = torch.cat([(run.value - MIXTURE.log_prob(x)) / run.stderr for run in runs])
    assert 0.3 < float(t.square().mean()) < 3.9


def test_network_covariance_is_that_of_the_mixture() -> None:
    prior = wrap(MIXTURE)
    x, s = points(4), torch.tensor([0.2, 0.5, 1.0, 4.0], dtype=F64)
    operator, exact = prior.covariance(x, s), MIXTURE.covariance(x, s)
    assert isinstance(operator, NetworkCovariance)
    v = torch.stack([points(4, seed=2), points(4, seed=3)])
    for a, b in (
        (operator.mean, exact.mean),
        (operator.dense(), exact.dense()),
        (operator.matvec(v), exact.matvec(v)),
        (operator.solve(v, 0.3), exact.solve(v, 0.3)),
        (operator.affine(0.5, 0.1).dense(), exact.affine(0.5, 0.1).dense()),
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    noise = torch.eye(3, dtype=F64)[:, None, :].expand(3, 4, 3)
    root = operator.sample(noise).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, exact.dense(), rtol=1e-8, atol=1e-10)


def test_network_covariance_is_symmetric_even_if_the_jacobian_is_not(network: EDMDenoiser) -> None:
    prior = DiffusionPrior(network, (2, 2))
    x = points(3, 4).reshape(3, 2, 2)
    operator = prior.covariance(x, 0.7)
    with torch.no_grad():
        jacobian = torch.stack([torch.func.jacrev(lambda v: network(v[None], 0.7)[0])(row) for row in x])
    jacobian = 0.49 * jacobian.reshape(3, 4, 4)
    symmetric = (jacobian + jacobian.mT) / 2
    assert float((jacobian - symmetric).abs().max()) > 1e-4
    eye = torch.eye(4, dtype=F64).reshape(4, 1, 2, 2).expand(4, 3, 2, 2)
    columns = operator.matvec(eye).reshape(4, 3, 4).movedim(0, -1)
    torch.testing.assert_close(columns, symmetric, rtol=1e-9, atol=1e-12)
    values = torch.linalg.eigvalsh(operator.dense())
    assert float(values.min()) >= -1e-12
    assert not operator.mean.requires_grad
    assert not operator.matvec(x).requires_grad
    large = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (300,), dtype=F64)
    wide = large.covariance(torch.zeros(1, 300, dtype=F64), 1.0)
    v = torch.ones(1, 300, dtype=F64)
    torch.testing.assert_close(wide.matvec(v), v / 2)
    with pytest.raises(RuntimeError, match="up to 256 entries"):
        wide.dense()


def test_covariance_corrected_runs_on_a_network_covariance() -> None:
    """Three steps suffice for a Gaussian. 5 z-scores at 4.8: false alarm below 1e-5."""
    n = 4000
    prior = wrap(GAUSSIAN, steps=3, solver=CovarianceCorrected(), sigma_min=0.1)
    x = prior.draw((n,), torch.Generator().manual_seed(0))
    exact = GAUSSIAN.covariance_matrix
    centred = x - GAUSSIAN.mean
    z_mean = centred.mean(0) / (exact.diagonal() / n).sqrt()
    spread = ((exact.diagonal()[:, None] * exact.diagonal() + exact.square()) / n).sqrt()
    z_cov = (centred.T @ centred / n - exact) / spread
    assert float(torch.cat([z_mean, z_cov.flatten()]).abs().max()) < 4.8


def test_parameters_are_tracked_for_nobody(network: EDMDenoiser) -> None:
    """Gradients reach x where asked for, and the parameters of the prior never."""
    prior = DiffusionPrior(network, (2, 2), steps=3, noise_steps=3, log_prob_steps=2)
    x = points(2, 4).reshape(2, 2, 2)
    assert not prior.denoise(x, 1.0).requires_grad
    assert not prior.log_prob(x).requires_grad
    assert not prior.from_noise(x).requires_grad
    assert not prior.sample((2,)).requires_grad
    x.requires_grad_()
    assert prior.denoise(x, 1.0).requires_grad
    with torch.no_grad():
        assert not prior.denoise(x, 1.0).requires_grad


def test_checkpointing_changes_memory_only(network: EDMDenoiser) -> None:
    gradients = []
    for checkpointing in (False, True):
        prior = DiffusionPrior(network, (2, 2), noise_steps=5, checkpointing=checkpointing)
        z = points(3, 4).reshape(3, 2, 2).requires_grad_()
        with count_calls(prior) as count:
            gradients.append(torch.autograd.grad(prior.from_noise(z).square().sum(), z)[0])
        assert count.calls == (10 if checkpointing else 5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_compiled_code_runs_where_nobody_differentiates(network: EDMDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the compiler: gradients, transforms, tangents and empty batches go to the denoiser itself."""
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: lambda *args, **kwargs: fn(*args, **kwargs) + 100)
    prior = DiffusionPrior(network, (2, 2), compile=True)
    x = points(3, 4).reshape(3, 2, 2)
    plain = DiffusionPrior(network, (2, 2)).denoise(x, 0.5)
    torch.testing.assert_close(prior.denoise(x, 0.5), plain + 100)
    torch.testing.assert_close(
        prior(label=1).denoise(x, 0.5), DiffusionPrior(network, (2, 2), label=1).denoise(x, 0.5) + 100
    )
    with torch.enable_grad():
        torch.testing.assert_close(prior.denoise(x.clone().requires_grad_(), 0.5).detach(), plain)
    torch.testing.assert_close(torch.func.vmap(lambda v: prior.denoise(v[None], 0.5)[0])(x), plain)
    torch.testing.assert_close(torch.func.jvp(lambda v: prior.denoise(v, 0.5), (x,), (x,))[0], plain)
    torch.testing.assert_close(prior.covariance(x, 0.5).mean, plain)
    assert prior.denoise(x[:0], 0.5).shape == (0, 2, 2)
    assert float(prior.to(dtype=torch.float32).denoise(x.float(), 0.5).min()) > 50
    assert float(wrap(MIXTURE, compile=True).to(dtype=F64).denoise(points(), 0.5).min()) > 50


@pytest.mark.slow
def test_compiled_code_gives_the_same(network: EDMDenoiser) -> None:
    pytest.importorskip("torch._inductor")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    x = points(3, 4).reshape(3, 2, 2)
    compiled = DiffusionPrior(network, (2, 2), compile=True).denoise(x, 0.5)
    torch.testing.assert_close(compiled, DiffusionPrior(network, (2, 2)).denoise(x, 0.5), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(network: EDMDenoiser) -> None:
    """Draws, densities and gradients to 1e-10; seven rows in chunks of three are three calls."""
    whole = DiffusionPrior(network, (2, 2), steps=6, noise_steps=4, log_prob_steps=3)
    parts = DiffusionPrior(network, (2, 2), steps=6, noise_steps=4, log_prob_steps=3, chunk=3)
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    sigma = torch.linspace(0.1, 2.0, 7, dtype=F64)
    x = points(7, 4).reshape(7, 2, 2)
    for act in (
        lambda p: p.draw((7,), torch.Generator().manual_seed(0)),
        lambda p: p(label=label).draw((), torch.Generator().manual_seed(0)),
        lambda p: p.denoise(x, sigma, label),
        lambda p: p.from_noise(x),
        lambda p: p.log_prob(x),
        lambda p: p.covariance(x, sigma).matvec(x),
    ):
        torch.testing.assert_close(act(whole), act(parts), rtol=1e-10, atol=1e-10)
    with count_calls(parts) as count:
        parts.denoise(x, 1.0)
    assert (count.calls, count.evals) == (3, 7)


def test_labels_condition_and_shape_the_batch(network: EDMDenoiser) -> None:
    prior = DiffusionPrior(network, (2, 2), steps=4, log_prob_steps=2)
    label = torch.tensor([0, 1, 2])
    given = prior(label=label)
    assert given.batch_shape == (3,)
    assert given.sample((5,)).shape == (5, 3, 2, 2)
    x = points(3, 4).reshape(3, 2, 2)
    separate = torch.stack([prior(label=int(c)).denoise(x[c], 1.0) for c in label])
    torch.testing.assert_close(given.denoise(x, 1.0), separate)
    assert not torch.allclose(given.denoise(x, 1.0), prior.denoise(x, 1.0))
    torch.testing.assert_close(given.denoise(x.expand(4, 3, 2, 2), 1.0), separate.expand(4, 3, 2, 2))
    torch.testing.assert_close(given.log_prob(x), torch.stack([prior(label=int(c)).log_prob(x[c]) for c in label]))
    assert given.log_prob(x[0]).shape == (3,)
    estimate = given.log_prob_estimate(x, torch.Generator().manual_seed(0), levels=2, repeats=2)
    assert estimate.value.shape == (3,)
    noise = given.from_noise(x)
    torch.testing.assert_close(noise, torch.stack([prior(label=int(c)).from_noise(x[c]) for c in label]))
    assert prior(label=2).batch_shape == ()
    assert prior().shape == (2, 2)


def test_pyro_contract(network: EDMDenoiser) -> None:
    """Plates, to_event, latent labels, seeding; the generator twin leaves the global state alone."""
    prior = DiffusionPrior(network, (2, 2), steps=3, log_prob_steps=2)

    def model() -> tuple[Tensor, Tensor]:
        with pyro.plate("items", 4):
            label = pyro.sample("label", dist.Categorical(torch.ones(3)))
            x = pyro.sample("x", prior(label=label))
        return x, pyro.sample("pair", prior.expand((2,)).to_event(1))

    pyro.set_rng_seed(3)
    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (4, 2, 2)
    assert trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"]).shape == (4,)
    assert trace.nodes["pair"]["fn"].log_prob(trace.nodes["pair"]["value"]).shape == ()
    assert torch.isfinite(trace.log_prob_sum())
    pyro.set_rng_seed(3)
    assert torch.equal(model()[0], trace.nodes["x"]["value"])
    state = torch.get_rng_state()
    draws = [prior.draw((2,), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_type_and_device_follow_the_denoiser(network: EDMDenoiser) -> None:
    assert DiffusionPrior(network, (2, 2)).dtype == F64
    assert DiffusionPrior(MIXTURE.denoise, (3,)).dtype == F64
    assert DiffusionPrior(lambda x, sigma: x, (3,)).dtype == torch.get_default_dtype()
    assert DiffusionPrior(lambda x, sigma: x, (3,), dtype=torch.float16).dtype == torch.float16
    single = DiffusionPrior(network, (2, 2), steps=3).to(dtype=torch.float32)
    assert single.draw((1,), torch.Generator().manual_seed(0)).dtype == torch.float32
    assert wrap(MIXTURE).to(dtype=torch.float32).denoise(torch.zeros(1, 3), 1.0).dtype == torch.float32


def test_grid_and_facts() -> None:
    prior = wrap(MIXTURE, grid=edm_grid, steps=9)
    assert torch.equal(prior.sigmas(), edm_grid(500.0, 1e-3, 9))
    assert prior.sigmas(4).shape == (5,)
    assert prior.noise_shape == (3,)
    assert prior.data_std == 100.0
    assert prior.capabilities == {"denoiser", "noise_space", "log_prob"}
    assert math.isclose(DiffusionPrior(lambda x, s: x, (3,), data_std=2.0).data_std, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiffusionPrior(3, (3,)), "denoiser must be callable"),
        (lambda: wrap(MIXTURE, data_range=(1.0, -1.0)), "data_range"),
        (lambda: wrap(MIXTURE, sigma_min=0.0), "sigma_min"),
        (lambda: wrap(MIXTURE, steps=0), "steps must be"),
        (lambda: wrap(MIXTURE, chunk=0), "chunk must be"),
        (lambda: wrap(MIXTURE, probes=-1), "probes must be"),
        (lambda: wrap(MIXTURE, log_prob_steps=0), "log_prob_steps"),
        (lambda: wrap(MIXTURE, data_std=-1.0), "data_std must be"),
        (lambda: wrap(MIXTURE, noise_solver=DDIM(0.5)), "noise_solver must be deterministic"),
        (lambda: wrap(MIXTURE).denoise(torch.zeros(1, 3, dtype=F64), 0.0), "sigma must be positive"),
        (lambda: wrap(MIXTURE).denoise(torch.full((1, 3), torch.inf, dtype=F64), 1.0), "3 entries that are not finite"),
        (lambda: wrap(MIXTURE).denoise(torch.zeros(1, 3), 1.0), "computes in torch.float64"),
        (lambda: wrap(MIXTURE).log_prob_estimate(torch.zeros(1, 3, dtype=F64), repeats=1), "repeats >= 2"),
        (
            lambda: DiffusionPrior(lambda x, s: x[:, :1], (3,)).denoise(torch.zeros(2, 3), 1.0),
            "the denoiser returned shape",
        ),
        (lambda: wrap(MIXTURE, data_range=(0.0,)), "data_range must be"),
        (lambda: wrap(MIXTURE, solver=DDIM), "solver must be one of sde's solvers"),
        (lambda: wrap(MIXTURE, solver="ddim"), "solver must be one of sde's solvers"),
        (lambda: wrap(MIXTURE, grid=3), "grid must be a function"),
        (lambda: wrap(MIXTURE, noise_steps=0), "steps must be"),
        (lambda: DiffusionPrior(lambda x, s: x, 3), "event_shape must be the shape of one draw"),
        (lambda: DiffusionPrior(lambda x, s: x, (-3,)), "event_shape must be the shape of one draw"),
        (lambda: DiffusionPrior(lambda x, s: x, (3,), dtype="float32"), "dtype must be a floating type"),
        (
            lambda: DiffusionPrior(lambda x, s: x.double(), (3,)).denoise(torch.zeros(2, 3), 1.0),
            r"returned torch\.float64 for x of torch\.float32; .*\.to\(x\.dtype\)",
        ),
        (
            lambda: DiffusionPrior(lambda x, s: x.numpy(), (3,)).denoise(torch.zeros(2, 3), 1.0),
            r"returned ndarray for x of torch\.float32",
        ),
    ],
)
def test_errors_at_the_door(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_everything_runs_where_the_denoiser_is(network: EDMDenoiser) -> None:
    """Grids stay on the CPU, values on the device, and generators may live on either."""
    mixture = MIXTURE.to("cuda")
    prior = DiffusionPrior(network.cuda(), (2, 2), steps=3, noise_steps=3, log_prob_steps=2, chunk=2)
    for p in (mixture, prior):
        for generator in (torch.Generator("cuda").manual_seed(0), torch.Generator().manual_seed(0)):
            x = p.draw((3,), generator)
            assert x.device.type == "cuda"
        assert p.sigmas().device.type == "cpu"
        operator = p.covariance(x, p.sigmas()[1])
        for value in (
            p.denoise(x, p.sigmas()[1]),
            p.from_noise(x),
            p.log_prob(x),
            p.log_prob_estimate(x, levels=2, repeats=2).value,
            operator.matvec(x),
            operator.sample(x),
            operator.solve(x, 0.1),
        ):
            assert value.device.type == "cuda"
            assert value.isfinite().all()

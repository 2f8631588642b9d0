"""Amortised posteriors against a conjugate one: normal data of unknown mean and precision.

tau ~ Gamma(3, 2), mu | tau ~ N(0, 1 / (tau / 2)), six data y ~ N(mu, 1 / tau): the posterior is of the same form.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppl
from inverse import AmortisedDenoiser, FittedDenoiser
from inverse.variational.amortised_flow import heavy_noise, push_forward
from models.references import gaussian_problem
from ppl.amortised.pairs import Pairs
from ppl.diagnostics.rank_tests import ecdf_p_values
from ppl.errors import CheckpointError, OptionError, ProgramError, ShapeError
from sde.schedule import log_grid

F64 = torch.float64
DATA, A, B, K = 6, 3.0, 2.0, 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(y: Tensor) -> None:
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(A), y.new_tensor(B)))
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), (K * tau).rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def program() -> ppl.Program:
    return ppl.Program(model, torch.zeros(DATA, dtype=F64), compile="never")


def exact(y: Tensor) -> tuple[dict[str, float], dict[str, float], float]:
    """Mean and standard deviation by site, and the log evidence."""
    n, k = len(y), K + len(y)
    m, a = float(y.sum()) / k, A + n / 2
    b = B + 0.5 * (float(y.square().sum()) - k * m**2)
    evidence = math.lgamma(a) - math.lgamma(A) + A * math.log(B) - a * math.log(b)
    evidence += 0.5 * math.log(K / k) - n / 2 * math.log(2 * math.pi)
    return {"mu": m, "tau": a / b}, {"mu": math.sqrt(b / (k * (a - 1))), "tau": math.sqrt(a) / b}, evidence


TRAINED = AmortisedDenoiser(steps=1000, width=48, depth=2, lr=4e-3, levels=20)


@pytest.fixture(scope="module")
def fitted() -> FittedDenoiser:
    """One training for all tests: some four seconds."""
    return TRAINED.fit(program(), seed=0)


def several() -> Tensor:
    """Data sets of ordinary kinds: centred, shifted, spread out, tight."""
    shape = torch.tensor([-1.3, -0.6, -0.2, 0.2, 0.6, 1.3], dtype=F64)
    return torch.stack([shape, shape + 1.0, 1.5 * shape - 0.5, 0.6 * shape + 0.3])


# -- the posterior


@pytest.mark.parametrize("i", range(4))
def test_draws_match_the_conjugate_posterior(fitted: FittedDenoiser, i: int) -> None:
    """Means within 0.25 posterior sd, sds within 20 %: what this short training reaches, Monte-Carlo error 0.02 of it.

    A network that ignored the data would miss the means by a sd and more, and the sds by a factor of 2.
    """
    y = several()[i]
    mean, sd, _ = exact(y)
    posterior = fitted.posterior(3000, seed=1, y=y)
    for name in ("mu", "tau"):
        assert abs(float(posterior.mean(name)) - mean[name]) < 0.25 * sd[name]
        assert 1 / 1.2 < float(posterior.sd(name)) / sd[name] < 1.2


@pytest.mark.parametrize("i", range(4))
def test_corrected_draws_and_evidence(fitted: FittedDenoiser, i: int) -> None:
    """Self-normalised means within 5 standard errors and the evidence too: false alarm 2e-6 for all 12 statistics."""
    y = several()[i]
    mean, sd, evidence = exact(y)
    posterior = fitted.posterior(1500, seed=2, correct=True, y=y)
    weights = posterior.weights
    assert weights is not None
    assert float(posterior.info["pareto_k"]) < 0.7
    assert float(1 / weights.square().sum()) > 0.8 * 1500
    for name in ("mu", "tau"):
        gap = posterior[name] - mean[name]
        stderr = float((weights * gap).square().sum().sqrt())
        assert abs(float((weights * gap).sum())) < 5 * stderr
        assert stderr < 0.05 * sd[name]
    estimate = posterior.log_evidence
    assert estimate is not None
    assert abs(float(estimate.value) - evidence) < 5 * float(estimate.stderr)
    assert float(estimate.stderr) < 0.02


def ranks(posterior: ppl.Posterior, truth: dict[str, Tensor], of: ppl.Program, count: int) -> Tensor:
    """Ranks (problems, 3) of mu, tau and the log likelihood among `count` draws taken by weight, without repetition."""
    weights = posterior.weights
    assert weights is not None
    rows = []
    for i in range(len(weights)):
        index = torch.multinomial(weights[i].reshape(-1), count, generator=seeded(i))
        sample = {n: posterior.flatten(n)[i][index] for n in ("tau", "mu")}
        both = {n: torch.cat([truth[n][i : i + 1], v]) for n, v in sample.items()}
        values = torch.stack([both["mu"], both["tau"], of.problem(i).log_likelihood(both)])
        rows.append((values[:, 1:] < values[:, :1]).sum(1))
    return torch.stack(rows)


def test_ranks_of_corrected_draws_are_uniform(fitted: FittedDenoiser) -> None:
    """Simulation-based calibration: ECDF p-values above 1e-4 each, family-wise false alarm 3e-4.

    Power: the ranks of the next data set's truth are refused. 80 simulations, 31 ranks of 150 weighted draws.
    """
    joint = program().simulate(seeded(7), 80)
    many = program().over(y=joint["y"])
    quick = replace(fitted, options=replace(fitted.options, levels=12))
    posterior = quick.posterior(150, seed=3, correct=True, program=many)
    assert posterior["mu"].shape == (80, 1, 150)
    found = ranks(posterior, joint, many, 31)
    assert float(ecdf_p_values(found, 31, generator=seeded(), replicates=20_000).min()) > 1e-4
    wrong = ranks(posterior, {n: v.roll(1, 0) for n, v in joint.items()}, many, 31)
    assert float(ecdf_p_values(wrong, 31, generator=seeded(), replicates=20_000).min()) < 1e-4


@pytest.mark.slow
def test_calibration_of_a_longer_training(tmp_path: Any) -> None:
    """`sbc` of the backend itself, from its file: corrected draws, family-wise false alarm 1e-3."""
    AmortisedDenoiser(steps=4000, width=64, depth=2).fit(program(), seed=0).save(tmp_path / "a.safetensors")
    backend = AmortisedDenoiser(file=tmp_path / "a.safetensors", correct=True, levels=20)
    assert ppl.diagnostics.sbc(program(), backend, simulations=200, draws=400, ranks=63, seed=1).passes(1e-3)


def test_a_diffusion_prior_is_only_simulated() -> None:
    """Means of a Gaussian posterior within 0.25 sd in three dimensions; the prior's density is never asked for."""
    problem = gaussian_problem(0.5, dim=3, observations=2)
    backend = AmortisedDenoiser(steps=800, width=32, depth=1, lr=5e-3)
    posterior = ppl.infer(problem.program, backend, draws=2000)
    sd = problem.posterior.covariance_matrix.diagonal().sqrt()
    assert float(((posterior.mean("x") - problem.posterior.mean) / sd).abs().max()) < 0.25
    assert float((posterior.sd("x") / sd).log().abs().max()) < math.log(1.25)
    with pytest.raises(ProgramError, match="NoiseSpace"):
        ppl.infer(problem.program, replace(backend, steps=2, correct=True), draws=2)


class Convolution(nn.Module):
    """A network of one's own: images in, images out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor, level: Tensor, data: Tensor) -> Tensor:
        levels = level.reshape(-1, 1, 1, 1).expand_as(x)
        return self.out(nn.functional.silu(self.hidden(torch.cat([x, data, levels], 1))))


def images(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(1, 4, 4), 1.0).to_event(3))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(3), obs=y)


def test_a_network_of_ones_own(tmp_path: Any) -> None:
    """Pixels are independent with posterior mean 0.8 y and variance 0.2: regression slope within 0.15."""
    torch.manual_seed(0)
    network = Convolution()
    before = network.out.weight.clone()
    y = torch.randn(1, 4, 4, generator=seeded())
    backend = AmortisedDenoiser(network=network, steps=500, batch=64, lr=1e-2)
    fitted = backend.fit(ppl.Program(images, torch.zeros(1, 4, 4)))
    assert torch.equal(network.out.weight, before)  # a copy was trained
    mean = fitted.posterior(500, y=y).mean("x")
    assert abs(float((mean * y).sum() / y.square().sum()) - 0.8) < 0.15
    fitted.save(tmp_path / "own.safetensors")
    target = ppl.Program(images, y)
    loaded = FittedDenoiser.load(tmp_path / "own.safetensors", target, Convolution())
    torch.testing.assert_close(
        loaded.posterior(5, seed=1)["x"], fitted.posterior(5, seed=1, y=y)["x"], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(OptionError, match="pass own="):
        FittedDenoiser.load(tmp_path / "own.safetensors", target)
    with pytest.raises(OptionError, match="cannot be called"):
        AmortisedDenoiser(network=nn.Linear(3, 3)).fit(target)


# -- the density of the draws


def test_density_is_that_of_the_discrete_map() -> None:
    """Of a linear denoiser the whole flow is affine: the law of its draws is a known Gaussian, at five coarse steps."""
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.2]], dtype=F64)
    center, one = torch.tensor([1.0, -1.0], dtype=F64), torch.eye(2, dtype=F64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return center + (x - center) @ (covariance @ torch.linalg.inv(covariance + sigma**2 * one)).T

    sigmas = log_grid(20.0, 0.1, 5)
    noise = torch.randn(6, 2, generator=seeded(), dtype=F64)
    log_noise = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
    x, log_q, folded = push_forward(denoise, noise, log_noise, sigmas)
    nothing = torch.zeros(1, dtype=F64)
    origin = push_forward(denoise, torch.zeros(1, 2, dtype=F64), nothing, sigmas)[0][0]
    matrix = torch.stack([push_forward(denoise, e[None], nothing, sigmas)[0][0] - origin for e in one], 1)
    law = torch.distributions.MultivariateNormal(origin, matrix @ matrix.T)
    torch.testing.assert_close(log_q, law.log_prob(x), rtol=1e-10, atol=1e-10)
    assert folded == 0


def test_density_of_a_curved_flow() -> None:
    """Two modes in one dimension: q(x(n)) x'(n) = p(n) by central differences."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:  # x_0 is -1 or 1, with a spread of 0.3
        total = 0.09 + sigma**2
        side = torch.tanh(x / total)
        return side + 0.09 / total * (x - side)

    sigmas = log_grid(20.0, 0.05, 15)
    noise = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    log_noise = -noise[:, 0].square()
    _, log_q, folded = push_forward(denoise, noise, log_noise, sigmas)
    step = 1e-6
    up, down = (push_forward(denoise, noise + s, log_noise, sigmas)[0] for s in (step, -step))
    slope = (up - down)[:, 0] / (2 * step)
    torch.testing.assert_close(log_q, log_noise - slope.log(), rtol=1e-6, atol=1e-6)
    assert folded == 0


def test_folding_steps_are_counted() -> None:
    noise = torch.randn(5, 1, generator=seeded(), dtype=F64)
    assert push_forward(lambda x, sigma: -x, noise, noise[:, 0], torch.tensor([1.0, 0.0], dtype=F64))[2] == 5


def test_heavy_noise_has_the_density_it_states() -> None:
    """Student's t with ten degrees: E[n^2] = 1.25; the mean of N(n) / p(n) is 1. Bounds 5 errors."""
    noise, log_noise = heavy_noise(40_000, 1, seeded())
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
    for values, expected in ((noise[:, 0].square(), 1.25), ((normal - log_noise).exp(), 1.0)):
        assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / 200


# -- simulation


def test_pairs_are_draws_of_the_joint() -> None:
    """log tau: mean digamma(3) - log 2, variance trigamma(3); Var y = E[(1 / K + 1) / tau] = 3. Bounds 5 errors."""
    z, y = Pairs(program()).draw(20_000, seeded())
    root = math.sqrt(20_000)
    log_tau = z[:, 0]
    assert abs(float(log_tau.mean()) - (0.9227843351 - math.log(2))) < 5 * float(log_tau.std()) / root
    spread = (log_tau - log_tau.mean()).square()
    assert abs(float(spread.mean()) - 0.3949340668) < 5 * float(spread.std()) / root
    square = y[:, 0].square()
    assert abs(float(square.mean()) - (1 / K + 1) * B / (A - 1)) < 5 * float(square.std()) / root
    product = y[:, 0] * y[:, 1]  # data share mu: covariance E[1 / (K tau)]
    assert abs(float(product.mean()) - B / (K * (A - 1))) < 5 * float(product.std()) / root
    assert len(torch.unique(z[:, 1])) == 20_000  # every lane has numbers of its own


def test_models_that_cannot_be_batched_run_row_by_row() -> None:
    def angle(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.VonMises(torch.tensor(0.5), torch.tensor(4.0)))
        pyro.sample("y", dist.Normal(phi, 0.1), obs=y)

    pairs = Pairs(ppl.Program(angle, torch.zeros(())))
    assert not pairs.batched
    assert "row by row" in pairs.notes[0]
    z, y = pairs.draw(400, seeded())
    assert z.shape == (400, 1)
    assert abs(float(y.mean()) - 0.5) < 5 * float(y.std()) / 20
    assert abs(float((y - z).std()) - 0.1) < 5 * 0.1 / math.sqrt(800)


def test_beta_and_dirichlet_sites_are_batched() -> None:
    """Means and variances of Beta(2, 3) in a plate and Dirichlet(2, 1, 1), with bounds of 5 standard errors."""

    def proportions(y: Tensor) -> None:
        with pyro.plate("groups", 2):
            b = pyro.sample("b", dist.Beta(torch.tensor(2.0), torch.tensor(3.0)))
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 1.0, 1.0])))
        pyro.sample("y", dist.Normal(torch.cat([b, p]), 1e-3).to_event(1), obs=y)

    pairs = Pairs(ppl.Program(proportions, torch.ones(5) / 3))
    assert pairs.batched
    _, y = pairs.draw(20_000, seeded())
    mean = torch.tensor([0.4, 0.4, 0.5, 0.25, 0.25])
    variance = torch.tensor([0.04, 0.04, 0.05, 0.0375, 0.0375])
    assert bool(((y.mean(0) - mean).abs() < 5 * (variance / 20_000).sqrt()).all())
    square = (y - mean).square()
    assert bool(((square.mean(0) - variance).abs() < 5 * square.std(0) / math.sqrt(20_000)).all())
    assert abs(float(torch.corrcoef(y.T)[0, 1])) < 5 / math.sqrt(20_000)  # groups have numbers of their own


def test_masked_data_are_not_looked_at() -> None:
    seen = torch.tensor([True, False, True])

    def masked(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    one = ppl.Program(masked, torch.zeros(3))
    assert float(Pairs(one).draw(50, seeded())[1][:, 1].abs().max()) == 0
    fitted = AmortisedDenoiser(steps=5, batch=16, width=8).fit(one)
    a, b = (fitted.posterior(4, y=torch.tensor([0.5, v, 0.1]))["mu"] for v in (0.0, 9.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (lambda y: pyro.sample("k", dist.Bernoulli(0.5)), "discrete"),
        (lambda y: pyro.factor("f", torch.zeros(())), "factor"),
        (lambda y: pyro.sample("u", dist.ImproperUniform(dist.constraints.real, (), ())), "improper"),
        (lambda y: pyro.poutine.scale(lambda: pyro.sample("s", dist.Normal(0.0, 1.0)), 2.0)(), "scaled"),
    ],
)
def test_programs_whose_simulations_are_not_their_density(extra: Any, says: str) -> None:
    def odd(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        extra(y)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError, match=says):
        AmortisedDenoiser(steps=1).fit(ppl.Program(odd, torch.tensor(0.0)))


def test_subsampled_plates_are_refused() -> None:
    def some(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ProgramError, match="'data'"):
        AmortisedDenoiser(steps=1).fit(ppl.Program(some, torch.zeros(6)))


# -- one training, many uses


def test_file_gives_the_same_draws(fitted: FittedDenoiser, tmp_path: Any) -> None:
    path = tmp_path / "a.safetensors"
    fitted.save(path)
    y = several()[1]
    loaded = FittedDenoiser.load(path, program().with_data(y=y))
    same = replace(loaded, options=fitted.options).posterior(20, seed=4)
    assert torch.equal(same["mu"], fitted.posterior(20, seed=4, y=y)["mu"])
    by_name = ppl.infer(program().with_data(y=y), AmortisedDenoiser(file=path), draws=400, chains=2, seed=0)
    assert by_name["mu"].shape == (2, 400)
    assert abs(float(by_name.mean("mu")) - exact(y)[0]["mu"]) < 0.5 * exact(y)[1]["mu"]
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="checksum"):
        FittedDenoiser.load(path, program())


def test_other_programs_are_refused(fitted: FittedDenoiser, tmp_path: Any) -> None:
    fitted.save(tmp_path / "a.safetensors")

    def louder(y: Tensor) -> None:  # three times the noise
        tau = pyro.sample("tau", dist.Gamma(y.new_tensor(A), y.new_tensor(B)))
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), (K * tau).rsqrt()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 3 * tau.rsqrt()), obs=y)

    with pytest.raises(ProgramError, match="another program"):
        FittedDenoiser.load(tmp_path / "a.safetensors", ppl.Program(louder, torch.zeros(DATA, dtype=F64)))
    with pytest.raises(ShapeError, match="sites"):
        FittedDenoiser.load(tmp_path / "a.safetensors", ppl.Program(model, torch.zeros(3, dtype=F64)))
    with pytest.raises(OptionError, match="no file"):
        ppl.infer(program(), AmortisedDenoiser(file=tmp_path / "b.safetensors"), draws=2)


def test_covariates_belong_to_the_program() -> None:
    def line(y: Tensor, x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    one = ppl.Program(line, torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    fitted = AmortisedDenoiser(steps=3, batch=8, width=8).fit(one)
    fitted.posterior(2, y=torch.ones(3))
    with pytest.raises(ProgramError, match=r"arg\.x"):
        fitted.posterior(2, x=torch.ones(3))


def test_training_goes_on(fitted: FittedDenoiser) -> None:
    more = replace(TRAINED, steps=50, lr=5e-4)
    longer = more.fit(program(), seed=1, start=fitted)
    assert len(longer.history) == 1050
    assert longer.loss[0] < fitted.loss[0] + 0.02  # it did not begin anew, which would be at 1
    assert not torch.equal(next(longer.network.parameters()), next(fitted.network.parameters()))
    with pytest.raises(OptionError, match="width"):
        replace(more, width=16).fit(program(), start=fitted)


def test_an_interrupted_training_returns_what_there_is() -> None:
    backend = AmortisedDenoiser(steps=50, batch=16, width=8)
    part = ppl.infer(program(), backend, draws=7, callback=lambda event: event.step == 9)
    assert not part.complete
    assert part["mu"].shape == (1, 7)
    assert len(part.info["loss_history"]) == 10


def test_chunks_change_nothing(fitted: FittedDenoiser) -> None:
    for correct in (False, True):
        whole, parts = (
            replace(fitted, options=replace(fitted.options, chunk=chunk, levels=5)).posterior(11, correct=correct)
            for chunk in (None, 4)
        )
        torch.testing.assert_close(parts["mu"], whole["mu"], rtol=1e-10, atol=1e-10)


def test_data_that_were_never_simulated_are_noted(fitted: FittedDenoiser) -> None:
    assert not fitted.posterior(2, y=several()[0]).attrs["notes"]
    notes = fitted.posterior(2, y=several()[0] + 1e4).attrs["notes"]
    assert any("outside all that was simulated" in note for note in notes)


def test_claims_follow_the_correction() -> None:
    assert AmortisedDenoiser.exact == AmortisedDenoiser().exact == "never"
    corrected = AmortisedDenoiser(correct=True)
    assert (corrected.exact, corrected.limit) == ("in_the_limit", ("draws",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"depth": -1}, "depth"),
        ({"lr": 0.0}, "lr"),
        ({"sigma_min": 50.0}, "sigma_min < sigma_max"),
        ({"network": lambda x, level, data: x}, "torch module"),
        ({"chunk": 0}, "chunk"),
        ({"solver": "heun"}, "solver"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        AmortisedDenoiser(**options)


def test_correction_is_for_few_dimensions() -> None:
    def wide(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(65), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(OptionError, match="65 dimensions"):
        ppl.infer(
            ppl.Program(wide, torch.zeros(65)), AmortisedDenoiser(steps=1, batch=2, width=4, correct=True), draws=1
        )

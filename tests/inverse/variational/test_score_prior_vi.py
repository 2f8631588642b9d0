"""Variational fits with a diffusion prior, against exact posteriors and evidences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import FittedScorePrior, ScorePriorVI
from inverse.variational.bounded_program import BoundedProgram
from models.references import linear_problem
from ppl import Flow, FullRank, LowRank, MeanField, Program
from ppl.errors import CapabilityError, CheckpointError, OptionError, ProgramError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


ROOT = normal(4, 4, seed=4) / 2
COVARIANCE = ROOT @ ROOT.T + 0.1 * torch.eye(4, dtype=F64)
CENTER = normal(4, seed=5)
MATRIX = normal(2, 4, seed=6)
SIGMA = 0.2


def program_of(prior: Any, y: Tensor, matrix: Tensor = MATRIX, sigma: float = SIGMA) -> Program:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T, sigma).to_event(1), obs=y)

    return Program(model, y, compile="never")


def gaussian(covariance: Tensor = COVARIANCE) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), CENTER[None], covariance[None])


Y = normal(2, seed=7)


def fitted_moments(fitted: FittedScorePrior) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x under a fitted Gaussian."""
    (density,) = fitted._bounded.densities.values()
    assert isinstance(fitted.guide, FullRank)
    return density.center + density.scale * fitted.params["loc"], density.scale**2 * fitted.guide.covariance(
        fitted.params
    )


def errors(found: tuple[Tensor, Tensor], mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Largest error of the mean and of the covariance, in coordinates where the exact one is standard."""
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
    gap = factor.T @ found[1] @ factor - torch.eye(len(mean), dtype=F64)
    return float((factor.T @ (found[0] - mean)).abs().max()), float(gap.abs().max())


@pytest.mark.parametrize("anneal", [0, 3])
def test_the_score_gives_the_exact_posterior_for_the_prior_blurred_by_its_level(anneal: int) -> None:
    """The optimum for C + s^2 I, to rounding: path gradients have no noise there. Its bound is the evidence for that
    prior, log p(y) + s^2/2 (|A' S^-1 r|^2 - tr A' S^-1 A) up to s^4."""
    s, eye = 0.2, torch.eye(4, dtype=F64)
    backend = ScorePriorVI(steps=400, sigma_min=s, anneal=anneal)
    fitted = backend.fit(program_of(gaussian(), Y), seed=0)
    blurred = gaussian(COVARIANCE + s**2 * eye)
    posterior = blurred.condition_linear(MATRIX, Y, SIGMA**2)
    mean, spread = errors(fitted_moments(fitted), posterior.mean, posterior.covariance_matrix)
    assert mean < 1e-3
    assert spread < 1e-3
    evidence = blurred.log_evidence(MATRIX, Y, SIGMA**2)
    assert abs(float(fitted.history[-1] - evidence)) < 1e-3
    plain = gaussian().log_evidence(MATRIX, Y, SIGMA**2)
    assert abs(float(evidence - plain)) > 0.01
    total = MATRIX @ COVARIANCE @ MATRIX.T + SIGMA**2 * torch.eye(2, dtype=F64)
    pull = MATRIX.T @ torch.linalg.solve(total, Y - MATRIX @ CENTER)
    slope = 0.5 * (pull.square().sum() - (MATRIX.T @ torch.linalg.solve(total, MATRIX)).trace())
    small = gaussian(COVARIANCE + 0.01**2 * eye).log_evidence(MATRIX, Y, SIGMA**2)
    torch.testing.assert_close(small - plain, 0.01**2 * slope, rtol=0.01, atol=0)
    # The reported bound is for the prior itself: log p(y) less KL(q || posterior), in closed form.
    exact = gaussian().condition_linear(MATRIX, Y, SIGMA**2)
    q, p = (
        dist.MultivariateNormal(mean, covariance)
        for mean, covariance in (fitted_moments(fitted), (exact.mean, exact.covariance_matrix))
    )
    elbo = fitted.elbo(4000, seed=1)
    gap = plain - torch.distributions.kl_divergence(q, p) - elbo.value
    assert abs(float(gap)) < 6 * float(elbo.stderr)


def test_at_the_default_level_both_bounds_give_the_posterior_and_the_evidence() -> None:
    """The score to what its level blurs; the denoising bound to the noise of its levels as well, which the learning
    rate at the end averages: 0.05 sd in the mean, 0.1 in the covariance, 0.01 nats."""
    program, exact = program_of(gaussian(), Y), gaussian().condition_linear(MATRIX, Y, SIGMA**2)
    evidence = float(gaussian().log_evidence(MATRIX, Y, SIGMA**2))
    for backend, room in (
        (ScorePriorVI(steps=400), 0.01),
        (ScorePriorVI(steps=400, bound="immse"), 0.1),
    ):
        posterior = ppl.infer(program, backend, draws=2000)
        mean, spread = errors(fitted_moments(posterior.guide), exact.mean, exact.covariance_matrix)
        assert mean < room / 2
        assert spread < room
        assert abs(evidence - float(posterior.info["elbo"])) < 6 * float(posterior.info["elbo_stderr"]) + 0.01
        assert posterior.info["pareto_k"] < 0.5
        assert posterior.info["log_prior_noise"] == 0
        # Five calls read the prior, one looks at where the fit starts; then one for each step.
        assert posterior.cost.denoiser_calls == 406
        assert (posterior.cost.vjps == 0) == (backend.bound == "score")


TWO = GaussianMixture(
    torch.ones(2, dtype=F64),
    torch.tensor([[-3.0, 1.0], [3.0, -1.0]], dtype=F64),
    torch.tensor([0.3, 0.5], dtype=F64),
)


def two_modes() -> Any:
    """Two well separated modes, which the data tell apart a little."""
    return linear_problem(TWO, torch.tensor([[0.3, 1.0]], dtype=F64), 0.8, seeded(2))


@pytest.mark.parametrize("bound", ["score", "immse"])
def test_a_flow_stays_below_the_evidence(bound: Any) -> None:
    """Strictly below, at 6 standard errors, and above what the better mode alone is worth less 0.1 nats."""
    exact = two_modes()
    program = Program(exact.program.model, exact.program.data["y"], compile="never")
    guide = Flow(transforms=1, hidden=(16,), init_scale=0.5)
    posterior = ppl.infer(program, ScorePriorVI(guide=guide, bound=bound, steps=150, lr=0.03), draws=1000)
    elbo, stderr = float(posterior.info["elbo"]), float(posterior.info["elbo_stderr"])
    assert elbo < float(exact.log_evidence) + 6 * stderr
    alone = exact.log_evidence + exact.posterior.weights.min().log()
    assert elbo > float(alone) - 6 * stderr - 0.1


def test_starts_find_both_modes_and_keep_the_better() -> None:
    """Separated components: the ELBO of a Gaussian in mode k is log p(y) + log w_k(y), up to 6 standard errors.

    Eight starts are draws of the prior: that all are of one of its two equal modes has probability 2^-7.
    """
    exact = two_modes()
    program = Program(exact.program.model, exact.program.data["y"], compile="never")
    posterior = ppl.infer(program, ScorePriorVI(steps=120, starts=9), draws=500)
    worth = exact.log_evidence + exact.posterior.weights.log()
    found = posterior.info["start_elbo"]
    assert found.shape == (9,)
    assert ((found[:, None] - worth).abs().min(1).values < 0.05).all()
    assert {int(i) for i in (found[:, None] - worth).abs().argmin(1)} == {0, 1}
    assert abs(float(posterior.info["elbo"] - worth.max())) < 6 * float(posterior.info["elbo_stderr"]) + 0.05
    best = exact.posterior.means[exact.posterior.weights.argmax()]
    assert (posterior.mean("x") - best).abs().max() < 0.3


def network(prior: GaussianMixture, low: float = 0.02) -> DiffusionPrior:
    return DiffusionPrior(
        prior.denoise,
        prior.event_shape,
        sigma_min=low,
        sigma_max=prior.sigma_max,
        data_std=prior.data_std,
        dtype=F64,
    )


@pytest.mark.parametrize("bound", ["score", "immse"])
def test_a_prior_without_a_density(bound: Any) -> None:
    """The same answers from the denoiser alone, its density estimated: the ELBO within 6 standard errors and 0.05."""
    exact = gaussian().condition_linear(MATRIX, Y, SIGMA**2)
    backend = ScorePriorVI(bound=bound, steps=300, check=8)
    posterior = ppl.infer(program_of(network(gaussian()), Y), backend, draws=500)
    mean, spread = errors(fitted_moments(posterior.guide), exact.mean, exact.covariance_matrix)
    assert mean < 0.1
    assert spread < 0.15
    evidence = float(gaussian().log_evidence(MATRIX, Y, SIGMA**2))
    assert abs(evidence - float(posterior.info["elbo"])) < 6 * float(posterior.info["elbo_stderr"]) + 0.05
    assert 0 < posterior.info["log_prior_noise"] < 2
    assert (posterior.cost.vjps == 0) == (bound == "score")
    assert posterior.cost.denoiser_evals >= 300 * 16 + 500 * 16


def test_other_latents_are_fitted_along() -> None:
    """y = A x + b + noise with b ~ N(0, 1): jointly Gaussian, whose posterior is known."""
    prior = gaussian()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(x @ MATRIX.T + b, SIGMA).to_event(1), obs=y)

    joint = torch.block_diag(COVARIANCE, torch.ones(1, 1, dtype=F64))
    center = torch.cat([CENTER, torch.zeros(1, dtype=F64)])
    design = torch.cat([MATRIX, torch.ones(2, 1, dtype=F64)], 1)
    exact = GaussianMixture(torch.ones(1, dtype=F64), center[None], joint[None]).condition_linear(design, Y, SIGMA**2)
    posterior = ppl.infer(Program(model, Y, compile="never"), ScorePriorVI(steps=400), draws=4000)
    draws = torch.cat([posterior["x"], posterior["b"][..., None]], -1)[0]
    # 4000 draws: a covariance entry in exact units has a standard error of at most sqrt(2/4000); 20 entries.
    mean, spread = errors((draws.mean(0), torch.cov(draws.T)), exact.mean, exact.covariance_matrix)
    assert mean < 6 / math.sqrt(4000) + 0.01
    assert spread < 6 * math.sqrt(2 / 4000) + 0.01
    assert "x_noise" not in posterior.draws


def test_plates_and_other_guides() -> None:
    prior = gaussian()

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 2):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Poisson((0.3 * x).exp()).to_event(1), obs=y)

    program = Program(model, torch.ones(2, 4, dtype=F64), compile="never")
    for guide in (MeanField(), LowRank(2), Flow(transforms=1, hidden=(8,))):
        for bound in ("score", "immse"):
            backend = ScorePriorVI(guide=guide, bound=bound, steps=10, levels=1)
            posterior = ppl.infer(program, backend, draws=4)
            assert posterior["x"].shape == (1, 4, 2, 4)
            assert "residual_chi" not in posterior.info


def test_files_and_continuing(tmp_path: Path) -> None:
    program = program_of(gaussian(), Y)
    backend = ScorePriorVI(steps=150, sigma_min=0.05)
    fitted = backend.fit(program, seed=0)
    path = tmp_path / "guide.safetensors"
    fitted.save(path)
    loaded = FittedScorePrior.load(path, program)
    assert torch.equal(loaded.posterior(10, seed=1)["x"], fitted.posterior(10, seed=1)["x"])
    assert loaded._bounded.densities["x"].low == 0.05
    assert loaded.elbo(50, seed=1) == fitted.elbo(50, seed=1)
    more = backend.fit(program, seed=1, start=loaded)
    assert more.history[0] > fitted.history[0]
    assert len(more.history) == 150
    other = normal(2, seed=9)
    warm = backend.fit(program.with_data(y=other), seed=0, start=fitted)
    eye = torch.eye(4, dtype=F64)
    exact = gaussian(COVARIANCE + 0.05**2 * eye).condition_linear(MATRIX, other, SIGMA**2)
    assert errors(fitted_moments(warm), exact.mean, exact.covariance_matrix)[0] < 0.05
    plain = ppl.SVI(steps=2).fit(program.noise_space("x"))
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="ScorePriorVI"):
        FittedScorePrior.load(tmp_path / "plain.safetensors", program)


def test_the_flat_view_goes_both_ways() -> None:
    flat = BoundedProgram.of(program_of(gaussian(), Y), "score").flat()
    z = normal(3, 4, seed=1)
    torch.testing.assert_close(flat.ravel(flat.constrain(z)), z)
    x = flat.constrain(z)["x"]
    expected = gaussian().log_prob(x) + dist.Normal(x @ MATRIX.T, SIGMA).log_prob(Y).sum(-1)
    torch.testing.assert_close(flat.log_density(z), expected + 4 * math.log(gaussian().data_std))


def test_options_and_programs_are_checked() -> None:
    for options in ({"bound": "elbo"}, {"levels": 0}, {"check": 0}, {"starts": 0}, {"anneal": -1}, {"sigma_min": 0.0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            ScorePriorVI(**options)
    program = program_of(gaussian(), Y)
    fitted = ScorePriorVI(steps=2).fit(program)
    with pytest.raises(OptionError, match="starts"):
        ScorePriorVI(steps=2, starts=2).fit(program, start=fitted)
    with pytest.raises(OptionError, match="sigma_max"):
        ScorePriorVI(steps=2, sigma_min=100.0).fit(program)
    with pytest.raises(ProgramError, match="one problem"):
        ScorePriorVI(steps=2).fit(program.over(y=torch.stack([Y, Y])))

    def moving(y: Tensor) -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        prior = GaussianMixture(torch.ones(1, dtype=F64), c.expand(1, 2), torch.ones(1, dtype=F64))
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="depends on other sites"):
        ScorePriorVI(steps=2).fit(Program(moving, Y, batching="loop"))
    with pytest.raises(CapabilityError, match="diffusion prior"):
        BoundedProgram.of(
            Program(
                lambda y: pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=y),
                torch.tensor(1.0),
            ),
            "score",
        )

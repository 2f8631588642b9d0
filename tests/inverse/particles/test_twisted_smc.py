"""Twisted SMC against exact posteriors and exact evidence."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse.guides import DPSGuide, PiGDMGuide
from inverse.operators import Dense
from inverse.particles import TwistedSMC, systematic
from models.references import gaussian_problem, linear_problem, mixture_problem
from ppl.diagnostics import sliced_over_floor
from ppl.diagnostics.ess import root_ess, z_bound
from ppl.program import Program
from sde import DiffusionPrior, GaussianMixture
from sde.denoiser import count_calls
from sde.solvers import DDIM, Ancestral, CovarianceCorrected, DPMSolver2M, DPMSolver2MSDE, EDMHeun

F64 = torch.float64


def hidden(prior: GaussianMixture, **options: object) -> DiffusionPrior:
    """The same prior as a network would offer it: a denoiser without an exact covariance."""
    return DiffusionPrior(
        prior.denoise, prior.event_shape, sigma_min=0.02, sigma_max=5 * prior.data_std, data_std=prior.data_std,
        dtype=F64, **options,
    )  # fmt: skip


def program_of(prior: object, matrix: Tensor, sigma: float, y: Tensor) -> Program:
    operator = Dense(matrix)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=y)

    return Program(model, y)


@pytest.fixture(scope="module")
def small() -> tuple[Program, GaussianMixture, Tensor, Tensor, float]:
    """Two dimensions, one observation, a single Gaussian without exact covariance."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64)
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.tensor([[0.5, -1.0]], dtype=F64), covariance[None])
    matrix, y, sigma = torch.tensor([[1.0, -0.5]], dtype=F64), torch.tensor([2.0], dtype=F64), 0.3
    return program_of(hidden(prior), matrix, sigma, y), prior, matrix, y, sigma


def test_systematic_resampling_rounds_expected_counts() -> None:
    """Every index is drawn floor or ceil of n w times, whatever the uniform."""
    generator = torch.Generator().manual_seed(0)
    log_weight = torch.randn(50, generator=generator, dtype=F64)
    expected = 200 * torch.softmax(log_weight, 0)
    for _ in range(20):
        counts = systematic(log_weight, 200, torch.rand((), generator=generator, dtype=F64)).bincount(minlength=50)
        assert bool((counts >= expected.floor()).all())
        assert bool((counts <= expected.ceil()).all())


def test_root_ess_counts_roots_not_particles() -> None:
    roots = torch.tensor([0, 0, 0, 0])
    assert float(root_ess(torch.zeros(4), roots, 4)) == pytest.approx(1.0)
    assert float(root_ess(torch.zeros(4), torch.arange(4), 4)) == pytest.approx(4.0)


@pytest.mark.parametrize("sigma", [0.05, 0.01])
@pytest.mark.parametrize("steps", [3, 10])
def test_gaussian_posterior_is_exact_at_any_number_of_levels(sigma: float, steps: int) -> None:
    """Mean, variance and evidence of a Gaussian problem, with as few as three levels.

    33 statistics, family-wise false alarm 1e-4. Draws are resampled from a population worth `root_ess`, so a mean
    has variance at most 1/draws + 1/root_ess. Power: with 6,000 draws a variance wrong by 10 % is seen always, and
    the plain ancestral step keeps 11 % of it at three levels.
    """
    problem = gaussian_problem(sigma)
    posterior = ppl.infer(problem.program, TwistedSMC(steps=steps), draws=6000, seed=1)
    x = posterior.flatten("x")
    size = 1 / (1 / len(x) + 1 / float(posterior.info["root_ess"]))
    variance = problem.posterior.covariance_matrix.diagonal()
    z_mean = (x.mean(0) - problem.posterior.mean) / (variance / size).sqrt()
    z_variance = ((x - problem.posterior.mean).square().mean(0) / variance - 1) * math.sqrt(size / 2)
    assert posterior.log_evidence is not None
    z_evidence = (posterior.log_evidence.value - problem.log_evidence) / posterior.log_evidence.stderr
    z = torch.cat([z_mean, z_variance, z_evidence[None]])
    assert float(z.abs().max()) < z_bound(1e-4, 33)
    assert float(posterior.info["root_ess"]) > 6000


def test_mixture_posterior_reaches_the_floor() -> None:
    """Cell mean of sliced Wasserstein over the floor for d = 8, two observations, runs merged by evidence.

    The measured cell mean is 1.05 with standard error 0.06 over 20 runs; a kernel that drops the weights scores 4 to 6.
    """
    ratios, errors = [], []
    for seed in range(6):
        problem = mixture_problem(8, 2, seed=seed)
        posterior = ppl.infer(problem.program, TwistedSMC(steps=50), draws=500, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        exact = problem.posterior
        ratio = sliced_over_floor(posterior.flatten("x"), lambda n, g, e=exact: e.draw((n,), g), generator=generator)
        ratios.append(ratio.ratio)
        assert posterior.log_evidence is not None
        errors.append(float((posterior.log_evidence.value - problem.log_evidence) / posterior.log_evidence.stderr))
    assert sum(ratios) / len(ratios) < 1.3
    # The standard error of the evidence comes from one run and is honest within 1.3; chi-square(6) at 1e-4 is 27.9.
    assert sum(e**2 for e in errors) < 1.3**2 * 27.9


@pytest.mark.parametrize(
    "guide", [PiGDMGuide(), PiGDMGuide(jacobian=False), DPSGuide(weight="likelihood")], ids=["pigdm", "scalar", "dps"]
)
def test_guide_changes_the_variance_not_the_answer(guide: object, small: tuple) -> None:
    """Evidence and moments of the discretised prior, computed by propagating its covariance, whatever the guide.

    With Ancestral() every step of the prior is affine, so the law of x_0 after ten steps is Gaussian with known
    moments and is far from the continuous prior's: a kernel with any other target fails. Three statistics, false
    alarm 1e-4 for each family; the bound uses the root ESS.
    """
    program, prior, matrix, y, sigma = small
    diffusion = program.sites["x"].distribution
    steps = 10
    mean, covariance = discretised_moments(diffusion, steps)
    target = GaussianMixture(torch.ones(1, dtype=F64), mean[None], covariance[None])
    exact, evidence = target.condition_linear(matrix, y, sigma**2), target.log_evidence(matrix, y, sigma**2)
    backend = TwistedSMC(steps=steps, guide=guide, solver=Ancestral(), particles=4000, runs=4)
    posterior = ppl.infer(program, backend, draws=4000, seed=3)
    assert posterior.log_evidence is not None
    size = 1 / (1 / 4000 + 1 / float(posterior.info["root_ess"]))
    sd = exact.covariance_matrix.diagonal().sqrt()
    z = (posterior.mean("x") - exact.mean) / sd * math.sqrt(size)
    z_evidence = (posterior.log_evidence.value - evidence) / posterior.log_evidence.stderr
    assert float(torch.cat([z, z_evidence[None]]).abs().max()) < 1.3 * z_bound(1e-4, 3)
    if isinstance(guide, DPSGuide):
        return  # its twist knows nothing of the spread of x_0: right, but with an error bar of half a nat
    # The continuous prior's evidence is another number, many standard errors away.
    continuous = prior.log_evidence(matrix, y, sigma**2)
    assert abs(float(posterior.log_evidence.value - continuous)) > 8 * float(posterior.log_evidence.stderr)


def discretised_moments(prior: DiffusionPrior, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 when the unguided ancestral sampler is run: every step is affine."""
    sigmas = prior.sigmas(steps)
    origin, basis = torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)
    start = prior.start(torch.cat([origin, basis]), sigmas[0])
    mean, root = start[0], (start[1:] - start[0]).T
    covariance = root @ root.T
    for a, b in pairwise(sigmas):

        def move(x: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return Ancestral().step(x, a, b, prior.denoise(x, a)).mean

        offset = move(origin)[0]
        matrix = (move(basis) - offset).T
        variance = Ancestral().step(origin, a, b, origin).covariance
        assert isinstance(variance, Tensor)
        mean = matrix @ mean + offset
        covariance = matrix @ covariance @ matrix.T + variance * torch.eye(2, dtype=F64)
    return mean, covariance


def test_second_order_kernel_converges_to_the_continuous_prior(small: tuple) -> None:
    """100 levels of the second-order kernel: moments and evidence within Monte-Carlo error and 1 % of a sd."""
    program, prior, matrix, y, sigma = small
    exact, evidence = prior.condition_linear(matrix, y, sigma**2), prior.log_evidence(matrix, y, sigma**2)
    posterior = ppl.infer(program, TwistedSMC(steps=100, guide=PiGDMGuide(), particles=4000), draws=4000, seed=5)
    assert posterior.log_evidence is not None
    size = 1 / (1 / 4000 + 1 / float(posterior.info["root_ess"]))
    sd = exact.covariance_matrix.diagonal().sqrt()
    bound = z_bound(1e-4, 5) / math.sqrt(size)
    assert float(((posterior.mean("x") - exact.mean) / sd).abs().max()) < bound + 0.01
    assert float((posterior.sd("x") / sd - 1).abs().max()) < bound + 0.01
    assert abs(float(posterior.log_evidence.value - evidence)) < 5 * float(posterior.log_evidence.stderr) + 0.01


def test_a_guide_on_an_exact_prior_goes_down_to_what_the_data_resolve() -> None:
    """Variance of a Gaussian posterior with the prior's own options: the grid of the closure would keep 80 to 95 %.

    Two variances, false alarm 1e-4 by the root ESS, plus 2 % of discretisation at 80 levels.
    """
    covariance = torch.tensor([[[1.0, 0.6], [0.6, 0.8]]], dtype=F64)
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), covariance)
    matrix, y = torch.tensor([[1.0, -0.5]], dtype=F64), torch.tensor([1.0], dtype=F64)
    backend = TwistedSMC(steps=80, guide=PiGDMGuide(), particles=4000, runs=4)
    posterior = ppl.infer(program_of(prior, matrix, 0.5, y), backend, draws=4000, seed=0)
    exact = prior.condition_linear(matrix, y, 0.25)
    size = 1 / (1 / 4000 + 1 / float(posterior.info["root_ess"]))
    ratio = posterior.sd("x").square() / exact.covariance_matrix.diagonal()
    assert float((ratio - 1).abs().max()) < z_bound(1e-4, 2) * math.sqrt(2 / size) + 0.02


def test_nonlinear_and_non_gaussian_data_through_a_guide_for_any_likelihood() -> None:
    """Poisson counts of an exponential: the posterior mean of one coordinate against quadrature.

    False alarm 1e-5 for one statistic, its error from the root ESS; the prior mean is 6 standard errors away.
    """
    prior = hidden(GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64)))

    def model(counts: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("counts", dist.Poisson((1 + 0.7 * x).exp()).to_event(1), obs=counts)

    program = Program(model, torch.tensor([6.0, 1.0], dtype=F64))
    backend = TwistedSMC(steps=60, guide=DPSGuide(weight="likelihood"), particles=2000, runs=3)
    posterior = ppl.infer(program, backend, draws=2000, seed=0)
    grid = torch.linspace(-6, 6, 4001, dtype=F64)
    for i, count in enumerate((6.0, 1.0)):
        log_density = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Poisson((1 + 0.7 * grid).exp()).log_prob(
            torch.tensor(count, dtype=F64)
        )
        weight = torch.softmax(log_density, 0)
        mean = (weight * grid).sum()
        sd = (weight * (grid - mean).square()).sum().sqrt()
        size = 1 / (1 / 2000 + 1 / float(posterior.info["root_ess"]))
        assert abs(float(posterior.mean("x")[i] - mean)) < (z_bound(1e-5, 2) / math.sqrt(size) + 0.02) * float(sd)


def test_same_seed_same_draws_whatever_the_chunk(small: tuple) -> None:
    program = small[0]

    def run(seed: int, chunk: int | None) -> Tensor:
        backend = TwistedSMC(steps=8, guide=PiGDMGuide(), particles=50, runs=1, chunk=chunk)
        return ppl.infer(program, backend, draws=50, seed=seed)["x"]

    torch.testing.assert_close(run(0, None), run(0, 7), rtol=0, atol=1e-10)
    assert not torch.equal(run(0, None), run(1, None))


@pytest.mark.parametrize("guide", [None, PiGDMGuide()], ids=["closure", "guided"])
def test_interrupted_run_resumes_to_the_same_draws(guide: object, small: tuple, tmp_path: object) -> None:
    """Stopped in the second run of a chain; the resumed result equals the uninterrupted one."""
    program = gaussian_problem(0.05).program if guide is None else small[0]
    backend = TwistedSMC(steps=9, guide=guide, particles=40, runs=3, threshold=1.0)
    whole = ppl.infer(program, backend, draws=120, chains=2, seed=4)
    seen = []

    def stop(event: ppl.Event) -> bool:
        seen.append(event)
        return len(seen) == 13

    folder = str(tmp_path) + "/checkpoint"
    partial = ppl.infer(
        program, backend, draws=120, chains=2, seed=4, checkpoint=folder, checkpoint_every=0, callback=stop
    )
    assert not partial.complete
    assert partial["x"].shape[1] in (0, 120)
    resumed = ppl.infer(program, backend, draws=120, chains=2, seed=4, checkpoint=folder, checkpoint_every=0)
    torch.testing.assert_close(resumed["x"], whole["x"], rtol=0, atol=1e-9)
    assert resumed.log_evidence is not None
    assert whole.log_evidence is not None
    torch.testing.assert_close(resumed.log_evidence.value, whole.log_evidence.value)


@pytest.mark.parametrize("guide", [None, PiGDMGuide()], ids=["closure", "guided"])
def test_cost_equals_a_count_by_hook(guide: object, small: tuple) -> None:
    """One denoiser call per level and run; `posterior.cost` and an independent counter agree."""
    program = gaussian_problem(0.05).program if guide is None else small[0]
    prior = program.sites["x"].distribution
    with count_calls(prior) as count:
        posterior = ppl.infer(program, TwistedSMC(steps=6, guide=guide, particles=30, runs=1), draws=30, seed=0)
    assert posterior.cost.denoiser_calls == count.calls == 6
    assert posterior.cost.denoiser_evals == count.evals == 180


def test_moments_survive_a_plate(small: tuple) -> None:
    """Two independent sites in a plate are moved together; each keeps its own posterior."""
    _, prior, matrix, y, sigma = small
    operator = Dense(matrix)
    ys = torch.stack([y, y - 3])

    def model(ys: Tensor) -> None:
        with pyro.plate("images", 2):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=ys)

    posterior = ppl.infer(Program(model, ys), TwistedSMC(steps=4), draws=4000, seed=0)
    size = 1 / (1 / 4000 + 1 / float(posterior.info["root_ess"]))
    for i in range(2):
        exact = prior.condition_linear(matrix, ys[i], sigma**2)
        sd = exact.covariance_matrix.diagonal().sqrt()
        z = (posterior.mean("x")[i] - exact.mean) / sd * math.sqrt(size)
        assert float(z.abs().max()) < z_bound(1e-4, 4)


@pytest.mark.parametrize("solver", [DPMSolver2M(), DDIM(eta=0.0), EDMHeun(), CovarianceCorrected()], ids=repr)
def test_solver_without_a_density_is_refused(solver: object, small: tuple) -> None:
    with pytest.raises(ppl.OptionError, match="stochastic solver"):
        ppl.infer(small[0], TwistedSMC(guide=PiGDMGuide(), solver=solver), draws=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps"),
        ({"particles": 1}, "particles"),
        ({"threshold": 0.0}, "threshold"),
        ({"runs": 0}, "runs"),
        ({"chunk": 0}, "chunk"),
        ({"guide": "pigdm"}, "guide"),
        ({"guide": DPSGuide(weight="published")}, "changes the step"),
    ],
)
def test_options_are_checked_when_built(options: dict, message: str) -> None:
    with pytest.raises(ppl.OptionError, match=message):
        TwistedSMC(**options)


def test_program_without_a_diffusion_site_is_refused() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ppl.CapabilityError, match="denoiser"):
        ppl.infer(Program(model, torch.tensor(1.0)), TwistedSMC(), draws=10)


def test_merged_runs_weigh_by_evidence() -> None:
    """Two runs of equal size: shares follow the evidence, and the root ESS follows the shares."""
    problem = mixture_problem(8, 1, seed=0)
    posterior = ppl.infer(problem.program, TwistedSMC(steps=20, particles=100, runs=2), draws=200, seed=0)
    assert int(posterior.info["runs"]) == 2
    share = torch.softmax(posterior.info["run_log_evidence"], 0)
    assert float(share.sum()) == pytest.approx(1.0)
    assert posterior.log_evidence is not None
    mean = torch.logsumexp(posterior.info["run_log_evidence"], 0) - math.log(2)
    torch.testing.assert_close(posterior.log_evidence.value, mean)


def test_linear_problem_matches_the_density_of_its_program() -> None:
    """The reference evidence is the integral of the program's joint density: checked by importance sampling.

    One statistic at 5 standard errors, 40,000 prior draws.
    """
    generator = torch.Generator().manual_seed(2)
    prior = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[-1.0], [2.0]], dtype=F64), torch.ones(2, dtype=F64)
    )
    problem = linear_problem(prior, torch.tensor([[1.5]], dtype=F64), 0.8, generator)
    x = prior.draw((40_000,), generator)
    weight = problem.program.log_likelihood({"x": x}).exp()
    stderr = weight.std() / math.sqrt(len(weight))
    assert abs(float(weight.mean() - problem.log_evidence.exp())) < 5 * float(stderr)


def test_solver_default_is_second_order() -> None:
    assert TwistedSMC().solver == DPMSolver2MSDE()

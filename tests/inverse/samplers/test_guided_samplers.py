"""Guided samplers against closed forms: for a Gaussian prior a sampler is an affine map of its noise.

That map is read off with one lane per noise entry, so means and covariances are exact numbers without Monte Carlo.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from affine import law as law_of
from affine import posterior_of, seeded
from torch import Tensor

import ppl
from inverse import (
    DAPS,
    DCPS,
    DDNM,
    DDRM,
    DPS,
    MGPS,
    MPGD,
    DiffPIR,
    DPSGuide,
    FreeDoM,
    GuidedSampler,
    MomentMatching,
    MomentMatchingGuide,
    PiGDM,
    PiGDMGuide,
    ReSample,
)
from inverse.problem import DiffusionProblem
from inverse.samplers import lanes as lanes_module
from inverse.samplers.guided import _Guided, guided_levels
from ppl import Program
from ppl.backend import registered
from ppl.errors import CapabilityError, NotFiniteError, OptionError
from ppl.monitor import Event
from sde import (
    DDIM,
    Ancestral,
    CovarianceCorrected,
    DiffusionPrior,
    DPMSolver2M,
    DPMSolver2MSDE,
    EDMHeun,
    GaussianMixture,
    VariancePreserving,
    count_calls,
)

F64 = torch.float64


def gaussian(d: int = 3) -> GaussianMixture:
    root = torch.randn(d, d, generator=seeded(1), dtype=F64)
    mean = torch.randn(1, d, generator=seeded(2), dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (root @ root.T + 0.2 * torch.eye(d, dtype=F64))[None])


def isotropic(d: int = 3, sd: float = 0.7) -> GaussianMixture:
    one = torch.ones(1, dtype=F64)
    return GaussianMixture(one, torch.linspace(-1, 1, d, dtype=F64)[None], sd**2 * one)


def program_of(prior: Any, m: int = 2, sigma: float = 0.3, d: int = 3) -> Program:
    matrix = torch.randn(m, d, generator=seeded(3), dtype=F64)
    y = torch.randn(m, generator=seeded(4), dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T, sigma).to_event(1), obs=y)

    return Program(model, y)


def law(sampler: GuidedSampler, problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the draws of an affine sampler, exactly."""
    method = _Guided(problem, sampler.guide.bind(problem), sampler.solver, guided_levels(sampler, problem))
    return law_of(method)


@pytest.mark.parametrize("prior", [gaussian, isotropic])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("limit", [64, 1])
def test_moment_matching_is_exact_for_gaussians_at_any_number_of_steps(prior: Any, steps: int, limit: int) -> None:
    problem = DiffusionProblem.of(program_of(prior()))
    sampler = MomentMatching(steps=steps, exact_limit=limit).sampler(problem)
    mean, covariance = law(sampler, problem)
    exact = posterior_of(problem)
    torch.testing.assert_close(mean, exact.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(covariance, exact.covariance_matrix, rtol=1e-10, atol=1e-10)


def test_moment_matching_is_exact_without_an_informed_start_only_in_the_limit() -> None:
    """From N(0, sigma_max^2) alone the start is off by what the data say of x at that level, about 1 in 25."""
    problem = DiffusionProblem.of(program_of(gaussian()))
    sampler = GuidedSampler(MomentMatchingGuide(), CovarianceCorrected(), steps=3)
    mean, _ = law(sampler, problem)
    error = (mean - posterior_of(problem).mean).abs().max()
    assert 1e-6 < error < 0.1


def ancestral_by_hand(problem: DiffusionProblem, levels: Tensor, scalar: bool) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ancestral sampling with V = v I (or 0) guidance, as matrices."""
    prior = problem.prior
    B, d = problem.likelihood.gaussian.operator.dense(), problem.likelihood.gaussian.data
    eye, C0, m0 = torch.eye(3, dtype=F64), prior.covariance_matrix, prior.mean
    mean, cov = m0.clone(), C0 + levels[0] ** 2 * eye
    for a, b in pairwise(levels):
        J = C0 @ torch.linalg.inv(C0 + a**2 * eye)  # D = m0 + J (x - m0)
        v = a**2 * prior.data_std**2 / (a**2 + prior.data_std**2) if scalar else torch.zeros((), dtype=F64)
        S = torch.eye(len(B), dtype=F64) + v * B @ B.T
        G = a**2 * J.T @ B.T @ torch.linalg.inv(S)
        slope = J - G @ B @ J
        ratio = (b / a) ** 2
        F = ratio * eye + (1 - ratio) * slope
        shift = (1 - ratio) * (m0 + G @ (d - B @ m0))
        mean = ratio * mean + (1 - ratio) * slope @ (mean - m0) + shift
        cov = F @ cov @ F.T + b**2 * (1 - ratio) * eye
    return mean, cov


@pytest.mark.parametrize(
    ("guide", "scalar"), [(PiGDMGuide(), True), (DPSGuide(weight="likelihood"), False)], ids=["PiGDM", "DPS"]
)
def test_biased_samplers_have_the_bias_of_their_formulas(guide: Any, scalar: bool) -> None:
    problem = DiffusionProblem.of(program_of(gaussian()))
    sampler = GuidedSampler(guide, Ancestral(), steps=60)
    mean, covariance = law(sampler, problem)
    expected_mean, expected = ancestral_by_hand(problem, guided_levels(sampler, problem), scalar)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-10)


def test_pigdm_converges_to_the_posterior_of_an_isotropic_gaussian() -> None:
    """First order: the error halves when the steps double."""
    problem = DiffusionProblem.of(program_of(isotropic()))
    exact = posterior_of(problem)
    errors = []
    for steps in (200, 400):
        sampler = GuidedSampler(PiGDMGuide(), Ancestral(), steps=steps, sigma_min=1e-3)
        _, covariance = law(sampler, problem)
        errors.append(float((covariance - exact.covariance_matrix).norm() / exact.covariance_matrix.norm()))
    assert errors[1] < 0.05
    assert 0.4 < errors[1] / errors[0] < 0.6


def test_dps_is_biased_however_many_steps_it_takes() -> None:
    problem = DiffusionProblem.of(program_of(isotropic()))
    exact = posterior_of(problem).covariance_matrix
    sampler = GuidedSampler(DPSGuide(weight="likelihood"), Ancestral(), steps=300, sigma_min=1e-3)
    _, covariance = law(sampler, problem)
    B = problem.likelihood.gaussian.operator.dense()
    seen = torch.linalg.svd(B)[2][0]
    assert float(seen @ covariance @ seen / (seen @ exact @ seen)) < 0.9


@pytest.mark.parametrize("solver", [DPMSolver2MSDE(), DPMSolver2M(), DDIM(), EDMHeun(), Ancestral()], ids=repr)
def test_any_solver_takes_the_exact_guide(solver: Any) -> None:
    """The guide is exact here, so what is left is solver error: small at 400 steps for all of them."""
    problem = DiffusionProblem.of(program_of(gaussian()))
    sampler = GuidedSampler(MomentMatchingGuide(), solver, steps=400)
    mean, covariance = law(sampler, problem)
    exact = posterior_of(problem)
    # The start leaves out what the data say at sigma_max.
    assert (mean - exact.mean).norm() / exact.stddev.norm() < 0.1
    assert (covariance - exact.covariance_matrix).norm() / exact.covariance_matrix.norm() < 0.1


def test_the_published_dps_forgets_the_noise_level() -> None:
    draws = {}
    for sigma in (0.1, 1.0):
        program = program_of(isotropic(), sigma=sigma)
        sampler = GuidedSampler(DPSGuide(), Ancestral(), steps=30, sigma_min=0.01)
        draws[sigma] = ppl.infer(program, sampler, draws=5)["x"]
    torch.testing.assert_close(draws[0.1], draws[1.0], rtol=1e-9, atol=1e-12)


BACKENDS: list[Any] = [
    DPS(steps=12),
    DPS(steps=12, weight="likelihood"),
    PiGDM(steps=12, jacobian=False),
    PiGDM(steps=12, solver=DPMSolver2MSDE()),
    MomentMatching(steps=4),
    MomentMatching(steps=12, solver=DPMSolver2MSDE()),
    GuidedSampler(PiGDMGuide(), EDMHeun(churn=0.2), steps=6),
    DPS(steps=12, schedule=VariancePreserving()),
    DDRM(steps=6),
    DDNM(steps=6, travel_length=2, travel_repeats=2),
    DiffPIR(steps=6),
    DAPS(steps=4),
    DAPS(steps=3, inner="hmc", inner_steps=3),
    DCPS(steps=6, blocks=2, langevin_steps=2),
    MGPS(steps=6, fit_steps=2),
    ReSample(steps=6, every=2),
    ReSample(steps=6, inner="adam", inner_steps=5),
    FreeDoM(steps=6, travel_repeats=2),
    MPGD(steps=6),
]


@pytest.mark.parametrize("backend", BACKENDS, ids=repr)
def test_chunks_change_nothing_but_memory(backend: Any) -> None:
    from dataclasses import replace

    program = program_of(gaussian())
    whole = ppl.infer(program, backend, draws=21, chains=2, seed=0)
    assert whole["x"].shape == (2, 21, 3)
    for chunk in (1, 5, 16, 100):
        part = ppl.infer(program, replace(backend, chunk=chunk), draws=21, chains=2, seed=0)
        torch.testing.assert_close(part["x"], whole["x"], rtol=1e-10, atol=1e-10)
    again = ppl.infer(program, backend, draws=21, chains=2, seed=0)
    assert torch.equal(again["x"], whole["x"])
    assert not torch.equal(ppl.infer(program, backend, draws=21, chains=2, seed=1)["x"], whole["x"])
    assert len(whole["x"].reshape(-1, 3).unique(dim=0)) == 42


@pytest.mark.parametrize("backend", BACKENDS, ids=repr)
def test_costs_are_what_the_hooks_count(backend: Any) -> None:
    network = DiffusionPrior(Linear(), (3,), sigma_max=10.0, sigma_min=0.05, data_std=1.0)
    for prior in (gaussian(), network):
        program = program_of(prior)
        with count_calls(prior) as count:
            posterior = ppl.infer(program, backend, draws=7)
        assert posterior.cost.denoiser_calls == count.calls
        assert posterior.cost.denoiser_evals == count.evals
        assert count.evals == 7 * count.calls
        assert posterior.cost.likelihood_evals > 0


class Linear(torch.nn.Module):
    """The denoiser of N(0, I) as a module with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.gain * x / (1 + sigma.square().reshape(-1, *[1] * (x.ndim - 1)))


def test_costs_by_backend() -> None:
    network = DiffusionPrior(Linear(), (3,), sigma_max=10.0, sigma_min=0.05, data_std=1.0)
    for backend, calls, vjps in (
        (DPS(steps=12), 12, 12 * 7),
        (PiGDM(steps=12), 12, 12 * 7),
        (PiGDM(steps=12, jacobian=False), 12, 0),
        (MomentMatching(steps=4), 4, 4 * 7 * 3),  # C itself: one vjp per entry of the event
        (MomentMatching(steps=4, small=2), 4, 4 * 7 * 2),  # products with the two rows of B
    ):
        cost = ppl.infer(program_of(network), backend, draws=7).cost
        assert (cost.denoiser_calls, cost.vjps) == (calls, vjps), backend


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(
    "backend",
    [
        MomentMatching(steps=6),
        PiGDM(steps=6, solver=DPMSolver2MSDE()),
        DPS(steps=6),
        DDRM(steps=6),
        DDNM(steps=6),
        DiffPIR(steps=6),
        DAPS(steps=6),
        DCPS(steps=6),
        MGPS(steps=6),
        ReSample(steps=6, every=2),
        FreeDoM(steps=6),
        MPGD(steps=6),
    ],
    ids=repr,
)
def test_a_killed_run_resumes_to_the_same_draws(backend: Any, chunk: int | None, tmp_path: Path) -> None:
    from dataclasses import replace

    backend = replace(backend, chunk=chunk)
    program = program_of(gaussian())
    whole = ppl.infer(program, backend, draws=9, chains=2, seed=3)

    class Killed(Exception):
        pass

    seen = []

    def kill(event: Event) -> None:
        seen.append(event.step)
        if len(seen) in (4, 9):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            ppl.infer(
                program,
                backend,
                draws=9,
                chains=2,
                seed=3,
                callback=kill,
                checkpoint=tmp_path / "run",
                checkpoint_every=0,
            )
        if chunk is None:
            break
    before = len(seen)
    rest = ppl.infer(
        program, backend, draws=9, chains=2, seed=3, callback=lambda e: seen.append(e.step), checkpoint=tmp_path / "run"
    )
    assert torch.equal(rest["x"], whole["x"])
    assert rest.complete
    groups = 1 if chunk is None else math.ceil(18 / chunk)
    # A step that was done but not yet reported is done: nothing runs twice.
    assert before < len(seen) <= 6 * groups
    assert rest.cost.denoiser_calls == whole.cost.denoiser_calls


def test_an_interrupted_run_returns_the_finished_groups() -> None:
    program = program_of(gaussian())
    whole = ppl.infer(program, MomentMatching(steps=4), draws=10, chains=2, seed=0)
    seen = []

    def stop(event: Event) -> bool:
        seen.append(event.step)
        return len(seen) == 10  # in the middle of the third group

    part = ppl.infer(program, MomentMatching(steps=4, chunk=5), draws=10, chains=2, seed=0, callback=stop)
    assert not part.complete
    assert part["x"].shape == (2, 5, 3)
    torch.testing.assert_close(part["x"], whole["x"][:, :5], rtol=1e-10, atol=1e-10)
    none = ppl.infer(program, MomentMatching(steps=4), draws=10, callback=lambda event: True)
    assert none["x"].shape == (1, 0, 3)
    assert not none.complete


class Failing(torch.nn.Module):
    """A denoiser of N(0, I) that fails in some way after a number of calls, or for too many rows."""

    def __init__(self, fault: str, at: int) -> None:
        super().__init__()
        self.fault, self.at, self.calls = fault, at, -1000  # a program runs its model when it is made

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        if self.fault == "memory" and len(x) > self.at:
            raise torch.OutOfMemoryError("too many rows")
        out = x / (1 + sigma.square().reshape(-1, *[1] * (x.ndim - 1)))
        return out * math.nan if self.fault == "nan" and self.calls > self.at else out


def failing(fault: str, at: int) -> Program:
    denoiser = Failing(fault, at)
    program = program_of(DiffusionPrior(denoiser, (3,), sigma_max=10.0, sigma_min=0.05, data_std=1.0, dtype=F64))
    denoiser.calls = 0
    return program


def test_out_of_memory_halves_the_group_and_changes_no_draw() -> None:
    whole = ppl.infer(failing("memory", 100), PiGDM(steps=5), draws=20)
    part = ppl.infer(failing("memory", 6), PiGDM(steps=5), draws=20)
    torch.testing.assert_close(part["x"], whole["x"], rtol=1e-10, atol=1e-10)
    assert part.complete
    assert any("chunk=5" in note for note in part.attrs["notes"])
    with pytest.raises(torch.OutOfMemoryError):
        ppl.infer(failing("memory", 0), PiGDM(steps=5), draws=20)


def test_a_nan_stops_with_its_place_and_keeps_finished_groups() -> None:
    with pytest.raises(NotFiniteError, match=r"step 3 of 5"):
        ppl.infer(failing("nan", 2), PiGDM(steps=5, jacobian=False), draws=20)
    part = ppl.infer(failing("nan", 7), PiGDM(steps=5, jacobian=False, chunk=8), draws=20)
    assert part["x"].shape == (1, 8, 3)
    assert not part.complete
    assert any("step 3 of 5" in note for note in part.attrs["notes"])


def test_backends_read_the_program() -> None:
    prior = gaussian()

    def poisson(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    def nuisance(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

    def none(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    for backend in (PiGDM(steps=3), MomentMatching(steps=3)):
        with pytest.raises(CapabilityError, match="Poisson"):
            ppl.infer(Program(poisson, y), backend, draws=3)
    assert ppl.infer(Program(poisson, y), DPS(steps=3), draws=3)["x"].shape == (1, 3, 3)
    for any_backend in (PiGDM(steps=3), MomentMatching(steps=3), DPS(steps=3)):
        with pytest.raises(CapabilityError, match=r"ppl\.Gibbs"):
            ppl.infer(Program(nuisance, y), any_backend, draws=3)
        with pytest.raises(CapabilityError, match="denoiser"):
            ppl.infer(Program(none, y.float()), any_backend, draws=3)


def test_plates_labels_and_float32() -> None:
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    program = Program(model, torch.ones(4, 3))
    for backend in (
        DPS(steps=5),
        PiGDM(steps=5),
        MomentMatching(steps=5),
        MomentMatching(steps=5, exact_limit=2),
        DDRM(steps=5),
        DDNM(steps=5),
        DiffPIR(steps=5),
        DAPS(steps=5),
        DCPS(steps=5),
        MGPS(steps=5),
        ReSample(steps=5),
        ReSample(steps=5, inner="adam", inner_steps=5),
        FreeDoM(steps=5),
        MPGD(steps=5),
    ):
        posterior = ppl.infer(program, backend, draws=6, chains=2)
        assert posterior["x"].shape == (2, 6, 4, 3)
        assert posterior["x"].dtype == torch.float32
        assert posterior.info["residual_chi"].shape == (2, 6)


def test_residual_chi_is_one_for_draws_that_fit() -> None:
    """m chi^2 at the exact posterior of a flat prior is a chi-squared of m degrees; 4000 draws, 6 standard errors."""
    prior = isotropic(sd=100.0)
    program = program_of(prior, m=3)
    chi = ppl.infer(program, MomentMatching(steps=1), draws=4000).info["residual_chi"]
    assert abs(chi.square().mean() - 1) < 6 * math.sqrt(2 / 3 / 4000) + 1e-3


def test_draws_that_miss_the_data_are_remarked_on() -> None:
    program = program_of(isotropic(), sigma=0.01)
    weak = ppl.infer(program, GuidedSampler(DPSGuide(zeta=1e-6), Ancestral(), steps=20), draws=20)
    assert any("miss the data" in note for note in weak.attrs["notes"])
    good = ppl.infer(program, MomentMatching(steps=2), draws=20)
    assert good.attrs["notes"] == []


def test_problems_have_an_axis_of_their_own() -> None:
    program = program_of(gaussian())
    ys = torch.randn(3, 2, generator=seeded(9), dtype=F64)
    posterior = ppl.infer(program.over(y=ys), MomentMatching(steps=2), draws=4)
    assert posterior["x"].shape == (3, 1, 4, 3)


def test_options_are_checked_and_backends_registered() -> None:
    for make in (
        lambda: DPS(steps=0),
        lambda: DPS(zeta=-1.0),
        lambda: PiGDM(chunk=0),
        lambda: PiGDM(data_std=0.0),
        lambda: MomentMatching(steps=1.5),  # type: ignore[arg-type]
        lambda: GuidedSampler(DPSGuide(), DPMSolver2MSDE()),
        lambda: GuidedSampler("DPS", Ancestral()),  # type: ignore[arg-type]
        lambda: GuidedSampler(PiGDMGuide(), Ancestral(), sigma_min=-1.0),
    ):
        with pytest.raises(OptionError):
            make()
    assert {"DPS", "PiGDM", "MomentMatching", "GuidedSampler", "Exact"} <= set(registered())
    with pytest.raises(OptionError, match="sigma_min"):
        ppl.infer(program_of(gaussian()), GuidedSampler(PiGDMGuide(), Ancestral(), sigma_min=1e9), draws=2)
    with pytest.raises(OptionError, match="covariance"):
        ppl.infer(program_of(gaussian()), GuidedSampler(PiGDMGuide(), CovarianceCorrected()), draws=2)


def test_noise_of_a_lane_does_not_depend_on_its_group() -> None:
    problem = DiffusionProblem.of(program_of(gaussian()))
    seeds = torch.arange(5)
    cpu = torch.device("cpu")
    whole = lanes_module.Lanes(seeds[None], 0, 70, 70, problem, cpu)
    part = lanes_module.Lanes(seeds[None], 15, 33, 70, problem, cpu)
    for shape in ((3,), (), (2, 2)):
        assert torch.equal(whole.normal(shape)[15:33], part.normal(shape))
    again = lanes_module.Lanes(seeds[None], 15, 33, 70, problem, cpu)
    again.unpack(part.pack())
    assert torch.equal(again.normal((3,)), part.normal((3,)))

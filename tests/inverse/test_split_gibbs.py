"""Split Gibbs: for a Gaussian prior a sweep is an affine map, so its stationary law is an exact number.

A sweep x -> F x + f + G z is read off with unit values of x and of the noise; the stationary moments solve
m = F m + f and S = F S F^T + G G^T.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor

import ppl
from inverse import PnPDM, SplitGibbs
from inverse.operators import FunctionOperator
from inverse.problem import DiffusionProblem
from inverse.side_by_side import SideBySide
from ppl import Program
from ppl.backend import registered
from ppl.diagnostics.ess import ess_of, z_bound
from ppl.errors import CapabilityError, NotFiniteError, OptionError
from ppl.monitor import Event
from sde import Ancestral, DiffusionPrior, DPMSolver2M, DPMSolver2MSDE, GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianMixture:
    root = torch.randn(4, 4, generator=seeded(1), dtype=F64)
    mean = torch.randn(1, 4, generator=seeded(2), dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (root @ root.T + 0.2 * torch.eye(4, dtype=F64))[None])


def program_of(prior: Any, noise: Tensor | float = 0.5, m: int = 2) -> Program:
    matrix = torch.randn(m, 4, generator=seeded(3), dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ matrix.T.to(x), torch.as_tensor(noise).to(x)).to_event(1), obs=y)

    return Program(model, torch.randn(m, generator=seeded(4), dtype=F64).to(prior.dtype))


def posterior_of(problem: DiffusionProblem, noise: Tensor | float = 1.0) -> GaussianMixture:
    gaussian = problem.likelihood.gaussian
    return problem.prior.condition_linear(gaussian.operator.dense(), gaussian.data.reshape(-1), noise)


class Counting:
    """Counts how much noise a sweep asks for, and gives none."""

    def __init__(self) -> None:
        self.size = 0

    def normal(self, shape: Size) -> Tensor:
        self.size += Size(shape).numel()
        return torch.zeros(5, *shape, dtype=F64)


class Unit:
    """Chain i has one in its i-th noise entry and zero elsewhere."""

    def __init__(self, size: int) -> None:
        self.rows, self.at = torch.eye(size, dtype=F64), 0

    def normal(self, shape: Size) -> Tensor:
        n = Size(shape).numel()
        self.at += n
        return self.rows[:, self.at - n : self.at].reshape(-1, *shape)


@torch.no_grad()
def stationary(backend: SplitGibbs | PnPDM, problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Exact stationary mean and covariance of the sweep at the final coupling."""
    splitting, counting = backend.splitting(SideBySide.alone(problem)), Counting()
    starts = torch.cat([torch.zeros(1, 4, dtype=F64), torch.eye(4, dtype=F64)])
    still, _ = splitting.sweep(starts, splitting.rhos, counting)
    f, F = still[0], (still[1:] - still[0]).T
    moved, _ = splitting.sweep(torch.zeros(counting.size, 4, dtype=F64), splitting.rhos, Unit(counting.size))
    G = (moved - f).T
    assert float(torch.linalg.eigvals(F).abs().max()) < 1
    eye = torch.eye(16, dtype=F64)
    covariance = torch.linalg.solve(eye - torch.kron(F, F), (G @ G.T).reshape(-1)).reshape(4, 4)
    return torch.linalg.solve(torch.eye(4, dtype=F64) - F, f), covariance


@pytest.mark.parametrize("noise", [0.5, torch.tensor([0.3, 2.0], dtype=F64)], ids=["equal", "unequal"])
@pytest.mark.parametrize("share", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_corrected_chain_is_exact_at_any_coupling(noise: Tensor | float, share: float, steps: int) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), noise))
    most = 1 / float(problem.likelihood.gaussian.operator.norm())
    mean, covariance = stationary(SplitGibbs(rho=share * most, steps=steps), problem)
    exact = posterior_of(problem)
    torch.testing.assert_close(mean, exact.mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(covariance, exact.covariance_matrix, rtol=1e-9, atol=1e-10)


def test_the_published_chain_sees_noisier_data() -> None:
    """Its law is the posterior for noise I + rho^2 B B^T, an error of several per cent at 0.9 / ||B||."""
    problem = DiffusionProblem.of(program_of(gaussian()))
    B = problem.likelihood.gaussian.operator.dense()
    exact = posterior_of(problem)
    errors = []
    for share in (0.9, 0.45):
        rho = share / float(torch.linalg.matrix_norm(B, 2))
        mean, covariance = stationary(PnPDM(rho=rho, steps=2), problem)
        wide = posterior_of(problem, torch.eye(2, dtype=F64) + rho**2 * B @ B.T)
        torch.testing.assert_close(mean, wide.mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(covariance, wide.covariance_matrix, rtol=1e-9, atol=1e-10)
        errors.append(float((covariance - exact.covariance_matrix).norm() / exact.covariance_matrix.norm()))
    assert 0.005 < errors[0] < 0.2
    assert 3 < errors[0] / errors[1] < 5  # O(rho^2)


def test_a_second_order_step_is_exact_only_as_steps_grow() -> None:
    problem = DiffusionProblem.of(program_of(gaussian()))
    exact = posterior_of(problem).covariance_matrix
    errors = [
        float((stationary(SplitGibbs(steps=n, solver=DPMSolver2MSDE()), problem)[1] - exact).norm() / exact.norm())
        for n in (10, 160)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05


@pytest.mark.parametrize(("warmup", "said"), [(0, True), (20, True), (53, False)])
def test_a_warmup_that_ends_far_above_the_last_coupling_is_noted(warmup: int, said: bool) -> None:
    """rho is a 234th of sigma_max, 0.9^52 a 239th; the warmup that the note asks for is enough, half of it is not."""
    program = program_of(gaussian(), 0.1)

    def notes(warmup: int) -> list[str]:
        posterior = ppl.infer(program, SplitGibbs(steps=1, warmup=warmup), draws=1, chains=1)
        return [note for note in posterior.attrs["notes"] if "the warmup ends" in note]

    found = notes(warmup)
    assert bool(found) == said
    for note in found:
        cure = int(note.split("warmup=")[1].split()[0])
        assert notes(cure) == []
        assert notes(cure // 2) != []


def test_draws_agree_with_the_posterior() -> None:
    """8 statistics by their own ESS, false alarm 1e-5. This sees warmup and bookkeeping; the law itself is above."""
    program = program_of(gaussian())
    problem = DiffusionProblem.of(program)
    posterior = ppl.infer(program, SplitGibbs(steps=1, warmup=60), draws=150, chains=40, seed=0)
    assert any("sweeps at a coupling" in note for note in posterior.attrs["notes"])
    vague = ppl.infer(program_of(gaussian(), 5.0), SplitGibbs(steps=1, warmup=0), draws=50, chains=1)
    assert vague.attrs["notes"] == []
    exact, x = posterior_of(problem), posterior["x"]
    assert x.shape == (40, 150, 4)
    z = []
    for i in range(4):
        v = (x[..., i] - exact.mean[i]) / exact.stddev[i]
        z.append(float(v.mean() * ess_of(v).sqrt()))
        square = v.square()
        z.append(float((square.mean() - 1) / square.std() * ess_of(square).sqrt()))
    assert max(map(abs, z)) < z_bound(1e-5, 8)
    assert posterior.complete
    assert posterior.info["residual_chi"].shape == (40, 150)
    assert posterior.attrs["rho"] == pytest.approx(0.9 / float(problem.likelihood.gaussian.operator.norm()))


def test_modes_get_their_weights() -> None:
    """Two modes of a mixture, 0.3 and 0.7 of the prior, seen through noise 1.5: weight, mean and square by their own
    ESS, false alarm 1e-5, and 1 % of a standard deviation for the steps of the reverse diffusion."""
    means = torch.tensor([[-1.5], [1.5]], dtype=F64)
    prior = GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), means, torch.tensor([0.25, 0.16], dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.5).to_event(1), obs=y)

    y = torch.tensor([-0.5], dtype=F64)
    exact = prior.condition_linear(torch.eye(1, dtype=F64), y, 1.5**2)
    posterior = ppl.infer(Program(model, y), SplitGibbs(steps=15, warmup=40), draws=80, chains=100)
    x = posterior["x"][..., 0]
    variance = float(exact.covariance_matrix[0, 0])
    parts = dist.Normal(exact.means[:, 0], exact.covariances[:, 0, 0].sqrt())
    negative = float((exact.weights * parts.cdf(torch.zeros(2, dtype=F64))).sum())
    assert 0.3 < negative < 0.7
    for statistic, expected in (
        (x, float(exact.mean)),
        (x.square(), variance + float(exact.mean) ** 2),
        ((x < 0).to(F64), negative),
    ):
        error = float(statistic.mean()) - expected
        sd = float(statistic.std())
        assert abs(error) < z_bound(1e-5, 3) * sd / float(ess_of(statistic).sqrt()) + 0.01 * sd


def test_metropolis_leaves_the_conditional_of_z_alone() -> None:
    """20000 exact draws of z given x, moved 3 times by large steps: 8 statistics, false alarm 1e-5.

    Without the test of Metropolis the variance is off by tens of standard errors at this step size.
    """
    problem = DiffusionProblem.of(program_of(gaussian()))
    lanes, rho = 20_000, 0.5
    closed = PnPDM(rho=rho, inner="closed").splitting(SideBySide.alone(problem))
    chain = PnPDM(rho=rho, inner="mala", inner_steps=3, step_size=0.05).splitting(SideBySide.alone(problem))

    class Normal:
        generator = seeded(7)

        def normal(self, shape: Size) -> Tensor:
            return torch.randn((lanes, *shape), generator=self.generator, dtype=F64)

    x = torch.randn(4, generator=seeded(5), dtype=F64).expand(lanes, 4)
    B, d = problem.likelihood.gaussian.operator.dense(), problem.likelihood.gaussian.data
    V = torch.linalg.inv(B.T @ B + torch.eye(4, dtype=F64) / rho**2)
    mean = V @ (B.T @ d + x[0] / rho**2)
    with torch.no_grad():
        z, _ = closed.split(x, [rho], Normal())
        moved, accepted = chain.walk(z, x, [rho], Normal())
    for found in (z, moved):
        z_mean = (found.mean(0) - mean) / (V.diagonal() / lanes).sqrt()
        z_var = ((found - mean).square().mean(0) / V.diagonal() - 1) * math.sqrt(lanes / 2)
        assert float(torch.cat([z_mean, z_var]).abs().max()) < z_bound(1e-5, 8)
    assert 0.3 < float(accepted.mean()) < 0.95
    assert float((moved - z).abs().mean()) > 0.02


def test_counts_without_a_gaussian_form() -> None:
    """y ~ Poisson(exp x), one entry: mean and sd by quadrature. 2 statistics by ESS, false alarm 1e-5, at a coupling
    that is small against the posterior (bias of the mean below 1 % of its sd)."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))

    def poisson(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    program = Program(poisson, torch.tensor([4.0], dtype=F64))
    backend = PnPDM(rho=0.1, steps=1, warmup=60, inner_steps=5, step_size=5e-3)
    posterior = ppl.infer(program, backend, draws=150, chains=40)
    grid = torch.linspace(-6, 6, 4001, dtype=F64)
    weight = torch.softmax(-0.5 * grid**2 + 4 * grid - grid.exp(), 0)
    mean = (weight * grid).sum()
    sd = (weight * (grid - mean).square()).sum().sqrt()
    v = (posterior["x"][..., 0] - mean) / sd
    assert abs(float(v.mean() * ess_of(v).sqrt())) < z_bound(1e-5, 2) + 0.01 * float(ess_of(v).sqrt())
    square = v.square()
    assert abs(float((square.mean() - 1) / square.std() * ess_of(square).sqrt())) < z_bound(1e-5, 2) + 0.5
    assert 0.3 < float(posterior.info["acceptance_rate"].mean()) <= 1
    with pytest.raises(CapabilityError, match="Poisson"):
        ppl.infer(program, SplitGibbs(), draws=2)


@pytest.mark.parametrize("backend", [SplitGibbs(steps=2, warmup=3, thin=2), PnPDM(steps=2, warmup=3)], ids=repr)
def test_a_killed_run_resumes_to_the_same_draws(backend: Any, tmp_path: Path) -> None:
    program = program_of(gaussian())
    whole = ppl.infer(program, backend, draws=5, chains=3, seed=3)

    class Killed(Exception):
        pass

    seen = []

    def kill(event: Event) -> None:
        seen.append(event.step)
        if len(seen) == 6:
            raise Killed

    where = {"checkpoint": tmp_path / "run", "checkpoint_every": 0}
    with pytest.raises(Killed):
        ppl.infer(program, backend, draws=5, chains=3, seed=3, callback=kill, **where)
    rest = ppl.infer(program, backend, draws=5, chains=3, seed=3, **where)
    assert torch.equal(rest["x"], whole["x"])
    assert rest.cost.denoiser_calls == whole.cost.denoiser_calls
    assert torch.equal(ppl.infer(program, backend, draws=5, chains=3, seed=3)["x"], whole["x"])
    part = ppl.infer(program, backend, draws=5, chains=3, seed=3, callback=lambda e: e.step == 6)
    assert not part.complete
    assert 0 < part["x"].shape[1] < 5
    assert torch.equal(part["x"], whole["x"][:, : part["x"].shape[1]])


class Linear(torch.nn.Module):
    """The denoiser of N(0, I), which fails after some calls."""

    def __init__(self, at: int = 10**9) -> None:
        super().__init__()
        self.calls, self.at = -10_000, at

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        out = x / (1 + sigma.square().reshape(-1, *[1] * (x.ndim - 1)))
        return out * math.nan if self.calls > self.at else out


def test_networks_cost_one_call_per_level_and_no_vjp() -> None:
    prior = DiffusionPrior(Linear(), (4,), sigma_max=10.0, sigma_min=0.02, data_std=1.0, dtype=F64)
    for backend in (SplitGibbs(steps=6, warmup=4), PnPDM(steps=6, warmup=4), SplitGibbs(steps=6, warmup=4, thin=1)):
        cost = ppl.infer(program_of(prior), backend, draws=3, chains=5).cost
        assert (cost.denoiser_calls, cost.denoiser_evals, cost.vjps) == (8 * 6, 8 * 6 * 5, 0)
        assert cost.likelihood_evals == 7 * 5


def test_a_nan_stops_with_its_place_and_keeps_draws() -> None:
    network = Linear()
    program = program_of(DiffusionPrior(network, (4,), sigma_max=10.0, sigma_min=0.02, data_std=1.0, dtype=F64))
    for at, kept in ((8, None), (32, 3)):
        network.calls, network.at = 0, at
        if kept is None:
            with pytest.raises(NotFiniteError, match="noise level"):
                ppl.infer(program, SplitGibbs(steps=4, warmup=4), draws=16, chains=2)
        else:
            part = ppl.infer(program, SplitGibbs(steps=4, warmup=4), draws=16, chains=2)
            assert part["x"].shape == (2, kept, 4)
            assert not part.complete


def test_plates_and_float32() -> None:
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    program = Program(model, torch.ones(4, 3))
    for backend in (
        SplitGibbs(steps=2, warmup=2),
        SplitGibbs(steps=2, warmup=2, solver=Ancestral()),
        PnPDM(steps=2, warmup=2),
        PnPDM(steps=2, warmup=2, inner="mala", inner_steps=2),
    ):
        posterior = ppl.infer(program, backend, draws=3, chains=2)
        assert posterior["x"].shape == (2, 3, 4, 3)
        assert posterior["x"].dtype == torch.float32


def test_what_cannot_be_done_is_said() -> None:
    program = program_of(gaussian())
    with pytest.raises(OptionError, match="corrected likelihood does not exist"):
        ppl.infer(program, SplitGibbs(rho=5.0), draws=1)
    with pytest.raises(OptionError, match="sigma_max"):
        ppl.infer(program, PnPDM(rho=1e6), draws=1)
    coarse = DiffusionPrior(Linear(), (4,), sigma_max=10.0, sigma_min=0.4, data_std=1.0, dtype=F64)
    with pytest.raises(OptionError, match="lowest noise level"):
        ppl.infer(program_of(coarse), SplitGibbs(), draws=1)
    with pytest.raises(OptionError, match="adds no noise"):
        SplitGibbs(solver=DPMSolver2M())
    for bad in ({"rho": -1.0}, {"steps": 0}, {"warmup": -1}, {"thin": 0}, {"decay": 1.0}):
        for kind in (SplitGibbs, PnPDM):
            with pytest.raises(OptionError):
                kind(**bad)  # type: ignore[arg-type]
    for bad in ({"inner": "hmc"}, {"inner_steps": 0}, {"step_size": 0.0}):
        with pytest.raises(OptionError):
            PnPDM(**bad)  # type: ignore[arg-type]
    n = 3000
    large = FunctionOperator(lambda x: x + 0.5 * x.roll(1, -1), (n,), linear=True, dtype=torch.float32)
    wide = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (n,), dtype=torch.float32)

    def big(y: Tensor) -> None:
        x = pyro.sample("x", wide)
        pyro.sample("y", dist.Normal(large(x), 0.1).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="SplitGibbs works in the singular basis"):
        ppl.infer(Program(big, torch.zeros(n)), SplitGibbs(steps=2), draws=1)
    assert {"SplitGibbs", "PnPDM"} <= set(registered())

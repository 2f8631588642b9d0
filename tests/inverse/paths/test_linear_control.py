"""The exact control of linear paths: its evidence and its law are those of the Gaussian vector that the path is."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.paths import LinearControl, linear_control, linear_control_of
from inverse.paths.factors import Factors
from ppl.errors import CapabilityError, ShapeError
from sde import BrownianNoise, MarkovNoise, Path, Process
from sde.increments import Noise

DOUBLE = torch.float64
# Type, H, theta, log p(1) in continuous time: the published grid with five factors, T = 2, noise 0.1.
CASES = [
    ("II", 0.3, 0.0, -1.500494),
    ("II", 0.7, 0.0, -1.545778),
    ("II", 0.7, 1.0, -1.557860),
    ("I", 0.3, 1.0, -1.480816),
    ("I", 0.7, 0.0, -1.540700),
]
HURSTS = torch.tensor([0.3, 0.5, 0.8], dtype=DOUBLE)
NOISES: dict[str, Noise] = {
    "brownian": BrownianNoise(),
    "I": MarkovNoise(HURSTS, 1.0, "I", 4),
    "II": MarkovNoise(HURSTS, 1.0, "II", 4),
    "varying": MarkovNoise(lambda t: 0.3 + 0.4 * t, 1.0, "II", 4),
    "varying, I": MarkovNoise(lambda t: 0.3 + 0.4 * t, 1.0, "I", 4),
}


def bridge(kind: str, hurst: float, theta: float, dt: float = 0.01) -> Path:
    noise = MarkovNoise(hurst, 2.0, kind, factors=5, grid="paper", unit=False, zero=False)  # type: ignore[arg-type]
    process = Process(lambda x, t: -theta * x, 1.0, noise)
    return Path(process, torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE), dt=dt)


def general(noise: Noise) -> tuple[Path, Tensor, Tensor, Tensor]:
    """Two coordinates, three noises, drift and diffusion that depend on time, five data, one of them of nothing."""
    generator = torch.Generator().manual_seed(0)
    f, g, b, x0, y = (torch.randn(s, dtype=DOUBLE, generator=generator) for s in ((2, 2), (2, 3), (2,), (2,), (5,)))
    process = Process(
        lambda x, t: 0.3 * x @ f.mT + b * torch.sin(t), lambda x, t: g * (1 + t), noise, general=True, noises=3
    )
    path = Path(process, torch.tensor([0.2, 0.5, 0.55, 1.0], dtype=DOUBLE), x0, dt=0.04)
    rows = torch.zeros(5, 4, 2, dtype=DOUBLE)
    rows[0, 0, 0], rows[3, 3, 1] = 1.0, 1.0
    rows[1, 0], rows[2, 2] = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    return path, rows, y, torch.tensor([0.1, 0.2, 0.05, 0.3, 0.7], dtype=DOUBLE)


def draws_of(control: LinearControl, path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Driving numbers of controlled paths, those of the start last, and their log density."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(count, len(control.start_mean), generator=generator, dtype=DOUBLE)
    first = control.start_mean + start @ control.start_factor.mT
    log_q = dist.Normal(0.0, 1.0).log_prob(start).sum(1) - control.start_factor.diagonal().log().sum()
    x, factors, found = path.initial.expand(count, -1), Factors(path, start), []
    if first.shape[1]:
        root = torch.from_numpy(path.process.noise.initial_factor)  # type: ignore[attr-defined]
        factors.y = first.reshape(count, path.noises, -1) @ root.mT
    for n in range(path.steps):
        mean = control.mean(n, x, factors.y)
        z = mean + torch.randn(count, path.noises, generator=generator, dtype=DOUBLE) @ control.factor[n].mT
        log_q = log_q + control.log_prob(n, z, x, factors.y)
        t = x.new_tensor(path.increments.grid[n])
        x = path.process.step(x, t, float(path.increments.dt[n]), factors.move(n, z))
        found.append(z)
    return torch.cat([torch.stack(found, -1).flatten(1), first], 1), log_q


def weights_of(control: LinearControl, path: Path, count: int) -> Tensor:
    """log p(z, y) - log q(z) of controlled paths, for the one datum of the five cases."""
    z, log_q = draws_of(control, path, count)
    x = path.from_noise(z)[:, 1, 0]
    return dist.Normal(0.0, 1.0).log_prob(z).sum(1) + dist.Normal(x, 0.1).log_prob(torch.ones(count)) - log_q


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hurst", "theta", "_"), CASES)
def test_without_its_own_variance_a_control_needs_small_steps(kind: str, hurst: float, theta: float, _: float) -> None:
    """The exact mean with the prior's variance: at 8000 steps within 0.1 nat, with a spread of 0.35 over paths.

    At 200 steps the rough cases are two nats below.
    """
    gaps, spreads = [], []
    for dt in (0.01, 0.00025):
        path = bridge(kind, hurst, theta, dt)
        exact = linear_control(path, torch.tensor([[0.0, 1.0]], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), 0.01)
        weights = weights_of(replace(exact, factor=torch.ones_like(exact.factor)), path, 400)
        gaps.append(float(exact.log_evidence - weights.mean()))
        spreads.append(float(weights.std()))
    print(f"{kind} H {hurst} theta {theta}: gaps {gaps}, sd {spreads}")
    assert -0.01 < gaps[1] < 0.1 < gaps[0] + 0.05
    assert spreads[1] < 0.35


@pytest.mark.parametrize("name", list(NOISES))
def test_evidence_is_that_of_the_gaussian_vector(name: str) -> None:
    path, rows, data, variance = general(NOISES[name])
    expected = path.gaussian().log_evidence(rows.flatten(1), data, torch.diag(variance))
    found = linear_control(path, rows.flatten(1), data, variance)
    torch.testing.assert_close(found.log_evidence, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(NOISES))
def test_every_controlled_path_has_the_evidence_for_weight(name: str) -> None:
    """log p(z, y) - log q(z) is one number, which only the exact posterior gives."""
    path, rows, data, variance = general(NOISES[name])
    control = linear_control(path, rows, data, variance)
    z, log_q = draws_of(control, path, 50)
    miss = data - path.from_noise(z).flatten(1) @ rows.flatten(1).mT
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(1) + dist.Normal(0.0, variance.sqrt()).log_prob(miss).sum(1)
    torch.testing.assert_close(log_p - log_q, control.log_evidence.expand(50), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "hurst", "theta", "expected"), CASES)
def test_evidence_of_the_five_linear_cases(kind: str, hurst: float, theta: float, expected: float) -> None:
    """Within 0.05 nat of continuous time at 200 steps; within a fifth of that, and half the bias at half the step."""
    rows, y = torch.tensor([[0.0, 1.0]], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    coarse = linear_control(bridge(kind, hurst, theta), rows, y, 0.01).log_evidence - expected
    fine = linear_control(bridge(kind, hurst, theta, 0.005), rows, y, 0.01).log_evidence - expected
    assert abs(float(coarse)) < 0.01
    assert abs(float(fine)) < 0.6 * abs(float(coarse)) + 1e-6  # the printed values have six digits


def test_evidence_is_differentiable_in_the_process() -> None:
    def evidence(theta: Tensor) -> Tensor:
        noise = MarkovNoise(0.7, 1.0, "I", 3)
        times = torch.tensor([0.5, 1.0], dtype=DOUBLE)
        path = Path(Process(lambda x, t: -theta * x, theta.sqrt(), noise), times, torch.ones(1, dtype=DOUBLE), dt=0.1)
        return linear_control(path, torch.eye(2, dtype=DOUBLE), torch.tensor([0.3, -0.8]), 0.1).log_evidence

    assert torch.autograd.gradcheck(evidence, torch.tensor(1.3, dtype=DOUBLE, requires_grad=True))


def test_control_of_a_program_is_that_of_its_data() -> None:
    path = bridge("I", 0.7, 1.0, 0.1)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(2.0 * x[..., 0] + 0.5, torch.tensor([0.2, 0.4], dtype=DOUBLE)).to_event(1), obs=y)

    program = ppl.Program(model, torch.tensor([1.0, -0.3], dtype=DOUBLE))
    exact = ppl.infer(program, inverse.Exact(), draws=1, progress=False).log_evidence
    assert exact is not None
    torch.testing.assert_close(linear_control_of(program).log_evidence, exact.value, rtol=1e-9, atol=1e-9)


def test_bad_input() -> None:
    path, rows, y = bridge("II", 0.7, 0.0, 0.5), torch.tensor([[0.0, 1.0]]), torch.ones(1)
    curved = Path(Process(lambda x, t: -(x**3)), torch.tensor([0.5, 1.0]), torch.ones(1))
    with pytest.raises(CapabilityError, match="linear in its noise"):
        linear_control(curved, rows, y, 0.1)
    with pytest.raises(ShapeError, match=r"rows must be \(obs, 2, 1\) for 2 data"):
        linear_control(path, rows, torch.ones(2), 0.1)
    with pytest.raises(ValueError, match="variance of every datum must be positive"):
        linear_control(path, rows, y, 0.0)
    with pytest.raises(ValueError, match="several times of the path at once"):
        linear_control(path, torch.ones(1, 2), y, 0.1)

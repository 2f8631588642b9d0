"""Paths of stochastic differential equations: increments against a loop over factors, laws against exact Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import sde.increments
from sde import BrownianNoise, MarkovNoise, Path, Process, fbm_covariance
from sde.fractional import Kind
from sde.increments import Increments

DOUBLE = torch.float64
ONE = torch.tensor([1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def by_loop(noise: MarkovNoise, grid: Tensor, eps: Tensor, start: Tensor | None) -> Tensor:
    """Increments of B by moving every factor, step by step."""
    size = noise.size
    y = torch.zeros(*eps.shape[:-1], size, dtype=DOUBLE)
    if start is not None:
        y = start @ torch.from_numpy(noise.initial_factor).mT
    times = grid if callable(noise.hurst) else None
    weights = noise.weights(times, dtype=DOUBLE)
    found = []
    for n in range(len(grid) - 1):
        dt = float(grid[n + 1] - grid[n])
        decay, gain = (torch.from_numpy(part) for part in noise.transition(dt))
        new = decay * y + gain * math.sqrt(dt) * eps[..., n, None]
        before, after = (weights[n], weights[n + 1]) if times is not None else (weights, weights)
        found.append((after * new).sum(-1) - (before * y).sum(-1))
        y = new
    return torch.stack(found, -1)


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("kind", ["I", "II"])
def test_increments_are_those_of_a_loop(kind: Kind, regular: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8, so that 30 steps cross three borders and end in a short one."""
    monkeypatch.setattr(sde.increments, "BLOCK", 8)
    grid = torch.linspace(0, 2, 31, dtype=DOUBLE)
    if not regular:
        grid = 2 * (grid / 2) ** 1.7
    noise = MarkovNoise(0.3, 2.0, kind)
    eps, start = normal(5, 30), normal(5, noise.size, seed=1) if kind == "I" else None
    torch.testing.assert_close(Increments(noise, grid)(eps, start), by_loop(noise, grid, eps, start))


def rising(t: Tensor) -> Tensor:
    return 0.3 + 0.4 * t


@pytest.mark.parametrize("kind", ["I", "II"])
def test_increments_with_a_hurst_index_that_depends_on_time(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sde.increments, "BLOCK", 8)
    grid = torch.linspace(0, 1, 21, dtype=DOUBLE)
    noise = MarkovNoise(rising, 1.0, kind)
    eps, start = normal(3, 20), normal(3, noise.size, seed=1) if kind == "I" else None
    torch.testing.assert_close(Increments(noise, grid)(eps, start), by_loop(noise, grid, eps, start))


@pytest.mark.parametrize("kind", ["I", "II"])
def test_multifractional_motion_has_the_variance_of_the_index_at_each_time(kind: Kind) -> None:
    """Var B(t) = t^(2 H(t)) to 1.5 %, and the density of a path is that of its Gaussian law."""
    times = torch.linspace(0.05, 1, 20, dtype=DOUBLE)
    noise = MarkovNoise(rising, 1.0, kind, 12)
    law = Path(Process(noise=noise), times, torch.zeros(1, dtype=DOUBLE), dt=0.005).gaussian()
    variance = law.covariances[0].diagonal()
    torch.testing.assert_close(variance, times ** (2 * rising(times)), rtol=0.015, atol=0.0)
    path = Path(Process(noise=noise), times, torch.zeros(1, dtype=DOUBLE))
    x = path.draw((3,), generator())
    torch.testing.assert_close(path.log_prob(x), path.gaussian().log_prob(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_single_precision_survives_large_weights(kind: Kind) -> None:
    """Weights above 1000 of both signs, over four blocks of steps."""
    noise = MarkovNoise(0.2, 1.0, kind, 20, "paper")
    assert float(noise.weights().abs().max()) > 1000
    law = Increments(noise, np.linspace(0, 1, 1001))
    eps, start = normal(3, 1000), normal(3, noise.size, seed=1) if kind == "I" else None
    found = law(eps.float(), None if start is None else start.float())
    assert found.dtype == torch.float32
    exact = law(eps, start)
    assert float((found - exact).abs().max()) < 1e-5 * float(exact.std())


@pytest.mark.parametrize("kind", ["I", "II"])
def test_one_hurst_index_for_each_noise(kind: Kind) -> None:
    grid = torch.linspace(0, 1, 11, dtype=DOUBLE)
    h = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    noise = MarkovNoise(h, 1.0, kind)
    eps, start = normal(4, 2, 10), normal(4, 2, noise.size, seed=1) if kind == "I" else None
    found = Increments(noise, grid)(eps, start)
    for i in range(2):
        one = Increments(MarkovNoise(h[i], 1.0, kind), grid)
        torch.testing.assert_close(found[:, i], one(eps[:, i], None if start is None else start[:, i]))
    factor = Increments(noise, grid).factor()
    torch.testing.assert_close(factor[1], Increments(MarkovNoise(h[1], 1.0, kind), grid).factor())


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.3, 0.8])
def test_covariance_of_the_path_is_near_that_of_the_process(kind: Kind, hurst: float) -> None:
    """200 steps at the default factors: within the error that the approximation predicts, and the scheme's own."""
    grid = np.linspace(0, 1, 201)
    factor = Increments(MarkovNoise(hurst, 1.0, kind), grid).factor()
    path = factor.cumsum(0)
    times = torch.from_numpy(grid[1:])
    exact = fbm_covariance(times[:, None], times, hurst, kind)
    assert float((path @ path.mT - exact).norm() / exact.norm()) < 5e-3


def wave(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) - t * x


@pytest.mark.parametrize("noise", [BrownianNoise(), MarkovNoise(0.7, 1.0), MarkovNoise(0.3, 1.0, "I")])
@pytest.mark.parametrize("general", [False, True])
def test_path_is_the_recursion(noise: MarkovNoise, general: bool) -> None:
    """Two coordinates, three noises in general; irregular times with steps between them."""

    def matrix(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([torch.cos(x), x + t, torch.ones_like(x)], -1)

    process = Process(
        wave, matrix if general else (lambda x, t: 1 + 0.5 * torch.cos(x)), noise, general, 3 if general else None
    )
    times = torch.tensor([0.15, 0.5, 1.0], dtype=DOUBLE)
    path = Path(process, times, torch.tensor([0.5, -1.0], dtype=DOUBLE), dt=0.1)
    z = normal(4, *path.noise_shape)
    found = path.from_noise(z)
    grid = torch.tensor([0, 0.075, 0.15, 0.2375, 0.325, 0.4125, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=DOUBLE)
    increments = Increments(noise, grid)(*path.split_noise(z))
    x, kept = path.initial.expand(4, 2), []
    for n in range(11):
        t = grid[n]
        g = process.g(x, t)
        move = torch.einsum("bdm,bm->bd", g, increments[..., n]) if general else g * increments[..., n]
        x = x + wave(x, t) * (grid[n + 1] - t) + move
        if n in (1, 5, 10):
            kept.append(x)
    torch.testing.assert_close(found, torch.stack(kept, 1))


def test_heun_is_the_sense_of_stratonovich() -> None:
    """dX = X o dB has X = exp(B): strong error falls with the step, where Euler's stays at exp(-t / 2)."""
    times = torch.tensor([1.0], dtype=DOUBLE)
    logs = {}
    for sense in ("ito", "stratonovich"):
        path = Path(Process(0.0, lambda x, t: x, sense=sense), times, torch.ones(1, dtype=DOUBLE), dt=1 / 512)
        z = normal(200, *path.noise_shape)
        logs[sense] = path.from_noise(z)[:, 0, 0].log() - z.sum(-1) / math.sqrt(512)
    assert float(logs["stratonovich"].abs().max()) < 0.02
    assert float((logs["ito"] + 0.5).abs().max()) < 0.2


@pytest.mark.parametrize("noise", [BrownianNoise(), MarkovNoise(0.3, 1.0), MarkovNoise(0.7, 1.0, "I")])
def test_density_is_that_of_its_draws(noise: MarkovNoise) -> None:
    """A linear process is Gaussian: density and moments against the covariance of the map from noise."""
    process = Process(lambda x, t: -2 * x + 0.3, 0.5, noise)
    path = Path(process, torch.linspace(0.2, 1, 5, dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE))
    zero = torch.zeros(path.noise_shape, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda z: path.from_noise(z)[:, 0], zero)
    law = torch.distributions.MultivariateNormal(path.from_noise(zero)[:, 0], jacobian @ jacobian.mT)
    x = law.sample((6,))
    torch.testing.assert_close(path.log_prob(x[..., None]), law.log_prob(x), rtol=1e-6, atol=1e-6)


def test_draws_and_their_mean() -> None:
    """Mean e^-t at the end of 20,000 paths of the discretised process; |z| above 4.5 once in 150,000 runs."""
    path = Path(Process(lambda x, t: -x, 0.5), torch.linspace(0.1, 1, 10, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE))
    x = path.draw((20_000,), generator())[:, -1, 0]
    assert abs(float(x.mean()) - 0.9**10) < 4.5 * float(x.std()) / math.sqrt(20_000)
    variance = sum(0.25 * 0.1 * 0.81**k for k in range(10))
    assert abs(float(x.var()) / variance - 1) < 4.5 * math.sqrt(2 / 20_000)


def test_checkpoints_leave_value_and_gradient_alone() -> None:
    times = torch.linspace(0.05, 1, 20, dtype=DOUBLE)
    z = normal(3, 20).requires_grad_()
    theta = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    found = []
    for steps in (None, 7):
        path = Path(Process(lambda x, t: -theta * torch.sin(x), 0.5), times, 0.3, checkpoint_steps=steps)
        value = path.from_noise(z)
        found.append((value, *torch.autograd.grad(value.square().sum(), (z, theta))))
    for plain, kept in zip(*found, strict=True):
        torch.testing.assert_close(plain, kept)


def test_hurst_index_with_a_gradient() -> None:
    times = torch.linspace(0.1, 1, 10, dtype=DOUBLE)
    z = normal(10)

    def end(h: Tensor) -> Tensor:
        return Path(Process(wave, 0.5, MarkovNoise(h, 1.0)), times, torch.zeros(1, dtype=DOUBLE)).from_noise(z)[-1, 0]

    assert torch.autograd.gradcheck(end, (torch.tensor(0.35, dtype=DOUBLE, requires_grad=True),))


def linear_posterior(hurst: Tensor, y: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and log evidence of the states of a linear process for every Hurst index in a list."""
    means, evidence = [], []
    for h in hurst:
        path = Path(Process(lambda x, t: -x, 1.0, MarkovNoise(h, 1.0)), times)
        zero = torch.zeros(path.noise_shape, dtype=DOUBLE)
        a = torch.autograd.functional.jacobian(lambda z, path=path: path.from_noise(z)[:, 0], zero)
        c = a @ a.mT
        s = c + 0.09 * torch.eye(len(times), dtype=DOUBLE)
        means.append(c @ torch.linalg.solve(s, y))
        evidence.append(torch.distributions.MultivariateNormal(torch.zeros_like(y), s).log_prob(y))
    return torch.stack(means), torch.stack(evidence)


def test_hurst_index_and_path_in_one_program() -> None:
    """HMC in noise space against quadrature over H of exact Gaussians: means within 4.5 standard errors each of 9."""
    import ppl

    times = torch.linspace(0.125, 1, 8, dtype=DOUBLE)
    y = torch.tensor([0.3, 0.5, 0.4, 0.9, 1.1, 0.8, 1.0, 1.3], dtype=DOUBLE)

    def model(y: Tensor) -> None:
        low = torch.tensor(0.1, dtype=DOUBLE)
        h = pyro.sample("h", dist.Uniform(low, 9 * low))
        x = pyro.sample("x", Path(Process(lambda x, t: -x, 1.0, MarkovNoise(h, 1.0)), times, 0 * low))
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    grid = torch.linspace(0.1, 0.9, 81, dtype=DOUBLE)
    means, evidence = linear_posterior(grid, y, times)
    weight = torch.ones(81, dtype=DOUBLE)
    weight[[0, -1]] = 0.5
    p = weight * (evidence - evidence.max()).exp()
    p = p / p.sum()
    expected = torch.cat([(p @ grid)[None], p @ means])
    posterior = ppl.infer(
        ppl.Program(model, y), ppl.NoiseSpace(ppl.HMC(warmup=200)), draws=100, chains=8, progress=False
    )
    assert posterior.draws["x"].shape == (8, 100, 8, 1)
    table = posterior.summary()
    rows = table.loc[[name for name in table.index if name == "h" or name.startswith("x[")]]
    z = (torch.tensor(rows["mean"].to_numpy()) - expected) / torch.tensor(rows["mcse"].to_numpy())
    assert len(z) == 9
    assert float(z.abs().max()) < 4.5
    assert float(rows["ess_bulk"].min()) > 100


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Path(Process(), torch.tensor([1.0, 0.5])), "strictly increasing"),
        (lambda: Path(Process(), torch.tensor([0.0, 0.5])), "after the start"),
        (lambda: Path(Process(), torch.tensor([0.5]), dt=-1.0), "dt must be positive"),
        (
            lambda: Path(Process(noise=MarkovNoise(0.3, 1.0)), torch.tensor([0.5, 2.0])),
            r"horizon of 1; give MarkovNoise",
        ),
        (lambda: Path(Process(lambda x, t: x / 0), torch.tensor([0.5])), "drift is not finite at time 0 and state"),
        (lambda: Path(Process(lambda x, t: x.sum()[None].expand(3)), torch.tensor([0.5])), "drift must have the shape"),
        (
            lambda: Path(Process(0.0, torch.ones(2, 3)), torch.tensor([0.5]), torch.zeros(2)),
            "for a matrix set general=True",
        ),
        (
            lambda: Path(Process(0.0, torch.ones(2), general=True), torch.tensor([0.5]), torch.zeros(2)),
            r"must be \(2, 2\)",
        ),
        (
            lambda: Path(
                Process(0.0, lambda x, t: torch.ones(7, 2, 3), general=True, noises=3), ONE, torch.zeros(6, 2)
            ),
            "batch",
        ),
        (lambda: Process(0.0, torch.ones(2, 3), general=True, noises=0), "noises must be a positive integer"),
        (lambda: Path(Process(), torch.tensor([1.0, math.inf])), "must be finite"),
        (lambda: Path(Process(), ONE, math.nan), "initial state must be finite"),
        (lambda: Path(Process(lambda x, t: 1.0), ONE), "drift must return a tensor"),  # type: ignore[arg-type, return-value]
        (lambda: Path(Process(0.0, lambda x, t: (x - 1).sqrt()), ONE), "diffusion is not finite at time 0 and state"),
        (
            lambda: Path(Process(), ONE).from_noise(torch.zeros(7)),
            r"driving numbers must end in \(1,\), got shape \(7,\)",
        ),
        (lambda: Path(Process(), ONE).log_prob(torch.zeros(3, 1)), r"value must end in \(1, 1\), got shape \(3, 1\)"),
        (lambda: Path(Process(lambda x, t: x, 0.0), ONE).log_prob(torch.ones(1, 1)), "diffusion vanishes at time 0"),
        (
            lambda: Path(Process(noise=MarkovNoise(torch.tensor([0.3, 0.7, 0.5]), 1.0)), ONE, torch.zeros(2)),
            "2 noises need",
        ),
        (lambda: Path(Process(noise=MarkovNoise(lambda t: 0.5 + t, 1.0)), ONE), r"must lie in .* got 1.0 at time 0.5;"),
        (lambda: Path(Process(noise=MarkovNoise(lambda t: t[:2], 1.0)), ONE), "maps times of shape"),
        (
            lambda: Path(Process(noise=MarkovNoise(lambda t: 0.9 + 0 * t, 1.0, "I", 2, "paper", zero=False)), ONE),
            r"predicted relative error .* leaves",
        ),
        (lambda: Path(Process(noise=MarkovNoise(0.9, 1e3, "I")), ONE), r"relative error is 1\.68.*horizon=1"),
        (lambda: Process(sense="kelvin"), "sense must be"),  # type: ignore[arg-type]
        (lambda: Process(lambda t, x: -x), r"called as drift\(x, t\), but takes \(t, x\); exchange"),
        (lambda: Process(0.0, lambda time, y: y), r"called as diffusion\(x, t\), but takes \(time, y\)"),
        (lambda: Process("ou"), r"drift must be a function of \(x, t\), a number or a tensor, got 'ou'"),  # type: ignore[arg-type]
        (lambda: Process(noise=BrownianNoise), "noise must be BrownianNoise"),  # type: ignore[arg-type]
        (lambda: Path(lambda x, t: -x, ONE), "process must be a Process"),  # type: ignore[arg-type]
        (lambda: Path(Process(), torch.tensor(1.0)), r"times, \(n,\), must be finite.*got \[1\.0\]"),
        (lambda: Path(Process(-1.0, 0.0), ONE).gaussian(), "zero from time 0 to 1, so that no noise moves it"),
        (lambda: Process(noises=2), "noises=2 is for general=True"),
        (lambda: Process(noise=0.3), "noise must be BrownianNoise"),  # type: ignore[arg-type]
        (
            lambda: Path(Process(lambda x, t: x**3 * 1e3), torch.tensor([1.0]), 5.0, dt=0.1).sample(),
            r"drift is not finite at time 0\.2 and state \[19.*steps of 0\.1 may be too long",
        ),
        (lambda: Path(Process(lambda x, t: -x), torch.tensor([1.0]), dt=0.1).log_prob(torch.zeros(1, 1)), "no density"),
        (lambda: Increments(BrownianNoise(), torch.tensor([0.0, 0.0])), "strictly increasing times"),
    ],
)
def test_bad_input(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("what", ["drift", "diffusion"])
def test_what_is_not_finite_on_the_way_is_named(what: str, general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the coefficients stop at time 0.5: the state named is that of the first such path, at the step before."""

    def stops(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t > 0.45) & (x > 0.3), math.nan, 0.1 * torch.ones_like(x))

    def matrix(x: Tensor, t: Tensor) -> Tensor:
        return torch.diag_embed(stops(x, t))

    parts: dict[str, Any] = {"drift": 0.1, "diffusion": 0.1 * torch.eye(2, dtype=DOUBLE) if general else 0.1}
    parts[what] = matrix if general and what == "diffusion" else stops
    path = Path(
        Process(**parts, general=general),
        torch.linspace(0.1, 1, 10, dtype=DOUBLE), torch.tensor([[0.0, 0.0], [0.3, 0.1]], dtype=DOUBLE), dt=0.05,
    )  # fmt: skip
    z = 0.1 * normal(3, 2, *path.noise_shape)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: z)
    with pytest.raises(ValueError, match=f"the {what} is not finite at time 0.5 and state") as error:
        path.draw((3,))
    state = [float(v) for v in str(error.value).split("[")[1].split("]")[0].split(", ")]
    at = path.from_noise(z)[..., 4, :].reshape(-1, 2)
    first = at[(at > 0.3).any(-1)][0]
    torch.testing.assert_close(torch.tensor(state, dtype=DOUBLE), first)


def test_memory_of_a_gradient_is_bounded_by_checkpoints() -> None:
    """Numbers that autograd keeps between the passes: a tenth, pieces' ends and noise included."""
    steps, width = 400, 50
    weight = torch.ones(1, width, dtype=DOUBLE, requires_grad=True)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -torch.tanh(x @ weight).mean(-1, keepdim=True)

    kept = {}
    for every in (None, 20):
        path = Path(Process(drift, 0.5), ONE.double(), 0.3, dt=1 / steps, checkpoint_steps=every)
        seen: dict[int, int] = {}

        def pack(saved: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // 8
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            path.from_noise(normal(8, *path.noise_shape)).square().mean()
        kept[every] = sum(seen.values())
    assert kept[None] > 8 * steps * width
    assert kept[20] < 0.1 * kept[None]


def test_error_over_part_of_the_horizon() -> None:
    """The weights of the whole horizon are worse there than those made for it, and as bad as a noise that has them."""
    noise = MarkovNoise(0.7, 1.0, "II", 4)
    short = MarkovNoise(0.7, 0.05, "II", 4, grid=tuple(0.05 * noise.rates[[0, -1]]))
    fitted = short.relative_error()
    found = noise.relative_error(until=0.05)
    assert float(fitted) < float(found) < 1
    torch.testing.assert_close(noise.relative_error(until=1.0), noise.relative_error())
    same = MarkovNoise(0.7, 0.05, "II", 4, grid=tuple(0.05 * noise.rates[[0, -1]]), fitted=noise.weights(dtype=DOUBLE))
    torch.testing.assert_close(same.relative_error(), found)

"""Mean-reverting paths by a scan: the same values, gradients and density as the loop over steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from sde import BrownianNoise, MarkovNoise, MeanRevertingPath, Path, Process
from sde.increments import Noise
from sde.mean_reversion import linear_scan, scanned_increments, slow_waves

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65])
def test_scan_is_the_recursion(n: int) -> None:
    decay, move = torch.rand(3, n, generator=torch.Generator().manual_seed(1), dtype=DOUBLE), normal(2, 3, n)
    x, found = torch.zeros(2, 3, dtype=DOUBLE), []
    for i in range(n):
        x = decay[:, i] * x + move[..., i]
        found.append(x)
    torch.testing.assert_close(linear_scan(decay, move), torch.stack(found, -1))


@pytest.mark.parametrize("kind", ["I", "II", "brownian", "varying", "varying I"])
@pytest.mark.parametrize("dt", [None, 0.02])
def test_path_is_that_of_the_loop(kind: str, dt: float | None) -> None:
    """Values, and gradients in all parameters and the noise, at irregular times of two coordinates."""
    times = torch.tensor([0.1, 0.15, 0.4, 0.9, 1.0, 1.7], dtype=DOUBLE)

    def noise(h: Tensor) -> Noise:
        if kind == "brownian":
            return BrownianNoise()
        index = (lambda t: h + 0.1 * t) if kind.startswith("varying") else h
        return MarkovNoise(index, 2.0, "I" if kind.endswith("I") and kind != "II" else "II")

    found = []
    for scanned in (True, False):
        rate, mean, scale, h = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (2.0, 0.7, 0.5, 0.3))
        x0 = torch.tensor([0.1, -1.0], dtype=DOUBLE, requires_grad=True)
        path: Path
        if scanned:
            path = MeanRevertingPath(rate, mean, scale, noise(h), times, x0, dt=dt)
        else:
            drift = lambda x, t, rate=rate, mean=mean: rate * (mean - x)  # noqa: E731
            path = Path(Process(drift, scale, noise(h)), times, x0, dt=dt)
        z = normal(3, *path.noise_shape).requires_grad_()
        x = path.from_noise(z)
        grads = torch.autograd.grad((x * normal(*x.shape, seed=2)).sum(), [rate, mean, scale, x0, z])
        found.append((x.detach(), *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_increments_of_many_draws_with_a_hurst_index_for_each() -> None:
    noise = MarkovNoise(torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE), 1.0, "I")
    path = Path(Process(noise=noise), torch.linspace(0.05, 1, 20, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE))
    eps, start = normal(4, 3, 20), normal(4, 3, noise.size, seed=1)
    torch.testing.assert_close(scanned_increments(path.increments, eps, start), path.increments(eps, start))


def test_in_a_program_gradients_of_the_hurst_index_agree_with_the_loop() -> None:
    """The whole way: lifted, traced and batched over draws, each with its own parameters."""
    times, y = torch.linspace(0.1, 1, 10, dtype=DOUBLE), normal(10)

    def program(scanned: bool) -> ppl.Program:
        def model(y: Tensor) -> None:
            zero = y.new_zeros(())
            h = pyro.sample("h", dist.Uniform(zero + 0.05, 0.95))
            rate = pyro.sample("rate", dist.LogNormal(zero, 1.0))
            noise = MarkovNoise(h, 1.0)
            path = MeanRevertingPath(rate, 1.0, 1.0, noise, times, y.new_zeros(1))
            if not scanned:
                path = Path(Process(lambda x, t: rate * (1.0 - x), 1.0, noise), times, y.new_zeros(1))
            x = pyro.sample("x", path)
            pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

        return ppl.Program(model, y)

    flats = [program(scanned).noise_space().flat() for scanned in (True, False)]
    z = normal(3, flats[0].dim)
    for ours, theirs in zip(*(flat.log_density_and_grad(z) for flat in flats), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_waves_change_no_law_and_are_those_of_a_sum() -> None:
    """Numbers in another orthogonal basis: the same covariance; a sum over steps takes each wave to a wave."""
    times, waves = torch.linspace(0.1, 2, 20, dtype=DOUBLE), slow_waves(20)
    laws = [
        MeanRevertingPath(2.0, 1.0, 0.5, MarkovNoise(0.3, 2.0), times, torch.zeros(1, dtype=DOUBLE), basis=basis)
        for basis in (None, waves)
    ]
    torch.testing.assert_close(laws[1].gaussian().covariances, laws[0].gaussian().covariances)
    z = normal(4, 20)
    torch.testing.assert_close(laws[1].from_noise(z), laws[0].from_noise(z @ torch.from_numpy(waves).mT))
    summed = torch.from_numpy(waves).cumsum(0)
    gram = summed.mT @ summed
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()))
    assert bool((gram.diagonal().diff() < 0).all())


def test_expanded_paths_stay_scanned() -> None:
    waves = slow_waves(5)
    path = MeanRevertingPath(2.0, 0.0, 1.0, BrownianNoise(), torch.linspace(0.1, 1, 5), basis=waves).expand((3,))
    assert isinstance(path, MeanRevertingPath)
    assert path.basis is waves
    assert path.sample((2,)).shape == (2, 3, 5, 1)

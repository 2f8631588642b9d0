"""torchsde runs the same processes and agrees in law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sde import MarkovNoise, Path, Process, solve_torchsde

DOUBLE = torch.float64
TIMES = torch.tensor([0.5, 1.0], dtype=DOUBLE)


def drift(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * x) - x


def processes() -> dict[str, tuple[Process, dict[str, object]]]:
    def waves(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 + 0.2 * torch.cos(x)

    def matrix(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([0.5 + 0.2 * torch.cos(x.flip(-1)), 0.3 * x, 0.2 * torch.ones_like(x) + 0.2 * t], -1)

    def coupled(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x.flip(-1)) - x + t

    slow = {"grid": (0.1, 20.0), "max_error": 0.9}

    def rising(t: Tensor) -> Tensor:
        return 0.3 + 0.5 * t

    two, one = MarkovNoise(0.7, 1.0, "II", 3, **slow), MarkovNoise(0.3, 1.0, "I", 3, **slow)  # type: ignore[arg-type]
    return {
        "srk, K = 0": (Process(drift, waves), {"method": "srk"}),
        "euler, type II": (Process(drift, 0.7, two), {"method": "euler"}),
        "srk, type I": (Process(drift, 0.7, one), {"method": "srk"}),
        "midpoint": (Process(drift, waves, two, sense="stratonovich"), {"method": "midpoint"}),
        "one index each": (
            Process(coupled, waves, MarkovNoise(torch.tensor([0.3, 0.7], dtype=DOUBLE), 1.0, "I", 3, **slow)),  # type: ignore[arg-type]
            {"method": "euler", "dt": 0.01},
        ),
        "general": (Process(coupled, matrix, general=True, noises=3), {"method": "euler", "dt": 0.01}),
        "general, adaptive": (
            Process(coupled, matrix, general=True, noises=3, sense="stratonovich"),
            {"method": "midpoint", "adaptive": True, "rtol": 1e-2, "atol": 1e-2},
        ),
        "general, type II": (
            Process(coupled, matrix, two, general=True, noises=3, sense="stratonovich"), {"method": "midpoint"}
        ),
        "adaptive": (Process(drift, 0.7, sense="stratonovich"), {"adaptive": True, "method": "midpoint"}),
        "an index of time, type II": (
            Process(drift, 0.7, MarkovNoise(rising, 1.0, "II", 3, **slow)), {"method": "euler"}
        ),
        "an index of time, type I": (
            Process(drift, 0.7, MarkovNoise(rising, 1.0, "I", 3, **slow)), {"method": "srk"}
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(processes()))
def test_agreement_in_law(name: str) -> None:
    """First and second moments of all coordinates at both times, 4000 paths each, and 2 % of sd for dt.

    At most 112 comparisons: |z| above 4.7 once in 3,000 runs.
    """
    process, options = processes()[name]
    d = 1 if name in ("srk, K = 0", "euler, type II", "srk, type I", "midpoint", "adaptive") else 2
    path = Path(process, TIMES, torch.linspace(0.8, 0.3, d, dtype=DOUBLE), dt=0.01)
    count = 4000
    ours = path.draw((count,), torch.Generator().manual_seed(0))
    theirs = solve_torchsde(path, count, seed=3, **{"dt": 0.02, **options})  # type: ignore[arg-type]
    assert theirs.shape == (count, 2, d)
    pairs = torch.triu_indices(2 * d, 2 * d)
    moments = []
    for x in (ours.flatten(1), theirs.flatten(1)):
        centred = x - x.mean(0)
        moments.append((x, centred[:, pairs[0]] * centred[:, pairs[1]]))
    for one, other in zip(*moments, strict=True):
        spread = ((one.var(0) + other.var(0)) / count).sqrt()
        assert bool(((one.mean(0) - other.mean(0)).abs() < 4.7 * spread + 0.02 * one.std(0)).all())


def test_gradient_by_the_adjoint_is_that_of_backpropagation() -> None:
    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(1.5, dtype=DOUBLE))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -self.theta * x

    found = []
    for adjoint in (False, True):
        f = Drift()
        path = Path(Process(f, 0.3, sense="stratonovich"), TIMES, torch.ones(1, dtype=DOUBLE))
        x = solve_torchsde(path, 20, dt=0.005, seed=1, method="midpoint", adjoint=adjoint)
        x.square().mean().backward()
        assert f.theta.grad is not None
        found.append(float(f.theta.grad))
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("of_time", [False, True])
def test_adjoint_finds_a_learned_hurst_index(of_time: bool) -> None:
    """A tensor, and a module that makes one of time; gradients as without the adjoint, to 2 % for the steps."""

    class Index(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.Parameter(torch.tensor(0.6, dtype=DOUBLE))

        def forward(self, t: Tensor) -> Tensor:
            return self.h + 0.2 * t

    found = []
    for adjoint in (False, True):
        index = Index()
        noise = MarkovNoise(index if of_time else index.h, 1.0, "II", 3, grid=(0.1, 10.0))
        path = Path(Process(lambda x, t: -x, 0.3, noise, sense="stratonovich"), TIMES[:1], torch.ones(1, dtype=DOUBLE))
        x = solve_torchsde(path, 20, dt=0.005, seed=1, method="midpoint", adjoint=adjoint)
        x[:, -1].square().mean().backward()
        assert index.h.grad is not None
        found.append(float(index.h.grad))
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_same_seed_same_paths() -> None:
    path = Path(Process(drift, 0.5), TIMES, torch.zeros(2, dtype=DOUBLE))
    one, other, different = (solve_torchsde(path, 3, dt=0.1, seed=s, method="euler") for s in (4, 4, 5))
    assert torch.equal(one, other)
    assert not torch.allclose(one, different)


def test_bad_input() -> None:
    fast = Path(Process(drift, 0.5, MarkovNoise(0.2, 1.0)), TIMES, torch.zeros(1, dtype=DOUBLE))
    with pytest.raises(ValueError, match="explicit solvers need rate times dt below"):
        solve_torchsde(fast, 2, dt=0.01)
    jump = MarkovNoise(lambda t: torch.where(t < 0.7, 0.3, 0.6).to(t), 1.0, grid=(0.1, 10.0))
    with pytest.raises(ValueError, match=r"too fast near time 0.7 for steps of 0.02, or jumps there"):
        solve_torchsde(Path(Process(drift, 0.5, jump), TIMES, torch.zeros(1, dtype=DOUBLE)), 2, dt=0.02)
    with pytest.raises(ValueError, match="without a batch shape"):
        solve_torchsde(Path(Process(drift, 0.5), TIMES, torch.zeros(4, 1, dtype=DOUBLE)), 2, dt=0.1)

"""torchsde runs the same processes and agrees in law."""

from __future__ import annotations

import math

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

    slow = {"grid": (0.1, 20.0), "max_error": 0.9}
    two, one = MarkovNoise(0.7, 1.0, "II", 3, **slow), MarkovNoise(0.3, 1.0, "I", 3, **slow)  # type: ignore[arg-type]
    return {
        "srk, K = 0": (Process(drift, waves), {"method": "srk"}),
        "euler, type II": (Process(drift, 0.7, two), {"method": "euler"}),
        "srk, type I": (Process(drift, 0.7, one), {"method": "srk"}),
        "midpoint": (Process(drift, waves, two, sense="stratonovich"), {"method": "midpoint"}),
        "adaptive": (Process(drift, 0.7, sense="stratonovich"), {"adaptive": True, "method": "midpoint"}),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(processes()))
def test_agreement_in_law(name: str) -> None:
    """First and second moments at both times, 4000 paths each: |z| above 4.7 once in 70,000 runs; 2 % of sd for dt."""
    process, options = processes()[name]
    path = Path(process, TIMES, torch.full((1,), 0.8, dtype=DOUBLE), dt=0.01)
    count = 4000
    ours = path.draw((count,), torch.Generator().manual_seed(0))[..., 0]
    theirs = solve_torchsde(path, count, dt=0.02, seed=3, **options)[..., 0]  # type: ignore[arg-type]
    assert theirs.shape == (count, 2)
    for one, other in ((ours, theirs), ((ours - ours.mean(0)) ** 2, (theirs - theirs.mean(0)) ** 2)):
        spread = ((one.var(0) + other.var(0)) / count).sqrt()
        assert bool(((one.mean(0) - other.mean(0)).abs() < 4.7 * spread + 0.02 * one.std(0)).all())
    products = [(x - x.mean(0)).prod(1) for x in (ours, theirs)]
    error = float((products[0].var() + products[1].var()).sqrt()) / math.sqrt(count)
    assert abs(float(products[0].mean() - products[1].mean())) < 4.7 * error + 0.02 * float(products[0].std())


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


def test_same_seed_same_paths() -> None:
    path = Path(Process(drift, 0.5), TIMES, torch.zeros(2, dtype=DOUBLE))
    one, other, different = (solve_torchsde(path, 3, dt=0.1, seed=s, method="euler") for s in (4, 4, 5))
    assert torch.equal(one, other)
    assert not torch.allclose(one, different)


def test_bad_input() -> None:
    fast = Path(Process(drift, 0.5, MarkovNoise(0.2, 1.0)), TIMES, torch.zeros(1, dtype=DOUBLE))
    with pytest.raises(ValueError, match="explicit solvers need rate times dt below"):
        solve_torchsde(fast, 2, dt=0.01)
    varying = Path(
        Process(drift, 0.5, MarkovNoise(lambda t: 0.3 + 0.2 * t, 1.0, grid=(0.1, 10.0))),
        TIMES,
        torch.zeros(1, dtype=DOUBLE),
    )
    with pytest.raises(ValueError, match="does not depend on time"):
        solve_torchsde(varying, 2, dt=0.01)
    with pytest.raises(ValueError, match="without a batch shape"):
        solve_torchsde(Path(Process(drift, 0.5), TIMES, torch.zeros(4, 1, dtype=DOUBLE)), 2, dt=0.1)

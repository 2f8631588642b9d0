"""Draws that diverge are left out with their step, and change no other draw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from affine import gaussian, program_of
from torch import Tensor

import ppl
from inverse import DAPS, DDNM, DPS, DiffPIR, LGDGuide, MomentMatching, PiGDM
from inverse.guides.closure import floored_cholesky
from inverse.samplers.guided import GuidedSampler
from inverse.samplers.lanes import _mark
from ppl import Program
from ppl.errors import NotFiniteError
from ppl.monitor import Event
from sde import DiffusionPrior, DPMSolver2MSDE

F64 = torch.float64


class Hole(torch.nn.Module):
    """The denoiser of N(0, I), but not a number below a noise level where x_0 > limit."""

    def __init__(self, limit: float, below: float) -> None:
        super().__init__()
        self.limit, self.below, self.open = limit, below, False  # a program runs its model when it is made

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=F64)
        out = x / (1 + sigma.square().reshape(-1, *[1] * (x.ndim - 1)))
        if not self.open or float(sigma.max()) >= self.below:
            return out
        return torch.where(x[..., :1] > self.limit, torch.nan, out)


def program(limit: float = -0.5, below: float = 0.5) -> Program:
    hole = Hole(limit, below)
    made = program_of(DiffusionPrior(hole, (4,), sigma_max=10.0, sigma_min=0.05, data_std=1.0, dtype=F64), 1.0)
    hole.open = True
    return made


BACKENDS: list[Any] = [
    PiGDM(steps=8, jacobian=False),
    MomentMatching(steps=8),
    DPS(steps=8),
    DiffPIR(steps=8),
    DDNM(steps=8),
    DAPS(steps=6),
    GuidedSampler(LGDGuide(samples=2), DPMSolver2MSDE(), steps=8),
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_the_others_are_kept_as_they_were(backend: Any) -> None:
    whole = ppl.infer(program(float("inf")), backend, draws=40)["x"][0]
    found = ppl.infer(program(), backend, draws=40)
    kept = found["x"][0]
    assert 0 < len(kept) < 40
    assert not found.complete
    assert bool(kept.isfinite().all())
    # Every draw that is left is one of the whole run, in the same order.
    place = [int((whole - row).abs().amax(1).argmin()) for row in kept]
    assert place == sorted(set(place))
    torch.testing.assert_close(kept, whole[place], rtol=1e-10, atol=1e-10)
    assert len(found.info["residual_chi"][0]) == len(kept)
    (note,) = [n for n in found.attrs["notes"] if "diverged" in n]
    assert note.startswith(f"{40 - len(kept)} of 40 draws diverged")
    counted = sum(int(n) for n in re.findall(r"(\d+) at step", note))
    assert counted == 40 - len(kept) or "others later" in note


@pytest.mark.parametrize("chunk", [1, 7])
def test_groups_change_nothing(chunk: int) -> None:
    whole = ppl.infer(program(), PiGDM(steps=8), draws=20, chains=2)
    part = ppl.infer(program(), PiGDM(steps=8, chunk=chunk), draws=20, chains=2)
    assert whole["x"].shape[0] == 2
    torch.testing.assert_close(part["x"], whole["x"], rtol=1e-10, atol=1e-10)
    assert part.attrs["notes"] == whole.attrs["notes"]


def test_the_step_is_the_one_at_which_it_happened() -> None:
    prior = program().sites["x"].distribution
    levels = prior.grid(10.0, 0.05, 8).tolist()
    first = next(i for i, level in enumerate(levels) if level < 0.5)
    notes = ppl.infer(program(), PiGDM(steps=8, jacobian=False), draws=40).attrs["notes"]
    assert f"at step {first + 1} of 8" in notes[0]


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_killed_run_remembers_what_was_lost(chunk: int | None, tmp_path: Path) -> None:
    backend = PiGDM(steps=8, chunk=chunk)
    whole = ppl.infer(program(), backend, draws=12, seed=3)

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.step == 6 and (chunk is None or "5-9" in event.label):
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program(), backend, draws=12, seed=3, callback=kill, checkpoint=tmp_path / "a", checkpoint_every=0)
    rest = ppl.infer(program(), backend, draws=12, seed=3, checkpoint=tmp_path / "a")
    assert torch.equal(rest["x"], whole["x"])
    assert rest.attrs["notes"] == whole.attrs["notes"]


def test_too_few_left_is_an_error_with_the_step() -> None:
    with pytest.raises(NotFiniteError, match=r"6 of 6 draws .*at step \d of 8"):
        ppl.infer(program(-1e9), PiGDM(steps=8), draws=6)
    # One lane in five chains of one draw is enough: no draw is left for one of them.
    for seed in range(20):
        lost = 5 - ppl.infer(program(), PiGDM(steps=8), draws=5, seed=seed)["x"].shape[1]
        if lost:
            break
    with pytest.raises(NotFiniteError, match="for 5 chains"):
        ppl.infer(program(), PiGDM(steps=8), draws=1, chains=5, seed=seed)


def test_two_sites() -> None:
    """One site of two runs into its hole within a step of several denoiser calls."""
    holes = [Hole(0.5, 0.5), Hole(float("inf"), 0.5)]
    first, second = (
        DiffusionPrior(hole, (4,), sigma_max=10.0, sigma_min=0.05, data_std=1.0, dtype=F64) for hole in holes
    )

    def model(y: Tensor) -> None:
        x, z = pyro.sample("x", first), pyro.sample("z", second)
        pyro.sample("y", dist.Normal(x + z, 1.0).to_event(1), obs=y)

    made = Program(model, torch.full((4,), -3.0, dtype=F64))
    holes[0].open = True
    found = ppl.infer(made, DAPS(steps=6), draws=40)
    kept = found["x"].shape[1]
    assert 0 < kept < 40
    assert found["z"].shape[1] == kept
    assert first._validate_args is not False
    assert f"{40 - kept} of 40 draws diverged" in found.attrs["notes"][0]


def test_guidance_that_overflows_is_left_out() -> None:
    """The likelihood itself is not a number on part of the line: x_0 > 2 is outside its domain."""
    prior = gaussian()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal((2 - x).sqrt(), 1.0).to_event(1), obs=y)

    y = torch.full((4,), 0.5, dtype=F64)
    found = ppl.infer(Program(model, y), DPS(steps=60, weight="likelihood"), draws=60)
    assert 0 < found["x"].shape[1] < 60
    assert "diverged" in found.attrs["notes"][0]


def test_a_copy_stands_in_and_the_first_step_is_the_one_noted() -> None:
    nan, inf = float("nan"), float("inf")
    state = {"x": torch.tensor([[1.0], [nan], [2.0]]), "history": torch.tensor([1.0, nan, 3.0])}
    owner = torch.zeros(3, dtype=torch.long)
    state, lost = _mark(state, torch.zeros(3, dtype=torch.long), owner, 3, 100.0)
    assert lost.tolist() == [0, 3, 0]
    assert state["x"][:, 0].tolist() == [1.0, 1.0, 2.0]
    assert state["history"].tolist() == [1.0, 1.0, 3.0]
    state, lost = _mark({"x": torch.tensor([[-101.0], [inf], [2.0]])}, lost, owner, 5, 100.0)
    assert lost.tolist() == [5, 3, 0]
    assert state["x"][:, 0].tolist() == [2.0, 2.0, 2.0]
    _, lost = _mark({"x": torch.full((3, 1), nan)}, lost, owner, 6, 100.0)
    assert lost.tolist() == [5, 3, 6]


def test_a_copy_is_of_the_same_problem_where_there_is_one() -> None:
    x = torch.tensor([[1.0], [2.0], [float("nan")], [4.0], [float("nan")]])
    owner = torch.tensor([0, 0, 1, 1, 2])
    state, lost = _mark({"x": x}, torch.zeros(5, dtype=torch.long), owner, 2, 100.0)
    assert lost.tolist() == [0, 0, 2, 0, 2]
    assert state["x"][:, 0].tolist() == [1.0, 2.0, 4.0, 4.0, 1.0]


def test_a_covariance_that_is_not_a_number_spoils_its_own_lane_only() -> None:
    gram = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan), -3 * torch.eye(2)])
    factor, failed = floored_cholesky(gram)
    assert failed.tolist() == [False, False, True]
    assert factor.isfinite().all(-1).all(-1).tolist() == [True, False, True]

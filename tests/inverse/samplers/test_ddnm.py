"""DDNM+ against matrices, without Monte Carlo."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from affine import Matrices, gaussian, isotropic, law, posterior_of, program_of
from torch import Tensor

import ppl
from inverse import DDNM, DDRM
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import trajectory_levels
from ppl.errors import OptionError
from sde import GaussianMixture

F64 = torch.float64


class Fixed:
    """The same noise every time."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def normal(self, shape: Any) -> Tensor:
        return self.value[..., : math.prod(shape)].reshape(-1, *shape)


def by_hand(problem: DiffusionProblem, path: list[float], eta: float) -> tuple[Tensor, Tensor]:
    """x^ - Lambda A^+ (A x^ - y) and noise c^2 - (w Lambda tau)^2 as matrices."""
    p = Matrices.of(problem)
    U, s, Vt = torch.linalg.svd(p.B, full_matrices=False)
    V = Vt.T
    mean, cov = p.m0.clone(), p.C0 + path[0] ** 2 * p.eye
    for a, b in pairwise(path):
        if b > a:
            cov = cov + (b**2 - a**2) * p.eye
            continue
        c = eta * b * math.sqrt(1 - (b / a) ** 2)
        k = math.sqrt(b**2 - c**2) / a
        lam = torch.tensor([1.0 if c >= (1 - k) / float(v) else c * float(v) / (1 - k) for v in s], dtype=F64)
        J, shift = p.denoiser(a)
        project = V @ torch.diag(lam / s) @ U.T  # Lambda A^+
        slope = J - project @ p.B @ J
        offset = shift - project @ (p.B @ shift - p.d)
        F = k * p.eye + (1 - k) * slope
        mean = F @ mean + (1 - k) * offset
        cov = F @ cov @ F.T + c**2 * p.eye - V @ torch.diag(((1 - k) * lam / s) ** 2) @ V.T
    return mean, cov


@pytest.mark.parametrize("options", [{}, {"eta": 0.4}, {"travel_length": 4, "travel_repeats": 2}], ids=str)
@pytest.mark.parametrize("noise", [0.05, 1.0], ids=["low", "high"])
def test_the_law_is_that_of_the_formulas(options: dict[str, float], noise: float) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), noise))
    sampler = DDNM(steps=10, **options)  # type: ignore[arg-type]
    mean, covariance = law(sampler.method(problem))
    path = sampler.path(trajectory_levels(None, 10, problem).tolist())
    expected_mean, expected = by_hand(problem, path, sampler.eta)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)


def test_time_travel_walks_every_stretch_again() -> None:
    levels = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert DDNM().path(levels) == levels
    path = DDNM(travel_length=2, travel_repeats=3).path(levels)
    assert path == [5, 4, 3, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 3, 2, 1, 0, 1, 0, 1, 0]
    cost = ppl.infer(program_of(gaussian()), DDNM(steps=5, travel_length=2, travel_repeats=3), draws=4).cost
    assert cost.denoiser_calls == sum(b < a for a, b in pairwise(path)) == 15


def test_the_form_of_the_code_takes_the_steps_of_ddrm() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 1.0))
    code, restoration = DDNM(steps=10, form="code").method(problem), DDRM(steps=10).method(problem)
    noise = Fixed(torch.randn(3, *problem.shape, generator=torch.Generator().manual_seed(0), dtype=F64))
    x = noise.normal(problem.shape) * 2
    for step in range(10):
        theirs = restoration.advance(step, {"x": x}, noise)["x"]
        torch.testing.assert_close(code.advance(step, {"x": x}, noise)["x"], theirs, rtol=1e-12, atol=1e-12)
        x = theirs


@pytest.mark.parametrize(("form", "gain"), [("paper", 3.64), ("code", 0.527)])
def test_noise_of_data_that_see_little_adds_up_in_the_form_of_the_paper(form: str, gain: float) -> None:
    """Levels that fall by a fifth, data of noise 1e6: x / b moves per unit of the data's noise by the number derived.

    The prior is a point, so that the denoiser forgets x. With k a / b = sqrt(1 - q^2) the sum is geometric,
    q / (1 - sqrt(1 - q^2)); without memory it is its one term, sqrt(1 - eta^2).
    """
    one = torch.ones(1, dtype=F64)
    prior = GaussianMixture(one, torch.zeros(1, 2, dtype=F64), 1e-12 * one)
    levels = torch.tensor([0.8**k for k in range(41)] + [0.0], dtype=F64)

    class Geometric:
        def grid(self, steps: int) -> Tensor:
            return levels

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1e6).to_event(1), obs=y)

    noise = Fixed(torch.zeros(1, 2, dtype=F64))
    ends = []
    for unit in (0.0, 1.0):
        program = ppl.Program(model, torch.tensor([1e6 * unit, 0.0], dtype=F64))
        method = DDNM(steps=41, form=form, schedule=Geometric()).method(DiffusionProblem.of(program))  # type: ignore
        state = method.begin(1, noise)
        for step in range(40):
            state = method.advance(step, state, noise)
        ends.append(state["x"][0] / levels[40])
    torch.testing.assert_close(ends[1] - ends[0], torch.tensor([gain, 0.0], dtype=F64), rtol=5e-3, atol=1e-4)


def test_precise_data_are_met_and_the_prior_rules_where_there_are_none() -> None:
    problem = DiffusionProblem.of(program_of(isotropic(), 1e-3))
    exact = posterior_of(problem)
    mean, covariance = law(DDNM(steps=200).method(problem))
    # The row space is given by the data, the null space of an isotropic prior by its mean.
    assert (mean - exact.mean).norm() < 0.01 * exact.mean.norm()
    assert float(covariance.trace() / exact.covariance_matrix.trace()) < 1.0


def test_options_are_checked() -> None:
    for bad in ({"eta": -0.1}, {"travel_length": 0}, {"travel_repeats": 0}, {"steps": 0}, {"form": "a"}):
        with pytest.raises(OptionError):
            DDNM(**bad)  # type: ignore[arg-type]

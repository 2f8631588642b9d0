"""Guided steps with time travel, FreeDoM's and MPGD's, against matrices, without Monte Carlo."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from affine import Matrices, gaussian, law, program_of

from inverse.problem import DiffusionProblem
from inverse.samplers.ddnm import DDNM
from inverse.samplers.freedom import FreeDoM
from inverse.samplers.mpgd import MPGD
from inverse.samplers.travel import travel_path
from sde import VarianceExploding

SCHEDULE = VarianceExploding(sigma_min=0.1, sigma_max=5.0)


def walked(levels: list[float], length: int, repeats: int, low: float, high: float) -> list[float]:
    path = [levels[0]]
    for start in range(0, len(levels) - 1, length):
        for k in range(repeats if low <= levels[start] <= high else 1):
            path += ([levels[start]] if k else []) + levels[start + 1 : start + 1 + length]
    return path


def test_paths() -> None:
    levels = [8.0, 4.0, 2.0, 1.0, 0.0]
    assert travel_path(levels, 1, 1) == levels
    for length, repeats, low, high in ((1, 3, 0.0, 9.0), (2, 2, 0.0, 9.0), (3, 2, 0.0, 9.0), (1, 4, 2.0, 4.0)):
        assert travel_path(levels, length, repeats, (low, high)) == walked(levels, length, repeats, low, high)
    assert DDNM(travel_length=2, travel_repeats=2).path(levels) == walked(levels, 2, 2, 0.0, 9.0)


@pytest.mark.parametrize("weight", ["likelihood", "alpha"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_freedom(weight: Any, repeats: int) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 1.0))
    p = Matrices.of(problem)
    sampler = FreeDoM(
        8, weight, scale=0.7, travel_length=2, travel_repeats=repeats, travel_between=(0.2, 3.0), schedule=SCHEDULE
    )
    levels = SCHEDULE.grid(8).tolist()
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * p.eye
    for a, b in pairwise(walked(levels, 2, repeats, 0.2, 3.0)):
        if b > a:
            cov = cov + (b**2 - a**2) * p.eye
            continue
        J, k = p.denoiser(a)
        ratio = (b / a) ** 2
        # Added to the ancestral step: (1 - ratio) scale a^2 J^T grad, or scale sqrt(1 + b^2) J^T grad.
        size = 0.7 * ((1 - ratio) * a**2 if weight == "likelihood" else math.sqrt(1 + b**2))
        push = size * J.T @ p.B.T
        F = ratio * p.eye + (1 - ratio) * J - push @ p.B @ J
        mean = F @ mean + (1 - ratio) * k + push @ (p.d - p.B @ k)
        cov = F @ cov @ F.T + b**2 * (1 - ratio) * p.eye
    found_mean, found = law(sampler.method(problem))
    torch.testing.assert_close(found_mean, mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, cov, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mpgd(eta: float) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 1.0))
    p = Matrices.of(problem)
    sampler = MPGD(8, "likelihood", scale=0.7, eta=eta, data_std=0.9, schedule=SCHEDULE, travel_repeats=2)
    levels = SCHEDULE.grid(8).tolist()
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * p.eye
    for a, b in pairwise(walked(levels, 1, 2, 0.0, 9.0)):
        if b > a:
            cov = cov + (b**2 - a**2) * p.eye
            continue
        J, k = p.denoiser(a)
        c = eta * b * math.sqrt(1 - (b / a) ** 2)
        keep = math.sqrt(b**2 - c**2) / a
        push = 0.7 * a**2 * 0.81 / (a**2 + 0.81) * p.B.T
        pull = p.eye - push @ p.B
        F = keep * p.eye + (1 - keep) * pull @ J
        mean = F @ mean + (1 - keep) * (pull @ k + push @ p.d)
        cov = F @ cov @ F.T + c**2 * p.eye
    found_mean, found = law(sampler.method(problem))
    torch.testing.assert_close(found_mean, mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, cov, rtol=1e-8, atol=1e-9)

"""Samplers of deepinv, on vectors shaped as images (draws, 1, 1, d) with entries in [0, 1].

Everything runs as the package has it, with two exceptions: nothing is clipped by choice (DiffPIR clamps to the range in
its code, which holds all the data here), and PosteriorDiffusion, which has no default solver, takes the DDPM solver
that the package's own DPS takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inverse.methods import Method
from benchmarks.inverse.problems import Task


def _declare_torchvision_operators() -> Any:
    """Declare the two operators that torchvision describes at import and a CPU build of torch cannot load.

    The wheel of torchvision on the package index links CUDA. Nothing here calls its operators; the library that
    declares them must be kept.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_LIBRARY = _declare_torchvision_operators()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv


class Denoiser(deepinv.models.Denoiser):
    """The exact denoiser for images in [0, 1]; sigma in the same unit."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, x: Tensor, sigma: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        level = 2 * torch.as_tensor(sigma, dtype=torch.float64).detach().reshape(-1)[0]
        denoised = self.task.denoise(2 * x.reshape(len(x), -1) - 1, level)
        return ((denoised + 1) / 2).reshape(x.shape)


class Physics(deepinv.physics.DecomposablePhysics):
    """y = A x by the full decomposition of A: spectral vectors have d entries, zero beyond the rank."""

    def __init__(self, matrix: Tensor, sigma: float) -> None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=True)
        m, d = matrix.shape
        mask = torch.zeros(1, 1, 1, d, dtype=matrix.dtype)
        mask[..., :m] = values
        super().__init__(mask=mask, noise_model=deepinv.physics.GaussianNoise(sigma))
        self.m, self.d, self.left, self.right = m, d, left, right

    def U(self, x: Tensor) -> Tensor:
        return x[..., : self.m] @ self.left.to(x.dtype).T

    def U_adjoint(self, x: Tensor, **kwargs: Any) -> Tensor:
        return torch.nn.functional.pad(x @ self.left.to(x.dtype), (0, self.d - self.m))

    def V(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x @ self.right.to(x.dtype)

    def V_adjoint(self, x: Tensor) -> Tensor:
        return x @ self.right.to(x.dtype).T


def _setup(task: Task, draws: int) -> tuple[Denoiser, Physics, Tensor]:
    """Denoiser, operator and data of x / 2 + 1 / 2."""
    matrix = task.problem.matrix
    y = (task.y + matrix.sum(1)) / 2
    return Denoiser(task), Physics(matrix, task.sigma / 2), y.expand(draws, 1, 1, -1).clone()


def _to_task(x: Tensor) -> Tensor:
    return 2 * x.reshape(len(x), -1) - 1


def dps(task: Task, draws: int, **options: Any) -> Tensor:
    """deepinv.sampling.DPS."""
    denoiser, physics, y = _setup(task, draws)
    model = deepinv.sampling.DPS(denoiser, **options)
    model.data_fidelity.clip = None
    return _to_task(model(y, physics, x_init=(draws, 1, 1, task.dim)))


def _posterior_diffusion(
    fidelity: str, task: Task, draws: int, schedule: str = "vp", num_steps: int = 200, **options: Any
) -> Tensor:
    """deepinv.sampling.PosteriorDiffusion with one of its data-fidelity terms."""
    denoiser, physics, y = _setup(task, draws)
    sampling = deepinv.sampling
    if schedule == "vp":
        sde = sampling.VariancePreservingDiffusion(alpha=1.0)
    else:
        sde = sampling.VarianceExplodingDiffusion(sigma_min=task.lowest, sigma_max=task.largest, alpha=1.0)
    model = sampling.PosteriorDiffusion(
        data_fidelity=getattr(sampling, fidelity)(denoiser, **options),
        denoiser=denoiser,
        sde=sde,
        solver=sampling.DDPMSolver(timesteps=torch.linspace(1, 0, num_steps, dtype=torch.float64)),
    )
    return _to_task(model(y, physics, x_init=(draws, 1, 1, task.dim)))


def pigdm(task: Task, draws: int, **options: Any) -> Tensor:
    """PosteriorDiffusion with PiGDMDataFidelity."""
    return _posterior_diffusion("PiGDMDataFidelity", task, draws, **options)


def moment_matching(task: Task, draws: int, **options: Any) -> Tensor:
    """PosteriorDiffusion with MomentMatchingDataFidelity."""
    return _posterior_diffusion("MomentMatchingDataFidelity", task, draws, **options)


def ddrm(task: Task, draws: int, grid: str = "default", **options: Any) -> Tensor:
    """deepinv.sampling.DDRM; with grid="log" its levels are log-uniform and cover prior and data."""
    denoiser, physics, y = _setup(task, draws)
    if grid == "log":
        options["sigmas"] = np.append(np.geomspace(task.largest / 2, task.lowest / 2, 100), 0.0)
    return _to_task(deepinv.sampling.DDRM(denoiser, **options)(y, physics))


def diffpir(task: Task, draws: int, **options: Any) -> Tensor:
    """deepinv.sampling.DiffPIR."""
    denoiser, physics, y = _setup(task, draws)
    sigma = task.sigma / 2
    model = deepinv.sampling.DiffPIR(denoiser, deepinv.optim.data_fidelity.L2(), sigma=sigma, **options)
    return _to_task(model(y, physics))


CLOSE = ("PosteriorDiffusion, MomentMatching", "DPS")


def methods() -> list[Method]:
    """All of them, with the settings to choose from."""

    def method(name: str, sample: Any, settings: Mapping[str, Mapping[str, Any]]) -> Method:
        return Method("deepinv", name, sample, settings, close=name in CLOSE)

    norm = {f"weight={w:g}, 250 steps": {"weight": w, "num_steps": 250} for w in (10.0, 100.0, 300.0)}
    longer = {f"weight={w:g}, 1000 steps": {"weight": w} for w in (100.0, 300.0, 1000.0)}
    annealed = {
        f"annealed, weight={w:g}, 250 steps": {"guidance": "annealed", "weight": w, "num_steps": 250}
        for w in (3.0, 10.0)
    }
    return [
        method("DDRM", ddrm, {
            "default": {},
            **{f"log grid, eta={e:g}": {"grid": "log", "eta": e} for e in (0.5, 0.85, 1.0)},
        }),
        method("DiffPIR", diffpir, {
            "default": {},
            **{
                f"lambda={lam:g}, zeta={z:g}": {"lambda_": lam, "zeta": z}
                for lam, z in ((1.0, 0.1), (1.0, 1.0), (7.0, 0.5), (7.0, 1.0), (30.0, 1.0))
            },
        }),
        method("PosteriorDiffusion, PiGDM", pigdm, {
            "default": {},
            **{f"ve, weight={w:g}": {"schedule": "ve", "weight": w} for w in (0.5, 1.0, 2.0)},
        }),
        method("PosteriorDiffusion, MomentMatching", moment_matching, {
            "default": {},
            "ve, 6 CG steps": {"schedule": "ve", "cg_max_iter": 6},
        }),
        method("DPS", dps, {"default": {}, **norm, **longer, **annealed}),
    ]  # fmt: skip

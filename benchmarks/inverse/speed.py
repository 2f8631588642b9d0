"""Time per draw at equal steps with the shipped 28x28 network: each method of ours beside its twins.

Half the pixels of an image are observed. Packages take turns, so that the machine's mood is shared; the figure is the
median over rounds of our time over that of the faster twin in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepinv
import pyro
import pyro.distributions as dist
import torch
from azula.guidance import DiffPIRDenoiser, DPSSampler, MMPSDenoiser, PGDMSampler
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VPSchedule
from azula.sample import DDPMSampler, Sampler
from torch import Tensor

import inverse
import models
import ppl
from benchmarks.inverse import peers_azula, peers_deepinv
from inverse.operators import Mask
from sde import DiffusionPrior

STEPS, DRAWS, SIGMA, CG = 20, 16, 0.1, 3
Run = Callable[[], object]


@dataclass
class Images:
    """What the adapters of the peers need: the network on rows of 784 entries in [-1, 1], counted."""

    prior: DiffusionPrior
    keep: Tensor
    y: Tensor
    evals: int = field(default=0)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        self.evals += len(x)
        level = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)[0]
        images = x.float().reshape(len(x), *self.prior.event_shape)
        return self.prior.denoiser(images, level).reshape(x.shape).to(x.dtype)


def ours(images: Images) -> dict[str, Run]:
    """Our backends on one program."""
    mask = Mask(images.keep.reshape(images.prior.event_shape))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", images.prior)
        pyro.sample("y", dist.Normal(mask(x), SIGMA).to_event(1), obs=y)

    program = ppl.Program(model, images.y)
    backends: dict[str, ppl.Backend] = {
        "DPS": inverse.DPS(steps=STEPS),
        "PiGDM": inverse.PiGDM(steps=STEPS),
        "moment matching, 3 CG steps": inverse.MomentMatching(steps=STEPS, cg_steps=CG),
        "DiffPIR": inverse.DiffPIR(steps=STEPS),
        "DDRM": inverse.DDRM(steps=STEPS),
    }

    def run(backend: ppl.Backend) -> None:
        images.evals += ppl.infer(program, backend, draws=DRAWS).cost.denoiser_evals

    return {name: lambda b=backend: run(b) for name, backend in backends.items()}  # type: ignore[misc]


def of_deepinv(images: Images) -> dict[str, Run]:
    """Its samplers on images in [0, 1]."""
    shape = (DRAWS, *images.prior.event_shape)
    noise = deepinv.physics.GaussianNoise(SIGMA / 2)
    mask = images.keep.reshape(images.prior.event_shape).float()
    physics = deepinv.physics.Inpainting(img_size=images.prior.event_shape, mask=mask, noise_model=noise)
    full = torch.zeros(images.keep.shape)
    full[images.keep] = (images.y + 1) / 2
    y = full.reshape(1, *images.prior.event_shape).expand(shape).clone()
    denoiser = peers_deepinv.Denoiser(images)  # type: ignore[arg-type]
    sampling = deepinv.sampling

    def guided(fidelity: Any) -> Any:
        solver = sampling.DDPMSolver(timesteps=torch.linspace(1, 0, STEPS + 1, dtype=torch.float64))
        sde = sampling.VariancePreservingDiffusion(alpha=1.0)
        return sampling.PosteriorDiffusion(data_fidelity=fidelity, denoiser=denoiser, sde=sde, solver=solver)

    dps = sampling.DPS(denoiser, num_steps=STEPS + 1)
    pigdm = guided(sampling.PiGDMDataFidelity(denoiser))
    matching = guided(sampling.MomentMatchingDataFidelity(denoiser, cg_max_iter=CG))
    l2 = deepinv.optim.data_fidelity.L2()
    diffpir = sampling.DiffPIR(denoiser, l2, sigma=SIGMA / 2, max_iter=STEPS)
    ddrm = sampling.DDRM(denoiser, sigmas=torch.linspace(1, 0, STEPS).numpy())
    return {
        "DPS": lambda: dps(y, physics, x_init=shape),
        "PiGDM": lambda: pigdm(y, physics, x_init=shape),
        "moment matching, 3 CG steps": lambda: matching(y, physics, x_init=shape),
        "DiffPIR": lambda: diffpir(y, physics),
        "DDRM": lambda: ddrm(y, physics),
    }


def of_azula(images: Images) -> dict[str, Run]:
    """Its samplers on rows of entries in [-1, 1]."""
    keep, y = images.keep, images.y
    denoiser = peers_azula.Denoiser(images, VPSchedule())  # type: ignore[arg-type]
    options: dict[str, Any] = {"steps": STEPS, "silent": True}

    def look(x: Tensor) -> Tensor:
        return x[..., keep]

    def back(v: Tensor) -> Tensor:
        return torch.zeros(*v.shape[:-1], len(keep)).index_copy(-1, keep.nonzero().squeeze(-1), v)

    noise = IsotropicCovariance(torch.tensor(SIGMA**2))
    mmps = MMPSDenoiser(denoiser, y, look, noise, solver="cg", iterations=CG)
    samplers: dict[str, Sampler] = {
        "DPS": DPSSampler(denoiser, y, look, **options),
        "PiGDM": PGDMSampler(denoiser, y, look, back, eta=1.0, **options),
        "moment matching, 3 CG steps": DDPMSampler(mmps, **options),
        "DiffPIR": DDPMSampler(DiffPIRDenoiser(denoiser, y, look, SIGMA**2), **options),
    }
    return {
        name: lambda s=sampler: s(s.init((DRAWS, len(keep)), var=1.0))  # type: ignore[misc]
        for name, sampler in samplers.items()
    }


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show_speed(rounds: int) -> None:
    """Print the table."""
    generator = torch.Generator().manual_seed(0)
    prior = models.load("fashion28x28")
    keep = torch.rand(28 * 28, generator=generator) < 0.5
    truth = torch.rand(28 * 28, generator=generator) * 2 - 1
    y = (truth + SIGMA * torch.randn(28 * 28, generator=generator))[keep]
    images = Images(prior, keep, y)
    packages = {"pilotlight": ours(images), "deepinv": of_deepinv(images), "azula": of_azula(images)}
    print(f"milliseconds per draw: {DRAWS} draws of 28x28, {STEPS} steps, one thread, median of {rounds} rounds\n")
    print("| method | pilotlight | deepinv | azula | ours over the faster | goal 0.9 | evals per draw |")
    print("|---|---|---|---|---|---|---|")
    for name in packages["pilotlight"]:
        runs = {package: found[name] for package, found in packages.items() if name in found}
        evals = {}
        for package, run in runs.items():  # warm
            images.evals = 0
            run()
            evals[package] = images.evals / DRAWS
        times: dict[str, list[float]] = {package: [] for package in runs}
        for _ in range(rounds):
            for package, run in runs.items():
                times[package].append(seconds(run))
        peers = [times[p] for p in runs if p != "pilotlight"]
        ratio = statistics.median(
            mine / min(other) for mine, *other in zip(times["pilotlight"], *peers, strict=True)
        )  # fmt: skip
        shown = [
            f"{1e3 * statistics.median(times[p]) / DRAWS:.0f}" if p in runs else "-" for p in packages
        ]  # fmt: skip
        verdict = "met" if ratio <= 0.9 else "NOT met"
        counts = " / ".join(f"{evals[p]:.0f}" for p in runs)
        print(f"| {name} | {' | '.join(shown)} | {ratio:.2f} | {verdict} | {counts} |", flush=True)

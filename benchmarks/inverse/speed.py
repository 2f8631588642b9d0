"""Each method of ours and its twins with the shipped 28x28 network, half the pixels of an image observed.

`python -m benchmarks.inverse.speed <package>` runs those of one package on demand, in a process of its own: what one
package does to the allocator or compiles is no help to another.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import inverse
import models
import ppl
from benchmarks.inverse.speed_table import COMPILED, DRAWS, OURS, STEPS
from inverse.operators import Mask
from sde import DiffusionPrior

SIGMA, CG = 0.1, 3
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
    from benchmarks.inverse import peers_deepinv
    from benchmarks.inverse.peers_deepinv import deepinv

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
    from azula.guidance import DiffPIRDenoiser, DPSSampler, MMPSDenoiser, PGDMSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VPSchedule
    from azula.sample import DDPMSampler, Sampler

    from benchmarks.inverse import peers_azula

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


def problem(*, compile: bool = False) -> Images:
    """The image that all packages are given half of, and the network."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(28 * 28, generator=generator) < 0.5
    truth = torch.rand(28 * 28, generator=generator) * 2 - 1
    y = (truth + SIGMA * torch.randn(28 * 28, generator=generator))[keep]
    return Images(models.load("fashion28x28", compile=compile), keep, y)


def serve(package: str) -> None:
    """Run the methods whose names come in, one per line, and answer with processor seconds and evaluations per draw."""
    torch.set_num_threads(1)
    images = problem(compile=package == COMPILED)
    runs = {OURS: ours, COMPILED: ours, "deepinv": of_deepinv, "azula": of_azula}[package](images)
    print(json.dumps({"methods": list(runs)}), flush=True)
    for line in sys.stdin:
        images.evals = 0
        start = time.process_time()
        runs[line.strip()]()
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds / DRAWS, "evals": images.evals / DRAWS}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])

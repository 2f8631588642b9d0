"""Seconds per draw on the CPU and on a CUDA device: digits and Fashion-MNIST with guided samplers, one thread of CPU.

Then paths of 200 steps with a network as drift, eight dimensions, 4096 of them at once: seconds of a forward pass and
of one with its gradient.

`python -m benchmarks.gpu` prints a line for each backend. Without a CUDA device it says so and ends well.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import pyro
import pyro.distributions as dist
import torch

import inverse
import models
import ppl
import sde
from benchmarks.paths import DIM, STEPS, Drift
from inverse.operators import Mask


def program_on(device: str, name: str) -> ppl.Program:
    """Half of the pixels of an image drawn from the prior, under noise 0.2; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    prior = models.load(name)
    truth = prior.draw((1,), generator)[0]
    seen = torch.rand(truth.shape, generator=generator) < 0.5
    y = truth[seen] + 0.2 * torch.randn(int(seen.sum()), generator=generator)
    prior = models.load(name, device=device)
    mask = Mask(seen).to(device)

    def model(y: torch.Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), 0.2).to_event(1), obs=y)

    return ppl.Program(model, y.to(device))


def backends(steps: int, particles: int) -> dict[str, ppl.Backend]:
    return {
        "DPS": inverse.DPS(steps=steps),
        "PiGDM": inverse.PiGDM(steps=steps),
        "TwistedSMC": inverse.TwistedSMC(steps=steps, particles=particles, runs=1),
        "REDDiff": inverse.REDDiff(steps=steps),
        "NoiseSpace(SVI)": ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(8), steps=steps)),
    }


def seconds(program: ppl.Program, backend: ppl.Backend, draws: int, repeats: int) -> float:
    """Median wall time per draw; a first run warms up and is not counted."""
    ppl.infer(program, backend, draws=draws)
    walls = []
    for seed in range(repeats):
        start = time.perf_counter()
        posterior = ppl.infer(program, backend, draws=draws, seed=seed)
        posterior["x"].sum().item()  # waits for the device
        walls.append(time.perf_counter() - start)
    return statistics.median(walls) / draws


def path_seconds(device: str, factors: int, compile: bool, backward: bool, repeats: int) -> float:
    """Median wall time of 4096 paths, with the gradient by the drift's weights where it is asked for."""
    noise = sde.MarkovNoise(0.3, 1.0, factors=factors) if factors else sde.BrownianNoise()
    drift = Drift().to(device)
    times, origin = torch.linspace(1 / STEPS, 1, STEPS, device=device), torch.zeros(DIM, device=device)
    path = sde.Path(sde.Process(drift, 0.5, noise), times, origin, compile=compile)
    walls = []
    for _ in range(repeats + 2):  # the first two compile
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            end = path.from_noise(torch.randn(4096, *path.noise_shape, device=device))[:, -1].square().mean()
            if backward:
                end.backward()
        end.item()
        if device == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    return statistics.median(walls[2:])


def paths(devices: list[str], repeats: int) -> None:
    """A line for Brownian and fractional paths, as they are and compiled, forward and with the gradient."""
    for factors, compile, backward in itertools.product((0, 8), (False, True), (False, True)):
        times = [path_seconds(device, factors, compile, backward, repeats) for device in devices]
        words = "   ".join(f"{device} {1e3 * t:8.2f} ms" for device, t in zip(devices, times, strict=True))
        ratio = f"   {times[0] / times[1]:6.1f} times faster" if len(times) == 2 else ""
        name = f"Path, K = {factors}{', compiled' * compile}{', with backward' * backward}"
        print(f"{name:40s} {words}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--priors", nargs="*", default=["digits8x8", "fashion28x28"])
    parser.add_argument("--paths-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"{torch.cuda.get_device_name()} beside one CPU thread, torch {torch.__version__}")
    else:
        print("there is no CUDA device here: times of the CPU alone")
    if devices[1:]:
        paths(devices, options.repeats)
    if options.paths_only:
        return
    for name in options.priors:
        programs = {device: program_on(device, name) for device in devices}
        for label, backend in backends(options.steps, options.draws).items():
            times = [seconds(programs[device], backend, options.draws, options.repeats) for device in devices]
            words = "   ".join(f"{device} {1e3 * t:8.2f} ms" for device, t in zip(devices, times, strict=True))
            ratio = f"   {times[0] / times[1]:6.1f} times faster" if len(times) == 2 else ""
            print(f"{name:14s} {label:18s} per draw: {words}{ratio}", flush=True)


if __name__ == "__main__":
    main()

"""Bridges of fractional Brownian motion, and the Hurst index of a noisy record. A minute on a CPU."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inverse
import ppl
import sde

# %% a path that is seen once, at the end, with noise 0.1: one program for every Hurst index

SMOKE = "--smoke" in sys.argv
STEPS, HURST = (8, (0.7,)) if SMOKE else (100, (0.2, 0.5, 0.8))
END, SIGMA = 2.0, 0.1
times = torch.linspace(END / STEPS, END, STEPS, dtype=torch.float64)


def bridge(hurst):
    noise = sde.MarkovNoise(hurst, END, "I")
    print(noise.describe())
    path = sde.Path(sde.Process(noise=noise), times, torch.zeros(1, dtype=torch.float64))

    def model(y):
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], SIGMA), obs=y)

    return ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))


bridges = {h: ppl.infer(bridge(h), inverse.Exact(), draws=40, progress=False) for h in HURST}

# %% a record of a process that returns to zero, whose roughness is unknown: H is an ordinary site

SEEN = 6 if SMOKE else 40
seen = torch.linspace(END / SEEN, END, SEEN, dtype=torch.float64)
truth = sde.Path(
    sde.Process(lambda x, t: -x, 1.0, sde.MarkovNoise(0.75, END)), seen, torch.zeros(1, dtype=torch.float64)
)
record = truth.draw((), torch.Generator().manual_seed(3))[:, 0]
record = record + 0.05 * torch.randn(SEEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rough(y):
    low = torch.tensor(0.05, dtype=torch.float64)
    h = pyro.sample("h", dist.Uniform(low, 1 - low))
    process = sde.Process(lambda x, t: -x, 1.0, sde.MarkovNoise(h, END))
    x = pyro.sample("x", sde.Path(process, seen, torch.zeros(1, dtype=torch.float64)))
    pyro.sample("y", dist.Normal(x[:, 0], 0.05).to_event(1), obs=y)


engine = ppl.NoiseSpace(ppl.HMC(warmup=20 if SMOKE else 200))
posterior = ppl.infer(ppl.Program(rough, record), engine, draws=4 if SMOKE else 150, chains=8)
print(posterior.summary().loc[["h"]])

# %% figure

plt.rc("axes", titlesize=9)
figure, axes = plt.subplots(1, len(HURST) + 1, figsize=(3 * (len(HURST) + 1), 2.6), layout="constrained")
line = torch.cat([torch.zeros(1, dtype=torch.float64), times])
for axis, (h, found) in zip(axes, bridges.items(), strict=False):
    x = torch.nn.functional.pad(found.flatten("x")[..., 0], (1, 0))
    c = sde.fbm_covariance(times[:, None], times, h)
    gain = c[:, -1] / (c[-1, -1] + SIGMA**2)
    sd, mean = (torch.nn.functional.pad(v, (1, 0)) for v in ((c.diagonal() - gain * c[:, -1]).sqrt(), gain))
    axis.fill_between(line, mean - 1.645 * sd, mean + 1.645 * sd, color="C0", alpha=0.2, lw=0)
    axis.plot(line, x[:12].T, lw=0.6, color="C0")
    axis.plot([END], [1.0], "o", ms=4, color="C3")
    axis.set(title=f"draws and exact 90 %, H = {h}", xlabel="t", ylabel="x")
axes[-1].hist(posterior.flatten("h"), bins=30, range=(0, 1), density=True, color="C0", alpha=0.6)
axes[-1].axvline(0.75, color="C3", lw=1)
axes[-1].set(title="H given 40 noisy values", xlabel="Hurst index", ylabel="posterior density")
figure.savefig("fractional_bridge.png", dpi=150)
print("wrote fractional_bridge.png")

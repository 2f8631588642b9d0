"""A particle in a double well, seen five times through noise: a variational control against sampling."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inverse
import ppl
import sde

# %% the drift pushes to -1 or 1, whichever is nearer; fractional noise of Hurst index 0.7 carries the particle across

SMOKE = "--smoke" in sys.argv
STEPS, EVERY, SIGMA = (10, 2, 0.6) if SMOKE else (40, 8, 0.6)
times = torch.linspace(4 / STEPS, 4, STEPS, dtype=torch.float64)
start, wells = torch.zeros(1, dtype=torch.float64), lambda x, t: 3 * (torch.tanh(3 * x) - x)
noise = sde.MarkovNoise(0.7, 4.0, factors=4)
path = sde.Path(sde.Process(wells, 0.9, noise), times, start)
data = torch.tensor([-0.9, -1.1, 0.1, 0.9, 1.2], dtype=torch.float64)


def well(y):
    x = pyro.sample("x", path)
    with pyro.plate("seen", len(y)):
        pyro.sample("y", dist.Normal(x[EVERY - 1 :: EVERY, 0], SIGMA), obs=y)


program = ppl.Program(well, data)

# %% one control learned by variational inference, particles led by it or by nothing, chains in noise space

control = inverse.paths.ControlGuide(width=32)
fit = ppl.SVI(guide=control, steps=4 if SMOKE else 250, lr=0.03, particles=16)
fitted = fit.fit(program.noise_space(), seed=0)
MANY = 40 if SMOKE else 2000
backends = {
    "SVI, neural control": fitted.posterior(MANY),
    "particle filter, that control": inverse.GuidedParticleFilter(control=fitted, runs=1),
    "particle filter": inverse.GuidedParticleFilter(runs=1),
    "particle Gibbs": inverse.ParticleGibbs(16, warmup=2 if SMOKE else 30),
    "HMC in noise space": ppl.NoiseSpace(ppl.HMC(warmup=20 if SMOKE else 100)),
}
draws = dict.fromkeys(backends, MANY) | {"particle Gibbs": MANY // 10, "HMC in noise space": MANY // 20}
reference = ppl.infer(program, inverse.GuidedParticleFilter(runs=1), draws=100 if SMOKE else 10_000, seed=1)
comparison = ppl.compare(program, backends, draws, reference=reference)
comparison.show()

# %% figure: where the paths of each method go, and the state between the third and the fourth datum

figure, axes = plt.subplots(1, 4, figsize=(12, 2.7), layout="constrained")
shown = ["SVI, neural control", "particle filter, that control", "HMC in noise space"]
mid = 3 * EVERY + EVERY // 2 - 1
for i, (axis, name) in enumerate(zip(axes, shown, strict=False)):
    x = comparison.posteriors[name].flatten("x")[..., 0]
    low, high = x.quantile(torch.tensor([0.05, 0.95], dtype=x.dtype), 0)
    axis.fill_between(times, low, high, color=f"C{i}", alpha=0.25, lw=0)
    axis.plot(times, x[:: max(1, len(x) // 15)].T, color=f"C{i}", lw=0.5)
    axis.plot(times[EVERY - 1 :: EVERY], data, "o", ms=4, color="black")
    axis.set(title=name, ylim=(-2.2, 2.2), xlabel="t")
    axes[3].hist(x[:, mid], bins=40, range=(-2, 2), density=True, histtype="step", color=f"C{i}", lw=1.2)
weights = reference.flatten("x")[:, mid, 0]
axes[3].hist(weights, bins=40, range=(-2, 2), density=True, color="0.85", label="10,000 particles")
axes[3].set(title=f"x({float(times[mid]):.1f})", xlabel="x")
axes[3].legend(fontsize=8)
figure.savefig("double_well.png", dpi=150)
print("wrote double_well.png")

"""Amortised inference: one training for all data, against the exact posterior of each. Runs in half a minute."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inverse
import ppl

# %% a program: six normal data of unknown mean and precision, whose posterior is known

SMOKE = "--smoke" in sys.argv
DRAWS = 500 if SMOKE else 4000


def normal_data(y):
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0)))
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), (0.5 * tau).rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def exact(y):
    k, a = 0.5 + len(y), 3.0 + len(y) / 2
    m = y.sum() / k
    b = 2.0 + 0.5 * (y.square().sum() - k * m**2)
    return dist.StudentT(2 * a, m, (b / (a * k)).sqrt()), dist.Gamma(a, b)


# %% train once, on simulations alone; then ask for three data sets, and weight the draws of a short training

program = ppl.Program(normal_data, torch.zeros(6, dtype=torch.float64))
backend = inverse.AmortisedDenoiser(steps=100 if SMOKE else 1500, width=64, depth=2, lr=4e-3, levels=20)
fitted = backend.fit(program, seed=0, monitor=ppl.Monitor(progress=True))
shape = torch.tensor([-1.3, -0.6, -0.2, 0.2, 0.6, 1.3], dtype=torch.float64)
data_sets = {"centred": shape, "shifted": 0.6 * shape + 1.5, "spread out": 2.0 * shape - 1.0}

# %% figure: histograms of the draws, the exact posterior as a line

figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex="row")
for column, (name, y) in zip(axes.T, data_sets.items(), strict=True):
    plain = fitted.posterior(DRAWS, y=y)
    corrected = fitted.posterior(DRAWS, y=y, correct=True)
    ess = 1 / corrected.weights.square().sum()
    for axis, site, law, low, high in zip(column, ("mu", "tau"), exact(y), (-3, 0), (3, 5), strict=True):
        grid = torch.linspace(low + 1e-3, high, 300, dtype=torch.float64)
        bins = torch.linspace(low, high, 50)
        axis.hist(plain.flatten(site), bins, density=True, color="C0", alpha=0.35, label="network")
        weights = corrected.weights.flatten()
        axis.hist(
            corrected.flatten(site), bins, density=True, weights=weights, histtype="step", color="C1", label="weighted"
        )
        axis.plot(grid, law.log_prob(grid).exp(), "k", lw=1, label="exact")
        axis.set(xlabel=site, yticks=[])
    column[0].set_title(f"{name}: {ess / DRAWS:.0%} effective, k-hat {corrected.info['pareto_k']:.2f}", fontsize=9)
axes[0, 0].legend(frameon=False, fontsize=8)
figure.tight_layout()
figure.savefig("amortised.png", dpi=150)

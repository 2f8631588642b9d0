"""The Hurst index of a record by four methods: two posteriors and two estimates. Two minutes on a CPU."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl
import sde

# %% records: exact increments of fractional Brownian motion, their scale unknown to every method

SMOKE = "--smoke" in sys.argv
N, HURST = (48, (0.7,)) if SMOKE else (512, (0.2, 0.5, 0.8))
one = torch.ones((), dtype=torch.float64)


def record(hurst, seed):
    return sde.FractionalGaussianNoise(hurst * one, N, scale=2.0).draw((), torch.Generator().manual_seed(seed))


# %% one program, two likelihoods: the exact one, and that of eight Ornstein-Uhlenbeck factors in its place


def exact(h, scale):
    return sde.FractionalGaussianNoise(h, N, scale=scale)


def markov(h, scale):
    return sde.MarkovIncrements(sde.refitted_noise(h, 1.0, N, kind="I"), N, scale=scale)


def program(likelihood, x):
    def model(x):
        h = pyro.sample("h", dist.Beta(one, one))
        scale = pyro.sample("scale", dist.LogNormal(0 * one, 1.0))
        pyro.sample("x", likelihood(h, scale), obs=x)

    return ppl.Program(model, x, compile="never")


nuts = ppl.NUTS(warmup=50 if SMOKE else 200)
svi = ppl.SVI(guide=ppl.FullRank(), steps=30 if SMOKE else 200, particles=4, lr=0.05)

# %% inference and figure

figure, axes = plt.subplots(2, len(HURST), figsize=(3 * len(HURST) + 1, 4.4), layout="constrained", squeeze=False)
for (top, bottom), hurst, seed in zip(axes.T, HURST, range(1, 4), strict=False):
    x = record(hurst, seed)
    by_nuts = ppl.infer(program(exact, x), nuts, draws=20 if SMOKE else 400, chains=2, seed=0)
    by_svi = ppl.infer(program(markov, x), svi, draws=200 if SMOKE else 4000, seed=0)
    mle, whittle = sde.hurst_mle(x).hurst, sde.hurst_whittle(x).hurst
    for name, found in (("exact, NUTS", by_nuts), ("Markov, SVI", by_svi)):
        print(f"H = {hurst}  {name:12} {float(found.mean('h')):.3f} +- {float(found.sd('h')):.3f}")
    print(f"H = {hurst}  MLE {float(mle):.3f}  Whittle {float(whittle):.3f}")

    top.plot(torch.nn.functional.pad(x.cumsum(0), (1, 0)), lw=0.8, color="C0")
    top.set_title(f"a record with H = {hurst}", fontsize=9)
    top.set_xlabel("step", fontsize=9)
    centre, wide = float(by_nuts.mean("h")), 5 * float(by_nuts.sd("h"))
    bins = torch.linspace(centre - wide, centre + wide, 41)
    for found, style in ((by_nuts, {"alpha": 0.35}), (by_svi, {"histtype": "step", "lw": 1.5, "color": "C1"})):
        label = "exact likelihood, NUTS" if found is by_nuts else "Markov approximation, SVI"
        bottom.hist(found.flatten("h").numpy(), bins=bins, density=True, label=label, **style)
    bottom.axvline(mle, color="C0", lw=1.2, label="maximum likelihood")
    bottom.axvline(whittle, color="C2", lw=1.2, ls="--", label="Whittle")
    bottom.axvline(hurst, color="C3", lw=1.2, ls=":", label="truth")
    bottom.set_xlabel("H", fontsize=9)
    bottom.set_yticks([])
figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7, frameon=False)
figure.savefig("hurst.png", dpi=150)
print("wrote hurst.png")

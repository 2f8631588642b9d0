"""Rough volatility of the S&P 500 around 2008: the Hurst index and the path of volatility. Minutes on a CPU."""

from __future__ import annotations

import math
import sys

import matplotlib.pyplot as plt
import torch

import ppl
from models.market import market, structure_function
from models.rough_volatility import DAY, RoughVolatility, posterior_predictive_check

# %% two years of daily returns, and the day's range as a second, noisy measure of volatility
SMOKE = "--smoke" in sys.argv
days = market("2008-10-01", "2009-01-31") if SMOKE else market("2007-07-02", "2009-06-30")
model = RoughVolatility(error=0.29)  # of the log range of a day of Brownian motion (Alizadeh, Brandt, Diebold, 2002)
programs = {
    "returns alone": model.program(days.returns),
    "returns and ranges": model.program(days.returns, days.log_range),
}

# %% H and everything else unknown: a fit, and chains in its coordinates that correct it
fit = ppl.SVI(guide=ppl.Hierarchical(), steps=20 if SMOKE else 2500, lr=0.05)
hmc = ppl.HMC(warmup=20 if SMOKE else 120, adaptation="quarter_turn", max_steps=8 if SMOKE else 48, target_accept=0.85)
chains, draws = (4, 10) if SMOKE else (16, 200)
found, fits = {}, {}
for name, program in programs.items():
    fits[name] = fit.fit(program.noise_space(), seed=0)
    found[f"{name}, HMC"] = ppl.infer(program, ppl.NoiseSpace(ppl.Transport(hmc, fits[name])), draws, chains)
both, posterior = programs["returns and ranges"], found["returns and ranges, HMC"]
found["returns and ranges, SVI"] = fits["returns and ranges"].posterior(chains * draws)
for name, each in found.items():
    print(name, each.cost, each.summary().loc[["hurst", "level", "rate", "swing", "tails"]], sep="\n")

# %% fits against sampling: half of the chains are the reference, by which the others and the fits are judged
halves = [{name: posterior.draws[name][i::2] for name in both.latents} for i in range(2)]
backends = {
    "HMC, half of the chains": ppl.Posterior(halves[0], cost=posterior.cost, attrs=posterior.attrs),
    "SVI, Hierarchical": found["returns and ranges, SVI"],
    "SVI, low rank": ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(8), steps=fit.steps, lr=0.01)),
}
ppl.compare(both, backends, draws=chains * draws // 2, reference=halves[1]).show()

# %% what the model says of returns, and what a simple estimate of H says
moments = structure_function(days.log_range)
print(f"structure function of the range: H = {moments.hurst:.3f} +- {moments.stderr:.3f}")
checks = posterior_predictive_check(both, posterior, torch.Generator().manual_seed(1), lags=(1, 2, 5, 10, 21, 42))
for name, check in checks.items():
    print(f"{name}: {check.observed:.2f}, replicated {check.low:.2f} .. {check.median:.2f} .. {check.high:.2f}")

# %% figure: volatility over time, H by engine and record, and what replicated returns look like
plt.rcParams["date.converter"] = "concise"
places = [["path", "path", "path"], ["hurst", "hurst", "acf"]]
figure, axes = plt.subplot_mosaic(places, figsize=(9, 5.4), layout="constrained", height_ratios=[3, 2])
axis = axes["path"]
for name, color in (("returns alone, HMC", "C1"), ("returns and ranges, HMC", "C0")):
    v = found[name].flatten("v")[..., 0].exp()
    low, median, high = v.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=v.dtype), dim=0)
    axis.fill_between(days.dates, low, high, color=color, alpha=0.25, lw=0)
    axis.plot(days.dates, median, color=color, lw=1, label=f"given {name[:-5]}, median and 90 %")
axis.plot(days.dates, days.returns.abs() / math.sqrt(DAY), ".", c="0.35", ms=1.5, alpha=0.6, label="|return|, per year")
axis.set(yscale="log", ylim=(0.02, 2), ylabel="volatility per year")
axis.legend(fontsize=8, loc="lower left", ncols=3, framealpha=1)
axis, style = axes["hurst"], {"bins": 50, "range": (0, 1), "density": True, "histtype": "step"}
for (name, each), color in zip(found.items(), ("C1", "C0", "C2"), strict=True):
    axis.hist(each.flatten("hurst"), color=color, label=name, **style)
axis.axvline(moments.hurst, color="C3", lw=1, ls="--", label="structure function of the ranges")
axis.set(xlabel="Hurst index", ylabel="posterior density", yticks=[])
axis.legend(fontsize=8)
axis, lags = axes["acf"], {n[4:]: check for n, check in checks.items() if n.startswith("acf")}
middle, low, high = zip(*((c.median, c.median - c.low, c.high - c.median) for c in lags.values()), strict=True)
axis.errorbar(list(lags), middle, [low, high], fmt="o", ms=3, color="C0", capsize=2, label="replicated, 90 %")
axis.plot(list(lags), [c.observed for c in lags.values()], "x", color="C3", label="observed")
axis.set(xlabel="lag, days", ylabel="autocorrelation", title="squared returns")
axis.legend(fontsize=7)
figure.savefig("rough_volatility.png", dpi=150)
print("wrote rough_volatility.png")

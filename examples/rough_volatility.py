"""Rough volatility of the S&P 500 around 2008: the Hurst index and the path of volatility. Minutes on a CPU."""

from __future__ import annotations

import math
import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.dates import ConciseDateFormatter

import ppl
from models.market import market, structure_function
from models.rough_volatility import DAY, RoughVolatility, posterior_predictive_check

# %% two years of daily returns, and the day's range as a second, noisy measure of volatility

SMOKE = "--smoke" in sys.argv
days = market("2008-10-01", "2009-01-31") if SMOKE else market("2007-07-02", "2009-06-30")
# The log range of a day of Brownian motion has sd 0.29 (Alizadeh, Brandt and Diebold, 2002).
model = RoughVolatility(error=0.29)
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
    engine = ppl.NoiseSpace(ppl.Transport(hmc, fits[name]))
    found[f"{name}, HMC"] = ppl.infer(program, engine, draws, chains)
both, posterior = programs["returns and ranges"], found["returns and ranges, HMC"]
found["returns and ranges, SVI"] = fits["returns and ranges"].posterior(chains * draws)
for name, each in found.items():
    print(name, each.cost)
    print(each.summary().loc[["hurst", "level", "rate", "swing", "tails"]])

# %% fits against sampling: half of the chains are the reference, by which the others and the fits are judged

halves = [{name: posterior.draws[name][i::2] for name in both.latents} for i in range(2)]
low_rank = ppl.SVI(guide=ppl.LowRank(8), steps=20 if SMOKE else 2500, lr=0.01)
backends = {
    "HMC, half of the chains": ppl.Posterior(halves[0], cost=posterior.cost, attrs=posterior.attrs),
    "SVI, Hierarchical": found["returns and ranges, SVI"],
    "SVI, low rank": ppl.NoiseSpace(low_rank),
}
ppl.compare(both, backends, draws=chains * draws // 2, reference=halves[1]).show()

# %% what the model says of returns, and what a simple estimate of H says

moments = structure_function(days.log_range)
print(f"structure function of the range: H = {moments.hurst:.3f} +- {moments.stderr:.3f}")
checks = posterior_predictive_check(both, posterior, torch.Generator().manual_seed(1), lags=(1, 2, 5, 10, 21, 42))
for name, check in checks.items():
    print(f"{name}: {check.observed:.2f}, replicated {check.low:.2f} .. {check.median:.2f} .. {check.high:.2f}")

# %% figure: volatility over time, H by engine and record, and what replicated returns look like

figure, axes = plt.subplot_mosaic(
    [["path", "path", "path"], ["hurst", "hurst", "acf"]], figsize=(9, 5.4), layout="constrained", height_ratios=[3, 2]
)
axis = axes["path"]
for name, color in (("returns alone, HMC", "C1"), ("returns and ranges, HMC", "C0")):
    v = found[name].flatten("v")[..., 0].exp()
    low, median, high = v.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=v.dtype), dim=0)
    axis.fill_between(days.dates, low, high, color=color, alpha=0.25, lw=0)
    axis.plot(days.dates, median, color=color, lw=1, label=f"given {name[:-5]}, median and 90 %")
shown = {"color": "0.35", "ms": 1.5, "alpha": 0.6}
axis.plot(days.dates, days.returns.abs() / math.sqrt(DAY), ".", label="|return|, per year", **shown)
axis.set(yscale="log", ylim=(0.02, 2), ylabel="volatility per year")
axis.xaxis.set_major_formatter(ConciseDateFormatter(axis.xaxis.get_major_locator()))
axis.legend(fontsize=8, loc="lower left", ncols=3, framealpha=1)
for (name, posterior), color in zip(found.items(), ("C1", "C0", "C2"), strict=True):
    axes["hurst"].hist(
        posterior.flatten("hurst"), bins=50, range=(0, 1), density=True, histtype="step", color=color, label=name
    )
axes["hurst"].axvline(moments.hurst, color="C3", lw=1, ls="--", label="structure function of the ranges")
axes["hurst"].set(xlabel="Hurst index", ylabel="posterior density", yticks=[])
axes["hurst"].legend(fontsize=8)
lags = [name for name in checks if name.startswith("acf")]
middle = [checks[n].median for n in lags]
ends = [[checks[n].median - checks[n].low for n in lags], [checks[n].high - checks[n].median for n in lags]]
axes["acf"].errorbar(range(len(lags)), middle, ends, fmt="o", ms=3, color="C0", capsize=2, label="replicated, 90 %")
axes["acf"].plot(range(len(lags)), [checks[n].observed for n in lags], "x", color="C3", label="observed")
axes["acf"].set_xticks(range(len(lags)), [n[4:] for n in lags])
axes["acf"].set(xlabel="lag, days", ylabel="autocorrelation")
axes["acf"].set_title("squared returns", fontsize=9)
axes["acf"].legend(fontsize=7)
figure.savefig("rough_volatility.png", dpi=150)
print("wrote rough_volatility.png")

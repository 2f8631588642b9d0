"""Regression with outliers: each datum has a switch, summed out or drawn by a guide. Runs in a minute."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl
from ppl.objectives import ELBO

# %% data on a line, a quarter of them outliers; the model knows neither the line nor which they are

SMOKE = "--smoke" in sys.argv
STEPS, DRAWS = (40, 100) if SMOKE else (1500, 1000)
generator = torch.Generator().manual_seed(3)
x = torch.linspace(-2, 2, 24, dtype=torch.float64)
truth = torch.rand(24, generator=generator) < 0.25
noise = torch.randn(24, generator=generator, dtype=torch.float64)
y = torch.where(truth, 3.0 * noise, 0.5 + 1.2 * x + 0.3 * noise)


def switch(x, y):
    a, b = (pyro.sample(name, dist.Normal(x.new_zeros(()), 2.0)) for name in "ab")
    with pyro.plate("data", len(x)):
        out = pyro.sample("out", dist.Bernoulli(x.new_tensor(0.25)))
        pyro.sample("y", dist.Normal((1 - out) * (a + b * x), 0.3 + 2.7 * out), obs=y)


def guide(x, y):
    for name in "ab":
        place, log_sd = pyro.param(f"{name}_mean", x.new_zeros(())), pyro.param(f"{name}_log_sd", x.new_tensor(-1.0))
        pyro.sample(name, dist.Normal(place, log_sd.exp()))
    with pyro.plate("data", len(x)):
        pyro.sample("out", dist.Bernoulli(logits=pyro.param("logit", torch.full_like(x, -1.0))))


# %% NUTS and a full-rank fit sum the switches out and draw them afterwards; the guide draws them, by REINFORCE

program = ppl.Program(switch, x, y)
fits = {
    "summed out": ppl.SVI(guide=ppl.FullRank(), steps=STEPS),
    "REINFORCE": ppl.SVI(guide=guide, objective=ELBO(), estimators={"out": "rloo"}, steps=STEPS, lr=0.03),
}
exact = ppl.infer(program, ppl.NUTS(warmup=DRAWS // 2), draws=DRAWS // 2, chains=2, seed=0).discrete(program)
chance, histories = {"NUTS, summed out": exact.mean("out")}, {}
for name, svi in fits.items():
    fitted = svi.fit(program, seed=0, monitor=ppl.Monitor(progress=True))
    posterior = fitted.posterior(2 * DRAWS)
    chance[f"SVI, {name}"] = posterior.discrete(program).mean("out")
    histories[name] = fitted.history
    off = (chance[f"SVI, {name}"] - exact.mean("out")).abs().max()
    print(f"{name}: ELBO {fitted.elbo(4000).value:.3f}, largest error of a switch {off:.3f}")

# %% figure: lines and switches; the chance of each switch; how the two estimators climb

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.4, 1.2, 1])
a, b = (exact.flatten(n)[:, None] for n in "ab")
low, high = torch.quantile(a + b * x, torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
left.fill_between(x, low, high, color="C0", alpha=0.3, label="90 % of lines")
points = left.scatter(x, y, c=exact.mean("out"), cmap="coolwarm", vmin=0, vmax=1, edgecolor="k", lw=0.4, zorder=3)
left.scatter(x[truth], y[truth], s=90, facecolor="none", edgecolor="k", label="outliers, in truth")
figure.colorbar(points, ax=left, label="P(outlier | data)")
left.set(xlabel="x", ylabel="y")
left.legend(frameon=False, fontsize=8)
for i, (name, value) in enumerate(chance.items()):
    middle.plot(torch.arange(len(x)) + 0.2 * (i - 1), value, "os^"[i], ms=4, label=name)
middle.set(xlabel="datum", ylabel="P(outlier | data)")
middle.legend(frameon=False, fontsize=8)
for i, (name, history) in enumerate(histories.items()):
    right.plot(history, color=f"C{i + 1}", lw=0.5, alpha=0.8, label=name)
right.set(xlabel="step", ylabel="ELBO, estimates", ylim=(float(histories["summed out"].max()) - 25, None))
right.legend(frameon=False, fontsize=8)
figure.tight_layout()
figure.savefig("discrete_switch.png", dpi=150)

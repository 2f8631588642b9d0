"""Eight schools: NUTS and a variational fit of the same program, and the funnel that the fit misses. Runs in 20 s."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl

# %% data of Rubin (1981) and the hierarchical model, written for one draw

SMOKE = "--smoke" in sys.argv
DRAWS = 200 if SMOKE else 1000
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        shift = pyro.sample("shift", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * shift)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% two engines, one program

program = ppl.Program(eight_schools, y, sigma)
backends = {
    "NUTS": ppl.NUTS(warmup=200 if SMOKE else 1000),
    "SVI, independent": ppl.SVI(steps=200 if SMOKE else 3000),
    "SVI, full rank": ppl.SVI(guide=ppl.FullRank(), steps=200 if SMOKE else 3000),
}
comparison = ppl.compare(program, backends, draws=DRAWS, progress=True)
comparison.show()

# %% figure: the effect of each school, and the joint law of the spread and one effect

figure, (left, *right) = plt.subplots(1, 1 + len(backends), figsize=(12, 3.2), width_ratios=[1.6, 1, 1, 1])
for i, (name, posterior) in enumerate(comparison.posteriors.items()):
    low, middle, high = posterior.quantile("theta", [0.05, 0.5, 0.95])
    at = torch.arange(8) + 0.2 * (i - 1)
    left.errorbar(at, middle, yerr=torch.stack([middle - low, high - middle]), fmt="o", ms=3, label=name)
    tau, theta = (posterior.flatten(n) for n in ("tau", "theta"))
    right[i].plot(theta[:, 0], tau.log(), ".", ms=1.5, alpha=0.4)
    right[i].set(
        title=name, xlabel="effect of school 0", ylabel="log tau" if i == 0 else "", xlim=(-20, 45), ylim=(-6, 5)
    )
left.axhline(0.0, color="grey", lw=0.5)
left.set(xlabel="school", ylabel="effect, 90 % interval", ylim=(-6, 24))
left.legend(fontsize=7, loc="upper right")
figure.tight_layout()
figure.savefig("eight_schools.png", dpi=150)

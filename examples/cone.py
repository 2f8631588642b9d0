"""The noisy cone: one ring-shaped posterior, four variational bounds, and their guides. Runs in a minute."""

from __future__ import annotations

import math
import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppl
from ppl.objectives import DIWHVI, ELBO, HVI, IWHVI, Engine

# %% the model: only the radius is measured; two guides, a normal at one point and a ring with a hidden angle

STEPS = 20 if "--smoke" in sys.argv else 600
real = torch.tensor(5.0, dtype=torch.float64).new_tensor


def cone(z):
    x, y = (pyro.sample(name, dist.Normal(real(0.0), 10.0)) for name in "xy")
    r = x**2 + y**2
    pyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=z)


def point(z):
    for name, start in (("x", 0.5), ("y", 2.0)):
        place, scale = pyro.param(f"{name}_mean", real(start)), pyro.param(f"{name}_log_sd", real(-2.0)).exp()
        pyro.sample(name, dist.Normal(place, scale))


def ring(z):
    s = pyro.param("log_s", real(-2.5)).exp()
    hidden = pyro.sample("u", dist.Uniform(real(0.0), 1.0), infer={"is_auxiliary": True})  # the bounds integrate it out
    u = 2 * math.pi * hidden
    for name, place in (("x", torch.cos(u)), ("y", torch.sin(u))):
        pyro.sample(name, dist.Normal(z.sqrt() * place, s))


def reverse(kept, z):
    pyro.sample("u", dist.Uniform(real(0.0), 1.0))


# %% one loop over objectives; each bound is below log p(z), and is maximised by Adam

program = ppl.Program(cone, real(5.0))
objectives = {
    "ELBO, normal": (ELBO(), point),
    "HVI, ring": (HVI(reverse), ring),
    "IWHVI, ring": (IWHVI(reverse, 5), ring),
    "DIWHVI, ring": (DIWHVI(reverse, 5, 5), ring),
}
found = {}
for name, (objective, guide) in objectives.items():
    svi = ppl.SVI(guide=guide, objective=objective, steps=STEPS, lr=0.02, particles=16)
    fitted = svi.fit(program, seed=0, monitor=ppl.Monitor(progress=True))
    found[name] = (fitted, float(Engine(objective, program, guide).values(fitted.params, 20 * STEPS).mean()))
    print(f"{name}: {found[name][1]:.3f}")

# %% figure: the bounds as they rise, and draws of the guides on the posterior

figure, axes = plt.subplots(1, 5, figsize=(15, 3.2), width_ratios=[1.3, 1, 1, 1, 1], layout="constrained")
side = torch.linspace(-3.2, 3.2, 160, dtype=torch.float64)
x, y = torch.meshgrid(side, side, indexing="xy")
density = program.log_joint({"x": x.reshape(-1), "y": y.reshape(-1)}).reshape(x.shape).exp()
for i, (axis, (name, (fitted, bound))) in enumerate(zip(axes[1:], found.items(), strict=True)):
    smooth = fitted.history.unfold(0, max(STEPS // 30, 1), max(STEPS // 60, 1))
    axes[0].plot(torch.linspace(0, STEPS, len(smooth)), smooth.median(1).values, color=f"C{i}", label=name)
    draws = fitted.posterior(400, seed=1)
    axis.contourf(x, y, density, 8, cmap="Greys", alpha=0.7)
    axis.plot(draws.flatten("x"), draws.flatten("y"), ".", ms=2, color=f"C{i}")
    axis.set(title=f"{name}: {bound:.2f}", aspect="equal", xticks=[], yticks=[], xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
axes[0].axhline(-5.32323, color="k", lw=0.8, ls="--", label="log p(z), by quadrature")
axes[0].set(xlabel="step", ylabel="bound", ylim=(-14, -4.5))
axes[0].legend(fontsize=7, frameon=False)
figure.savefig("cone.png", dpi=150)

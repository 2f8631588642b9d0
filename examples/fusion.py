"""A target followed by range and bearing: a transformer that takes any prior, beside particles. Runs in two minutes."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch

import ppl
from models.fusion import (
    TrackPriors,
    corrected,
    particle_filter,
    range_bearing,
    range_bearing_data,
    range_bearing_log_likelihood,
    recursion,
    turning_point,
)

# %% one measurement as a program; the transformer learns its posterior for all priors of a family

STEPS, PARTICLES = (12, 200) if "--smoke" in sys.argv else (1500, 5000)
backend = ppl.DistributionTransformer(4, 48, feedforward=96, steps=STEPS, batch=256, priors=TrackPriors())
fitted = backend.fit(range_bearing(), seed=0, monitor=ppl.Monitor(progress=True))

# %% a target in motion: the posterior of a step, moved, is the prior of the next

generator, motion = torch.Generator().manual_seed(4), turning_point()
truth = motion.simulate(15, 1, generator)
y = range_bearing_data(truth, seed=1)


def update(prior, now):
    return fitted.mixtures(prior, range=now[:, 0], bearing=now[:, 1])


log_likelihood = range_bearing_log_likelihood
tracks = {
    "transformer": recursion(update, motion, y),
    "transformer, weighted draws": recursion(corrected(update, log_likelihood, 1000, generator), motion, y),
}
states, _ = particle_filter(lambda x, now: log_likelihood(x, now[:, None]), motion, y, PARTICLES, generator)

# %% figure: the track with 90 % ellipses, and the error of the place over time

figure = plt.figure(figsize=(13, 4), layout="constrained")
first = figure.add_subplot(1, 3, 1)
axes = [first, figure.add_subplot(1, 3, 2, sharex=first, sharey=first), figure.add_subplot(1, 3, 3)]
angle = torch.linspace(0, 2 * torch.pi, 60, dtype=torch.float64)
circle = 2.146 * torch.stack([angle.cos(), angle.sin()])  # the root of the 90 % point of chi-square, two degrees
places = [0, 2]
for i, (axis, (name, found)) in enumerate(zip(axes, tracks.items(), strict=False)):
    for q in found:
        spread = torch.linalg.cholesky(q.covariance[0][places][:, places]) @ circle
        axis.plot(*(q.mean[0, places, None] + spread), color=f"C{i}", lw=0.8)
    axis.plot(*(y[:, 0, :1] * torch.stack([y[:, 0, 1].cos(), y[:, 0, 1].sin()], 1)).T, "kx", ms=5, label="measured")
    axis.plot(*truth[:, 0, places].T, "k.-", lw=1, label="truth")
    axis.plot(*states[:, 0].mean(1)[:, places].T, "C2--", lw=1, label=f"{PARTICLES} particles")
    axis.set(title=name, aspect="equal", xlabel="x", ylabel="y")
    error = torch.stack([q.mean[0] for q in found]) - truth[:, 0]
    axes[2].plot(error[:, places].norm(dim=1), color=f"C{i}", label=name)
axes[0].legend(frameon=False, fontsize=7)
axes[2].plot((states[:, 0].mean(1) - truth[:, 0])[:, places].norm(dim=1), "C2--", label=f"{PARTICLES} particles")
axes[2].set(xlabel="step", ylabel="error of the place", ylim=(0, None))
axes[2].legend(frameon=False, fontsize=7)
figure.savefig("fusion.png", dpi=150)

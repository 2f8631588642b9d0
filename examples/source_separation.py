"""A digit on an uneven background: two diffusion priors in one measurement. Runs in a minute on a CPU."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inverse
import models
import ppl
import sde

# %% two priors, a trained network for the digit and a smooth Gaussian field for the background; data

SMOKE = "--smoke" in sys.argv
DRAWS, STEPS = (4, 2) if SMOKE else (48, 15)
SIGMA = 0.15
generator = torch.Generator().manual_seed(1)

digit_prior = models.load("digits8x8")
place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
smooth = torch.exp(-(torch.cdist(place, place) ** 2) / (2 * 4.0**2)) + 1e-4 * torch.eye(64)
background_prior = sde.GaussianMixture(torch.ones(1), torch.zeros(1, 1, 8, 8), smooth[None])
digit, background = models.digits().held_out[4], background_prior.draw((), generator)
y = digit + background + SIGMA * torch.randn(1, 8, 8, generator=generator)


def mixed(y):
    digit = pyro.sample("digit", digit_prior)
    background = pyro.sample("background", background_prior)
    pyro.sample("y", dist.Normal(digit + background, SIGMA).to_event(3), obs=y)


# %% one program, two backends; each denoises both sites at the same noise levels

program = ppl.Program(mixed, y)
backends = {
    "moment matching": inverse.MomentMatching(steps=STEPS, exact_limit=0, cg_steps=5),
    "ΠGDM": inverse.PiGDM(steps=2 * STEPS),
}
posteriors = {n: ppl.infer(program, b, draws=DRAWS, progress=True) for n, b in backends.items()}

# %% figure: what was mixed, and for each backend mean, standard deviation and draws of both sources

figure, axes = plt.subplots(1 + 2 * len(backends), 6, figsize=(6.5, 1.1 * (1 + 2 * len(backends))))
for axis in axes.flat:
    axis.set_axis_off()
grey = {"cmap": "gray", "vmin": -2, "vmax": 2}
for axis, (title, image) in zip(axes[0], {"digit": digit, "background": background, "data": y}.items(), strict=False):
    axis.imshow(image[0], **grey)
    axis.set_title(title, fontsize=8)
for i, (name, posterior) in enumerate(posteriors.items()):
    for row, site in zip(axes[1 + 2 * i :], ("digit", "background"), strict=False):
        row[0].imshow(posterior.mean(site)[0], **grey)
        row[0].set_title(f"{name}\n{site}", fontsize=7)
        row[1].imshow(posterior.sd(site)[0], cmap="magma", vmin=0, vmax=0.8)
        row[1].set_title("sd", fontsize=7)
        for axis, draw in zip(row[2:], posterior.flatten(site), strict=False):
            axis.imshow(draw[0], **grey)
figure.tight_layout()
figure.savefig("source_separation.png", dpi=150)

"""A noisy digit whose noise level is not known: one more site of the program. Runs in 40 s on a CPU."""

from __future__ import annotations

import math
import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import models
import ppl
from inverse.operators import Mask
from inverse.particles import NoiseAndReturn

# %% prior, operator, data

SMOKE = "--smoke" in sys.argv
SIGMA = 0.4
prior = models.load("digits8x8", noise_steps=10)
truth = models.digits().held_out[4]
seen = torch.ones(1, 8, 8, dtype=torch.bool)
seen[:, 2:5] = False
mask = Mask(seen)
y = mask(truth) + SIGMA * torch.randn(mask.out_shape, generator=torch.Generator().manual_seed(0))


def unknown_noise(y):
    sigma = pyro.sample("sigma", dist.LogNormal(math.log(0.3), 0.7))
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(mask(x), sigma).to_event(1), obs=y)


# %% two engines: blocks with a particle kernel for the image, and a fit of image noise and sigma together

program = ppl.Program(unknown_noise, y)
kernels = {("x",): NoiseAndReturn(steps=3 if SMOKE else 15, particles=8), ("sigma",): ppl.SliceKernel()}
posteriors = {
    "Gibbs": ppl.infer(program, ppl.Gibbs(kernels, warmup=1 if SMOKE else 10), draws=4 if SMOKE else 40, progress=True),
    "noise-space SVI": ppl.infer(
        program,
        ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=3 if SMOKE else 200, particles=4, lr=0.05)),
        draws=16 if SMOKE else 160,
        progress=True,
    ),
}

# %% figure: what each says about the noise and about the image

figure, axes = plt.subplots(2, 4, figsize=(9, 4), width_ratios=[2, 1, 1, 1])
grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
for (histogram, mean, sd, draw), (name, posterior) in zip(axes, posteriors.items(), strict=True):
    histogram.hist(posterior.flatten("sigma").numpy(), bins=20, range=(0.2, 0.8))
    histogram.axvline(SIGMA, color="crimson")
    histogram.set_title(f"{name}: sigma = {posterior.mean('sigma'):.2f} ± {posterior.sd('sigma'):.2f}", fontsize=9)
    for axis, image, title, colours in (
        (mean, posterior.mean("x"), "mean", grey),
        (sd, posterior.sd("x"), "sd", {"cmap": "magma", "vmin": 0, "vmax": 0.9}),
        (draw, posterior.flatten("x")[-1], "a draw", grey),
    ):
        axis.imshow(image[0], **colours)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
figure.tight_layout()
figure.savefig("unknown_noise.png", dpi=150)

"""Six blurred digits from one lens of unknown width: a hierarchy over inverse problems. Two minutes on a CPU.

Width and images are one posterior; beside it, the same images with a width each.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import models
import ppl
from inverse.operators import GaussianBlur
from inverse.particles import NoiseAndReturn

# %% images, the lens, data

SMOKE = "--smoke" in sys.argv
(IMAGES, DRAWS), WIDTH, SIGMA, SHAPE = (2, 3) if SMOKE else (6, 25), 0.9, 0.3, (1, 8, 8)
prior = models.load("digits8x8", noise_steps=10)
truth = models.digits().held_out[:IMAGES]
y = GaussianBlur(WIDTH, SHAPE)(truth)
y = y + SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def blurred(y, shared):
    law = dist.LogNormal(torch.tensor(0.0), 0.5)
    width = pyro.sample("width", law if shared else law.expand([len(y)]).to_event(1)).expand(len(y))
    for i in range(len(y)):  # one site an image, so that a block moves each given the width alone
        x = pyro.sample(f"x{i}", prior)
        mean = GaussianBlur(width[i], SHAPE, radius=3)(x)
        pyro.sample(f"y{i}", dist.Normal(mean, SIGMA).to_event(3), obs=y[i])


def run(images, shared):  # with 8 levels and 4 particles the shared width was 1.01 ± 0.05, here 0.96 ± 0.04
    image = NoiseAndReturn(steps=3 if SMOKE else 20, particles=6)
    kernels = {("width",): ppl.SliceKernel(width=0.5), **{(f"x{i}",): image for i in range(images)}}
    engine = ppl.Gibbs(kernels, warmup=1 if SMOKE else 5)
    return ppl.infer(ppl.Program(blurred, y[:images], shared), engine, draws=DRAWS, chains=1, seed=0, progress=True)


# %% each image alone, then half of them and all of them under one width

alone = run(IMAGES, shared=False)
together = {m: run(m, shared=True) for m in sorted({IMAGES // 2, IMAGES})}
sds = {1: alone.sd("width"), **{m: posterior.sd("width")[None] for m, posterior in together.items()}}
print("sd of width:", *(f"{m} images {float(values.mean()):.3f}" for m, values in sds.items()))

# %% figure: what is known of the width, and how that grows with the images; the images themselves

figure = plt.figure(figsize=(10, 4.2))
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
widths, growth = left.subplots(2, 1, height_ratios=[1.5, 1])
rows = [(float(w), float(s)) for w, s in zip(alone.mean("width"), alone.sd("width"), strict=True)]
rows += [(float(posterior.mean("width")), float(posterior.sd("width"))) for posterior in together.values()]
names = [*(f"image {i + 1} alone" for i in range(IMAGES)), *(f"{m} images, one width" for m in together)]
for row, (mean, sd) in enumerate(rows):
    widths.errorbar(mean, -row, xerr=2 * sd, fmt="o", color="0.5" if row < IMAGES else "C0", ms=4)
widths.axvline(WIDTH, color="crimson", lw=1)
widths.set_yticks([-row for row in range(len(names))], names, fontsize=7)
widths.set_xlabel("blur width in pixels, mean ± 2 sd (red: truth)")
for m, values in sds.items():
    growth.plot([m] * len(values), values, "o", color="0.5" if m == 1 else "C0", ms=4)
counts = torch.linspace(1, IMAGES, 50)
growth.plot(counts, sds[1].square().reciprocal().mean().rsqrt() / counts.sqrt(), color="0.7", lw=1)
growth.set(ylim=(0, None), ylabel="sd of width", xlabel="images; line: 1 / root of their number")
axes = right.subplots(4, IMAGES)
for i, column in enumerate(axes.T):
    images = (truth[i], y[i], alone.mean(f"x{i}"), together[IMAGES].mean(f"x{i}"))
    for axis, image, title in zip(column, images, ("truth", "data", "alone", "shared"), strict=True):
        axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[], ylabel="" if i else title)
left.subplots_adjust(left=0.33, right=0.96, bottom=0.13, top=0.97, hspace=0.45)
right.subplots_adjust(left=0.06, right=0.98, bottom=0.04, top=0.96, wspace=0.08, hspace=0.08)
figure.savefig("shared_operator.png", dpi=150)

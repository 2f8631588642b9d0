"""Hidden pixels of a held-out image: three samplers, one program, and what each is sure of. Runs in 30 s on a CPU."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inverse
import models
import ppl
from inverse.operators import Mask

# %% prior, operator, data

SMOKE = "--smoke" in sys.argv
DRAWS, STEPS = (4, 4) if SMOKE else (64, 50)
SIGMA = 0.2
generator = torch.Generator().manual_seed(0)

prior = models.load("fashion28x28")
truth = models.held_out_fashion()[0][29]
seen = torch.ones(1, 28, 28, dtype=torch.bool)
seen[:, 2:18, 13:] = False
mask = Mask(seen)
y = mask(truth) + SIGMA * torch.randn(mask.out_shape, generator=generator)


def inpaint(y):
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(mask(x), SIGMA).to_event(1), obs=y)


# %% one loop over backends

program = ppl.Program(inpaint, y)
backends = {
    "ΠGDM": inverse.PiGDM(steps=STEPS),
    "RED-diff": inverse.REDDiff(steps=STEPS),
    "twisted SMC": inverse.TwistedSMC(steps=STEPS, runs=1),
}
comparison = ppl.compare(program, backends, draws=DRAWS, truth={"x": truth}, progress=True)
comparison.show()

# %% figure: truth, data, and for each backend the mean, the standard deviation and four draws

figure, axes = plt.subplots(len(backends) + 1, 6, figsize=(7, 1.2 * (len(backends) + 1)))
for axis in axes.flat:
    axis.set_axis_off()
grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
hidden = torch.where(seen, mask.adjoint(y), torch.nan)
axes[0, 0].imshow(truth[0], **grey)
axes[0, 0].set_title("truth", fontsize=8)
axes[0, 1].imshow(hidden[0], **grey)
axes[0, 1].set_title("data", fontsize=8)
for row, (name, posterior) in zip(axes[1:], comparison.posteriors.items(), strict=True):
    row[0].imshow(posterior.mean("x")[0], **grey)
    row[0].set_title(f"{name}: mean", fontsize=8)
    row[1].imshow(posterior.sd("x")[0], cmap="magma", vmin=0, vmax=0.8)
    row[1].set_title("sd", fontsize=8)
    for axis, draw in zip(row[2:], posterior.sample("x", 4, generator), strict=True):
        axis.imshow(draw[0], **grey)
figure.tight_layout()
figure.savefig("inpainting.png", dpi=150)

"""A latent prior: the site is a code with a mixture prior, the image is decoder(code). Runs in two minutes on a CPU.

The decoder is an ordinary torch module inside the program. Guided samplers take it as a nonlinear part of the forward
model; generic engines work on the noise of the code. Any network and any diffusion prior fit in the same places.
"""

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

# %% a decoder fitted on digits: 12 principal axes and a squashing to the range of pixels; a mixture over the codes

SMOKE = "--smoke" in sys.argv
data = models.digits()
images, labels = data.train.flatten(1), data.train_label
centre = images.mean(0)
_, scale, axes = torch.linalg.svd(images - centre, full_matrices=False)
width = scale[:12] / len(images) ** 0.5
linear = torch.nn.Linear(12, 64)
linear.weight.data, linear.bias.data = 1.3 * (axes[:12] * width[:, None]).T, 1.3 * centre
decoder = torch.nn.Sequential(linear, torch.nn.Tanh()).requires_grad_(False)
codes = (images - centre) @ axes[:12].T / width
means = torch.stack([codes[labels == c].mean(0) for c in range(10)])
covariances = torch.stack([codes[labels == c].T.cov() + 0.01 * torch.eye(12) for c in range(10)])
prior = sde.GaussianMixture(torch.ones(10) / 10, means, covariances, noise_steps=10)

# %% data: the lower half of a held-out digit, with noise

truth, SIGMA = data.held_out[4].flatten(), 0.4
y = truth[32:] + SIGMA * torch.randn(32, generator=torch.Generator().manual_seed(0))


def latent(y):
    code = pyro.sample("code", prior)
    x = pyro.deterministic("x", decoder(code), event_dim=1)
    pyro.sample("y", dist.Normal(x[..., 32:], SIGMA).to_event(1), obs=y)


# %% a guided sampler for nonlinear data, and a generic engine on the noise of the code

program = ppl.Program(latent, y)
backends = {
    "DPS": inverse.DPS(steps=10 if SMOKE else 300, weight="likelihood"),
    "noise-space slice": ppl.NoiseSpace(ppl.EllipticalSlice(warmup=5 if SMOKE else 500, thin=1 if SMOKE else 5)),
}
comparison = ppl.compare(program, backends, draws=10 if SMOKE else 100, truth={"x": truth}, progress=True)
comparison.show()

# %% figure: data, and for each engine the mean, the standard deviation and draws of the decoded image

figure, grid = plt.subplots(len(backends), 8, figsize=(9, 1.6 * len(backends)))
for row, (name, posterior) in zip(grid, comparison.posteriors.items(), strict=True):
    x = posterior.sample("x", 4, torch.Generator().manual_seed(0))
    shown = [truth, torch.cat([torch.full((32,), torch.nan), y]), posterior.mean("x"), posterior.sd("x"), *x]
    titles = ["truth", "data", f"{name}\nmean", "sd", "draws", "", "", ""]
    for axis, image, title in zip(row, shown, titles, strict=True):
        look = {"cmap": "magma", "vmin": 0, "vmax": 0.8} if title == "sd" else {"cmap": "gray", "vmin": -1, "vmax": 1}
        axis.imshow(image.reshape(8, 8), **look)
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
figure.tight_layout()
figure.savefig("latent_prior.png", dpi=150)

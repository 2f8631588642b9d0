"""A variational autoencoder of handwritten digits: two Pyro programs, one line to fit them. Runs in half a minute.

The model says how a digit comes about from a short code, the guide how to find the code of a digit. Both are ordinary
Pyro programs on ordinary torch modules. `SVI` traces them once into a graph, so that a step costs what the networks do.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import models
import ppl

# %% data: digits of 8 x 8 pixels in [0, 1]; 297 of them are held out

SMOKE = "--smoke" in sys.argv
torch.manual_seed(0)
data = models.digits()
train, held_out = ((x.flatten(1) + 1) / 2 for x in (data.train, data.held_out))
CODE, BATCH = 8, 100

# %% model p(code) p(digit | code) and guide q(code | digit), on minibatches

decoder = torch.nn.Sequential(torch.nn.Linear(CODE, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64), torch.nn.Sigmoid())
encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 2 * CODE))


def model(digits):
    pyro.module("decoder", decoder)
    sigma = pyro.param("sigma", torch.tensor(0.3), constraint=dist.constraints.positive)
    with pyro.plate("digits", len(digits), BATCH) as i:
        code = pyro.sample("code", dist.Normal(torch.zeros(CODE), 1.0).to_event(1))
        pyro.sample("digit", dist.Normal(decoder(code), sigma).to_event(1), obs=digits[i])


def guide(digits):
    pyro.module("encoder", encoder)
    with pyro.plate("digits", len(digits), BATCH) as i:
        loc, raw = encoder(digits[i]).chunk(2, -1)
        pyro.sample("code", dist.Normal(loc, torch.nn.functional.softplus(raw)).to_event(1))


# %% the same programs under two objectives: the evidence bound, and the tighter one of ten particles

steps, fits = (20 if SMOKE else 6000), {}
for name, objective in {"ELBO": ppl.objectives.ELBO(), "IWELBO(10)": ppl.objectives.IWELBO(10)}.items():
    backend = ppl.SVI(guide=guide, objective=objective, steps=steps, particles=1, lr=2e-3)
    fits[name] = backend.fit(ppl.Program(model, train))
encoder, decoder = (fits["ELBO"].module(n, net) for n, net in (("encoder", encoder), ("decoder", decoder)))

# %% figure: the two bounds, held-out digits with their reconstructions, and new digits from random codes

figure = plt.figure(figsize=(10, 3.6))
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
axis, window = left.subplots(), max(steps // 60, 1)  # each point is the mean of a window of steps
for name, fit in fits.items():
    means = fit.history[: steps // window * window].reshape(-1, window).mean(1) / len(train)
    axis.plot(window * (torch.arange(len(means)) + 0.5), means, label=name)
axis.set(xlabel="step", ylabel="bound on log p(digit), nats")
axis.legend()
with torch.no_grad():
    loc, raw = encoder(held_out[:10]).chunk(2, -1)
    draw = loc + torch.nn.functional.softplus(raw) * torch.randn(10, CODE)
    rows = {"held out": held_out[:10], "mean": decoder(loc), "draw": decoder(draw)}
    rows |= {"new": decoder(torch.randn(10, CODE)), "": decoder(torch.randn(10, CODE))}
grid = right.subplots(len(rows), 10, gridspec_kw={"left": 0.02, "right": 0.99, "hspace": 0.45, "wspace": 0.1})
for line, (name, images) in zip(grid, rows.items(), strict=True):
    line[0].set_title(name, fontsize=8, loc="left", pad=2)
    for place, image in zip(line, images, strict=True):
        place.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
        place.set_axis_off()
figure.savefig("vae.png", dpi=150, bbox_inches="tight")

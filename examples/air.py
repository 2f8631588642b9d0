"""Attend, infer, repeat: count the digits in a picture, say where they are and what they look like. A minute on a CPU.

`models.AIR` holds two Pyro programs. The model puts up to two objects into an image; the guide looks for them one after
another with a recurrent network. Whether there is another object is a coin, through which no gradient flows: it is
summed out here (`"enum"`), and the bound is compared with the one that the score of the coin finds (`"reinforce"`).
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.patches import Rectangle

import models
import ppl
from models.air import AIR, scenes

# %% data: none, one or two handwritten digits of 8 x 8 pixels somewhere in 20 x 20

SMOKE = "--smoke" in sys.argv
torch.manual_seed(0)
digits, SIZE = models.digits(), 20
generator = torch.Generator().manual_seed(0)
train, _ = scenes((digits.train[:, 0] + 1) / 2, 4000, generator, SIZE)
test, truth = scenes((digits.held_out[:, 0] + 1) / 2, 500, generator, SIZE)

# %% the same programs, fitted with two estimators of the gradient through the coins

steps, fits = (10 if SMOKE else 3000), {}
for estimator in ("enum", "reinforce"):
    air = AIR(size=SIZE, steps=2, hidden=64, sigma=0.2)
    coins = air.enumeration() if estimator == "enum" else {f"present_{t}": estimator for t in range(air.steps)}
    backend = ppl.SVI(guide=air.guide, steps=steps, particles=1, lr=4e-3, lr_ratio=0.1, estimators=coins)
    fits[estimator] = backend.fit(ppl.Program(air.model, train, 64))
    for name in ("decoder", "glimpse", "image", "recur", "seen", "head"):
        setattr(air, name, fits[estimator].module(name, getattr(air, name)))
    with torch.no_grad():
        found = pyro.poutine.trace(air.guide).get_trace(test).nodes
    values = {
        n: torch.stack([found[f"{n}_{t}"]["value"] for t in range(air.steps)], 1) for n in ("present", "where", "what")
    }
    right = (values["present"].sum(1) == truth).float().mean()
    print(f"{estimator}: {100 * right:.0f} % of 500 held-out pictures counted right")
    if estimator == "enum":
        best, inferred, score = air, values, right

# %% figure: the bound along the fits; pictures, what was found in them, and their reconstructions

figure = plt.figure(figsize=(11, 3.4))
left, middle = figure.subfigures(1, 2, width_ratios=(1, 2.2))
axis = left.subplots()
window = max(steps // 60, 1)  # each point is the mean of a window of steps
for name, fit in fits.items():
    means = fit.history[: steps // window * window].reshape(-1, window).mean(1) / len(train)
    axis.plot(window * (torch.arange(len(means)) + 0.5), means, label=name)
axis.set(xlabel="step", ylabel="bound on log p(picture), nats", title=f"counted right: {100 * score:.0f} %")
axis.legend()
grid = middle.subplots(2, 8, gridspec_kw={"left": 0.02, "right": 0.99, "hspace": 0.1, "wspace": 0.1})
for i, (top, bottom) in zip((truth > 0).nonzero()[:, 0].tolist(), grid.T, strict=False):
    top.imshow(test[i], cmap="gray", vmin=0, vmax=1)
    canvas = torch.zeros(SIZE, SIZE)
    for t, colour in enumerate(("tab:orange", "tab:cyan")):
        if inferred["present"][i, t]:
            where = inferred["where"][i, t]
            with torch.no_grad():
                canvas += best.write(best.decoder(inferred["what"][i, t]), where)
            scale, x, y = where.tolist()
            corner = [(c - 1 / scale + 1) / 2 * (SIZE - 1) - 0.5 for c in (x, y)]
            top.add_patch(Rectangle(corner, (SIZE - 1) / scale, (SIZE - 1) / scale, fill=False, color=colour, lw=1.5))
    bottom.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    top.set_axis_off()
    bottom.set_axis_off()
figure.savefig("air.png", dpi=150, bbox_inches="tight")

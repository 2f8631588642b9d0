"""Reaction times of 18 people short of sleep: one hierarchy, three engines, and what a person borrows from the others.

The residual spread is held at its restricted maximum likelihood; lines start from weak laws. A minute on a CPU.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch

import ppl
from models.meta import CoordinateAscent, Gaussian, GaussNewton, Hierarchy, Network, NIWMeta, NormalInverseWishart
from models.meta import sleep_study as people

# %% data, each person's own least squares (slope, intercept), and restricted maximum likelihood of a balanced design

SMOKE = "--smoke" in sys.argv
DOUBLE = torch.float64
episodes = people()
design = torch.cat([episodes.x_support[0], torch.ones(10, 1, dtype=DOUBLE)], 1)
gram = torch.linalg.inv(design.mT @ design)
own = episodes.y_support @ design @ gram
residual = (episodes.y_support - own @ design.mT).square().sum() / (18 * 8)
spread = (own.mT.cov() - residual * gram).diagonal().sqrt()

# %% one program, three engines

centre, share, count = (torch.tensor(v, dtype=DOUBLE) for v in ([0.0, 300.0], 0.01, 4.0))
prior = NormalInverseWishart(centre, share, count, torch.tensor([100.0, 900.0], dtype=DOUBLE).diag())
hierarchy = Hierarchy(Network(torch.nn.Linear(1, 1, dtype=DOUBLE)), Gaussian(float(residual.sqrt())), prior)
program = hierarchy.program(episodes)
natural = {"update": "natural", "expectation": "quadratic", "local": GaussNewton(steps=1)}
engines = {
    "NUTS": (ppl.NUTS(warmup=30 if SMOKE else 300), 2),
    "coordinate ascent": (CoordinateAscent(), 1),
    "NIW guide": (NIWMeta(steps=20 if SMOKE else 200, batch=18, **natural), 1),
}
draws = 40 if SMOKE else 1000
found = {name: ppl.infer(program, engine, draws=draws, chains=n, seed=0) for name, (engine, n) in engines.items()}

# %% figure: lines of people drawn to the common one; the common line and the spread of people under each engine

figure, (lines, *densities) = plt.subplots(1, 5, figsize=(14, 3.6), width_ratios=[1.5, 1, 1, 1, 1])
pooled = found["NUTS"].mean("theta")
for alone, together in zip(own, pooled, strict=True):
    ends = torch.stack([alone, together])
    lines.annotate("", ends[1, [1, 0]], ends[0, [1, 0]], arrowprops={"arrowstyle": "->", "color": "0.6"})
lines.plot(own[:, 1], own[:, 0], "o", color="0.5", ms=4, label="alone")
lines.plot(pooled[:, 1], pooled[:, 0], "o", color="C0", ms=4, label="in the hierarchy")
lines.plot(*own.mean(0)[[1, 0]], "+", color="crimson", ms=14, mew=2, label="mean")
lines.set(
    xlabel="intercept: reaction time on day 0, ms",
    ylabel="slope, ms per day",
    title="each person's line: 18 people",
)
titles = ("common slope", "common intercept", "sd of slopes", "sd of intercepts")
units = 2 * ("reaction time, ms per day", "reaction time, ms")
truths = torch.cat([own.mean(0), spread])
ranges = ((4, 17), (225, 278), (2, 12), (8, 50))
looks = ({"fill": True, "color": "0.8"}, {"lw": 2, "color": "C1"}, {"lw": 1.5, "color": "C0", "ls": "--"})
for (name, posterior), look in zip(found.items(), looks, strict=True):
    sds = torch.linalg.inv(posterior.flatten("precision")).diagonal(dim1=-2, dim2=-1).sqrt()
    values = torch.cat([posterior.flatten("mu"), sds], 1)
    print(name, *(f"{t} {m:.2f} ± {s:.2f}" for t, m, s in zip(titles, values.mean(0), values.std(0), strict=True)))
    for axis, value, place in zip(densities, values.T, ranges, strict=True):
        axis.hist(value.numpy(), bins=26, range=place, density=True, histtype="step", label=name, **look)
for axis, title, unit, truth in zip(densities, titles, units, truths, strict=True):
    axis.axvline(float(truth), color="crimson", lw=1, label="restricted maximum likelihood")
    axis.set(title=title, xlabel=unit, yticks=[])
densities[0].set_ylabel("posterior density")
figure.tight_layout(rect=(0, 0.08, 1, 1))
for axis, place in ((lines, 0.18), (densities[0], 0.66)):
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="lower center", bbox_to_anchor=(place, 0), ncols=4)
figure.savefig("sleep_study.png", dpi=150)

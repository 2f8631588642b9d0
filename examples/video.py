"""Videos of a digit that moves at random: what a latent process makes of them, and what may come next. Half a minute.

The digit follows fractional Brownian motion with Hurst index 0.8. Two trained models come with the package: four latent
coordinates driven by Brownian motion, or by fractional noise whose index was learned. Both see 16 frames; then the
prior goes on, with the memory of its noise.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch

import models
from models.moving_digits import moving_digits
from models.video import load_video, place, score

# %% data: digits and motions that no training saw

SMOKE = "--smoke" in sys.argv
SEEN, AHEAD, DRAWS = 16, 8, 4 if SMOKE else 40
images = (models.digits().held_out[:, 0] + 1) / 2
videos = moving_digits(images, 4 if SMOKE else 64, SEEN + AHEAD, torch.Generator().manual_seed(5), hurst=0.8, speed=0.6)
nets = {noise: load_video("smooth", noise) for noise in ("brownian", "fractional")}

# %% scores of both models on the same videos

for noise, net in nets.items():
    found = score(net, videos, SEEN, DRAWS, torch.Generator().manual_seed(0))
    text = ", ".join(f"{n} {v.mean():.2f} ± {v.std() / len(v) ** 0.5:.2f}" for n, v in found.items())
    print(f"{noise}, H {float(net.hurst):.2f}: {text}")

# %% one video: truth, reconstruction, three futures and their spread

video, net = videos[:1], nets["fractional"]
generator = torch.Generator().manual_seed(1)
again = net.reconstruct(video[:, :SEEN], 1, generator).mean[0, 0]
futures = {noise: n.forecast(video[:, :SEEN], AHEAD, DRAWS, generator).mean[:, 0] for noise, n in nets.items()}
blank = torch.full((SEEN, *video.shape[-2:]), torch.nan)
rows = {"truth": video[0], "reconstruction": torch.cat([again, blank[:AHEAD]])}
rows |= {f"future {i + 1}": torch.cat([blank, futures["fractional"][i]]) for i in range(3)}
rows["mean of futures"] = torch.cat([blank, futures["fractional"].mean(0)])
shown = list(range(0, SEEN, 3)) + list(range(SEEN, SEEN + AHEAD))

# %% figure

figure = plt.figure(figsize=(11, 7.2), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1))
for line, (name, frames) in zip(top.subplots(len(rows), len(shown)), rows.items(), strict=True):
    line[0].text(-0.2, 0.5, name, fontsize=9, ha="right", va="center", transform=line[0].transAxes)
    for axis, t in zip(line, shown, strict=True):
        axis.set_axis_off()
        if not frames[t].isnan().any():
            axis.imshow(frames[t], cmap="gray", vmin=0, vmax=1)
        if name == "truth":
            axis.set_title(f"{t}", fontsize=8, color="C3" if t >= SEEN else "black")
truth, times = place(video[0]), range(SEEN + AHEAD)
panels = [(noise, i) for noise in futures for i in (0, 1)]
for axis, (noise, i) in zip(bottom.subplots(1, 4, sharey=True), panels, strict=True):
    drawn = place(futures[noise])[..., i]
    low, high = drawn.quantile(torch.tensor([0.05, 0.95]), 0)
    axis.fill_between(times[SEEN:], low, high, color="C0", alpha=0.25, lw=0)
    axis.plot(times[SEEN:], drawn[:12].T, color="C0", lw=0.5)
    axis.plot(times[:SEEN], place(again)[:, i], "o", ms=3, color="C1", label="reconstruction")
    axis.plot(times, truth[:, i], color="black", lw=1, label="truth")
    axis.axvline(SEEN - 0.5, color="C3", lw=0.8)
    axis.set(title=f"{noise}, {('row', 'column')[i]} of the digit", xlabel="frame")
axis.legend(fontsize=8, loc="lower left")
figure.savefig("video.png", dpi=150)

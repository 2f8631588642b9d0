"""Small pictures for a page: arrays as PNG in a data address; histograms and intervals as SVG, styled by the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["histogram_svg", "image_uri", "intervals_svg"]


def image_uri(image: Tensor, low: float, high: float, colours: str = "gray") -> str:
    """An image as a PNG data address; NaN is transparent.

    Args:
        image: (channels, height, width) with 1 or 3 channels.
        low: value of the first colour.
        high: value of the last colour.
        colours: name of a matplotlib colour map, for one channel.
    """
    import matplotlib
    import matplotlib.image

    scaled = ((image.double() - low) / max(high - low, 1e-12)).clamp(0, 1)
    if image.shape[0] == 3:
        pixels = scaled.movedim(0, -1).numpy()
    else:
        one = scaled[0].numpy()
        pixels = matplotlib.colormaps[colours](one)
        pixels[..., 3] = ~torch.isnan(image[0]).numpy()
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png", pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def histogram_svg(values: Tensor, low: float, high: float, truth: float | None = None, bins: int = 24) -> str:
    """A histogram of (n,) values between low and high, with a line at the truth."""
    width, height, foot = 220, 70, 14
    counts = torch.histc(values.double().clamp(low, high), bins, low, high)
    top = float(counts.max()) or 1.0
    step = width / bins
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - c / top * height:.1f}" width="{step - 1:.1f}" '
        f'height="{c / top * height:.1f}"/>'
        for i, c in enumerate(counts.tolist())
        if c
    )
    mark = ""
    if truth is not None and low <= truth <= high:
        at = (truth - low) / (high - low) * width
        mark = f'<line class="truth" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}"/>'
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height + foot}" width="{width}" height="{height + foot}" role="img">'
        f'<g class="bars">{bars}</g><line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>{mark}'
        f'<text x="0" y="{height + 11}">{low:.3g}</text>'
        f'<text x="{width}" y="{height + 11}" text-anchor="end">{high:.3g}</text></svg>'
    )


def intervals_svg(
    quantiles: Tensor, low: float, high: float, labels: Sequence[str], truth: Tensor | None = None
) -> str:
    """Central intervals side by side, with dots at the medians and ticks at the truth.

    Args:
        quantiles: (3, entries) lower end, median, upper end.
        low: lower end of the axis.
        high: its upper end.
        labels: one per entry.
        truth: (entries,).
    """
    n = quantiles.shape[1]
    step = max(9.0, min(28.0, 560 / n))
    width, height, foot, left = n * step + 44, 110, 14, 40
    place = lambda v: 4 + (height - 8) * (1 - (float(v) - low) / max(high - low, 1e-12))  # noqa: E731
    parts = []
    for i in range(n):
        at = left + (i + 0.5) * step
        a, m, b = (place(q) for q in quantiles[:, i])
        parts.append(f'<line class="interval" x1="{at:.1f}" x2="{at:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{m:.1f}" r="2.2"/>')
        if truth is not None:
            t = place(truth[i].clamp(low, high))
            parts.append(f'<line class="truth" x1="{at - 4:.1f}" x2="{at + 4:.1f}" y1="{t:.1f}" y2="{t:.1f}"/>')
        if n <= 20:
            parts.append(f'<text x="{at:.1f}" y="{height + 11}" text-anchor="middle">{labels[i]}</text>')
    return (
        f'<svg class="plot" viewBox="0 0 {width:.0f} {height + foot}" width="{width:.0f}" height="{height + foot}" '
        f'role="img"><line class="axis" x1="{left}" x2="{left}" y1="0" y2="{height}"/>'
        f'<text x="{left - 4}" y="10" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 4}" y="{height}" text-anchor="end">{low:.3g}</text>{"".join(parts)}</svg>'
    )

"""A comparison of images as one picture: truth, data, and for each backend mean, standard deviation and a few draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl.errors import OptionError
from ppl.report.view import data_range, kind_of, pictures, problem_count

if TYPE_CHECKING:
    from torch import Tensor

    from ppl.compare import Comparison

__all__ = ["write_figure"]


def write_figure(comparison: Comparison, path: str | Path, draws: int = 4, site: str | None = None) -> Path:
    """Draw one row for each problem and backend, and return the path of the picture.

    Args:
        comparison: with at least one site that is an image.
        path: a file name that matplotlib knows how to write.
        draws: single draws shown.
        site: the image site; the first one when None.

    Raises:
        OptionError: no site is an image, or no backend drew it.
    """
    program = comparison.program
    names = [n for n in program.latents if kind_of(program, n) == "image"] if site is None else [site]
    found, data = pictures(comparison, names[0], draws) if names else ({}, None)
    if not found:
        raise OptionError(f"there is no image to draw: sites {list(program.latents)}, {comparison!r}")
    import matplotlib.pyplot as plt

    site = names[0]
    truth = comparison.truth.get(site)
    problems = problem_count(program)
    if truth is not None:
        truth = truth.detach().double().cpu().expand(problems, *program.sites[site].shape)
        truth = truth if truth.ndim >= 4 else truth.unsqueeze(1)
    low, high = data_range(program, site, *(p.mean for p in found.values()))
    spread = max(float(p.sd.max()) for p in found.values())
    # Backends side by side below each other, problems next to each other: the picture is as wide as a page.
    columns = 2 + draws
    figure, axes = plt.subplots(
        len(found) + 2,  # a thin empty row below the truth makes room for headings
        problems * columns + (problems - 1),
        figsize=(0.95 * (problems * columns + 0.5 * (problems - 1)) + 1.3, 1.0 * (len(found) + 1) + 0.5),
        gridspec_kw={
            "width_ratios": ([1.0] * columns + [0.35]) * (problems - 1) + [1.0] * columns,
            "height_ratios": [1.0, 0.12, *([1.0] * len(found))],
        },
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_axis_off()

    def show(axis: Any, image: Tensor, title: str | None = None, sd: bool = False) -> None:
        pixels = image.reshape(-1, *image.shape[-3:])[0].movedim(0, -1)
        grey = {"cmap": "gray", "vmin": low, "vmax": high}
        if pixels.shape[-1] == 3 and not sd:
            axis.imshow(((pixels - low) / (high - low)).clamp(0, 1).numpy(), interpolation="nearest")
        else:
            options: dict[str, Any] = {"cmap": "magma", "vmin": 0.0, "vmax": spread} if sd else grey
            axis.imshow(pixels.mean(-1).numpy(), interpolation="nearest", **options)
        axis.set_axis_on()
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("#b9c6d3")
        for spine in axis.spines.values():
            spine.set_visible(False)
        if title:
            axis.set_title(title, fontsize=9, color="#444444", pad=3)

    for problem in range(problems):
        start = problem * (columns + 1)
        if truth is not None:
            show(axes[0, start], truth[problem], "truth")
        if data is not None:
            show(axes[0, start + 1], data[problem], "data")
        for row, (name, p) in enumerate(found.items(), start=2):
            if problem >= len(p.mean):
                continue  # interrupted before this problem
            head = row == 2
            show(axes[row, start], p.mean[problem], "mean" if head else None)
            show(axes[row, start + 1], p.sd[problem], "sd" if head else None, sd=True)
            for i in range(min(draws, p.draws.shape[1])):
                show(axes[row, start + 2 + i], p.draws[problem, i], "draws" if head and i == 0 else None)
            if problem == 0:
                axes[row, 0].text(
                    -0.12, 0.5, name.replace(", ", "\n"), transform=axes[row, 0].transAxes, ha="right", va="center"
                )
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.subplots_adjust(left=0.1, right=0.995, top=0.95, bottom=0.01, wspace=0.04, hspace=0.06)
    figure.savefig(place, dpi=110, facecolor="white")
    plt.close(figure)
    return place

"""What there is to see of a comparison: which sites are images, the data and residuals in the space of an image.

With m(x) the mean of the data and J its derivative, the residual is shown as J^T (y - m(x)) / sd: for a mask, the
residuals in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ppl.scores import NO_MEAN, mean_and_sd
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.compare import Comparison
    from ppl.program import Program

__all__ = ["Kind", "Pictures", "data_range", "describe_model", "kind_of", "pictures", "problem_count"]

Kind = Literal["image", "scalar", "vector"]
SIDE = 4  # fewest pixels of an image's side


def kind_of(program: Program, site: str) -> Kind:
    """How a latent site is best shown."""
    found = program.sites[site]
    shape, event = found.shape, found.event_dim
    if shape.numel() == 1:
        return "scalar"
    image = event >= 2 and min(shape[-2:]) >= SIDE and (event == 2 or shape[-3] in (1, 3)) and event <= 3
    return "image" if image else "vector"


def data_range(program: Program, site: str, *images: Tensor) -> tuple[float, float]:
    """Black and white: the range that the prior states, or that of what is shown."""
    stated = getattr(unwrap(program.sites[site].distribution), "data_range", None)
    if stated is not None:
        return float(stated[0]), float(stated[1])
    if not images:
        return 0.0, 1.0
    together = torch.cat([i.flatten() for i in images])
    return float(together.min()), float(together.max())


def problem_count(program: Program) -> int:
    """Number of problems, one for the usual program."""
    return program.problems or 1


def describe_model(program: Program) -> str:
    """Source of the model, or how it prints."""
    import inspect
    import textwrap

    try:
        return textwrap.dedent(inspect.getsource(program.model)).strip()
    except (OSError, TypeError):
        return repr(program)


@dataclass(frozen=True)
class Pictures:
    """What is shown of one image site and one backend, images as (problem, channels, height, width).

    Args:
        mean: of the posterior.
        sd: pixel by pixel.
        draws: (problem, draws, channels, height, width).
        residual: in units of the noise, NaN where nothing was measured; None where the data have no mean in this space.
    """

    mean: Tensor
    sd: Tensor
    draws: Tensor
    residual: Tensor | None


def pictures(comparison: Comparison, site: str, count: int) -> tuple[dict[str, Pictures], Tensor | None]:
    """Pictures by backend, and the data in the space of the site, (problem, channels, height, width)."""
    program = comparison.program
    found: dict[str, Pictures] = {}
    data = None
    for name, posterior in comparison.posteriors.items():
        if site not in posterior or len(posterior) == 0:
            continue
        problems = posterior.problems or 1
        shape = program.sites[site].shape
        n = min(count, len(posterior))
        draws = posterior.sample(site, n, torch.Generator().manual_seed(comparison.seed))
        point = {
            s: posterior.mean(s).reshape(problems, *program.sites[s].shape) for s in program.latents if s in posterior
        }
        # A run that was interrupted may have fewer problems than the program, and is then shown without residuals.
        seen = _residual(program, site, point) if problems == problem_count(program) else None
        if seen is not None:
            data = seen[1] if data is None else data
        found[name] = Pictures(
            _image(posterior.mean(site).reshape(problems, *shape)),
            _image(posterior.sd(site).reshape(problems, *shape)),
            _image(draws.reshape(problems, n, *shape)),
            None if seen is None else _image(seen[0]),
        )
    return found, None if data is None else _image(data)


def _image(x: Tensor) -> Tensor:
    """(..., channels, height, width) in float64 on the CPU; plates are stacked on top of each other."""
    x = x.detach().double().cpu()
    return x if x.ndim >= 4 else x.unsqueeze(-3)


def _residual(program: Program, site: str, point: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Residual in units of the noise, and data; (problem, *shape of the site), NaN where nothing was measured."""
    if set(program.latents) - set(point) or len(program.observed) != 1:
        return None
    (observed,) = program.observed
    x = point[site].detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            mean, sd = program.batched(mean_and_sd)({**point, site: x})[observed]
            y = program.observed_data()[observed].to(mean).expand_as(mean)
            r = ((y - mean) / sd).detach()
            if mean.shape == x.shape:
                return r, y
            pull = [
                torch.autograd.grad(mean, x, seed, retain_graph=True, allow_unused=True)[0]
                for seed in (r, y, torch.ones_like(mean))
            ]
    except NO_MEAN:
        return None  # no mean, no derivative: there is nothing to show
    if any(p is None for p in pull):
        return None
    hidden = pull[2] == 0
    return pull[0].masked_fill(hidden, torch.nan), pull[1].masked_fill(hidden, torch.nan)

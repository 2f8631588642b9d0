"""Densities and values on all data, for programs that show a subsample at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ppl.flat import FlatDensity
from ppl.program import Program
from ppl.sites import Site

__all__ = ["covers", "draw_subsample", "full_log_density", "full_values", "partition", "shown_rows"]

LANES_AT_ONCE = 512
BATCHES_AT_MOST = 256  # subsample batches that are worth running for one exact density


def full_log_density(
    flat: FlatDensity, z: Tensor, lanes: int, generator: torch.Generator | None = None
) -> tuple[Tensor, bool]:
    """Log density (draws,) on all data, and whether it is exact.

    With subsampled plates the mean over the batches of a partition is the full density, where the batches divide the
    plates; otherwise it is the mean over random batches, one for each chunk, and unbiased.
    """
    # Values of lifted sites are built for the whole batch at once; what fits into memory then is what the fit used.
    size = lanes if flat._outside else LANES_AT_ONCE
    batches = list(partition(flat.program))
    if batches:
        total = torch.stack([_chunked(flat, z, size, subsample) for subsample in batches])
        return total.mean(0), True
    generator = generator or torch.Generator(z.device).manual_seed(0)
    rounds = [draw_subsample(flat.program, generator) for _ in range(16)]
    return torch.stack([_chunked(flat, z, size, subsample) for subsample in rounds]).mean(0), False


def full_values(flat: FlatDensity, z: Tensor) -> dict[str, Tensor]:
    """Site values with all rows of all plates; deterministic sites that differ between subsamples are left out."""
    program = flat.program
    if not program.subsampled:
        return flat.constrain(z)
    out: dict[str, Tensor] = {}
    moving: set[str] = set()
    for parts in itertools.product(*_parts(program).values()):
        subsample = dict(zip(program.subsampled, parts, strict=True))
        for name, value in flat.constrain(z, subsample).items():
            site = program.sites.get(name)
            if site is not None and value.shape[1:] != site.shape:
                out.setdefault(name, value.new_empty(len(z), *site.shape))
                out[name][shown_rows(site, subsample, len(z))] = value
            elif name not in out:
                out[name] = value
            elif not torch.equal(out[name], value):
                moving.add(name)
    return {n: v for n, v in out.items() if n not in moving}


def covers(program: Program) -> list[dict[str, Tensor]]:
    """Batches that show every row of every plate at least once, each plate in step with the others."""
    parts = _parts(program)
    most = max(len(v) for v in parts.values())
    return [{n: v[i % len(v)] for n, v in parts.items()} for i in range(most)]


def shown_rows(site: Site, subsample: Mapping[str, Tensor], lanes: int) -> tuple[Tensor, ...]:
    """The place of a batch's values among all rows of a site, as an index into (lanes, *site)."""
    place = [torch.arange(size) for size in (lanes, *site.shape)]
    for frame in site.frames:
        if frame.name in subsample:
            place[1 + len(site.shape) - site.event_dim + frame.dim] = subsample[frame.name]
    device = next(iter(subsample.values())).device
    return torch.meshgrid(*(p.to(device) for p in place), indexing="ij")


def _parts(program: Program) -> dict[str, list[Tensor]]:
    """Rows of each subsampled plate in parts of the size it shows, the last one shifted back to fit."""
    parts = {}
    for plate, (shown, full) in program.subsampled.items():
        starts = [*range(0, full - shown, shown), full - shown]
        parts[plate] = [torch.arange(start, start + shown, device=program.device) for start in starts]
    return parts


def draw_subsample(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh indices, without replacement, for each subsampled plate."""
    return {
        plate: torch.randperm(full, generator=generator, device=generator.device)[:shown]
        for plate, (shown, full) in program.subsampled.items()
    }


def partition(program: Program) -> Iterator[dict[str, Tensor]]:
    """Subsample indices that show every combination of data once; nothing where that is impossible or too much."""
    plates = program.subsampled
    counts = [full // shown for shown, full in plates.values()]
    if any(full % shown for shown, full in plates.values()) or math.prod(counts) > BATCHES_AT_MOST:
        return
    split = [torch.arange(full, device=program.device).split(shown) for shown, full in plates.values()]
    for parts in itertools.product(*split):
        yield dict(zip(plates, parts, strict=True))


def _chunked(flat: FlatDensity, z: Tensor, size: int, subsample: Mapping[str, Tensor]) -> Tensor:
    """The density in chunks of one size, the last one padded: the size is part of a graph."""
    rows = min(size, len(z))
    missing = -len(z) % rows
    padded = torch.cat([z, z[:missing]]) if missing else z
    return torch.cat([flat.log_density(part, subsample) for part in padded.split(rows)])[: len(z)]

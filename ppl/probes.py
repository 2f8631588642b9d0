"""Fresh inputs near given ones, at which a traced density is compared with the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ppl.lane_densities import LaneDensities

__all__ = ["shaken"]

Inputs = Mapping[str, Tensor]


def shaken(
    program: LaneDensities, lane: Inputs, shared: Inputs, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh inputs near the given ones: shaken latents and data, other subsample indices."""
    generator = torch.Generator(program.device).manual_seed(seed)

    def shake(name: str, value: Tensor) -> Tensor:
        plate = name.removeprefix("index.")
        if plate != name and plate in program.subsampled:
            shown, full = program.subsampled[plate]
            return torch.randperm(full, generator=generator, device=value.device)[:shown]
        if not value.is_floating_point() or name.removeprefix("data.") in program.discrete:
            return value
        noise = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
        if name == "z":
            return value + noise - 0.5
        site = program.sites.get(name.removeprefix("data."))
        support = getattr(site.support, "base_constraint", site.support) if site is not None else None
        if isinstance(support, type(torch.distributions.constraints.real)):
            return value + 0.05 * (noise - 0.5) * (1 + value.abs())
        # Keeps signs and zeros, and stays in intervals but for their ends.
        return value * (1 + 0.02 * (noise - 0.5))

    return {n: shake(n, v) for n, v in lane.items()}, {n: shake(n, v) for n, v in shared.items()}

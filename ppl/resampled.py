"""Equally weighted draws of a posterior, by systematic resampling."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl import weighted
from ppl.effective_size import shared_ess
from ppl.errors import OptionError

if TYPE_CHECKING:
    from ppl.posterior import Posterior

__all__ = ["resampled", "sample"]


def sample(posterior: Posterior, site: str, n: int, generator: torch.Generator) -> Tensor:
    """Draws of one site in random order: (n, *event), or (problem, n, *event)."""
    if n < 0:
        raise OptionError(f"the number of draws must be zero or more, got {n}")
    problems = posterior.problems or 1
    index = weighted.systematic(posterior._flat_weights(), len(posterior), n, problems, generator)
    order = [torch.randperm(n, generator=generator, device=generator.device).cpu() for _ in range(problems)]
    index = torch.stack([row[turn] for row, turn in zip(index, order, strict=True)])
    result = _take(posterior._lanes(site), index)
    return result if posterior.problems is not None else result[0]


def resampled(posterior: Posterior, generator: torch.Generator, draws: int) -> Posterior:
    """One chain of equally weighted draws in their old order; info with a leading (chain, draw) goes along."""
    problems = posterior.problems or 1
    index = weighted.systematic(posterior._flat_weights(), len(posterior), draws, problems, generator)

    def pick(values: Tensor) -> Tensor:
        lanes = values.detach().reshape(problems, len(posterior), *values.shape[posterior._lead :])
        chosen = _take(lanes, index).unsqueeze(1)
        return chosen if posterior.problems is not None else chosen[0]

    info = {name: pick(v) if v.shape[: posterior._lead] == posterior.shape else v for name, v in posterior.info.items()}
    shared = shared_ess(posterior)
    if shared is not None:
        info["root_ess"] = shared if posterior.problems is not None else shared[0]
    return replace(
        posterior,
        draws={site: pick(values) for site, values in posterior.draws.items()},
        log_weight=None,
        info=info,
        attrs={**posterior.attrs, "resampled": True},
    )


def _take(lanes: Tensor, index: Tensor) -> Tensor:
    """lanes (problem, draw, *event) at index (problem, n) -> (problem, n, *event)."""
    return torch.stack([lane[row.to(lane.device)] for lane, row in zip(lanes, index, strict=True)])

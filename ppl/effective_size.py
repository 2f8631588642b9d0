"""How many independent draws a posterior is worth: root ESS, Kish ESS of the weights, or ArviZ's bulk ESS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl import weighted
from ppl.errors import ShapeError

if TYPE_CHECKING:
    from ppl.posterior import Posterior

__all__ = ["effective_size", "shared_ess"]


def shared_ess(posterior: Posterior) -> Tensor | None:
    """(problem or 1,) effective sample size that holds for all sites; None for equally weighted chains."""
    problems = posterior.problems or 1
    weights = posterior._flat_weights()
    root = posterior.info.get("root_ess")
    if root is None or root.numel() == 0:
        return None if weights is None else weighted.kish_ess(weights).cpu()
    root = root.detach().cpu().double()
    if root.numel() == problems * posterior.chains and root.ndim == len(posterior.shape) - 1:
        if weights is None:
            share = torch.full((problems, posterior.chains), 1 / posterior.chains, dtype=torch.float64)
        else:
            share = weights.reshape(problems, posterior.chains, -1).sum(-1).cpu()
        return weighted.merged_root_ess(root.reshape(problems, posterior.chains), share)
    if root.numel() in (1, problems):
        return root.reshape(-1).expand(problems)
    raise ShapeError(
        f'info["root_ess"] has shape {tuple(root.shape)}; expected one number, or one per chain ({posterior.chains}), '
        "for each problem"
    )


def effective_size(posterior: Posterior, site: str) -> Tensor:
    """Of the mean of a site, (*event) or (problem, *event): shared by all sites, or ArviZ's bulk ESS of this one."""
    from ppl.summary import arviz_statistic

    event = posterior._site(site).shape[posterior._lead :]
    shared = shared_ess(posterior)
    if shared is not None:
        result = shared.reshape(-1, *(1,) * len(event)).expand(posterior.problems or 1, *event).clone()
    else:
        values = posterior._site(site).detach().reshape(-1, *posterior.shape[-2:], *event)
        parts = [values.real, values.imag] if values.is_complex() else [values]
        sizes = [torch.stack([arviz_statistic("ess_bulk", one) for one in part]) for part in parts]
        result = torch.stack(sizes).amin(0)
    return result if posterior.problems is not None else result[0]

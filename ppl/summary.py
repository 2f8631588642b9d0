"""The table of a posterior: one row per number; R-hat, ESS and Monte-Carlo errors come from ArviZ."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ppl import weighted
from ppl.effective_size import shared_ess

if TYPE_CHECKING:
    import pandas

    from ppl.posterior import Posterior

__all__ = ["arviz_statistic", "summary"]

_COLUMNS = ("mean", "sd", "5%", "50%", "95%", "mcse", "ess_bulk", "ess_tail", "r_hat")


def arviz_statistic(name: Literal["ess_bulk", "ess_tail", "mcse", "r_hat"], values: Tensor) -> Tensor:
    """One of ArviZ's statistics for every number of a site.

    Args:
        name: which one; mcse is that of the mean.
        values: (chain, draw, *event), real.

    Returns:
        (*event) in float64, on the CPU; NaN where a value is not finite, there are fewer than 4 draws, or, for r_hat,
        there is only one chain.
    """
    event = values.shape[2:]
    if values.shape[1] < 4 or values.shape[0] < 1 + (name == "r_hat") or values.numel() == 0:
        return torch.full(event, torch.nan, dtype=torch.float64)
    with warnings.catch_warnings():
        # ArviZ announces its next version at import, and divides by zero for constant draws.
        warnings.simplefilter("ignore")
        import arviz

        data = arviz.convert_to_dataset({"x": values.detach().cpu().double().numpy()})
        if name == "r_hat":
            result = arviz.rhat(data)
        elif name == "mcse":
            result = arviz.mcse(data, method="mean")
        else:
            result = arviz.ess(data, method=name.removeprefix("ess_"))
        array = result["x"].to_numpy()
    return torch.as_tensor(array, dtype=torch.float64).reshape(event)


def summary(posterior: Posterior, sites: Sequence[str] | None, limit: int | None) -> pandas.DataFrame:
    """See `Posterior.summary`."""
    import pandas

    chosen = list(posterior.draws) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    weights, shared = posterior._flat_weights(), shared_ess(posterior)
    rows: list[list[float]] = []
    index: list[tuple[int, str]] = []
    left_out: dict[str, str] = {}
    for site in chosen:
        values = posterior[site].detach()
        event = tuple(values.shape[posterior._lead :])
        labels = _labels(posterior, site, event)
        flat = values.reshape(posterior.problems or 1, *posterior.shape[-2:], len(labels))
        if limit is not None and len(labels) > limit:
            left_out[site] = f"{limit} of {len(labels)} numbers are shown"
            keep = torch.linspace(0, len(labels) - 1, limit).round().long()
            flat = flat[..., keep.to(flat.device)]
            labels = [labels[i] for i in keep.tolist()]
        parts = {".real": flat.real, ".imag": flat.imag} if flat.is_complex() else {"": flat}
        for suffix, part in parts.items():
            table = _numbers(part, weights, shared)
            for problem, block in enumerate(table):
                rows += block.tolist()
                index += [(problem, f"{site}{suffix}{label}") for label in labels]
    if posterior.problems is None:
        names: pandas.Index = pandas.Index([name for _, name in index], dtype=object)
    else:
        names = pandas.MultiIndex.from_tuples(index, names=["problem", None]) if index else pandas.Index([])
    frame = pandas.DataFrame(rows, index=names, columns=list(_COLUMNS), dtype=float)
    if left_out:
        frame.attrs["left_out"] = left_out
    if not posterior.complete:
        frame.attrs["complete"] = False
    return frame


def _numbers(part: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    """(problem, number, column) of one real site (problem, chain, draw, number)."""
    problems, chains, draws, numbers = part.shape
    x = part.reshape(problems, chains * draws, numbers)
    mean, sd = weighted.mean(x, weights).cpu(), weighted.sd(x, weights).cpu()
    quantiles = weighted.quantile(x, weights, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).cpu()
    if shared is None:
        # Problems are only more numbers to ArviZ: (chain, draw, problem, number).
        stacked = part.permute(1, 2, 0, 3)
        mcse, bulk, tail, r_hat = (arviz_statistic(name, stacked) for name in ("mcse", "ess_bulk", "ess_tail", "r_hat"))
    else:
        bulk = shared[:, None].expand(problems, numbers)
        mcse = sd / bulk.sqrt()
        tail = r_hat = torch.full_like(bulk, torch.nan)
    return torch.stack([mean, sd, *quantiles, mcse, bulk, tail, r_hat], -1)


def _labels(posterior: Posterior, site: str, event: tuple[int, ...]) -> list[str]:
    """ "[a, 0]" for every number of a site, with the labels of coords where there are some."""
    if not event:
        return [""]
    dims = posterior.dims.get(site, ("",) * len(event))
    axes = [posterior.coords.get(dim, range(size)) for dim, size in zip(dims, event, strict=True)]
    return [f"[{', '.join(str(label) for label in labels)}]" for labels in itertools.product(*axes)]

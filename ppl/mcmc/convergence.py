"""Do the chains agree? R-hat of every site, and a note that names the worst when they do not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ppl.monitor import Monitor

__all__ = ["max_r_hat", "note_disagreement"]

LIMIT = 1.01
ENTRIES = 200  # numbers of one site that are looked at, evenly spaced; ArviZ takes about a millisecond for each


def max_r_hat(values: Tensor) -> float:
    """The largest rank-normalised split R-hat of a site's numbers; NaN for a constant site.

    At most 200 evenly spaced numbers of the site are looked at.

    Args:
        values: (chain, draw, *event).

    Example:
        >>> chains = torch.stack([torch.zeros(50), torch.ones(50)]) + torch.linspace(0, 0.1, 50)
        >>> max_r_hat(chains) > 2
        True
    """
    import arviz

    flat = values.detach().reshape(*values.shape[:2], -1).double().cpu()
    size = flat.shape[-1]
    if size > ENTRIES:
        flat = flat[..., torch.linspace(0, size - 1, ENTRIES).round().long()]
    worst = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in flat.unbind(-1):
            # A number that never moves, such as the diagonal of a correlation matrix, has no R-hat.
            if not bool(torch.isfinite(entry).all()) or float(entry.std()) <= 1e-12 * (1 + float(entry.abs().max())):
                continue
            r_hat = float(arviz.rhat(entry.numpy()))
            worst = r_hat if not worst >= r_hat else worst
    return worst


def note_disagreement(draws: Mapping[str, Tensor], monitor: Monitor, problems: bool = False) -> Tensor | None:
    """R-hat of each site, the largest of its numbers: (site,) or (problem, site), in the order of the draws.

    None when there is one chain, fewer than four draws, or nothing to look at.
    """
    kept = {n: v for n, v in draws.items() if v.is_floating_point()}
    if not kept:
        return None
    chains, length = next(iter(kept.values())).shape[int(problems) : int(problems) + 2]
    if chains < 2 or length < 4:
        return None
    rows = [[max_r_hat(v[i]) if problems else max_r_hat(v) for n, v in kept.items()] for i in _range(kept, problems)]
    table = torch.tensor(rows, dtype=torch.float64)
    for i, row in enumerate(rows):
        place = f" of problem {i}" if problems else ""
        bad = {n: r for n, r in zip(kept, row, strict=True) if r > LIMIT}
        if bad:
            worst = max(bad, key=lambda n: bad[n])
            monitor.note(
                f"R-hat {bad[worst]:.2f} for {worst!r}{place}: chains disagree (limit {LIMIT}). They have not mixed, "
                "or each sits in its own mode, which this engine cannot leave: run longer, or use an engine that moves "
                "between modes"
            )
    index = [list(kept).index(n) if n in kept else -1 for n in draws]
    columns = [table[:, i] if i >= 0 else torch.full((len(rows),), float("nan"), dtype=table.dtype) for i in index]
    full = torch.stack(columns, dim=1)
    return full if problems else full[0]


def _range(kept: Mapping[str, Tensor], problems: bool) -> range:
    return range(len(next(iter(kept.values()))) if problems else 1)

"""Several runs of one program as one posterior.

Run r with n_r draws and evidence Z_r carries the share n_r Z_r / sum_s n_s Z_s of the merged weight, and

    Z = sum_r n_r Z_r / sum_r n_r      se(log Z)^2 = sum_r (share_r se_r)^2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl import weighted
from ppl.cost import Cost
from ppl.effective_size import shared_ess
from ppl.errors import OptionError, ShapeError
from ppl.posterior import Estimate, Posterior

__all__ = ["concat"]


def concat(posteriors: Sequence[Posterior]) -> Posterior:
    """Runs of one program side by side along the chain axis.

    Weighted runs are merged by their evidence; where it is missing, each draw of each run counts the same on average.
    Parameters and guides that differ are left out, and a note says so; other attributes that differ become lists.

    Args:
        posteriors: at least one; the same sites, shapes, number of draws, data, dims and coords.

    Raises:
        OptionError: for an empty sequence.
        ShapeError: if the runs do not fit together, or only some are weighted.

    Example:
        >>> runs = [Posterior({"x": torch.zeros(1, 5)}), Posterior({"x": torch.ones(2, 5)})]
        >>> concat(runs).draws["x"].shape
        torch.Size([3, 5])
    """
    if not posteriors:
        raise OptionError("concat needs at least one posterior, got none")
    first, *rest = posteriors
    for number, other in enumerate(rest, 1):
        _check_fit(first, other, number)
    axis = first._lead - 2
    evidence, share = _evidence(posteriors)
    notes = [note for run in posteriors for note in run.attrs.get("notes", [])]
    parameters, guide = first.parameters, first.guide
    if any(not _same(first.parameters, other.parameters) for other in rest):
        parameters = {}
        notes.append("the runs have different parameters; they are not in the concatenated posterior")
    if any(other.guide is not first.guide for other in rest):
        guide = None
        notes.append("the runs have different guides; they are not in the concatenated posterior")
    cost = Cost()
    for run in posteriors:
        cost.merge(run.cost)
    return Posterior(
        draws={site: torch.cat([run.draws[site] for run in posteriors], axis) for site in first.draws},
        log_weight=_log_weight(posteriors, share, axis),
        log_evidence=evidence,
        parameters=parameters,
        guide=guide,
        cost=cost,
        info=_info(posteriors, share, axis),
        dims=first.dims,
        coords=first.coords,
        observed=first.observed,
        attrs=_attrs(posteriors, list(dict.fromkeys(notes))),
    )


def _check_fit(first: Posterior, other: Posterior, number: int) -> None:
    def shapes(run: Posterior) -> dict[str, Any]:
        lead = run._lead
        return {s: (tuple(v.shape[: lead - 2]), tuple(v.shape[lead - 1 :]), v.dtype) for s, v in run.draws.items()}

    for what, one, two in [
        ("problems", first.problems, other.problems),
        ("sites, draws, shapes or dtypes", shapes(first), shapes(other)),
        ("dims", dict(first.dims), dict(other.dims)),
        ("coords", dict(first.coords), dict(other.coords)),
        ("weights (some have them, some not)", first.log_weight is None, other.log_weight is None),
    ]:
        if one != two:
            raise ShapeError(
                f"posteriors 0 and {number} differ in {what}: {one} and {two}; only runs alike can be joined"
            )
    if not _same(first.observed, other.observed):
        raise ShapeError(
            f"posteriors 0 and {number} were made from different data; only runs on equal data can be joined"
        )


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _evidence(runs: Sequence[Posterior]) -> tuple[Estimate | None, Tensor]:
    """The merged evidence, and log shares (run, problem or 1)."""
    problems = runs[0].problems
    log_n = torch.tensor([max(len(run), 1) for run in runs], dtype=torch.float64).log()[:, None]
    estimates = [run.log_evidence for run in runs if run.log_evidence is not None]
    if len(estimates) < len(runs):
        return None, torch.log_softmax(log_n.expand(-1, problems or 1), 0)
    log_z = torch.stack([estimate.value.reshape(-1).expand(problems or 1) for estimate in estimates])
    stderr = torch.stack([estimate.stderr.reshape(-1).expand(problems or 1) for estimate in estimates])
    share = torch.log_softmax(log_z + log_n, 0)
    value = torch.logsumexp(log_z + log_n, 0) - torch.logsumexp(log_n, 0)
    error = (share.exp() * stderr).square().sum(0).sqrt()
    return Estimate(value, error) if problems is not None else Estimate(value[0], error[0]), share


def _log_weight(runs: Sequence[Posterior], share: Tensor, axis: int) -> Tensor | None:
    """Each run's weights sum to its share; runs without weights keep none."""
    parts = []
    for run, log_share in zip(runs, share, strict=True):
        if run.log_weight is None:
            return None
        flat = run.log_weight.double().reshape(run.problems or 1, len(run))
        total = torch.logsumexp(flat, 1, keepdim=True)
        parts.append((flat - total + log_share[:, None].to(flat.device)).reshape(run.shape))
    return torch.cat(parts, axis)


def _info(runs: Sequence[Posterior], share: Tensor, axis: int) -> dict[str, Tensor]:
    """Entries per chain are joined; the root ESS is merged; what differs otherwise gets a leading run axis."""
    info: dict[str, Tensor] = {}
    common = [name for name in runs[0].info if all(name in run.info for run in runs)]
    for name in common:
        parts = [run.info[name] for run in runs]
        per_chain = all(part.shape[: axis + 1] == run.shape[: axis + 1] for part, run in zip(parts, runs, strict=True))
        alike = len({part.shape[:axis] + part.shape[axis + 1 :] for part in parts}) == 1
        if name == "root_ess":
            sizes = torch.stack([size for run in runs if (size := shared_ess(run)) is not None], -1)
            weight = share.exp().T if runs[0].log_weight is not None else _chain_share(runs).expand(len(sizes), -1)
            merged = weighted.merged_root_ess(sizes, weight)
            info[name] = merged if runs[0].problems is not None else merged[0]
        elif per_chain and alike and all(part.ndim > axis for part in parts):
            info[name] = torch.cat(parts, axis)
        elif all(part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts):
            info[name] = parts[0]
        elif len({part.shape for part in parts}) == 1:
            info[f"{name}_per_run"] = torch.stack(parts)
        else:
            info |= {f"{name}_run_{number}": part for number, part in enumerate(parts)}
    for number, run in enumerate(runs):
        info |= {f"{name}_run_{number}": part for name, part in run.info.items() if name not in common}
    return info


def _chain_share(runs: Sequence[Posterior]) -> Tensor:
    """(1, run) share of equally weighted runs: their number of draws."""
    counts = torch.tensor([[float(len(run)) for run in runs]], dtype=torch.float64)
    return counts / counts.sum()


def _attrs(runs: Sequence[Posterior], notes: list[str]) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run.attrs):
        values = [run.attrs.get(name) for run in runs]
        attrs[name] = values[0] if all(value == values[0] for value in values) else values
    if notes:
        attrs["notes"] = notes
    if any("complete" in run.attrs for run in runs):
        attrs["complete"] = all(run.complete for run in runs)
    return attrs

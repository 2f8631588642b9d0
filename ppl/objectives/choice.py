"""Which estimator a site gets: what a policy or the guide says, where its distribution has it; else a default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributions import constraints

from ppl.errors import CapabilityError, OptionError
from ppl.objectives.estimators import (
    Enumerate,
    Estimator,
    MeasureValued,
    Policy,
    Rebar,
    Reinforce,
    Relax,
    Reparam,
)
from ppl.objectives.measure_valued import has_arms
from ppl.objectives.relaxed import can_relax
from ppl.sites import unwrap

__all__ = ["chosen", "defaults", "support_of"]

NAMES: dict[str, Estimator] = {
    "reparam": Reparam(),
    "implicit": Reparam(),
    "reinforce": Reinforce(),
    "score": Reinforce(),
    "rloo": Reinforce(),
    "decaying_average": Reinforce("decaying_average"),
    "enum": Enumerate(),
    "mvd": MeasureValued(),
    "rebar": Rebar(),
}
STATES, LANES = 8, 32  # up to which sites are enumerated, or measured, unasked


def as_estimator(given: Any, name: str) -> Estimator:
    """An estimator from its name or itself."""
    if isinstance(given, Estimator):
        return given
    if isinstance(given, str) and given in NAMES:
        return NAMES[given]
    if isinstance(given, type) and issubclass(given, Estimator):
        return given()
    raise OptionError(f"site {name!r}: unknown estimator {given!r}; the names are {list(NAMES)}")


def chosen(name: str, fn: Any, infer: Mapping[str, Any], policy: Policy | None) -> Estimator | None:
    """What the policy, then the guide, says of a site; `None` leaves it to `defaults`.

    Raises:
        CapabilityError: the distribution does not have that estimator; the message names those it has.
        OptionError: there is no such estimator.
    """
    said = policy(name, fn) if callable(policy) else (policy or {}).get(name)
    if said is None:
        said = infer.get("estimator")
    if said is None and infer.get("enumerate"):
        said = "enum"
    if said is None and isinstance(infer.get("baseline"), Mapping):  # the form Pyro's TraceGraph_ELBO reads
        said = _pyro_baseline(infer["baseline"])
    if said is None:
        return None
    estimator = as_estimator(said, name)
    if type(estimator) not in (works := able(fn)):
        raise CapabilityError(
            f"site {name!r}: {type(unwrap(fn)).__name__} cannot take the estimator {type(estimator).__name__}"
            f"{_why(estimator, fn)}; estimators that would work: {', '.join(_name(w) for w in works) or 'none'}"
        )
    return estimator


def able(fn: Any) -> list[type]:
    """The estimators that a distribution has."""
    found: list[type] = [Reparam] if fn.has_rsample else []
    if support_of(fn) is not None:
        found.append(Enumerate)
    if has_arms(fn):
        found.append(MeasureValued)
    if not _moving(fn):
        found.append(Reinforce)
    if can_relax(fn):
        found += [Rebar, Relax]
    return found


def defaults(fn: Any, lanes: int, states: int, joint: int) -> Estimator:
    """The estimator of a site for which none is named.

    Args:
        fn: its distribution.
        lanes: coordinates of one datum, all particles together.
        states: their joint states; 0 without finite support.
        joint: joint states of the sites enumerated so far.
    """
    if fn.has_rsample:
        return Reparam()
    if states and states <= STATES and states * joint <= STATES**2:
        return Enumerate()
    if has_arms(fn) and lanes <= LANES:
        return MeasureValued()
    return Reinforce()


def support_of(fn: Any) -> torch.Tensor | None:
    """(states, *atom) values of one coordinate of a finite support; `None` where there is none."""
    base = unwrap(fn)
    if not base.has_enumerate_support:
        return None
    try:
        values = base.enumerate_support(expand=False)
    except (NotImplementedError, ValueError):  # Poisson has none; a binomial may mix counts
        return None
    atom = values.shape[values.ndim - len(base.event_shape) :] if base.event_shape else ()
    return values.reshape(len(values), *atom) if values.numel() == len(values) * max(1, _numel(atom)) else None


def _numel(shape: Any) -> int:
    out = 1
    for size in shape:
        out *= int(size)
    return out


def _moving(fn: Any) -> bool:
    """Whether the support depends on parameters with gradients."""
    support = unwrap(fn).support
    if isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = [getattr(support, n, None) for n in ("lower_bound", "upper_bound")]
    return any(isinstance(b, torch.Tensor) and b.requires_grad for b in bounds)


def _why(estimator: Estimator, fn: Any) -> str:
    if isinstance(estimator, Enumerate):
        return " (its support is infinite, or cannot be listed)"
    if isinstance(estimator, Reparam):
        return " (its draws are not differentiable)"
    if isinstance(estimator, Reinforce):
        return " (its support may move with its parameters)"
    if isinstance(estimator, Rebar | Relax):
        return " (it has no relaxation)"
    return " (no measure-valued derivative in closed form)"


def _name(kind: type) -> str:
    return {
        Reparam: '"reparam"',
        Enumerate: '"enum"',
        MeasureValued: '"mvd"',
        Reinforce: '"reinforce"',
        Rebar: '"rebar"',
        Relax: "Relax(surrogate)",
    }[kind]


def _pyro_baseline(options: Mapping[str, Any]) -> Reinforce:
    decay = float(options.get("baseline_beta", 0.9))
    if options.get("nn_baseline") is not None:
        return Reinforce(options["nn_baseline"], decay, options.get("nn_baseline_input"))
    if options.get("baseline_value") is not None:
        return Reinforce(options["baseline_value"], decay)
    return Reinforce("decaying_average" if options.get("use_decaying_avg_baseline") else "leave_one_out", decay)

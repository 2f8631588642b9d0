"""The part of a cost that a draw can change: of a sum of log densities, the terms downstream of a site.

    E[t_j d log q(v)] = 0   where t_j is no function of v

A term knows the sites that its program had run through when it was reached. It is downstream of v if v, or a site that
the guide drew after v, is among them; and within a plate, whose lanes are independent, only in the lane of v. What is
left out has mean zero in the gradient, but its own mean may have served as a baseline: take one of `Reinforce`'s.
Source: Rao-Blackwellisation of Ranganath, Gerrish & Blei (2014) [inferred]; plates as in Pyro's TraceGraph_ELBO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.objectives.run import Node

if TYPE_CHECKING:
    from ppl.objectives.draw import Address
    from ppl.objectives.plan import Plan

__all__ = ["Term", "Terms", "downstream", "terms_of"]

Plates = frozenset[tuple[str, int]]


@dataclass(frozen=True, eq=False)
class Term:
    """The log density of one site, as it enters a sum.

    Args:
        value: (*lanes, *plates) with its sign and scale.
        plates: names and axes of the plates around the site.
        sources: sites whose values may enter it.
    """

    value: Tensor
    plates: Plates
    sources: frozenset[str]


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum of log densities at one draw of a program.

    Args:
        call: number of the run that drew the values.
        order: sites of that run, in the order in which they were drawn.
        plates: plates of each.
        terms: the summands.
    """

    call: int
    order: tuple[str, ...]
    plates: Mapping[str, Plates]
    terms: tuple[Term, ...]

    def minus(self, other: Terms | None) -> Terms | None:
        """The difference, where both are of the same draw."""
        if other is None or other.call != self.call:
            return None
        less = tuple(Term(-t.value, t.plates, t.sources) for t in other.terms)
        return Terms(self.call, self.order, self.plates, (*self.terms, *less))


def terms_of(plan: Plan, call: int, drawn: Mapping[str, Node], nodes: Mapping[str, Node]) -> Terms:
    """The terms of one run at the values of another.

    Args:
        plan: scales inside one datum.
        call: number of the run that drew the values.
        drawn: its sites.
        nodes: the sites that are summed, in the order of their run; or those drawn themselves.
    """
    terms, seen = [], set()
    for name, node in nodes.items():
        if node.latent:
            seen.add(name)
        terms.append(Term(node.raw * plan.inner_scale(node), _plates(node), frozenset(seen)))
    return Terms(call, tuple(drawn), {n: _plates(node) for n, node in drawn.items()}, tuple(terms))


def downstream(plan: Plan, terms: Terms, address: Address) -> Tensor | None:
    """(samples, *plates) the cost that a draw can change, in its own lanes; `None` where all of it may.

    Args:
        plan: layout of tensors.
        terms: the cost.
        address: of the site.
    """
    call, name = address
    if call != terms.call or name not in terms.order:
        return None
    later = terms.order[terms.order.index(name) :]
    own = terms.plates[name]
    total: Tensor | None = None
    for term in terms.terms:
        between = term.sources.intersection(later)
        if not between:
            continue
        # A later site outside of a plate carries what is drawn in one lane of it to all others.
        kept = {
            dim for plate, dim in own & term.plates if all((plate, dim) in terms.plates[n] for n in between - {name})
        }
        drop = [i + 1 for i in range(plan.plates) if i - plan.plates not in kept.union(plan.dims)]
        part = term.value.sum(drop, keepdim=True) if drop else term.value
        total = part if total is None else total + part
    return total if total is not None else torch.zeros((1,) * (plan.plates + 1), dtype=plan.programs.dtype)


def _plates(node: Any) -> Plates:
    return frozenset((f.name, f.dim) for f in node.frames if f.dim is not None)

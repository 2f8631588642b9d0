"""How one site of a program is drawn: its forced value, or by its estimator with the noise of its address."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.objectives.draw import Address
from ppl.objectives.estimators import Estimator, Rebar, Reinforce, Reparam
from ppl.objectives.noise import SharedNoise
from ppl.objectives.relaxed import relaxed_draw
from ppl.objectives.run import unpad

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["draw_site", "learned"]


def draw_site(ctx: Context, address: Address, msg: Any, detach: bool) -> tuple[Tensor, Estimator | None, Tensor | None]:
    """Value of a site, its estimator where its draw counts, and the prediction of a learned baseline."""
    fn, lane = msg["fn"], msg.get("lane")
    ctx.seen.setdefault(address, (fn, msg["infer"]))
    estimator = None if detach else ctx.engine.estimator(address, fn, msg["infer"])
    if address in ctx.forced:
        value = ctx.forced[address]
        if lane is not None:
            i, lead, plates = lane
            value = value.expand(lead + value.shape[len(lead) :])
            value = unpad(value.reshape(-1, *value.shape[len(lead) :])[i], plates)
            value = value.expand(fn.batch_shape + fn.event_shape)
        return value, estimator, None
    if lane is None:
        ctx._seed(address)
    else:
        ctx._seed((*address, lane[0]))
    if isinstance(estimator, Rebar):
        if lane is not None:
            raise OptionError(f"site {address[1]!r}: Rebar needs programs that run in one batch; use Reinforce")
        value, *ctx.relaxed[address] = relaxed_draw(fn, estimator.temperature)
    elif isinstance(estimator, Reparam):
        shared = lane is None and ctx.states > 1
        with SharedNoise(len(ctx.axes), ctx.states) if shared else nullcontext():
            value = fn.rsample()
    else:
        with torch.no_grad():
            value = fn.sample()
    baseline = None
    if isinstance(estimator, Reinforce) and torch.is_grad_enabled():
        baseline = learned(address[1], estimator)
    return value, estimator, baseline


def learned(name: str, estimator: Reinforce) -> Tensor | None:
    """The prediction of a learned baseline; a module is registered, so that it is trained with the guide."""
    baseline = estimator.baseline
    if isinstance(baseline, str):
        return None
    if isinstance(baseline, Tensor):
        return baseline
    if isinstance(baseline, torch.nn.Module):
        import pyro

        pyro.module(f"{name}_baseline", baseline)
    given = estimator.given
    given = given.detach() if isinstance(given, Tensor) else given
    out = baseline(given) if given is not None else baseline()
    if not isinstance(out, Tensor):
        raise ShapeError(f"the baseline of site {name!r} must return a tensor, got {type(out).__name__}")
    return out

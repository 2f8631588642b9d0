"""How one site of a program is drawn: its forced value, or by its estimator with the noise of its address."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.objectives.draw import Address
from ppl.objectives.estimators import Estimator, Rebar, Reinforce, Relax, Reparam
from ppl.objectives.learned_control import draw_with_control
from ppl.objectives.noise import SharedNoise
from ppl.objectives.relaxed import relaxed, relaxed_noise, soften
from ppl.objectives.run import unpad
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["draw_site", "register"]


def draw_site(ctx: Context, address: Address, msg: Any, detach: bool) -> tuple[Tensor, Estimator | None, Tensor | None]:
    """Value of a site, its estimator where its draw counts, and the prediction of a learned baseline."""
    made = _draw_site(ctx, address, msg, detach)
    if msg.get("lane") is None:
        ctx.drawn[address] = (made[0].detach(), len(ctx.axes))
    return made


def _draw_site(
    ctx: Context, address: Address, msg: Any, detach: bool
) -> tuple[Tensor, Estimator | None, Tensor | None]:
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
    if isinstance(estimator, Rebar | Relax):
        if lane is not None:
            kind = type(estimator).__name__
            raise OptionError(f"site {address[1]!r}: {kind} needs programs that run in one batch; use Reinforce")
        value = _relaxed(ctx, address, fn, estimator)
    elif isinstance(estimator, Reparam):
        shared = lane is None and ctx.states > 1
        with SharedNoise(len(ctx.axes), ctx.states) if shared else nullcontext():
            value = fn.rsample()
    else:
        with torch.no_grad(), SharedNoise(len(ctx.axes), ctx.states) if ctx.shared else nullcontext():
            value = fn.sample()
    return value, estimator, register(address[1], estimator) if torch.is_grad_enabled() else None


def _relaxed(ctx: Context, address: Address, fn: Any, estimator: Rebar | Relax) -> Tensor:
    """A draw, and what its control variate needs later."""
    if isinstance(estimator, Relax):
        register(address[1], estimator)
        value, control = draw_with_control(address[1], fn, estimator)
        if control is not None:
            ctx.controls[address] = control
        return value
    value, *ends = relaxed(fn, unwrap(fn).logits.expand(fn.shape()), *relaxed_noise(fn))
    ctx.relaxed[address] = [soften(fn, z, estimator.temperature) for z in ends]
    return value


def register(name: str, estimator: Estimator | None) -> Tensor | None:
    """Register what a site learns besides its guide, as parts of it; the prediction of a learned baseline."""
    if isinstance(estimator, Relax) and isinstance(estimator.surrogate, torch.nn.Module):
        pyro.module(f"{name}_surrogate", estimator.surrogate)
    if not isinstance(estimator, Reinforce):
        return None
    baseline = estimator.baseline
    if isinstance(baseline, str):
        return None
    if isinstance(baseline, Tensor):
        return baseline
    if isinstance(baseline, torch.nn.Module):
        pyro.module(f"{name}_baseline", baseline)
    given = estimator.given
    given = given.detach() if isinstance(given, Tensor) else given
    out = baseline(given) if given is not None else baseline()
    if not isinstance(out, Tensor):
        raise ShapeError(f"the baseline of site {name!r} must return a tensor, got {type(out).__name__}")
    return out

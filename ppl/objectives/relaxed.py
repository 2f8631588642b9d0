"""Relaxed draws of coins and one-hot choices, free and given the draw they round to.

    b = H(z),   z = logits + logistic (Gumbel) noise,   z~ ~ z | b with noise of its own

Both are differentiable in the logits. Control variates of the score are made of the two:

    REBAR   g = (f(b) - c(z~)) d log q(b) + d c(z) - d c(z~),   c(z) = scale f(sigma(z / temperature))

Unbiased for any c, so that temperature and scale change the variance alone; RELAX learns it (`learned_control`).
Source: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein (2017), section 3 [inferred].
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.sites import unwrap

__all__ = ["can_relax", "relaxed", "relaxed_noise", "soften"]


def can_relax(fn: Any) -> bool:
    """Whether a distribution has a relaxation here."""
    return type(unwrap(fn)) in (dist.Bernoulli, dist.OneHotCategorical)


def relaxed_noise(fn: Any) -> tuple[Tensor, Tensor]:
    """Uniform noise of the free and of the conditional draw, each of the shape of a draw."""
    logits = unwrap(fn).logits
    u, v = (torch.rand(fn.shape(), dtype=logits.dtype, device=logits.device) for _ in range(2))
    return u.clamp(1e-12, 1 - 1e-12), v.clamp(1e-12, 1 - 1e-12)


def relaxed(fn: Any, logits: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A draw b, z, and z~ given b, at logits of the shape of a draw."""
    if isinstance(unwrap(fn), dist.Bernoulli):
        p = torch.sigmoid(logits)
        z = logits + torch.logit(u)
        b = (z > 0).to(z.dtype).detach()
        given = torch.where(b == 1, v * p + (1 - p), v * (1 - p)).clamp(1e-12, 1 - 1e-12)
        return b, z, logits + torch.logit(given)
    logits = logits.log_softmax(-1)
    z = logits - (-u.log()).log()
    b = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype).detach()
    # Given that k is the largest, its Gumbel is standard and the others are cut off there.
    top = -(-v.log()).log()
    largest = (top * b).sum(-1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    others = -((-v.log()) / logits.exp().clamp_min(tiny) + (-largest).exp()).log()
    return b, z, torch.where(b == 1, top, others)


def soften(fn: Any, z: Tensor, temperature: float) -> Tensor:
    """A value between the states."""
    scaled = z / temperature
    return torch.sigmoid(scaled) if isinstance(unwrap(fn), dist.Bernoulli) else torch.softmax(scaled, -1)

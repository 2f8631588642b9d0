"""Control variates from a relaxed draw, for coins and one-hot choices: REBAR.

    g = (f(b) - c(z~)) d log q(b) + d c(z) - d c(z~),   c(z) = scale f(sigma(z / temperature))

z are logits with logistic (Gumbel) noise, b = H(z), and z~ has the law of z given b with noise of its own. Unbiased for
any c, so that temperature and scale change the variance alone.
Source: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein (2017), section 3 [inferred].
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.sites import unwrap

__all__ = ["can_relax", "relaxed_draw"]


def can_relax(fn: Any) -> bool:
    """Whether a distribution has a relaxation here."""
    return type(unwrap(fn)) in (dist.Bernoulli, dist.OneHotCategorical)


def relaxed_draw(fn: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """A draw b, its relaxation from z, and that from z~ given b."""
    base, shape = unwrap(fn), fn.shape()
    tiny = torch.finfo(base.logits.dtype).tiny

    def uniform() -> Tensor:
        return torch.rand(shape, dtype=base.logits.dtype, device=base.logits.device).clamp(1e-12, 1 - 1e-12)

    u, v = uniform(), uniform()
    if isinstance(base, dist.Bernoulli):
        p = base.probs.expand(shape)
        logits = base.logits.expand(shape)
        z = logits + torch.logit(u)
        b = (z > 0).to(z.dtype).detach()
        given = torch.where(b == 1, v * p + (1 - p), v * (1 - p)).clamp(1e-12, 1 - 1e-12)
        z_given = logits + torch.logit(given)
        return b, torch.sigmoid(z / temperature), torch.sigmoid(z_given / temperature)
    logits = base.logits.expand(shape)  # normalised
    z = logits - (-u.log()).log()
    b = torch.nn.functional.one_hot(z.argmax(-1), shape[-1]).to(z.dtype).detach()
    # Given that k is the largest, its Gumbel is standard and the others are cut off there.
    top = -(-v.log()).log()
    largest = (top * b).sum(-1, keepdim=True)
    others = -((-v.log()) / logits.exp().clamp_min(tiny) + (-largest).exp()).log()
    z_given = torch.where(b == 1, top, others)
    return b, torch.softmax(z / temperature, -1), torch.softmax(z_given / temperature, -1)

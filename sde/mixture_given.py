r"""A Gaussian mixture given x at noise s, in closed form.

p_s(x) = sum_k w_k N(x; m_k, C_k + s^2 I),  r_k = softmax_k log(w_k N(...)),  mu_k = m_k + C_k (C_k + s^2 I)^{-1} (x -
m_k), D = sum_k r_k mu_k,  Cov[x_0 | x] = sum_k r_k (V_k + (mu_k - D)(mu_k - D)^T),  V_k = s^2 C_k (C_k + s^2 I)^{-1}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sde.mixture_form import LOG_2PI, MixtureForm

__all__ = ["GivenNoised", "Moments"]


class Moments(NamedTuple):
    """D and Cov[x_0 | x] of rows, in the terms of `SubspaceCovariance`.

    Args:
        mean: (rows, d).
        core: (rows or 1, m, m).
        outside: (rows or 1,).
        extra: (rows, d) one more direction for every row, or None.
    """

    mean: Tensor
    core: Tensor
    outside: Tensor
    extra: Tensor | None


@dataclass(frozen=True, eq=False)
class GivenNoised:
    """What the closed forms share.

    Args:
        form: the mixture.
        variance: (rows or 1, 1) s^2.
        log: (rows, K) log w_k N_k.
        z: (rows, K, q) R_k^T (Q^T (x - c) - a_k).
        rest: (rows, d) the part of x - c outside Q.
        length: (rows, 1) its squared length.
    """

    form: MixtureForm
    variance: Tensor
    log: Tensor
    z: Tensor
    rest: Tensor
    length: Tensor

    @classmethod
    def of(cls, form: MixtureForm, x: Tensor, variance: Tensor) -> Self:
        """Given x: (rows, d) at noise variance: (rows or 1, 1)."""
        shifted = x - form.center
        if form.basis is None:
            coordinates, rest = shifted, torch.zeros_like(shifted)
            length = shifted.new_zeros(len(x), 1)
        else:
            coordinates = shifted @ form.basis
            rest = shifted - form.lift(coordinates)
            length = rest.square().sum(-1, keepdim=True)
        z = coordinates[:, None, :] - form.places
        if form.rotations is not None:
            z = torch.einsum("nkq,kqr->nkr", z, form.rotations)
        inside = form.values + variance[..., None]
        log = -0.5 * (z.square() / inside + inside.log()).sum(-1) - 0.5 * form.dim * LOG_2PI
        if form.outside_dim:
            outside = form.outside + variance
            log = log - 0.5 * (length / outside + form.outside_dim * outside.log())
        return cls(form, variance, form.log_weights + log, z, rest, length)

    @property
    def responsibilities(self) -> Tensor:
        """(rows, K) r_k."""
        return self.log.softmax(-1)

    def log_prob(self) -> Tensor:
        """(rows,) log p_s(x)."""
        return self.log.logsumexp(-1)

    def denoised(self) -> Tensor:
        """(rows, d) D."""
        form, variance, r = self.form, self.variance, self.responsibilities
        inside = torch.einsum("nk,nkq->nq", r, self._inside_means(self._gains()))
        denoised = form.center + form.lift(inside)
        if form.outside_dim:
            denoised = denoised + (r * (form.outside / (form.outside + variance))).sum(-1, keepdim=True) * self.rest
        return denoised

    def score(self) -> Tensor:
        """(rows, d) grad log p_s(x), without the cancellation of (D - x) / s^2 at low noise."""
        form, variance, r = self.form, self.variance, self.responsibilities
        pull = self.z / (form.values + variance[..., None])
        if form.rotations is not None:
            pull = torch.einsum("nkr,kqr->nkq", pull, form.rotations)
        score = -form.lift(torch.einsum("nk,nkq->nq", r, pull))
        if form.outside_dim:
            score = score - (r / (form.outside + variance)).sum(-1, keepdim=True) * self.rest
        return score

    def moments(self) -> Moments:
        """D and Cov[x_0 | x]; of size d x d only if Q is everything."""
        form, variance, r = self.form, self.variance, self.responsibilities
        gains = self._gains()
        means = self._inside_means(gains)
        inside = torch.einsum("nk,nkq->nq", r, means)
        denoised = form.center + form.lift(inside)
        spread = gains * variance[..., None]
        if form.components == 1:
            core = form.core(spread)[:, 0]
        else:
            deviation = r.sqrt()[..., None] * (means - inside[:, None, :])
            core = deviation.mT @ deviation + self._average_core(r, spread)
        extra: Tensor | None = None
        outside = variance[:, 0] * 0
        if form.outside_dim:
            gain = form.outside / (form.outside + variance)
            average = (r * gain).sum(-1, keepdim=True)
            denoised = denoised + average * self.rest
            outside = (average * variance)[:, 0] if not form.one_gain else (gain[:, 0] * variance[:, 0])
            if not form.one_gain:
                core, extra = self._with_rest(core, r, gain - average, means - inside[:, None, :], outside)
        return Moments(denoised, core, outside, extra)

    def _gains(self) -> Tensor:
        """(rows or 1, K, q) C_k (C_k + s^2)^{-1}, direction by direction."""
        return self.form.values / (self.form.values + self.variance[..., None])

    def _inside_means(self, gains: Tensor) -> Tensor:
        """(rows, K, q) coordinates of mu_k in Q."""
        moved = gains * self.z
        if self.form.rotations is not None:
            moved = torch.einsum("nkr,kqr->nkq", moved, self.form.rotations)
        return self.form.places + moved

    def _average_core(self, r: Tensor, spread: Tensor) -> Tensor:
        """sum_k r_k R_k diag(spread_k) R_k^T: (rows, q, q)."""
        if self.form.rotations is None:
            return torch.diag_embed(torch.einsum("nk,nkq->nq", r, spread.expand(len(r), -1, -1)))
        if len(spread) == 1:
            return torch.einsum("nk,kij->nij", r, self.form.core(spread[0]))
        weighted = r[..., None] * spread
        return torch.einsum("kir,nkr,kjr->nij", self.form.rotations, weighted, self.form.rotations)

    def _with_rest(
        self, core: Tensor, r: Tensor, excess: Tensor, deviation: Tensor, outside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Core and extra direction when components shrink the outside part of x by different factors."""
        rest, length = self.rest, self.length
        norm = length.sqrt()
        cross = torch.einsum("nk,nk,nkq->nq", r, excess, deviation) * norm
        corner = outside[:, None] + (r * excess.square()).sum(-1, keepdim=True) * length
        top = torch.cat([core.expand(len(rest), -1, -1), cross[..., None]], -1)
        bottom = torch.cat([cross, corner], -1)[:, None, :]
        unit = torch.where(norm > 0, rest / norm.clamp(min=torch.finfo(norm.dtype).tiny), torch.zeros_like(rest))
        return torch.cat([top, bottom], 1), unit

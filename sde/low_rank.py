r"""A covariance from few of its columns: exact along a block of probes Q, isotropic where no probe looked.

    H = Q^T C Q,   E = (I - Q Q^T) C Q,   C ~ [ H  E^T ;  E  E (H + nu I)^{-1} E^T + a I ]

The lower block is what C holds at least, given these columns (Nystroem), plus the variance that random probes found
outside. E is kept, so what probes along the data say of all other entries is not lost. Source: Tropp et al. (2017)
for the completion [inferred]; the shift nu and the isotropic rest [derived].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

from sde.covariance import apply_rows, dense_matrices, flat_rows, row_index

__all__ = ["LowRankCovariance"]

# nu over the longest column: a network's columns are not quite those of a covariance, and small eigenvalues of H would
# blow up what E implies.
_SHIFT = 0.05

# Most variance that the columns may claim for the entries outside, over what random probes found there.
_TRUST = 2.0


@dataclass(frozen=True)
class LowRankCovariance:
    r"""C = V diag(h) V^T + a (I - V V^T), with an orthonormal V of its own for every row.

    All of it has a closed form, so that draws, solves and products belong to one and the same operator: what particles
    need to weigh their steps exactly. `NetworkCovariance.low_rank` makes one.

    Args:
        mean: (*batch, *event).
        event_shape: shape of one event, d entries.
        values: h, (rows, q), zero or more.
        vectors: V, (rows, d, q), orthonormal columns.
        outside: a, (rows,), zero or more.

    Example:
        >>> C = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
        >>> probes = torch.eye(3)[None, :, :2]
        >>> LowRankCovariance.from_columns(lambda v: v @ C, torch.zeros(1, 3), Size([3]), probes, 1).dense()[0].diag()
        tensor([4., 1., 1.])
    """

    mean: Tensor
    event_shape: Size
    values: Tensor
    vectors: Tensor
    outside: Tensor

    @classmethod
    def from_columns(
        cls, columns: Callable[[Tensor], Tensor], mean: Tensor, event_shape: Size, probes: Tensor, random: int
    ) -> LowRankCovariance:
        """From products of C with orthonormal probes.

        Args:
            columns: v -> C v for v: (rows, d), called once per probe; C need not be quite symmetric.
            mean: (*batch, *event).
            event_shape: shape of one event.
            probes: (rows or 1, d, k) orthonormal columns.
            random: how many of them, at the end, are random directions; they measure the variance outside.
        """
        d = event_shape.numel()
        rows = mean.shape[: mean.ndim - len(event_shape)].numel()
        q = probes.expand(rows, -1, -1)
        k = q.shape[-1]
        products = torch.stack([columns(q[..., j]) for j in range(k)], -1)
        h = q.mT @ products
        e = products - q @ h
        h = (h + h.mT) / 2
        if k == d:
            values, vectors = torch.linalg.eigh(h)
            return cls(mean, event_shape, values.clamp(min=0), q @ vectors, h.new_zeros(rows))
        inside, turn = torch.linalg.eigh(h)
        shift = (_SHIFT * products.norm(dim=1).amax(-1, keepdim=True)).clamp(min=torch.finfo(h.dtype).tiny)
        implied = (e @ turn) / (inside.clamp(min=0) + shift).sqrt()[:, None, :]
        found = h.diagonal(dim1=-2, dim2=-1)[:, k - random :].mean(-1).clamp(min=0)
        claimed = implied.square().sum((1, 2)) / (d - k)
        share = (_TRUST * found / claimed.clamp(min=torch.finfo(h.dtype).tiny)).clamp(max=1)
        implied = implied * share.sqrt()[:, None, None]
        outside = (found - share * claimed).clamp(min=0)
        # Orthonormal to the probes to machine precision, whatever the rank of E.
        basis = torch.linalg.qr(torch.cat([q, e], -1)).Q
        beyond = basis[..., k:]
        cross, lower = beyond.mT @ e, beyond.mT @ implied
        lower = lower @ lower.mT + outside[:, None, None] * torch.eye(beyond.shape[-1], dtype=h.dtype, device=h.device)
        core = torch.cat([torch.cat([h, cross.mT], -1), torch.cat([cross, lower], -1)], -2)
        values, vectors = torch.linalg.eigh(core)
        return cls(mean, event_shape, values.clamp(min=0), torch.cat([q, beyond], -1) @ vectors, outside)

    @property
    def noise_shape(self) -> Size:
        """Shape of the noise of one row: the event's own."""
        return self.event_shape

    def _spectral(self, v: Tensor, values: Tensor, outside: Tensor) -> Tensor:
        """V diag(values) V^T v + outside (I - V V^T) v."""
        flat = flat_rows(v, self.mean, self.event_shape)
        inside = apply_rows(self.vectors.mT, flat)
        a = outside[:, None]
        return (a * flat + apply_rows(self.vectors, (values - a) * inside)).reshape(v.shape)

    def matvec(self, v: Tensor) -> Tensor:
        """C v, for v: (*extra, *batch, *event)."""
        return self._spectral(v, self.values, self.outside)

    def sample(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise, for noise: (*extra, *batch, *event)."""
        return self._spectral(noise, self.values.sqrt(), self.outside.sqrt())

    def solve(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """(C + shift I)^{-1} v, for v: (*extra, *batch, *event); shift is 0-d."""
        return self._spectral(v, 1 / (self.values + shift), 1 / (self.outside + shift))

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> LowRankCovariance:
        """The operator scale C + shift I, for 0-d scale and shift."""
        return replace(self, values=scale * self.values + shift, outside=scale * self.outside + shift)

    def dense(self) -> Tensor:
        """(*batch, d, d) the matrices, over the flattened event; for small events."""
        return dense_matrices(self.matvec, self.mean, self.event_shape)

    def select(self, index: Tensor) -> LowRankCovariance:
        """The operators of the rows `index` of the first batch axis, as resampling needs them."""
        rows = row_index(index, self.mean, self.event_shape)
        return replace(
            self,
            mean=self.mean[index],
            values=self.values[rows],
            vectors=self.vectors[rows],
            outside=self.outside[rows],
        )

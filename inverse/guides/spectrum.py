r"""log det(I + v B B^T) for every v at once, from the eigenvalues of B B^T or a quadrature of their density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.operators import LinearOperator
from inverse.operators.per_lane import PerLane

__all__ = ["GramSpectrum"]


@dataclass(frozen=True)
class GramSpectrum:
    """Eigenvalues of B B^T with weights: log det(I + v B B^T) = sum_i weight_i log(1 + v value_i).

    Args:
        values: (n,) float64 eigenvalues, or Lanczos nodes; (lanes, n) where operators differ from lane to lane.
        weights: (n,) float64 multiplicities, or (lanes, n); all one with a decomposition.
        exact: whether these are all the eigenvalues that are not zero.
    """

    values: Tensor
    weights: Tensor
    exact: bool

    @classmethod
    def of(cls, operator: LinearOperator, probes: int = 16, depth: int = 40, seed: int = 0) -> GramSpectrum:
        """From the singular values where the operator has them, otherwise by stochastic Lanczos quadrature.

        Args:
            operator: B.
            probes: sign vectors; the relative error of the log determinant falls as 1 / sqrt(probes * rows).
            depth: Lanczos steps for each.
            seed: of the probes, so that the answer is a function of the operator.

        Example:
            >>> from inverse.operators import Dense
            >>> round(float(GramSpectrum.of(Dense(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))).log_det(1.0).exp()), 6)
            20.0
        """
        if isinstance(operator, PerLane):
            return cls._of_lanes(operator, probes, depth, seed)
        if "svd" in operator.capabilities:
            values = operator.svd().s.double().square()
            return cls(values, torch.ones_like(values), True)
        size = torch.Size(operator.out_shape).numel()
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (probes, size), generator=generator).double() * 2 - 1
        device = operator._device()
        nodes, weights = _lanczos(operator, (signs / size**0.5).to(device), min(depth, size))
        return cls(nodes.reshape(-1).clamp(min=0), weights.reshape(-1) * size / probes, False)

    @classmethod
    def _of_lanes(cls, operator: PerLane, probes: int, depth: int, seed: int) -> GramSpectrum:
        """That of every lane, shorter ones filled up with eigenvalues of zero."""
        each = [cls.of(member, probes, depth, seed) for member in operator.members]
        parts = ([one.values for one in each], [one.weights for one in each])
        values, weights = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True)[operator.which] for part in parts)
        return cls(values, weights, all(one.exact for one in each))

    def log_det(self, v: float) -> Tensor:
        """log det(I + v B B^T), 0-d float64; (lanes,) where operators differ from lane to lane."""
        return (self.weights * torch.log1p(v * self.values)).sum(-1)


def _lanczos(operator: LinearOperator, start: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (probes, depth) of B B^T seen from unit vectors (probes, size), reorthogonalised."""
    basis = [start]
    diagonal, off = [], []
    for k in range(depth):
        q = basis[-1]
        w = operator(operator.adjoint(q.reshape(-1, *operator.out_shape))).reshape(q.shape)
        diagonal.append((w * q).sum(-1))
        for other in (*basis, *basis):
            w = w - (w * other).sum(-1, keepdim=True) * other
        length = w.norm(dim=-1, keepdim=True)
        if k + 1 < depth:
            off.append(length[:, 0])
            # A Krylov space that is exhausted leaves rounding; zero keeps it out.
            alive = length > 1e-12 * diagonal[0].abs().max()
            off[-1] = torch.where(alive[:, 0], off[-1], torch.zeros_like(off[-1]))
            basis.append(torch.where(alive, w / torch.where(alive, length, torch.ones_like(length)), 0 * w))
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if off:
        side = torch.diag_embed(torch.stack(off, -1), offset=1)
        matrix = matrix + side + side.mT
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[:, 0, :].square()

r"""Twists of particles that carry nuisance parameters: psi(theta) with C or v I for C.

With whitened h = g / r,  d = (y - b) / r:   B = diag(h) A,   S = I + B C B^T,   gradient B^T S^{-1} (d - B D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inverse.guides.spectrum import GramSpectrum
from inverse.particles.lane_likelihood import LaneReader, Lanes
from ppl.errors import CapabilityError

__all__ = ["SMALL", "FactoredTwist", "SpectralTwist", "log_normal", "log_normaliser"]

SMALL = 64
"""Most measurements for which the covariance of the data is factored for every particle."""


class FactoredTwist:
    """psi for up to a few dozen measurements: the covariance of the data is factored for every particle."""

    def __init__(self, reader: LaneReader) -> None:
        self.reader = reader
        d = reader.problem.shape.numel()
        self.matrix: Tensor | None = None
        if reader.form != "own":
            self.matrix = reader.gaussian.measured.dense(dtype=reader.data.dtype).reshape(-1, d)

    def matrices(self, lane: Lanes) -> Tensor:
        """A of every particle, (particle or 1, m, d)."""
        return lane["matrix"] if self.matrix is None else self.matrix[None]

    def seen(self, lane: Lanes, mean: Tensor) -> Tensor:
        """A D, (particle, m)."""
        return (self.matrices(lane) @ mean.flatten(1)[..., None])[..., 0]

    def towards(self, lane: Lanes, covariance: Any) -> Tensor:
        """C A^T, (particle, m, d)."""
        lanes, shape = len(covariance.mean), covariance.mean.shape[1:]
        rows = self.matrices(lane).expand(lanes, -1, -1).movedim(1, 0)
        return covariance.matvec(rows.reshape(len(rows), lanes, *shape)).movedim(0, 1).flatten(2)

    def gram(self, lane: Lanes, towards: Tensor | float) -> Tensor:
        """A C A^T from C A^T, or v A A^T from v."""
        matrix = self.matrices(lane)
        if isinstance(towards, Tensor):
            gram = matrix @ towards.mT
            return (gram + gram.mT) / 2
        return towards * matrix @ matrix.mT

    def whiten(self, lane: Lanes, seen: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whitened residual (particle, m), whitened gram and the Cholesky factor of I + gram, not a number if bad."""
        h = lane["gain"] / lane["stddev"]
        residual = (self.reader.data - lane["offset"]) / lane["stddev"] - h * seen
        gram = h[:, :, None] * gram * h[:, None, :]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + eye)
        return residual, gram, torch.where((failed > 0)[:, None, None], torch.nan, factor)

    def value(self, lane: Lanes, seen: Tensor, gram: Tensor) -> Tensor:
        """log psi, (particle,)."""
        residual, _, factor = self.whiten(lane, seen, gram)
        return log_normaliser(lane) + log_normal(residual, factor)

    def gradient(self, lane: Lanes, seen: Tensor, gram: Tensor) -> Tensor:
        """B^T S^{-1} (d - B D), (particle, d)."""
        residual, _, factor = self.whiten(lane, seen, gram)
        solved = torch.cholesky_solve(residual[..., None], factor) * (lane["gain"] / lane["stddev"])[..., None]
        return (self.matrices(lane).mT @ solved)[..., 0]


class SpectralTwist:
    """psi with C = v I for many measurements, whose noise and gain change by one factor for all of them."""

    def __init__(self, reader: LaneReader) -> None:
        if reader.form == "own" or not reader.uniform:
            raise CapabilityError(
                f"with {reader.data.numel()} measurements, more than {SMALL}, the parameters {list(reader.names)} may "
                "change noise and gain by one factor for all of them, and the offset; use ppl.Gibbs with "
                "inverse.NoiseAndReturn() and ppl.SliceKernel()"
            )
        self.reader, self.operator = reader, reader.gaussian.operator
        self.spectrum = GramSpectrum.of(self.operator)
        stddev = reader.gaussian.stddev
        assert stddev is not None
        self.stddev = stddev.reshape(-1)

    def seen(self, mean: Tensor) -> Tensor:
        """Reference-whitened A D, (particle, m)."""
        return self.operator(mean).reshape(len(mean), -1)

    def _residual(self, lane: Lanes, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise, gain = lane["stddev"][:, 0] / self.stddev[0], lane["gain"][:, 0]
        return (self.reader.data - lane["offset"]) / self.stddev - gain[:, None] * seen, noise.square(), gain

    def value(self, lane: Lanes, seen: Tensor, v: float) -> Tensor:
        """log psi, (particle,)."""
        residual, noise, gain = self._residual(lane, seen)
        solved = self._solve(residual, noise, gain, v)
        growth = (v * gain.square() / noise).double()
        log_det = (self.spectrum.weights * torch.log1p(growth[:, None] * self.spectrum.values)).sum(-1)
        return log_normaliser(lane) - 0.5 * (residual * solved).sum(-1) - 0.5 * log_det.to(residual)

    def gradient(self, lane: Lanes, seen: Tensor, v: float) -> Tensor:
        """B^T S^{-1} (d - B D), (particle, d)."""
        residual, noise, gain = self._residual(lane, seen)
        solved = self._solve(residual, noise, gain, v).reshape(-1, *self.operator.out_shape)
        return gain[:, None] * self.operator.adjoint(solved).flatten(1)

    def _solve(self, residual: Tensor, noise: Tensor, gain: Tensor, v: float) -> Tensor:
        shaped = residual.reshape(-1, *self.operator.out_shape)
        return self.operator.solve_gram(shaped, noise, v * gain.square()).reshape(residual.shape)


def log_normaliser(lane: Lanes) -> Tensor:
    """-log|2 pi R| / 2, (particle,)."""
    return -lane["stddev"].log().sum(-1) - 0.5 * lane["stddev"].shape[-1] * math.log(2 * math.pi)


def log_normal(residual: Tensor, factor: Tensor) -> Tensor:
    """-r^T S^{-1} r / 2 - log|S| / 2 for S = L L^T, (particle, m) -> (particle,); the 2 pi is the likelihood's."""
    white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
    return -0.5 * white.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

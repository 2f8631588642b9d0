r"""Inverse scattering in two dimensions: waves sent through an object and heard around it.

u_s = v_s + k^2 G (x u_s),   y_{s, r} = k^2 sum_j g(r, r_j) x_j u_s(r_j) dA,   g(r, r') = (i / 4) H_0^{(1)}(k |r - r'|)

with v_s a plane wave and x = n^2 - 1 the contrast. Born: u = v, which is linear in x; each further order inserts the
equation once more, u <- v + k^2 G (x u); without limit it is the exact scattered wave of the pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.dense import Dense
from inverse.operators.events import numel
from inverse.operators.nonlinear import NonlinearOperator
from ppl.errors import OptionError

__all__ = ["BornScattering", "MultipleScattering"]


def _hankel(order: int, z: Tensor) -> Tensor:
    """H_n^{(1)}(z) for n of 0 or 1 and z > 0, complex."""
    j = torch.special.bessel_j0(z) if order == 0 else torch.special.bessel_j1(z)
    y = torch.special.bessel_y0(z) if order == 0 else torch.special.bessel_y1(z)
    return torch.complex(j, y)


class _Geometry:
    """Incident waves and Green's functions of a square of unit side, on pixels.

    incident: (transmitters, d); inside: (d, d), k^2 g dA between pixels; outside: (receivers, d), to the receivers.
    """

    def __init__(self, size: int, wavenumber: float, transmitters: int, receivers: int, radius: float) -> None:
        if size < 1 or transmitters < 1 or receivers < 1:
            raise OptionError(
                f"size, transmitters and receivers must be one or more, got {size}, {transmitters}, {receivers}"
            )
        if not (wavenumber > 0 and math.isfinite(wavenumber)):
            raise OptionError(f"wavenumber must be positive and finite, got {wavenumber}; it is per side of the image")
        if not (radius > math.sqrt(0.5) and math.isfinite(radius)):
            raise OptionError(f"receivers must stand outside the unit square, at a radius above 0.71, got {radius}")
        k, side = wavenumber, 1 / size
        line = (torch.arange(size, dtype=torch.float64) + 0.5) * side - 0.5
        X, Y = line.expand(size, size).reshape(-1), -line[:, None].expand(size, size).reshape(-1)
        send = torch.arange(transmitters, dtype=torch.float64) * (2 * math.pi / transmitters)
        hear = torch.arange(receivers, dtype=torch.float64) * (2 * math.pi / receivers)
        along = send.cos()[:, None] * X + send.sin()[:, None] * Y
        self.incident = torch.polar(torch.ones_like(along), k * along)
        distance = torch.hypot(radius * hear.cos()[:, None] - X, radius * hear.sin()[:, None] - Y)
        self.outside = 0.25j * _hankel(0, k * distance) * (k * side) ** 2
        apart = torch.hypot(X[:, None] - X, Y[:, None] - Y)
        same = apart < side / 2
        inside = 0.25j * _hankel(0, k * torch.where(same, torch.ones_like(apart), apart)) * (k * side) ** 2
        # The singular pixel is integrated over the disc of its area.
        a = torch.tensor(side / math.sqrt(math.pi), dtype=torch.float64)
        own = 0.5j * math.pi * k * a * _hankel(1, k * a) - 1
        self.inside = torch.where(same, own, inside)


class BornScattering(Dense):
    """First-order scattered waves, linear in the contrast: diffraction tomography.

    The image is the unit square, centred at the origin; transmitter s sends exp(i k r . e_s) with e_s at angle
    2 pi s / transmitters, receiver r stands at angle 2 pi r / receivers.

    Args:
        size: pixels per side.
        wavenumber: k in radians per side of the image; k / (2 pi) wavelengths fit into it. A pixel should be at most a
            sixth of a wavelength.
        transmitters: number of directions of plane waves.
        receivers: number of places where the wave is heard.
        radius: distance of the receivers from the centre, above 0.71.

    in_shape is (size, size), out_shape (transmitters, receivers, 2) with last axis (re, im).

    Raises:
        OptionError: a count below one, or receivers inside the image.

    Source: Colton & Kress (2013), chapter 8 [inferred]; self term of a pixel from Richmond (1965) [derived].

    Example:
        >>> A = BornScattering(4, wavenumber=3.0, transmitters=2, receivers=3)
        >>> A(torch.zeros(5, 4, 4)).shape
        torch.Size([5, 2, 3, 2])
    """

    def __init__(
        self, size: int, wavenumber: float, transmitters: int = 8, receivers: int = 8, *, radius: float = 1.0
    ) -> None:
        geometry = _Geometry(size, wavenumber, transmitters, receivers, radius)
        matrix = geometry.incident[:, None, :] * geometry.outside
        super().__init__(matrix.reshape(transmitters * receivers, -1), (size, size), (transmitters, receivers))


class MultipleScattering(NonlinearOperator):
    """Scattered waves with `orders` of scattering between pixels, or all of them; no longer linear in the contrast.

    The series diverges for strong or large objects (||k^2 G x|| >= 1); orders=None solves the equation instead, at the
    cost of one dense system of size^2 unknowns per image.

    Args:
        size: pixels per side; the matrix between pixels has size^4 complex entries.
        wavenumber: as in BornScattering.
        transmitters: number of directions of plane waves.
        receivers: number of places where the wave is heard.
        radius: distance of the receivers from the centre, above 0.71.
        orders: 1 is Born, 2 one scattering between pixels, and so on; None for all.

    in_shape is (size, size), out_shape (transmitters, receivers, 2) with last axis (re, im).

    Raises:
        OptionError: a count below one, receivers inside the image, or more than 64 pixels a side.

    Source: as BornScattering; the series is that of Lippmann and Schwinger [derived].

    Example:
        >>> A = MultipleScattering(4, wavenumber=3.0, transmitters=2, receivers=3, orders=2)
        >>> A(torch.zeros(4, 4)).shape, A.linear
        (torch.Size([2, 3, 2]), False)
    """

    incident: Tensor
    inside: Tensor
    outside: Tensor

    def __init__(
        self,
        size: int,
        wavenumber: float,
        transmitters: int = 8,
        receivers: int = 8,
        *,
        radius: float = 1.0,
        orders: int | None = 2,
    ) -> None:
        if orders is not None and orders < 1:
            raise OptionError(f"orders must be one or more, or None for all, got {orders}")
        if size > 64:
            raise OptionError(f"size must be at most 64 pixels a side, got {size}: the matrix has size^4 entries")
        geometry = _Geometry(size, wavenumber, transmitters, receivers, radius)
        super().__init__((size, size), (transmitters, receivers, 2))
        self.orders = orders
        # Kept real: .to(dtype) would drop the imaginary part of a complex buffer.
        for name in ("incident", "inside", "outside"):
            self.register_buffer(name, torch.view_as_real(getattr(geometry, name).resolve_conj().contiguous()))

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, k^2 G dA and the same to the receivers, complex."""
        v, g, h = (t.to(like) for t in (self.incident, self.inside, self.outside))
        return (
            torch.complex(v[..., 0], v[..., 1]),
            torch.complex(g[..., 0], g[..., 1]),
            torch.complex(h[..., 0], h[..., 1]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The scattered wave at the receivers, for every transmitter."""
        batch = x.shape[:-2]
        if x.numel() == 0:
            return x.new_zeros(*batch, *self.out_shape)
        v, g, h = self._parts(x)
        contrast = x.reshape(*batch, 1, numel(self.in_shape))
        if self.orders is None:
            d = g.shape[0]
            system = torch.eye(d, dtype=g.dtype, device=g.device) - g * contrast
            wave = torch.linalg.solve(system, v.T.expand(*batch, *v.T.shape)).transpose(-2, -1)
        else:
            wave = v
            for _ in range(self.orders - 1):
                wave = v + (contrast * wave) @ g
        y = (contrast * wave) @ h.T
        return torch.stack([y.real, y.imag], -1)

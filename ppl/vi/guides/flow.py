"""A normalising flow: z = loc + s * T(eps), T a composition of invertible networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppl.errors import OptionError
from ppl.vi.guides.guide import LOG_2PI, Params, check_init_scale, detached, standard_normal

__all__ = ["Flow"]

PREFIX = "flow."


class _Transform(nn.Module):
    """The flow's transform as a module with one call, so that its parameters can be swapped from outside."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """T or its inverse, (lanes, dim), with the log determinant of its Jacobian, (lanes,)."""
        transform = self.flow().transform
        # zuko's own direction is data to noise; that of a draw is the inverse, which costs the same for couplings.
        return (transform if inverse else transform.inv).call_and_ladj(value)


@dataclass(frozen=True)
class Flow:
    """q(z) = N(T^-1((z - loc) / s)) |det ...|, with T from the zuko library.

    Couplings (`passes=2`) draw and score at one price. A full autoregression (`passes=None`) bends more per layer and
    takes `dim` network calls to draw.

    Args:
        transforms: number of layers.
        hidden: widths of the hidden layers of each network.
        kind: "nsf" for rational-quadratic splines on [-5, 5], "maf" for affine layers.
        passes: 2 for couplings, None for a full autoregression.
        init_scale: scale at the start.

    Source: Durkan et al. (2019) for splines, Papamakarios et al. (2017) for affine layers [inferred].

    Example:
        >>> guide, generator = Flow(transforms=1, hidden=(8,)), torch.Generator().manual_seed(0)
        >>> params = guide.init(2, torch.float64, torch.device("cpu"), generator)
        >>> z, log_q = guide.rsample_and_log_prob(params, guide.noise(5, 2, torch.float64, generator))
        >>> z.shape, torch.allclose(log_q, guide.log_prob(params, z))
        (torch.Size([5, 2]), True)
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    kind: Literal["nsf", "maf"] = "nsf"
    passes: int | None = 2
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        check_init_scale(self.init_scale)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.transforms < 1 or any(width < 1 for width in self.hidden):
            raise OptionError(f"a flow needs layers and widths of one or more, got {self.transforms} and {self.hidden}")
        if self.kind not in ("nsf", "maf"):
            raise OptionError(f'kind must be "nsf" or "maf", got {self.kind!r}')
        if self.passes is not None and self.passes < 2:
            raise OptionError(f"passes must be 2 or more, or None for a full autoregression, got {self.passes}")

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Centre zero, equal scales; the last layers are shrunk so that T starts near the identity."""
        from ppl.trace import seeded

        with seeded(generator):
            module = _build(self, dim, dtype, device)
        params = {PREFIX + n: v.detach().clone() for n, v in module.named_parameters()}
        last = str(max((int(n.split(".")[-2]) for n in params if n.split(".")[-2].isdigit()), default=0))
        for name, value in params.items():
            if name.split(".")[-2] == last or "phi" in name:
                value.mul_(0.1)
        log_scale = torch.full((dim,), self.init_scale, dtype=dtype, device=device).log()
        return {"loc": torch.zeros(dim, dtype=dtype, device=device), "log_scale": log_scale, **params}

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        value, ladj = self._call(params, noise, inverse=False)
        z = params["loc"] + params["log_scale"].exp() * value
        if path:
            return z, self.log_prob(detached(params), z)
        base = -0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * LOG_2PI
        return z, base - ladj - params["log_scale"].sum()

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        value = (z - params["loc"]) * (-params["log_scale"]).exp()
        noise, ladj = self._call(params, value, inverse=True)
        base = -0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * LOG_2PI
        return base + ladj - params["log_scale"].sum()

    def _call(self, params: Params, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        module = _cached(self, value.shape[1], value.dtype, value.device)
        own = {n.removeprefix(PREFIX): v for n, v in params.items() if n.startswith(PREFIX)}
        return torch.func.functional_call(module, own, (value, inverse))


def _build(guide: Flow, dim: int, dtype: torch.dtype, device: torch.device) -> _Transform:
    try:
        import zuko
    except ImportError as error:
        raise OptionError("Flow needs the zuko library: pip install zuko") from error
    family = zuko.flows.NSF if guide.kind == "nsf" else zuko.flows.MAF
    options: dict[str, Any] = {"transforms": guide.transforms, "hidden_features": guide.hidden}
    if guide.passes is not None and dim > 1:
        options["passes"] = guide.passes
    return _Transform(family(dim, 0, **options)).to(dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _cached(guide: Flow, dim: int, dtype: torch.dtype, device: torch.device) -> _Transform:
    """The structure of the flow; its own parameters are never used."""
    with torch.random.fork_rng(devices=[]):
        return _build(guide, dim, dtype, device)

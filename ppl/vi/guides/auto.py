"""Pyro's automatic guides, run on the unconstrained sites of the same program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from torch import Tensor, nn

from ppl.errors import CapabilityError, OptionError
from ppl.sites import Layout
from ppl.vi.guides.guide import Params, detached

__all__ = ["AutoGuide"]

Leaves = tuple[tuple[str, tuple[int, ...]], ...]


class _Runner(nn.Module):
    """One run of a guide for many lanes as a module call, so that its parameters can be swapped from outside."""

    def __init__(self, guide: Any, leaves: Leaves) -> None:
        super().__init__()
        self.guide = guide
        self.leaves = leaves

    def forward(self, lanes: int, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density; or, given z, the log density there."""
        if z is not None:
            return z, self.guide.get_posterior().log_prob(z)
        plate = pyro.plate("_lanes", lanes, dim=-1)
        trace: Any = pyro.poutine.trace(plate(self.guide)).get_trace()
        values = [trace.nodes[n]["value"].expand(lanes, *shape).reshape(lanes, -1) for n, shape in self.leaves]
        log_q = torch.zeros((), dtype=values[0].dtype, device=values[0].device)
        for node in trace.nodes.values():
            if node["type"] == "sample" and node["name"] != "_lanes":
                log_q = log_q + node["fn"].log_prob(node["value"])
        return torch.cat(values, 1), log_q.expand(lanes)


@dataclass(frozen=True)
class AutoGuide:
    """One of Pyro's automatic guides, such as `AutoGuide(pyro.infer.autoguide.AutoNormal)`.

    The guide sees one real-valued site for each continuous latent of the program (its unconstrained value, with all its
    plates, or its noise where it is lifted) and none of the model's dependencies.

    Args:
        cls: the class of the guide, or any callable that builds one from a model.
        options: its keyword arguments, such as `{"rank": 4}`.

    Raises:
        OptionError: `cls` cannot be fitted by gradient steps alone.

    Example:
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> guide, generator = AutoGuide(AutoDiagonalNormal), torch.Generator().manual_seed(0)
        >>> params = guide.init(3, torch.float64, torch.device("cpu"), generator)
        >>> sorted(params)
        ['guide.loc', 'guide.scale_unconstrained']
    """

    cls: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    leaves: Leaves = field(default=(), repr=False)
    _runners: dict[Any, _Runner] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.cls):
            raise OptionError(f"expected a class of pyro.infer.autoguide, got {self.cls!r}")
        if not inspect.isclass(self.cls):
            return
        refused = (autoguide.AutoLaplaceApproximation, autoguide.AutoDiscreteParallel, autoguide.AutoCallable)
        if issubclass(self.cls, refused) or not issubclass(self.cls, autoguide.AutoGuide):
            raise OptionError(
                f"{self.cls.__name__} cannot be fitted here; use an autoguide with reparametrised continuous draws, "
                "such as AutoNormal, AutoMultivariateNormal or AutoStructured"
            )

    @property
    def name(self) -> str:
        """Name of the guide class."""
        return getattr(self.cls, "__name__", type(self.cls).__name__)

    def bind(self, layout: Layout) -> AutoGuide:
        """The same guide for the sites of a program."""
        return replace(self, leaves=tuple((n, tuple(leaf.shape)) for n, leaf in layout.leaves.items()))

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """The guide's own starting parameters, unconstrained."""
        from ppl.trace import seeded

        with seeded(generator):
            runner = self._build(dim, dtype, device)
        return {n: v.detach().clone() for n, v in runner.named_parameters()}

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes,) integers, the first of which seeds Pyro's own draws."""
        return torch.randint(2**31 - 1, (lanes,), generator=generator, device=generator.device)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        devices = [noise.device] if noise.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(noise[0]))
            z, log_q = self._call(params, len(noise), None)
        if path and self._has_density:
            return z, self.log_prob(detached(params), z)
        return z, log_q

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,).

        Raises:
            CapabilityError: the guide has no density that can be called at any point.
        """
        if not self._has_density:
            raise CapabilityError(
                f"{self.name} offers draws with their log density, but no log density at other points; use "
                "MeanField(), FullRank(), LowRank() or Flow(), or a guide of the AutoContinuous family"
            )
        return self._call(params, len(z), z)[1]

    @property
    def _has_density(self) -> bool:
        return inspect.isclass(self.cls) and issubclass(self.cls, autoguide.AutoContinuous)

    def _call(self, params: Params, lanes: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
        some = next(iter(params.values()))
        dim = sum(torch.Size(shape).numel() for _, shape in self.leaves) if self.leaves else 0
        if not dim:
            raise OptionError(f"{self.name} is not bound to a program; call bind(program.flat().layout) first")
        runner = self._structure(dim, some.dtype, some.device)
        with _pyro_settings(some.dtype):
            return torch.func.functional_call(runner, dict(params), (lanes, z))

    def _structure(self, dim: int, dtype: torch.dtype, device: torch.device) -> _Runner:
        """The guide's modules; their own parameters are never used."""
        key = (dtype, device)
        if key not in self._runners:
            with torch.random.fork_rng(devices=[]):
                self._runners[key] = self._build(dim, dtype, device)
        return self._runners[key]

    def _build(self, dim: int, dtype: torch.dtype, device: torch.device) -> _Runner:
        leaves = self.leaves or (("z", (dim,)),)

        def model() -> None:
            for name, shape in leaves:
                zero = torch.zeros(shape, dtype=dtype, device=device)
                pyro.sample(name, dist.Normal(zero, 1.0).to_event(len(shape)))

        with _pyro_settings(dtype):
            guide = self.cls(model, **self.options)
            guide()
        return _Runner(guide, leaves)


@contextmanager
def _pyro_settings(dtype: torch.dtype) -> Iterator[None]:
    """Parameters of modules stay in the modules; nothing global is left changed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            pyro.validation_enabled(False),
            pyro.settings.context(module_local_params=True),
            pyro.get_param_store().scope(),
        ):
            yield
    finally:
        torch.set_default_dtype(before)

r"""Chains in the coordinates of a fitted guide, in which the posterior is nearly a standard normal.

    z = t(e),  e ~ N(0, I) makes draws of q:   target of e proportional to N(e; 0, I) p(t(e), y) / q(t(e))

What t makes of that target is the posterior, whatever the guide: the map need not be invertible. A guide of low rank
takes more numbers than there are unknowns, and those left over are integrated out. A guide that is far off costs steps,
never exactness.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import CapabilityError, OptionError, ProgramError
from ppl.flat import FlatDensity
from ppl.mcmc.hmc import HMC
from ppl.mcmc.nuts import NUTS
from ppl.noise_space import OfEngine
from ppl.program import Program
from ppl.smc.reference import check_source, reference_of
from ppl.trace import Run, log_prob_of
from ppl.vi.guides.guide import LOG_2PI

if TYPE_CHECKING:
    from collections.abc import Callable

    from ppl.graph import LaneFunction
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior
    from ppl.vi.fitted import FittedGuide

__all__ = ["Transport"]


@register
@dataclass(frozen=True)
class Transport:
    """Runs HMC or NUTS in the coordinates of a guide that is fitted first, or was before.

    Worth it where a posterior is curved or narrow in directions that a diagonal mass matrix cannot follow and a guide
    can. Chains start at draws of the guide and correct it: exact whatever the guide, as their draws grow.

    Args:
        engine: `ppl.HMC(...)` or `ppl.NUTS(...)`, whose own `init` stays out.
        guide: a fitted guide, or a backend that fits one: `ppl.SVI(guide=ppl.Hierarchical())`, `ppl.Laplace()`.

    Raises:
        OptionError: another engine, or nothing that fits a guide.

    Source: Hoffman et al. (2019), "NeuTra" [inferred]; maps that are not invertible [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        ...     pyro.sample("y", dist.Normal(mu, 0.01), obs=y)
        >>> engine = Transport(ppl.HMC(warmup=50), guide=ppl.Laplace())
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(2.0, dtype=torch.float64)), engine, draws=50)
        >>> bool((posterior.mean("mu") - 2.0).abs() < 0.01)
        True
    """

    engine: HMC | NUTS
    guide: Any

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[Any] = OfEngine("default_chains", 1)
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.engine, HMC | NUTS) or self.engine.init is not None:
            raise OptionError(
                "Transport runs ppl.HMC(...) or ppl.NUTS(...) without an init of its own (chains start at draws of the "
                f"guide), got {self.engine!r}"
            )
        if self.guide is None:
            raise OptionError("guide must be a fitted guide or a backend that fits one: ppl.Laplace(), not None")
        check_source(self.guide, "guide")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit the guide once, and run the chains in its coordinates; see `ppl.infer`."""
        reference = reference_of(self.guide, program, generator, monitor)
        fitted = reference.guide
        assert fitted is not None
        moved = _Moved(reference.program, fitted)
        posterior = self.engine.run(moved, draws=draws, chains=chains, generator=generator, monitor=monitor)
        name = f"Transport({type(self.engine).__name__})"
        return replace(posterior, guide=fitted, attrs={**posterior.attrs, "backend": name})


class _Moved(Program):
    """A program whose flat view is that of a guide's coordinates."""

    def __init__(self, program: Program, fitted: FittedGuide) -> None:
        self.__dict__.update(program.__dict__)
        self.fitted, self.near = fitted, hasattr(fitted.guide, "draw_near")
        if self.near:
            self.compile = "never"  # a density inside a density: the compiler takes minutes over its long chains

    def flat(self) -> FlatDensity:
        """The density of the guide's noise."""
        return _NearDensity(self, self.fitted) if self.near else _GuideDensity(self, self.fitted)


class _Transported(FlatDensity, ABC):
    """The log density of noise e (lanes, size) that a guide makes draws of."""

    def __init__(self, program: Program, fitted: FittedGuide) -> None:
        super().__init__(program)
        self.own, self.fitted = FlatDensity(program), fitted
        self.params = {n: v.detach() for n, v in fitted.guide_params.items()}
        example = fitted.guide.noise(1, self.dim, program.dtype, torch.Generator(program.device))
        if example.ndim != 2:
            raise CapabilityError(
                f"{type(fitted.guide).__name__} makes draws of noise of shape {tuple(example.shape[1:])}; Transport "
                "needs standard normal vectors, as of MeanField, LowRank, FullRank, Hierarchical or Flow"
            )
        self.dim = example.shape[1]

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """What the noise makes, (lanes, dim of the program)."""

    def constrain(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Site values of noise (lanes, size)."""
        self._check(z)
        with torch.no_grad():
            drawn = self.draw(z) if len(z) else z.new_zeros(0, self.own.dim)
            return self.own.constrain(drawn, subsample)

    def ravel(self, values: Mapping[str, Tensor]) -> Tensor:
        """There is no way back."""
        raise ProgramError(
            "values of sites have no coordinates in the noise of a guide, whose map may not be one to one"
        )

    def initial(self, lanes: int, generator: torch.Generator, radius: float = 2.0) -> Tensor:
        """Noise of draws of the guide, drawn again where the density is not finite."""

        def draw() -> Tensor:
            return torch.randn(lanes, self.dim, generator=generator, dtype=self.program.dtype, device=generator.device)

        z = draw()
        for _ in range(100):
            value, grad = self.log_density_and_grad(z)
            bad = ~(torch.isfinite(value) & torch.isfinite(grad).all(1))
            if not bool(bad.any()):
                return z
            z = torch.where(bad[:, None], draw(), z)
        raise ProgramError(
            f"{int(bad.sum())} of {lanes} chains found no draw of {self.fitted.guide!r} at which the density is "
            "finite; fit it longer"
        )


class _GuideDensity(_Transported):
    """Through the map of any guide, and through the program's own graph."""

    def draw(self, noise: Tensor) -> Tensor:
        """What the noise makes, (lanes, dim of the program)."""
        return self.fitted.guide.rsample_and_log_prob(self.params, noise)[0]

    def log_density(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log density of noise, (lanes, size) -> (lanes,)."""
        self._check(z)
        with torch.no_grad():
            drawn, log_q = self.fitted.guide.rsample_and_log_prob(self.params, z)
            return self.own.log_density(drawn, subsample) + _log_normal(z) - log_q

    def value_and_grads(
        self,
        z: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        subsample: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log density (lanes,), gradient in z (lanes, size), and in the parameters, summed over lanes."""
        self._check(z)
        noise = z.detach().requires_grad_()
        with torch.enable_grad():
            drawn, log_q = self.fitted.guide.rsample_and_log_prob(self.params, noise)
            rest = _log_normal(noise) - log_q
        lost = ~torch.isfinite(drawn.detach()).all(1)  # where a trajectory diverges
        point = torch.where(lost[:, None], 0.0, drawn.detach())
        value, slope, grads = self.own.value_and_grads(point, params=params, subsample=subsample)
        (grad,) = torch.autograd.grad([drawn, rest.sum()], noise, [slope, None])
        return torch.where(lost, -torch.inf, value + rest.detach()), grad, grads

    def prepare(self, z: Tensor, calls: int, *, gradient: bool = True, params: Sequence[str] = ()) -> str:
        """Capture, and compile where it pays, the program's graph."""
        with torch.no_grad():
            return self.own.prepare(self.draw(z), calls, gradient=gradient, params=params)

    def one_lane(self) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """Value and gradient at one point, between float64 arrays."""
        dtype, device = self.program.dtype, self.program.device

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = self.log_density_and_grad(torch.from_numpy(x)[None].to(device=device, dtype=dtype))
            return value.item(), grad[0].double().cpu().numpy()

        return evaluate

    def native(self, z: Tensor, calls: int) -> None:
        """The guide's map is no graph of the program."""


class _NearDensity(_Transported):
    """Through the map of a guide that looks at the density itself: one graph of both."""

    def __init__(self, program: Program, fitted: FittedGuide) -> None:
        super().__init__(program, fitted)
        hard = [n for n in program.lifted if "denoiser" in program.sites[n].capabilities]
        if hard:
            raise CapabilityError(
                f"{type(fitted.guide).__name__} follows the density of all sites, that of {hard} through a network; "
                "use Transport with ppl.LowRank() or ppl.MeanField() there"
            )
        self._outside = []

    def draw(self, noise: Tensor) -> Tensor:
        """What the noise makes, (lanes, dim of the program)."""

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            return self._drawn(lane, shared)[0]

        key = ("transport draw", id(self.fitted))
        function = self.program.lane_function(key, one, {"z": noise}, keep=self.fitted)
        found: Tensor = function(self.program.lane_inputs({"z": noise}), self._shared())
        return found

    def _density(self, lane: Mapping[str, Tensor]) -> LaneFunction:
        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            z, log_q, log_density = self._drawn(lane, shared)
            return log_density(z) + _log_normal(lane["z"]) - log_q

        return self.program.lane_function(("transport", id(self.fitted)), one, lane, keep=self.fitted)

    def _drawn(
        self, lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Of one draw: z, log q, and the program's density."""
        program, enumerated = self.program, bool(self.program.discrete)
        inputs = {n: v for n, v in lane.items() if n != "z"}

        def log_density(z: Tensor) -> Tensor:
            trace, setter = program.trace_one(inputs, shared, Run(z=z, layout=self.layout, enumerate_=enumerated))
            scored = log_prob_of(trace, lambda node: True, enumerated=enumerated, nesting=program.nesting)
            return scored + setter.log_jacobian

        z, log_q = self.fitted.guide.draw_near(self.params, lane["z"], log_density)  # type: ignore[attr-defined]
        return z, log_q, log_density


def _log_normal(noise: Tensor) -> Tensor:
    """Standard normal log density over the last axis."""
    return -0.5 * (noise.square().sum(-1) + noise.shape[-1] * LOG_2PI)

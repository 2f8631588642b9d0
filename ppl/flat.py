"""A program as a density on R^n: what HMC, NUTS, elliptical slices and variational guides see.

    log pi(z) = log p(x(z), y) + log |det dx/dz|,   x(z) = constrain(z)

Transforms are rebuilt from the supports inside the graph, so that a support may depend on another site. Sites lifted to
their noise space have a standard normal density there; those whose distribution depends on no other site build their
value for the whole batch at once, outside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.errors import ProgramError, ShapeError
from ppl.graph import COMPILE_NODES, LaneFunction
from ppl.sites import Layout, Leaf, unwrap
from ppl.trace import Run, log_prob_of

if TYPE_CHECKING:
    import numpy as np

    from ppl.native import NativeDensity
    from ppl.program import Program

__all__ = ["FlatDensity"]

INITIAL_TRIES = 100
LANES_AT_ONCE = 256
# What a graph spends on one operation in each call, and the C compiler on a density and on each operation of it.
CALL_SECONDS, COMPILER_SECONDS, COMPILER_NODE_SECONDS = 4e-6, 0.25, 2e-3
FAR = 1e4  # standard normal noise is never as large


class FlatDensity:
    """The log density of a program on unconstrained vectors z of shape (lanes, dim).

    Args:
        program: the program; its discrete sites must be enumerable, they are summed out.
        coordinates: for `constrain`, `ravel` and the layout alone; a diffusion prior may then stay as it is.

    Raises:
        ProgramError: a discrete latent cannot be summed out, or the density of a diffusion prior would be needed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppl.program import Program
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.Exponential(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> flat = Program(model, torch.tensor(1.0)).flat()
        >>> value, gradient = flat.log_density_and_grad(torch.zeros(2, 1))
        >>> value.shape, gradient.shape, flat.constrain(torch.zeros(2, 1))["scale"]
        (torch.Size([2]), torch.Size([2, 1]), tensor([1., 1.]))
    """

    def __init__(self, program: Program, *, coordinates: bool = False) -> None:
        hard = [n for n in program.discrete if "enumerable" not in program.sites[n].capabilities]
        if hard:
            raise ProgramError(
                f"latent sites {hard} are discrete and cannot be summed out; an engine that uses gradients needs them "
                "continuous, enumerable (Categorical, Bernoulli, ...) or removed by hand"
            )
        self.program = program
        sites = {n: s for n, s in program.latents.items() if not s.discrete}
        for name, site in sites.items():
            if "denoiser" in site.capabilities and name not in program.lifted and not coordinates:
                raise ProgramError(
                    f"site {name!r} is a diffusion prior, whose density a generic engine cannot call at every step; "
                    "run the engine in its noise space, ppl.NoiseSpace(engine), or use a guided sampler from `inverse`"
                )
        self.layout = Layout.of(sites, program.lifted)
        self.dim = self.layout.dim
        self._outside = [leaf for leaf in self.layout.leaves.values() if leaf.noise and program.sites[leaf.site].static]
        self.notes: list[str] = []

    # The density -----------------------------------------------------------------------------------------------------

    def log_density(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log density with Jacobians: (lanes, dim) -> (lanes,)."""
        self._check(z)
        if not len(z):
            return z.new_zeros(0)
        with torch.no_grad():
            lane, log_noise = self._lane(z)
            return self._density(lane)(lane, self._shared(subsample)) + log_noise

    def log_density_and_grad(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Log density (lanes,) and its gradient (lanes, dim)."""
        value, grad, _ = self.value_and_grads(z, subsample=subsample)
        return value, grad

    def value_and_grads(
        self,
        z: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        subsample: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log density (lanes,), gradient in z (lanes, dim), and in the parameters, summed over lanes."""
        self._check(z)
        z = z.detach()
        wrt = tuple(f"param.{n}" for n in params or {})
        if not self._outside:
            lane, _ = self._lane(z, scored=False)
            function = self._density(lane)
            value, grads = function.value_and_grad(lane, self._shared(subsample, params), ("z", *wrt))
            return value, grads["z"], {n: grads[f"param.{n}"] for n in params or {}}
        noise = z.clone().requires_grad_()
        with torch.enable_grad():
            lane, log_noise = self._lane(noise)
        built = tuple(_built(leaf) for leaf in self._outside)
        detached = {n: v.detach() for n, v in lane.items()}
        function = self._density(detached)
        value, grads = function.value_and_grad(detached, self._shared(subsample, params), ("z", *built, *wrt))
        outer = [lane[n] for n in built]
        (through,) = torch.autograd.grad([*outer, log_noise.sum()], noise, [*(grads[n] for n in built), None])
        return value + log_noise.detach(), grads["z"] + through, {n: grads[f"param.{n}"] for n in params or {}}

    def prepare(self, z: Tensor, calls: int, *, gradient: bool = True, params: Sequence[str] = ()) -> str:
        """Capture, and compile where it pays, for `calls` calls at the lane count of `z`; says what was chosen."""
        with torch.no_grad():
            lane, _ = self._lane(z, scored=False)
        wrt = ("z", *(_built(leaf) for leaf in self._outside), *(f"param.{n}" for n in params)) if gradient else None
        return self._density(lane).prepare(lane, self._shared(), wrt=wrt, calls=calls)

    def one_lane(self) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """Value and gradient at one point, between float64 arrays, with as little around the graph as can be."""
        dtype, device = self.program.dtype, self.program.device
        plain = dtype == torch.float64 and device.type == "cpu"
        run: Callable[[Tensor], tuple[Tensor, Tensor]] = self.log_density_and_grad
        if not self._outside and self.program.problems is None:
            example = {"z": torch.zeros(1, self.dim, dtype=dtype, device=device)}
            bound = self._density(example).bind(example, self._shared(), ("z",))
            run = bound

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            z = torch.from_numpy(x)[None]
            value, grad = run(z if plain else z.to(device=device, dtype=dtype))
            return value.item(), (grad[0] if plain else grad[0].double().cpu()).numpy()

        return evaluate

    def native(self, z: Tensor, calls: int) -> NativeDensity | None:
        """Value and gradient at one point as a C function, for `calls` calls; None where that fails or does not pay.

        Counts decide, not the clock, so that the same seed takes the same path.
        """
        from ppl.native import native_density

        plain = self.program.device.type == "cpu" and self.program.problems is None
        if self._outside or not plain or self.program.compile != "auto":
            return None
        lane, _ = self._lane(z, scored=False)
        function = self._density(lane)
        captured = function.captured(lane, self._shared(), ("z",), calls)
        if captured is None:
            return None
        graph, inputs = captured
        nodes = len(graph.graph.nodes)
        if nodes > COMPILE_NODES or CALL_SECONDS * nodes * calls < COMPILER_SECONDS + COMPILER_NODE_SECONDS * nodes:
            return None
        density, reason = native_density(graph, inputs)
        if reason and reason not in function.notes:
            function.notes.append(reason)
        return density

    # Between the two spaces ------------------------------------------------------------------------------------------

    def constrain(self, z: Tensor, subsample: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Site values of unconstrained vectors, (lanes, dim) -> site -> (lanes, *shape), with deterministic sites.

        Sites in subsampled plates have the rows that `subsample` shows. A lifted site appears as its value under its
        name and as its noise under `name_noise`.
        """
        self._check(z)
        with torch.no_grad():
            # Lanes of many problems are problem-major, so that a chunk would cut across problems.
            size = LANES_AT_ONCE if self.program.problems is None else max(len(z), 1)
            if not len(z):
                one = self._constrain(z.new_zeros(self.program.problems or 1, self.dim), subsample)
                return {n: v[:0] for n, v in one.items()}
            chunks = [self._constrain(part, subsample) for part in z.split(size)]
        return {n: torch.cat([c[n] for c in chunks]) for n in chunks[0]}

    def _constrain(self, z: Tensor, subsample: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        lane, _ = self._lane(z, scored=False)
        built = {leaf.site for leaf in self._outside}
        # A deterministic site that depends on a discrete one has no single value once that is summed out.
        shapes = self.program.deterministic

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
            trace, _ = self.program.trace_one(lane, shared, self._run(lane))
            return {
                n: node["value"]
                for n, node in trace.nodes.items()
                if node["type"] == "sample"
                and n not in built
                and (n in self.layout.leaves or (n in shapes and node["value"].shape == shapes[n]))
            }

        function = self.program.lane_function(("constrain", self.program.lifted), one, lane)
        out = dict(function(lane, self._shared(subsample)))
        for leaf in self.layout.leaves.values():
            if leaf.noise:
                out[f"{leaf.site}_noise"] = z[:, leaf.start : leaf.stop].reshape(-1, *leaf.shape)
        out |= {leaf.site: lane[_built(leaf)] for leaf in self._outside}
        return {n: out[n] for n in [*self.layout.leaves, *(k for k in out if k not in self.layout.leaves)]}

    def ravel(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vectors (lanes, dim) of site values; lifted sites are given by `name_noise`."""
        missing = [n for n, leaf in self.layout.leaves.items() if not leaf.noise and n not in values]
        missing += [f"{n}_noise" for n, leaf in self.layout.leaves.items() if leaf.noise and f"{n}_noise" not in values]
        if missing:
            raise ProgramError(f"values for {missing} are missing; got {list(values)}")
        own = {n: values[n] for n, leaf in self.layout.leaves.items() if not leaf.noise}
        noise = {n: values[f"{n}_noise"] for n, leaf in self.layout.leaves.items() if leaf.noise}
        lifted = {n: self._build(self.layout.leaves[n], v) for n, v in noise.items()}
        lane = {**own, **lifted}
        rows = next(iter(lane.values())).shape[0]

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
            run = Run(values={n: lane[n] for n in (*own, *lifted)}, layout=self.layout)
            return self.program.trace_one(lane, shared, run)[1].unconstrained

        out: dict[str, Tensor] = dict(noise)
        if own:
            function = self.program.lane_function(("ravel", self.program.lifted), one, lane)
            lane = self.program.lane_inputs(lane)
            out |= function(lane, self.program.shared_inputs())
        return torch.cat([out[n].reshape(rows, -1) for n in self.layout.leaves], dim=1)

    def initial(self, lanes: int, generator: torch.Generator, radius: float = 2.0) -> Tensor:
        """Starting points (lanes, dim): uniform on [-radius, radius], drawn again until the density is finite there.

        Raises:
            ProgramError: no finite density was found.
        """
        dtype, device = self.program.dtype, generator.device

        def draw() -> Tensor:
            z = (torch.rand(lanes, self.dim, generator=generator, dtype=dtype, device=device) * 2 - 1) * radius
            for leaf in self.layout.leaves.values():  # noise starts where its prior is
                if leaf.noise:
                    size = (lanes, leaf.stop - leaf.start)
                    z[:, leaf.start : leaf.stop] = torch.randn(size, generator=generator, dtype=dtype, device=device)
            return z

        z = draw()
        for attempt in range(INITIAL_TRIES):
            value, grad = self.log_density_and_grad(z)
            bad = ~(torch.isfinite(value) & torch.isfinite(grad).all(1))
            if not bool(bad.any()):
                return z
            shrink = 1.0 if attempt < INITIAL_TRIES // 2 else 0.3  # narrow supports sit near zero more often
            z = torch.where(bad[:, None], shrink * draw(), z)
        raise ProgramError(
            f"no starting point with a finite density and gradient was found in {INITIAL_TRIES} tries for "
            f"{int(bad.sum())} of {lanes} chains; check that the data have positive density under the model, or narrow "
            "its priors"
        )

    # Inside ----------------------------------------------------------------------------------------------------------

    def _build(self, leaf: Leaf, noise: Tensor) -> Tensor:
        """Values of a lifted site whose distribution is the same for all draws: (lanes, *shape)."""
        fn = unwrap(self.program.sites[leaf.site].distribution)
        return fn.from_noise(noise.reshape(-1, *leaf.shape))

    def _log_base(self, leaf: Leaf, noise: Tensor, value: Tensor) -> Tensor:
        """Log density (lanes,) of the noise (lanes, dim) from which `value` was built."""
        return -0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi)

    def _lane(self, z: Tensor, scored: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """Graph inputs of a batch, and the log density of the noise that was used outside the graph, if wanted."""
        lane = {"z": z}
        log_noise = z.new_zeros(len(z))
        for leaf in self._outside:
            noise = z[:, leaf.start : leaf.stop]
            # A trajectory that diverges asks for points out there; the density says no without building them.
            lost = ~(noise.detach().abs().amax(1) < FAR)
            noise = torch.where(lost[:, None], 0.0, noise)
            lane[_built(leaf)] = value = self._build(leaf, noise)
            if scored:
                log_noise = torch.where(lost, -math.inf, log_noise + self._log_base(leaf, noise, value))
        return self.program.lane_inputs(lane), log_noise

    def _density(self, lane: Mapping[str, Tensor]) -> LaneFunction:
        enumerated = bool(self.program.discrete)

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            trace, setter = self.program.trace_one(lane, shared, self._run(lane))
            scored = log_prob_of(trace, lambda node: True, enumerated=enumerated, nesting=self.program.nesting)
            return scored + setter.log_jacobian

        return self.program.lane_function(("flat", self.program.lifted), one, lane)

    def _shared(
        self, subsample: Mapping[str, Tensor] | None = None, params: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        return self.program.shared_inputs(subsample, params)

    def _run(self, lane: Mapping[str, Tensor]) -> Run:
        """Settings of one run of the model from the graph inputs of one draw."""
        built = {leaf.site: lane[_built(leaf)] for leaf in self._outside}
        enumerate_ = bool(self.program.discrete)
        return Run(z=lane["z"], layout=self.layout, values=built, unscored=frozenset(built), enumerate_=enumerate_)

    def _check(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ShapeError(f"expected unconstrained vectors of shape (lanes, {self.dim}), got {tuple(z.shape)}")


def _built(leaf: Leaf) -> str:
    """Name of a graph input that holds a site built outside the graph; a site may be called "z" as well."""
    return f"built.{leaf.site}"

"""A trained amortised posterior: draws for any data, their density, files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inverse.variational.amortised_flow import heavy_noise, push_forward
from inverse.variational.amortised_training import build_network, judge
from ppl.amortised.family import recognise, singles_of
from ppl.amortised.fitted import Fitted
from ppl.amortised.pairs import Pairs, data_of
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.program import Program
from sde.denoiser import EDMDenoiser
from sde.schedule import log_grid
from sde.solvers import sample

__all__ = ["FittedDenoiser"]

ROWS_AT_ONCE = 8192
LARGEST = 64  # entries of a latent vector whose density is worth its Jacobians


@dataclass(frozen=True, eq=False)
class FittedDenoiser(Fitted):
    """D(z_sigma, sigma, y), trained on simulations of a program; one training serves all data.

    The program is part of what was learned: `load` and `posterior` refuse one with other sites, covariates or
    parameters, and `load` one whose simulations differ plainly from those of the training, or on which the denoiser
    errs otherwise (a noise level changed by a third is found, by a tenth is not).

    Args:
        program: what was simulated (one problem).
        network: averaged weights, in evaluation mode, on vectors.
        scales: of simulated latents and data.
        options: of training and drawing.
        history: (steps,) training losses, float64.
        loss: denoising loss on fresh pairs with its standard error; 1 is what a network that knows nothing reaches.
        complete: whether the training ran to its end.
        mask: (data_dim,) which data are seen.
        given: names of the model's other inputs, and a hash of their values.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from inverse import AmortisedDenoiser
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fitted = AmortisedDenoiser(steps=200, width=16, depth=1).fit(Program(model, torch.tensor(0.0)))
        >>> means = [float(fitted.posterior(500, y=torch.tensor(y)).mean("mu")) for y in (-2.0, 2.0)]
        >>> means[0] < -0.5 < 0.5 < means[1]                              # exact: -1 and 1
        True
    """

    FORM: ClassVar[tuple[str, ...]] = ("width", "depth")
    noun: ClassVar[str] = "denoiser"
    OWN: ClassVar[tuple[str, str]] = ("holds weights of a network of your own: pass own=", "has its own network")

    def sample(
        self, program: Program, draws: int, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Tensor | None]:
        """Unconstrained draws (problems, draws, dim), and their log density where the options ask for a correction.

        After Ctrl-C the draws that are finished; all of them if it came before.
        """
        options, singles = self.options, singles_of(program)
        self.check(singles)
        raw = torch.stack([data_of(one, self.mask) for one in singles])
        self._warn(raw, monitor)
        data = self.scales.standard_data(raw)
        dim, dtype = len(self.scales.z_mean), program.dtype
        if options.correct and dim > LARGEST:
            raise OptionError(
                f"the correction needs Jacobians of a flow in {dim} dimensions, {LARGEST} is the most; use "
                "correct=False, or draw with an exact engine"
            )
        network = copy.deepcopy(self.network).to(dtype)
        sigmas = log_grid(options.sigma_max, options.sigma_min, options.levels)
        size = max(1, ROWS_AT_ONCE // len(singles))
        sizes = [min(size, draws - at) for at in range(0, draws, size)]
        seeds = torch.randint(2**62, (len(sizes),), generator=generator, device=generator.device).tolist()
        parts: list[tuple[Tensor, Tensor | None]] = []
        blocks = range(len(sizes)) if monitor.interrupted else monitor.steps(len(sizes), "drawing")
        with torch.no_grad():
            for block in blocks:
                own = torch.Generator(generator.device).manual_seed(seeds[block])
                y = data.repeat_interleave(sizes[block], 0)
                u, log_q = self._block(network, y, sigmas, own, monitor)
                monitor.check_finite("draws of the denoiser", u, "the end of the sampler")
                z = self.scales.z_mean + self.scales.z_sd * u
                lead = (len(singles), sizes[block])
                if log_q is not None:
                    log_q = (log_q - self.scales.z_sd.log().sum()).reshape(lead)
                parts.append((z.reshape(*lead, dim), log_q))
        z = torch.cat([p[0] for p in parts], 1)
        return z, torch.cat([p[1] for p in parts if p[1] is not None], 1) if options.correct else None

    def _block(
        self, network: nn.Module, y: Tensor, sigmas: Tensor, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Tensor | None]:
        """Standardised draws (rows, dim), one for each row of data, and their log density."""
        options, denoiser = self.options, EDMDenoiser(network, 1.0)
        rows, dim, chunk = len(y), len(self.scales.z_mean), options.chunk or len(y)

        def denoise(x: Tensor, sigma: Tensor, y: Tensor = y) -> Tensor:
            calls = -(-len(x) // chunk)
            monitor.cost.add(denoiser_calls=calls, denoiser_evals=len(x))
            return torch.cat([denoiser(a, sigma, b) for a, b in zip(x.split(chunk), y.split(chunk), strict=True)])

        if not options.correct:
            first = sigmas[0]
            noise = torch.randn(rows, dim, generator=generator, dtype=y.dtype, device=generator.device)
            x = denoise(torch.zeros_like(noise), first) + first.to(noise) * noise
            return sample(options.solver, denoise, x, sigmas, generator), None
        noise, log_noise = heavy_noise(rows, dim, generator, y.dtype)
        parts = [
            push_forward(partial(denoise, y=c), a, b, sigmas)
            for a, b, c in zip(*(v.split(chunk) for v in (noise, log_noise, y)), strict=True)
        ]
        monitor.cost.add(vjps=noise.numel() * 2 * (len(sigmas) - 1))
        folded = sum(p[2] for p in parts)
        if folded:
            monitor.note(
                f"{folded} draws went through a step of the flow that is not one-to-one, so that their weights are not "
                "exact; raise levels"
            )
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _warn(self, data: Tensor, monitor: Monitor) -> None:
        outside = max(self.scales.outside(row) for row in data)
        if outside:
            monitor.note(
                f"{outside} of the data lie outside all that was simulated: the network extrapolates there; see "
                "program.check()"
            )

    # Files -----------------------------------------------------------------------------------------------------------

    def own_meta(self) -> dict[str, Any]:
        """Form of the network, and the noise levels it was trained on."""
        own = self.options
        network = {"width": own.width, "depth": own.depth} if own.network is None else None
        return {"network": network, "levels": own.levels_of_training}

    @classmethod
    def asks_own(cls, meta: dict[str, Any]) -> bool:
        """Whether the network was not ours."""
        return meta["network"] is None

    @classmethod
    def reread(
        cls, meta: dict[str, Any], tensors: dict[str, Tensor], program: Program, own: nn.Module | None, where: str
    ) -> FittedDenoiser:
        """`from_state`, of plain data that were checked."""
        from inverse.variational.amortised import AmortisedDenoiser

        options = AmortisedDenoiser(**(meta["network"] or {}), network=own, **meta["levels"])
        pairs = Pairs(program)
        built = build_network(options, pairs, torch.Generator(program.device).manual_seed(0))
        loaded = cls.rebuilt(meta, tensors, program, built, options, pairs.mask, where)
        recognise(judge(built, options.levels_of_training, loaded.scales, pairs, seed=1), loaded.loss, where)
        return loaded

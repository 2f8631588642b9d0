"""Amortised posteriors: a denoiser D(z_sigma, sigma, y) trained on simulations of a program, then run for its data.

    D = argmin E_{p(z, y)} lambda(sigma) |D(z + sigma n, sigma, y) - z|^2,   z | y = end of the reverse diffusion of D

No density is needed, only simulations; draws for new data cost one run of a sampler. With `correct` the draws come from
the probability flow with their exact density q, and are weighted by p(z, y) / q(z).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from inverse.variational.amortised_fitted import FittedDenoiser
from inverse.variational.amortised_training import DenoiserTraining, judge
from ppl.amortised.backend import AmortisedBackend
from ppl.amortised.pairs import Pairs
from ppl.amortised.training import Training
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.option_checks import check_integers
from ppl.program import Program
from sde.solvers import DPMSolver2MSDE
from sde.solvers.transition import Solver

__all__ = ["AmortisedDenoiser"]


@register
@dataclass(frozen=True)
class AmortisedDenoiser(AmortisedBackend[FittedDenoiser]):
    r"""Trains a denoiser on simulations of the program, then draws from the posterior of its data.

    One training serves all data: `fit(program).posterior(y=...)`, `program.over(y=ys)`, or a `file` written by
    `FittedDenoiser.save`. A chain is a training of its own, so that their disagreement shows what training left open;
    with a `file` chains are independent draws from one network.

    Without correction the draws are as good as the network, and no more draws make them better: judge it by
    `ppl.diagnostics.sbc`. Corrected draws are importance-weighted: exact as draws grow for any network, given finite
    weights, which k-hat tells (reliable below 0.7).

    Args:
        steps: training steps; the learning rate falls to zero over them.
        batch: simulated pairs per step, fresh ones every time.
        width: hidden units of the residual MLP.
        depth: its blocks.
        lr: learning rate of Adam.
        network: a torch module of your own instead: (x, level, data) -> like x. x is (rows, *shape) where there is one
            latent site, else (rows, dim), in units of its spread; data likewise for observed sites; level (rows,) is
            ln(sigma) / 4. It is copied, and goes on from the weights it has.
        correct: draw by the probability flow, with weights p / q, evidence and k-hat; up to 64 dimensions.
        levels: noise levels of the sampler.
        sigma_max: the first of them, in units of the latents' spread.
        sigma_min: the last.
        solver: sampler of draws that are not corrected.
        p_mean: mean of ln sigma in training.
        p_std: standard deviation of ln sigma.
        ema: width of the averaging of weights; 1 / ema is about the share of the steps that count.
        file: a trained denoiser, to be used instead of training one.
        chunk: most rows per network call when drawing; None is no limit.

    Raises:
        OptionError: an option is out of range.

    Source: Karras et al. (2022) for the loss [read]; Geffner, Papamakarios & Mnih (2023) for posteriors by denoising
        simulated pairs [inferred].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> program = Program(model, torch.tensor(2.0))
        >>> backend = AmortisedDenoiser(steps=200, width=16, depth=1, correct=True)
        >>> posterior = ppl.infer(program, backend, draws=500)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2), bool(posterior.info["pareto_k"] < 0.7)
        (True, True)
    """

    steps: int = 4000
    batch: int = 256
    width: int = 128
    depth: int = 3
    lr: float = 2e-3
    network: nn.Module | None = None
    correct: bool = False
    levels: int = 40
    sigma_max: float = 40.0
    sigma_min: float = 0.005
    solver: Solver = field(default_factory=DPMSolver2MSDE)
    p_mean: float = -1.0
    p_std: float = 1.6
    ema: float = 16.0
    file: str | Path | None = None
    chunk: int | None = None

    holds_denoisers: ClassVar[bool] = True  # it simulates a diffusion prior, and never asks for its density

    def __post_init__(self) -> None:
        check_integers(self, steps=1, batch=1, width=1, levels=1, depth=0)
        for name in ("lr", "p_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be positive and finite, got {value}")
        if not (0 < self.sigma_min < self.sigma_max < math.inf):
            raise OptionError(f"expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not math.isfinite(self.p_mean) or self.ema < 0:
            raise OptionError(f"p_mean must be finite and ema zero or more, got {self.p_mean} and {self.ema}")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise OptionError(
                f"network must be a torch module, called as (x, level, data), got {type(self.network).__name__}"
            )
        if getattr(self.solver, "needs_covariance", False) or not hasattr(self.solver, "step"):
            raise OptionError(f"solver must be one of sde.solvers that needs no covariance, got {self.solver!r}")
        if self.chunk is not None and self.chunk < 1:
            raise OptionError(f"chunk must be at least one row, or None for no limit, got {self.chunk}")

    @property
    def levels_of_training(self) -> dict[str, float]:
        """The law of ln sigma in training."""
        return {"p_mean": self.p_mean, "p_std": self.p_std}

    @property
    def fitted_class(self) -> type[FittedDenoiser]:
        """What `fit` returns."""
        return FittedDenoiser

    @property
    def step_cost(self) -> dict[str, int]:
        """A step is one call of the network on one batch, and back."""
        return {"denoiser_calls": 1, "denoiser_evals": self.batch, "vjps": self.batch}

    def pairs(self, program: Program, cost: Cost | None = None) -> Pairs:
        """What simulates the program."""
        return Pairs(program, cost)

    def training(self, pairs: Pairs, generator: torch.Generator, begun: Any) -> DenoiserTraining:
        """The training of a denoiser."""
        return DenoiserTraining(self, pairs, generator, begun)

    def judged(self, training: Training) -> tuple[float, float]:
        """Denoising loss on fresh simulations; 1 is what a network that knows nothing reaches."""
        return judge(training.averaged, self.levels_of_training, training.scales, training.pairs, seed=0)[:2]

    def loaded(self, program: Program) -> FittedDenoiser:
        """The network of `file`."""
        assert self.file is not None
        loaded = FittedDenoiser.load(self.file, program, self.network)
        return self.drawing_from(loaded, ("width", "depth", "p_mean", "p_std"))

    def check_start(self, start: FittedDenoiser) -> None:
        """The network has to be of the same form."""
        same = (start.options.width, start.options.depth) == (self.width, self.depth)
        if (start.options.network is None) != (self.network is None) or not (same or self.network is not None):
            raise OptionError(
                f"cannot go on from a network of width {start.options.width} and depth {start.options.depth} with "
                f"width {self.width} and depth {self.depth}; use the same network"
            )

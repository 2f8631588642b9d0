"""Distribution Transformers: prior and data in, a mixture posterior out in one pass, for all priors of a family.

    q(z | y, phi) = argmin E_{p(phi) p(z | phi) p(y | z)} [-log q(z | y, phi)]

Only simulations are needed; draws are then weighted by p(z | phi) p(y | z) / q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppl.amortised.backend import AmortisedBackend
from ppl.amortised.mixture_pairs import MixturePairs
from ppl.amortised.priors import MixtureLaw, MixturePriors
from ppl.amortised.training import Training
from ppl.amortised.transformer_fitted import FittedTransformer
from ppl.amortised.transformer_training import TransformerTraining, judge_transformer, knows_no_more
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.program import Program

__all__ = ["DistributionTransformer"]


@register
@dataclass(frozen=True)
class DistributionTransformer(AmortisedBackend[FittedTransformer]):
    """Trains a transformer on simulations of a program; then a posterior is one pass, as a mixture of Gaussians.

    Which priors it serves is chosen when it is trained. By default it is the program's own. With `priors` it is every
    mixture of Gaussians (on the unconstrained scale) of a law: the prior is then read off the program that is solved,
    or given as `fitted.posterior(prior=...)`, and a posterior can be the next prior. With `prior_sites` the prior has
    parameters, which lie in observed sites whose distribution is the law they are trained on:
    `pyro.sample("a", dist.Gamma(4.0, 6.0), obs=a)`.

    Draws are weighted by default: exact as draws grow for any network, given finite weights, which k-hat tells
    (reliable below 0.7). One in ten comes from a widened posterior and from the prior, so that thin tails of the
    network do not decide. A chain is a training of its own; with a `file` chains are independent draws from one.

    Args:
        components: of the mixtures.
        width: of a token.
        heads: of attention; they divide the width.
        depth: layers.
        feedforward: hidden units of a layer.
        steps: training steps; the learning rate falls to zero over them.
        batch: simulated pairs per step, fresh ones every time.
        lr: learning rate of Adam.
        priors: law of mixtures to train on, such as `ppl.MixturePriors()`.
        prior_sites: names of observed sites that hold parameters of the prior.
        rows: names of observed sites whose first axis holds rows, each a token; sites in plates need not be named.
        correct: weight the draws, with evidence and k-hat.
        ema: width of the averaging of weights; 1 / ema is about the share of the steps that count.
        file: a trained transformer, to be used instead of training one.

    Raises:
        OptionError: an option is out of range.

    Source: Whittle, Ziomek, Rawling & Osborne (2025): tokens, attention, loss and laws of priors after their code
        [read]; the frame of the prior's components, the weights and the defence against thin tails are ours [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> program = Program(model, torch.tensor(2.0))
        >>> backend = DistributionTransformer(components=2, width=16, depth=2, steps=100)
        >>> posterior = ppl.infer(program, backend, draws=2000)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.1), bool((posterior.log_evidence.value + 2.2655).abs() < 0.1)
        (True, True)
    """

    components: int = 5
    width: int = 32
    heads: int = 4
    depth: int = 3
    feedforward: int = 64
    steps: int = 2000
    batch: int = 512
    lr: float = 2e-3
    priors: MixtureLaw | None = None
    prior_sites: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    correct: bool = True
    ema: float = 16.0
    file: str | Path | None = None

    def __post_init__(self) -> None:
        check_integers(self, components=1, width=1, heads=1, depth=1, feedforward=1, steps=1, batch=1)
        if self.width % self.heads:
            raise OptionError(f"heads must divide the width, got {self.heads} heads and a width of {self.width}")
        if not (math.isfinite(self.lr) and self.lr > 0 and self.ema >= 0):
            raise OptionError(f"lr must be positive and ema zero or more, got {self.lr} and {self.ema}")
        if self.priors is not None and (isinstance(self.priors, type) or not isinstance(self.priors, MixtureLaw)):
            raise OptionError(f"priors must be a law of mixtures such as ppl.MixturePriors(), got {self.priors!r}")
        for name in ("prior_sites", "rows"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(n, str) for n in value):
                raise OptionError(f"{name} must be a tuple of site names, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    @property
    def fitted_class(self) -> type[FittedTransformer]:
        """What `fit` returns."""
        return FittedTransformer

    @property
    def step_cost(self) -> dict[str, int]:
        """A step differentiates one batch."""
        return {"gradient_evals": self.batch}

    def pairs(self, program: Program, cost: Cost | None = None) -> MixturePairs:
        """What simulates the program under the priors to train on."""
        return MixturePairs(program, self.components, self.priors, self.prior_sites, self.rows, cost)

    def training(self, pairs: MixturePairs, generator: torch.Generator, begun: Any) -> TransformerTraining:
        """The training of a transformer."""
        return TransformerTraining(self, pairs, generator, begun)

    def judged(self, training: Training) -> tuple[float, float]:
        """Mean -log q on fresh simulations, in units of the latents' spread."""
        assert isinstance(training, TransformerTraining)
        return judge_transformer(training.averaged, training.scales, training.pairs, seed=0)[:2]

    def loaded(self, program: Program) -> FittedTransformer:
        """The network of `file`; a law of priors of one's own comes with the options."""
        assert self.file is not None
        law = None if isinstance(self.priors, MixturePriors) else self.priors
        return self.drawing_from(FittedTransformer.load(self.file, program, law), FittedTransformer.FORM)

    def check_start(self, start: FittedTransformer) -> None:
        """The form of the network and the law of priors have to be the same."""
        ours, theirs = ({n: getattr(o, n) for n in start.FORM} for o in (self, start.options))
        if ours != theirs:
            raise OptionError(f"cannot go on from a network of the form {theirs} with {ours}; use the same options")

    def extras(self, training: Training, monitor: Monitor) -> dict[str, Any]:
        """The simulator; a remark where nothing was learned."""
        assert isinstance(training, TransformerTraining)
        if knows_no_more(training.averaged, training.scales, training.pairs):
            monitor.note(
                "the trained transformer knows no more than the prior: train longer (steps), or the data tell nothing"
            )
        return {"pairs": training.pairs}

"""A trained Distribution Transformer: posteriors as mixtures in one pass, draws with weights, recursions, files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ppl.amortised.family import recognise, singles_of
from ppl.amortised.fitted import Fitted, part_of
from ppl.amortised.mixture import Mixture
from ppl.amortised.mixture_pairs import MixturePairs
from ppl.amortised.priors import MixtureLaw, MixturePriors, prior_of
from ppl.amortised.result import LANES
from ppl.amortised.transformer_training import build_transformer, judge_transformer, predict
from ppl.errors import OptionError, ShapeError
from ppl.flat import FlatDensity
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.smc.reference import in_chunks
from ppl.smc.tempered import TemperedDensity

if TYPE_CHECKING:
    from ppl.amortised.transformer import DistributionTransformer

__all__ = ["FittedTransformer"]

ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class FittedTransformer(Fitted):
    """q(z | y, phi): for any data, and any prior of those trained on, a mixture of Gaussians in one pass.

    Mixtures are on the unconstrained scale, as `program.flat()` lays out the latents. The program is part of what was
    learned: one with other sites or covariates is refused, and by `load` one whose simulations differ.

    Args:
        prior: the mixture that replaces the program's prior, or a batch with one for each problem; None takes the
            program's own. It is given to `posterior` and `mixture`.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> small = {"components": 1, "width": 16, "depth": 2, "steps": 200}
        >>> backend = ppl.DistributionTransformer(**small, priors=ppl.MixturePriors())
        >>> fitted = backend.fit(ppl.Program(model, torch.tensor(0.0)))
        >>> prior = ppl.Mixture(torch.ones(1), torch.tensor([[-1.0]]), torch.full((1, 1, 1), 0.5))
        >>> posterior = fitted.posterior(2000, prior=prior, y=torch.tensor(1.0))
        >>> bool((posterior.mean("mu") + 0.6).abs() < 0.1)                     # exact: (-1 * 4 + 1 * 1) / 5
        True
    """

    FORM: ClassVar[tuple[str, ...]] = (
        "components", "width", "heads", "depth", "feedforward", "prior_sites", "rows", "priors",
    )  # fmt: skip
    noun: ClassVar[str] = "transformer"
    OWN: ClassVar[tuple[str, str]] = (
        "was trained on a law of priors of your own: pass own=", "has its own law",
    )  # fmt: skip

    prior: Mixture | None = field(default=None, repr=False)
    pairs: MixturePairs | None = field(default=None, repr=False)

    # The posterior as a mixture --------------------------------------------------------------------------------------

    def mixture(self, *, program: Program | None = None, prior: Mixture | None = None, **data: Tensor) -> Mixture:
        """The posterior in one pass, on the unconstrained scale, without correction.

        Args:
            program: the same program with other data, also `program.over(...)`; that of the training when None.
            prior: the prior; a batch of as many as there are problems, or one for all; that of the program when None.
            **data: data by argument or observed site, instead of a program.

        Returns:
            One mixture, or for many problems a batch of them.

        Raises:
            ShapeError: the prior is over vectors of another length.
            OptionError: the prior has more components than the network, or the network knows one prior only.
        """
        program = self.program if program is None else program
        program = program.with_data(**data) if data else program
        fitted = replace(self, prior=prior if prior is not None else self.prior)
        _, posterior = fitted._predict(program, Monitor())
        return posterior if program.problems is not None else posterior[0]

    def mixtures(self, prior: Mixture | None = None, **data: Tensor) -> Mixture:
        """As `mixture`, for rows of data of every observed site, with nothing read from a program: for recursions.

        Args:
            prior: a batch (rows,), or one for all.
            **data: each observed site as (rows, *shape).

        Raises:
            ShapeError: sites are missing, or their rows do not agree.
        """
        assert self.pairs is not None
        program = self.program
        shapes = {n: (len(data[n]), *s.shape) for n, s in program.observed.items() if n in data}
        if set(data) != set(program.observed) or any(data[n].shape != s for n, s in shapes.items()):
            expected = {n: ("rows", *s.shape) for n, s in program.observed.items()}
            raise ShapeError(f"expected data {expected}, got { {n: tuple(v.shape) for n, v in data.items()} }")
        if len({s[0] for s in shapes.values()}) != 1:
            raise ShapeError(f"the rows of {shapes} do not agree")
        rows = next(iter(shapes.values()))[0]
        given = prior if prior is not None else self.prior
        priors = replace(self, prior=given)._priors(program, rows)
        y = torch.cat([data[n].to(program.dtype).reshape(rows, -1) for n in program.observed], 1)
        return self._pass(self.pairs.shown(torch.where(self.mask, y, torch.zeros_like(y)), priors))[1]

    def posterior(  # type: ignore[override]  # one keyword more
        self, draws: int = 1000, chains: int = 1, *args: Any, prior: Mixture | None = None, **options: Any
    ) -> Posterior:
        """Independent draws of the posterior, weighted unless `correct=False`; see `Fitted.posterior`.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws from one network.
            *args: generator and seed.
            prior: the prior, as for `mixture`; weights then lead to prior times likelihood of the program.
            **options: program, correct, monitor, and data by name.
        """
        fitted = self if prior is None else replace(self, prior=prior)
        return Fitted.posterior(fitted, draws, chains, *args, **options)

    def sample(
        self, program: Program, draws: int, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Tensor | None]:
        """Unconstrained draws (problems, draws, dim), and where a correction is wanted their log density."""
        prior, q = self._predict(program, monitor)
        if self.options.correct:
            q = q.defended(prior)
        z = q.draw((draws,), generator)
        monitor.check_finite("draws of the transformer", z, "the posterior mixture")
        return z.transpose(0, 1), q.log_prob(z).T if self.options.correct else None

    def densities(self, program: Program) -> Sequence[Callable[[FlatDensity, Tensor], Tensor]] | None:
        """Prior times likelihood, where the prior is not the program's."""
        if self.prior is None:
            return None
        priors = self._priors(program, program.problems or 1)
        assert priors is not None

        def density(i: int) -> Callable[[FlatDensity, Tensor], Tensor]:
            def value(flat: FlatDensity, z: Tensor) -> Tensor:
                likelihood = in_chunks(TemperedDensity(flat.program).split, z, LANES)[1]
                return priors[i].log_prob(z) + likelihood

            return value

        return [density(i) for i in range(len(priors.weights))]

    def _predict(self, program: Program, monitor: Monitor) -> tuple[Mixture, Mixture]:
        """Prior and posterior of each problem, on the unconstrained scale."""
        # Reading a program takes as long as the network: one tells for all, unless covariates differ between them.
        differ = program._lane_args & set(self.given[0])
        self.check(singles_of(program) if differ else [program.problem(0) if program.problems else program])
        assert self.pairs is not None
        y = self.pairs.vectors(program, self._priors(program, program.problems or 1))
        self._warn(y, monitor)
        monitor.cost.add(density_evals=len(y))
        return self._pass(y)

    def _pass(self, y: Tensor) -> tuple[Mixture, Mixture]:
        """Prior and posterior of rows as they are simulated."""
        # Rounding of the network in float32 would be seen in a recursion over many steps.
        network = copy.deepcopy(self.network).to(y.dtype)
        with torch.no_grad():
            parts = [predict(network, self.scales, part) for part in y.split(ROWS_AT_ONCE)]
        found = []
        for which in (0, 1):
            whole = [p[which] for p in parts]
            joined = Mixture(
                torch.cat([m.weights for m in whole]),
                torch.cat([m.means for m in whole]),
                torch.cat([m.scale_tril for m in whole]),
            )
            found.append(joined.affine(self.scales.z_sd, self.scales.z_mean))
        return found[0], found[1]

    def _priors(self, program: Program, count: int) -> Mixture | None:
        """The prior of each problem with as many components as the network, a batch; None where there is one only."""
        components, dim = self.options.components, len(self.scales.z_mean)
        law = None if self.pairs is None else self.pairs.law
        if law is None:
            if self.prior is not None:
                raise OptionError(
                    "the transformer was trained for the program's own prior and takes no other; train it with "
                    "priors=ppl.MixturePriors(), or put the prior's parameters into observed sites: prior_sites=..."
                )
            return None
        given = self.prior
        if given is None:
            singles = singles_of(program)
            own = [prior_of(one).split(components) for one in (singles if len(singles) == count else singles * count)]
            return Mixture(
                *(torch.stack(v) for v in zip(*((m.weights, m.means, m.scale_tril) for m in own), strict=True))
            )
        if given.dim != dim:
            raise ShapeError(
                f"the prior is over vectors of length {given.dim}, the program's latents have {dim} unconstrained "
                f"coordinates: {list(self.pairs.latent_shapes) if self.pairs else ''}"
            )
        given = given.to(dtype=self.scales.z_mean.dtype, device=self.scales.z_mean.device).split(components)
        if not given.batch_shape:
            return Mixture(*(v.expand(count, *v.shape) for v in (given.weights, given.means, given.scale_tril)))
        if given.batch_shape != (count,):
            raise ShapeError(f"{tuple(given.batch_shape)} priors were given for {count} problems")
        return given

    def _warn(self, y: Tensor, monitor: Monitor) -> None:
        packed = self.network.columns.packed  # type: ignore[union-attr]
        outside = (y < self.scales.y_low) | (y > self.scales.y_high)
        for what, part in (("numbers of the prior", outside[:, :packed]), ("data", outside[:, packed:])):
            count = int(part.sum(1).max()) if part.shape[1] else 0
            if count:
                monitor.note(
                    f"{count} of the {what} lie outside all that was simulated: the transformer extrapolates there, "
                    "and only weighted draws can be trusted, if k-hat allows; see program.check()"
                )

    # Files -----------------------------------------------------------------------------------------------------------

    def own_meta(self) -> dict[str, Any]:
        """Form of the network, and the law of priors where it is ours."""
        law = self.options.priors
        known = None if law is None else dict(vars(law)) if isinstance(law, MixturePriors) else "own"
        return {"form": {n: getattr(self.options, n) for n in self.FORM[:-1]}, "priors": known}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same transformer again."""
        meta, tensors = Fitted.state(self)
        assert self.pairs is not None
        return meta, {**tensors, "place.center": self.pairs.center, "place.scale": self.pairs.scale}

    @classmethod
    def asks_own(cls, meta: dict[str, Any]) -> bool:
        """Whether the law of priors was not ours."""
        return bool(meta["priors"] == "own")

    @classmethod
    def reread(
        cls, meta: dict[str, Any], tensors: dict[str, Tensor], program: Program, own: MixtureLaw | None, where: str
    ) -> FittedTransformer:
        """`from_state`, of plain data that were checked."""
        priors = MixturePriors(**meta["priors"]) if isinstance(meta["priors"], dict) else own
        from ppl.amortised.transformer import DistributionTransformer

        options: DistributionTransformer = DistributionTransformer(**meta["form"], priors=priors)
        pairs = options.pairs(program)
        built = build_transformer(options, pairs, torch.Generator(program.device).manual_seed(0))
        # The law of priors stays where it was: the program may hold another prior now.
        place = part_of(tensors, "place.", program.device)
        pairs.center, pairs.scale = (place[n].to(program.dtype) for n in ("center", "scale"))
        loaded = cls.rebuilt(meta, tensors, program, built, options, pairs.mask, where)
        recognise(judge_transformer(built, loaded.scales, pairs, seed=1), loaded.loss, where)
        return replace(loaded, pairs=pairs)

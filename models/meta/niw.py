"""NIW-Meta: the global law by one-time episodic optimisation, local posteriors in closed form and thrown away.

J = mean_i [ E_{q_i} l_i(theta) + E_q(phi) KL(q_i || N(mu, Sigma)) ] + KL(q(phi) || p(phi)) / N
q(phi) = NIW(m_0, V_0, n_0, l_0),   q_i = N(m_i, V_i) in closed form from q(phi) and a quadratic fit of l_i
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from models.meta.episodes import Episodes, EpisodeSource, Points, drawn
from models.meta.fitted_meta import FittedMeta
from models.meta.gauss_newton import GaussNewton
from models.meta.global_ascent import GlobalAscent
from models.meta.local import LocalFit
from models.meta.program import Hierarchy, hierarchy_of
from ppl.backend import Exactness
from ppl.errors import OptionError, ProgramError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["NIWMeta"]


@dataclass(frozen=True)
class NIWMeta:
    """The NIW guide of a `Hierarchy`: variational, with a law of mu and Sigma and no state for any episode.

    Per step: quadratic fits of a batch of episodes at the present global law, their posteriors in closed form, one step
    of the global law, and the posteriors are thrown away. Memory does not grow with the steps of the inner fits.

    Without KL(q(phi) || p(phi)) / N the objective falls for ever in l_0 and n_0, and q(phi) would collapse to a point
    (empirical Bayes). The term is kept, and its optimum is known: l_0 = lambda_0 + N, n_0 = nu_0 + N. So counts are
    set, not learned, with N all episodes and not those of a batch; `counts="learned"` exists to show that it is worse.

    Mean-field: theta and phi are independent in q, so that the spread of Sigma is too small and the bound not tight;
    for the reference example of twelve Gaussian episodes the bound is 0.69 nats below the evidence.

    For small networks and few shots `local=GaussNewton(steps=1, through=True)` with `expectation="quadratic"` learns
    the network's derivatives along with its parameters; its predictions are the linearised ones (`Adapted.predict`).
    It is for Gaussian targets: one linearisation is no fit of a classifier. For networks of classes take
    `local=Fisher(steps=5)`, `update="natural"`, `expectation="quadratic"`, a prior whose variance is wide (0.5), held
    by a df of 1e6, and predictions at the temperature that `cooled` finds.

    Where torch.distributed is initialised the episodes of a batch are shared between its processes, all with the same
    arguments, and all end with the same law; `models.meta.distributed` says how to start them.

    Args:
        local: how an episode's loss is fitted: `GaussNewton()`, `Fisher()`, or the published `SGLD()`.
        steps: of the global law.
        batch: episodes for each step; a subsampled program brings its own.
        update: "gradient" is the published step, of Adam on J through m_i and V_i; "natural" goes from the present law
            towards its coordinate optimum for the batch, and is coordinate ascent where the batch shows all episodes.
        expectation: of l_i: at "draw"s of q_i, or of the "quadratic" fit, without noise.
        draws: of q_i for each episode and step.
        lr: of Adam at the start, for m_0 in units of theta; it falls as a cosine to a hundredth.
        scale_lr: likewise for log V_0; None for the same. A V_0 that does not know yet which weights matter has a long
            way to go: at the rate of m_0 it stays near its start, and predictions are too wide.
        forgetting: step t of "natural" goes (1 + t / delay)^-forgetting of the way.
        delay: see forgetting.
        average: share of the last steps whose laws are averaged; 0 keeps the last one.
        counts: see above.

    Raises:
        OptionError: an option is out of range.

    Source: Kim & Hospedales (2024) [read: abstract, reviews, README]; formulas [derived].

    Example:
        >>> from models.meta import Gaussian, NormalInverseGamma, mlp
        >>> network = mlp([1, 1])
        >>> prior = NormalInverseGamma.around(network.start, 0.1, 3.0, 1.0)
        >>> g = torch.Generator().manual_seed(0)
        >>> x, slope = torch.randn(32, 8, 1, generator=g), 2.0 + 0.3 * torch.randn(32, 1, generator=g)
        >>> program = Hierarchy(network, Gaussian(0.1), prior).program(Episodes(x, slope * x[..., 0]))
        >>> fitted = NIWMeta(steps=5, update="natural", batch=32).fit(program)
        >>> bool((fitted.law.mean - torch.tensor([2.0, 0.0])).abs().max() < 0.2), float(fitted.law.df)
        (True, 35.0)
    """

    local: LocalFit = field(default_factory=GaussNewton)
    steps: int = 1000
    batch: int = 16
    update: Literal["gradient", "natural"] = "gradient"
    expectation: Literal["draw", "quadratic"] = "draw"
    draws: int = 1
    lr: float = 0.01
    scale_lr: float | None = None
    forgetting: float = 0.7
    delay: float = 10.0
    average: float = 0.2
    counts: Literal["analytic", "learned"] = "analytic"

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ("steps",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, steps=1, batch=1, draws=1)
        if isinstance(self.local, type) or not callable(self.local):
            raise OptionError(f"local must be an object such as GaussNewton() or SGLD(steps=5), got {self.local!r}")
        for name, allowed in (
            ("update", ("gradient", "natural")),
            ("expectation", ("draw", "quadratic")),
            ("counts", ("analytic", "learned")),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_positive(self, "lr", "delay", *([] if self.scale_lr is None else ["scale_lr"]))
        if not 0.5 < self.forgetting <= 1:
            raise OptionError(f"forgetting must lie in (0.5, 1] for the steps to settle, got {self.forgetting!r}")
        if not 0 <= self.average < 1:
            raise OptionError(f"average is a share of the steps, in [0, 1), got {self.average}")
        if self.update == "natural" and self.counts == "learned":
            raise OptionError('natural steps have no gradient to learn counts by; use counts="analytic"')

    # Doors -----------------------------------------------------------------------------------------------------------

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit once, and draw mu and Sigma from q(phi) and every theta_i from its q_i; see `ppl.infer`."""
        fitted = self.fit(program, generator=generator, monitor=monitor)
        return fitted.posterior(program, draws, chains, generator)

    def fit(
        self,
        target: Program | Hierarchy,
        episodes: Episodes | EpisodeSource | None = None,
        *,
        total: float | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
        start: FittedMeta | None = None,
    ) -> FittedMeta:
        """The global law, to be kept.

        Args:
            target: a program of `Hierarchy.program`, which brings its data; or a hierarchy, with `episodes`.
            episodes: a set of them, or an endless source `(how many, generator) -> Episodes`.
            total: N, episodes that the law is learned from: all of the set; of a source, as many as are drawn.
            generator: source of all randomness, of the episodes too; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C; a quiet one when None.
            start: a fit of the same hierarchy to go on from.

        Raises:
            ProgramError: the program is no hierarchy over episodes, or holds several problems.
            OptionError: options do not fit the episodes.
            NotFiniteError: an inner fit or a gradient is not finite.
        """
        hierarchy, batches, total = self._batches(target, episodes, total)
        device = hierarchy.prior.mean.device
        generator = generator or torch.Generator(device).manual_seed(seed)
        monitor = monitor or Monitor(generator=generator)
        return self._ascend(GlobalAscent(self, hierarchy, total, start), batches, generator, monitor)

    def _batches(
        self, target: Program | Hierarchy, episodes: Episodes | EpisodeSource | None, total: float | None
    ) -> tuple[Hierarchy, Callable[[torch.Generator], Points], float]:
        """The hierarchy, what gives the points of a step, and N."""
        points = None
        if isinstance(target, Program):
            if target.problems is not None:
                raise ProgramError("NIWMeta.fit takes one problem at a time; ppl.infer runs the problems in turn")
            if episodes is not None:
                raise OptionError("a program brings its own episodes; give the hierarchy to fit to others")
            hierarchy, points = hierarchy_of(target)
        else:
            hierarchy = target
            if isinstance(episodes, Episodes):
                points = episodes.points
        size = hierarchy.batch or self.batch
        if points is not None:
            hierarchy.check(points)
            number = len(points.x)
            whole = points

            def some(generator: torch.Generator) -> Points:
                if size >= number:
                    return whole
                index = torch.randperm(number, generator=generator, device=generator.device)[:size]
                return Points(*(part[index] for part in whole))

            return hierarchy, some, float(number if total is None else total)
        checked: list[bool] = []

        def fresh(generator: torch.Generator) -> Points:
            found = drawn(episodes, size, generator).points
            if not checked:
                hierarchy.check(found)
                checked.append(True)
            return found

        return hierarchy, fresh, float(self.steps * size if total is None else total)

    def _ascend(
        self,
        ascent: GlobalAscent,
        batches: Callable[[torch.Generator], Points],
        generator: torch.Generator,
        monitor: Monitor,
    ) -> FittedMeta:
        """All steps, or those that are left after the last checkpoint."""
        if self.counts == "learned":
            text = (
                "counts are learned by gradient: their optimum is known (l_0 = lambda_0 + N, n_0 = nu_0 + N), and "
                'gradients reach it slowly; use counts="analytic"'
            )
            warnings.warn(text, stacklevel=3)
            monitor.note(text)
        workers = ascent.workers
        finished = monitor.finished("fit") if workers.rank == 0 else None
        saved = monitor.resume() if workers.rank == 0 and finished is None else finished
        saved, over, state = workers.first((saved, finished is not None, generator.get_state()))
        generator.set_state(state)
        first = 0
        if saved is not None:
            first = self.steps if over else int(saved.pop("step"))
            ascent.load(saved)

        def advance(step: int) -> None:
            elbo = ascent.step(step, batches(generator), generator, monitor)
            monitor.report(elbo=elbo)
            if workers.rank == 0:
                monitor.checkpoint(step + 1, ascent.state)

        done = first
        for step in monitor.steps(self.steps, "fit", start=first):
            advance(step)
            done = step + 1
        if workers.size > 1 and monitor.interrupted and not ascent.told and done < self.steps:
            advance(done)  # the others have begun this step, and learn in it that the run ends
        if first < self.steps and workers.rank == 0:
            monitor.finish("fit", ascent.state())
        return ascent.result(complete=not monitor.interrupted)

r"""One estimate of the bound of SDE matching, and its gradient, for many draws at once.

    log p(y, r | X) with X_t ~ q at the times of the path   -   (T / 2) mean over random t of |g^-1 (f_q - f)|^2

What is drawn goes through the program's own run, where drift, diffusion and start of the path have the values that
other latents and learned parameters give them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.paths.factors import ProgramPath
from inverse.paths.marginals import Marginals, half_divergence, squared
from inverse.paths.steered import FIRST, part
from ppl.errors import CapabilityError, NotFiniteError
from ppl.graph import LaneFunction
from ppl.program import Program
from ppl.sites import Layout
from ppl.trace import Run, log_prob_of
from ppl.vi.guides import FullRank
from ppl.vi.guides.guide import Params, standard_normal
from sde.path import Path

__all__ = ["MatchingDensity", "MatchingDraws"]

PIECES = ("rest", "o", "r", "offset", "rate", "move", "move_rate", "white", "t")  # of a draw, see MatchingDraws


@dataclass(frozen=True, eq=False)
class MatchingDraws:
    """What is drawn of q: other unknowns, and the path in units of its start and first spread, undressed of both.

    At the path's own times its offset o + C r and its move R eps; at `count` random times, spread over the horizon,
    those with their rates, and R^-T eps.

    Args:
        family: curves of the marginals.
        path: a path of the program, for its times.
        others: coordinates of the other unknowns.
        count: random times in a draw.
    """

    family: Marginals
    path: Path
    others: int
    count: int

    @property
    def sizes(self) -> list[int]:
        """Lengths of the pieces of a draw."""
        seen, asked = len(self.path.times) * self.family.size, self.count * self.family.size
        return [self.others, seen, seen, *[asked] * 5, self.count]

    @property
    def dim(self) -> int:
        """Length of a draw."""
        return sum(self.sizes)

    def pieces(self, z: Tensor) -> dict[str, Tensor]:
        """A draw (..., dim) in pieces: the path's are (..., times, d)."""
        d = self.family.size
        cut = dict(zip(PIECES, z.split(self.sizes, -1), strict=True))
        return {n: v if n in ("rest", "t") else v.unflatten(-1, (-1, d)) for n, v in cut.items()}

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Marginals about the path without noise, that spread as it does at first."""
        first = FullRank().init(self.others, dtype, device, generator)
        knots = self.family.knots
        times = torch.as_tensor(knots[1:], dtype=dtype, device=device)
        still = Path(
            self.path.process, times, self.path.initial.detach().to(device=device, dtype=dtype), start=knots[0]
        )
        with torch.no_grad():
            states = still.from_noise(torch.zeros(still.noise_shape, dtype=dtype, device=device)) - still.initial
        offsets = torch.cat([torch.zeros_like(states[:1]), states])
        return {**{FIRST + n: v for n, v in first.items()}, **self.family.init(offsets)}

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, and uniform ones for the times."""
        size = self.others + (len(self.path.times) + self.count) * self.family.size
        normal = standard_normal(lanes, size, dtype, generator)
        uniform = torch.rand(lanes, self.count, dtype=dtype, device=normal.device, generator=generator)
        return torch.cat([normal, uniform], 1)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim), and log q of the other unknowns (lanes,): that of the path is in its energy."""
        d, n, lanes = self.family.size, len(self.path.times), len(noise)
        rest, seen, asked, uniform = noise.split([self.others, n * d, self.count * d, self.count], 1)
        rest, log_q = FullRank().rsample_and_log_prob(part(params, FIRST), rest, path=path)
        strata = torch.arange(self.count, dtype=noise.dtype, device=noise.device)
        start, end = float(self.family.knots[0]), float(self.family.knots[-1])
        t = start + (end - start) * ((strata + uniform) / self.count).clamp_min(1e-6)
        own = self.path.times.to(noise).expand(lanes, -1)
        found = [rest]
        for times, eps in ((own, seen), (t, asked)):
            others = rest[:, None].expand(-1, times.shape[1], -1) if self.others else None
            curves = self.family.at(params, times, others)
            move, move_rate, white = self.family.times(curves, eps.unflatten(1, (-1, d)))
            both = (curves.offset, move)
            found += [
                v.flatten(1)
                for v in (both if times is own else (curves.offset, curves.offset_rate, move, move_rate, white))
            ]
        return torch.cat([*found, t], 1), log_q


class MatchingDensity:
    """The bound of one draw, with the interface of `ppl.flat.FlatDensity` that a fit uses.

    Args:
        program: in the noise space of its path.
        site: the path.
        draws: what is drawn.
    """

    def __init__(self, program: Program, site: str, draws: MatchingDraws) -> None:
        self.program, self.site, self.draws, self.dim = program, site, draws, draws.dim
        others = {n: s for n, s in program.latents.items() if n != site}
        self.layout = Layout.of(others, program.lifted - {site})
        self.own = ProgramPath(program, self.layout, site)

    def value_and_grads(
        self, z: Tensor, *, params: Params | None = None, subsample: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The bound without log q (lanes,), its gradient (lanes, dim), and that in learned parameters.

        Raises:
            NotFiniteError: the diffusion vanishes; the message says where.
        """
        wrt = ("z", *(f"param.{n}" for n in params or {}))
        lane, shared = {"z": z.detach()}, self.program.shared_inputs(subsample, params)
        value, grads = self._function("bound").value_and_grad(lane, shared, wrt)
        if not bool(value.isfinite().all()):
            self.refuse_vanishing(z.detach(), params or {})
        return value, grads["z"], {n: grads[f"param.{n}"] for n in params or {}}

    def log_density(self, z: Tensor) -> Tensor:
        """The bound without log q: (lanes, dim) -> (lanes,)."""
        with torch.no_grad():
            value: Tensor = self._function("bound")({"z": z}, self.program.shared_inputs())
        return value

    def prepare(self, z: Tensor, calls: int, *, gradient: bool = True, params: Sequence[str] = ()) -> str:
        """Capture, and compile where it pays; says what was chosen."""
        wrt = ("z", *(f"param.{n}" for n in params)) if gradient else None
        lane = {"z": z + 0.5}  # times after the start
        return self._function("bound").prepare(lane, self.program.shared_inputs(), wrt=wrt, calls=calls)

    def refuse_coupled(self, generator: torch.Generator) -> None:
        """Refuse data, and latents, that see several times of the path at once.

        Raises:
            CapabilityError: marginals do not say what those see.
        """
        draws, program = self.draws, self.program
        noise = draws.noise(2, self.dim, program.dtype, generator)
        params = draws.init(self.dim, program.dtype, program.device, generator)
        one, other = draws.rsample_and_log_prob(params, noise)[0]
        other = torch.cat([one[: draws.others], other[draws.others :]])
        times, d = len(draws.path.times), draws.family.size
        rows = [one, other]
        for _ in range(3):
            mask = torch.rand(times, generator=generator, device=program.device) < 0.5
            both = mask.repeat_interleave(d).repeat(2)  # of offset and move
            both = torch.nn.functional.pad(both, (draws.others, self.dim - draws.others - len(both)))
            rows += [torch.where(both, one, other), torch.where(both, other, one)]
        with torch.no_grad():
            found = self._function("data")({"z": torch.stack(rows)}, program.shared_inputs())
        miss = found[:2].sum() - found[2:].reshape(3, 2).sum(1)
        if bool(
            (miss.abs() > (1e-7 if program.dtype == torch.float64 else 1e-3) * found.abs().max().clamp_min(1)).any()
        ):
            raise CapabilityError(
                f"a datum or a latent sees several times of {self.site!r} at once, which the marginals of a path do "
                "not determine; use ppl.NoiseSpace(ppl.SVI(guide=inverse.paths.ControlGuide()))"
            )

    def refuse_vanishing(self, z: Tensor, params: Params) -> None:
        """Name a time and a state at which the diffusion vanishes, if it does.

        Raises:
            NotFiniteError: it does, where the control has to move the path.
        """
        draws = self.draws

        def action(path: Path, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            cut, zero = draws.pieces(row), path.initial.new_tensor(float(draws.family.knots[0]))
            x, _ = _states(path, zero, cut["offset"], cut["move"])
            t, x = torch.cat([zero[None], cut["t"]]), torch.cat([path.initial[None], x])
            g = squared_at(path, x, t)
            least = torch.linalg.eigvalsh(g)[..., 0] if path.process.general else g.amin(-1)
            return least, t, x

        with torch.no_grad():
            least, t, x = self.own.each(z[:, : draws.others], params, action, z)
        bad = (~(least > 0)).nonzero()
        if len(bad):
            lane, i = bad[0].tolist()
            raise NotFiniteError(
                f"the diffusion of {self.site!r} vanishes at time {float(t[lane, i]):.4g} and state "
                f"{x[lane, i].tolist()[:8]}, where the control has to move it; add a floor to the diffusion, or use "
                "ppl.NoiseSpace(engine), which does not divide by it"
            )

    def _function(self, what: str) -> LaneFunction:
        """The traced function of one draw: the bound, or its part without the energy."""
        program, draws, own, site = self.program, self.draws, self.own, self.site

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            cut = draws.pieces(lane["z"])

            def action(path: Path) -> tuple[Tensor, Tensor]:
                start = path.initial.new_tensor(float(draws.family.knots[0]))
                seen, _ = _states(path, start, cut["o"], cut["r"])
                return _energy(path, start, cut) if what == "bound" else start.new_zeros(()), seen

            run = Run(z=cut["rest"], layout=self.layout)
            (trace, setter), energy = own.run({}, shared, run, action)
            scored = log_prob_of(trace, lambda node: node["name"] != site, enumerated=False, nesting=program.nesting)
            horizon = float(draws.family.knots[-1] - draws.family.knots[0])
            return scored + setter.log_jacobian - 0.5 * horizon * energy

        key = ("matching", what, site, tuple(draws.sizes), draws.family.diagonal)
        return program.lane_function(
            key, one, {"z": torch.ones(1, self.dim, dtype=program.dtype, device=program.device)}
        )


def squared_at(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """g g' at states (times, d): its diagonal, or all of it in general."""
    found: Tensor = torch.vmap(lambda x, t: squared(path.process, x, t))(x, t)
    return found


def _states(path: Path, start: Tensor, offset: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """States x_0 + offset + G_0 move, (times, d), and G_0 G_0' or its diagonal."""
    square = squared(path.process, path.initial, start)
    return path.initial + offset + _spread(path, square, move), square


def _spread(path: Path, square: Tensor, move: Tensor) -> Tensor:
    """G_0 v for rows v."""
    return move @ torch.linalg.cholesky_ex(square)[0].mT if path.process.general else square.sqrt() * move


def _energy(path: Path, start: Tensor, cut: Mapping[str, Tensor]) -> Tensor:
    """Mean over the random times of |g^-1 (f_q - f)|^2."""
    process, t = path.process, cut["t"]
    x, first = _states(path, start, cut["offset"], cut["move"])
    velocity = cut["rate"] + _spread(path, first, cut["move_rate"])
    square = squared_at(path, x, t)
    drift = torch.vmap(process.f)(x, t)
    more = velocity + torch.vmap(lambda x, t: half_divergence(process, x, t))(x, t) - drift
    if not process.general:
        more = more - 0.5 * square * cut["white"] / first.sqrt()
        return (more.square() / square).sum(-1).mean()
    root = torch.linalg.cholesky_ex(first)[0]
    score = -torch.linalg.solve_triangular(root.mT, cut["white"].mT, upper=True).mT
    more = more + 0.5 * (square @ score[..., None])[..., 0]
    white = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(square)[0], more[..., None], upper=False)
    return white.square().sum((-1, -2)).mean()

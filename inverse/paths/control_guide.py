r"""A guide that steers a path: its driving numbers have a mean that depends on the state.

    dW -> dW + u(t, X, Y, r) dt,   z_n ~ N(u_n sqrt(dt), s_n^2)   given all before

u sqrt(dt) is linear in what it sees, with gains of its own for every step, plus a network: linear programs with
Gaussian data need no more than the first. In continuous time s = 1 and the divergence from the prior is
E int u^2 dt / 2. Prior and guide move the factors alike, so the bound is a true one for the discretised process, at any
step; a learned s_n is what data sharper than a step ask for. Two estimates of the divergence have the same mean:

    pathwise    int u dW + int u^2 dt / 2     log q - log p of the path that was drawn: one number at the best control
    energy      int u^2 dt / 2                its expectation given what came before each step

Source: Daems et al. (ICLR 2024), the public code, a network with s = 1 and the energy [read]; gains, scales, other
latents and the start of the factors in a Gaussian of their own [derived].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from inverse.paths.linear_control import LinearControl, linearised_control
from inverse.paths.path_checks import coarse_steps, linear_data, refuse_unmoved
from inverse.paths.steered import FIRST, Laws, Now, Steered, part
from ppl.errors import OptionError, ShapeError
from ppl.program import Program
from ppl.sites import Layout
from ppl.vi.guides import FullRank
from ppl.vi.guides.guide import Params
from sde.path import Path

__all__ = ["ControlGuide"]

CONTEXT = "context."  # parameters of the context
ROUNDS = 3  # of linearising a path that is not linear


@dataclass(frozen=True)
class ControlGuide(Steered):
    """A neural control of one path's driving numbers, after a full-rank Gaussian for all other unknowns.

    For `ppl.NoiseSpace(ppl.SVI(guide=ControlGuide()))`. The control sees time, the state, the factors of the noise and
    the other unknowns. Drift, diffusion and Hurst index may depend on other latents and on learned parameters: the
    guide then follows the program's own path at their values, draw by draw, and the parameters climb the same bound.

    Args:
        path: a path with the same grid and numbers of coordinates, noises and factors, on which the guide keeps count
            of the state: any gives a valid guide, a near one a good one, and it is cheaper. None follows the program's.
        site: its name; None where the program has one path.
        width: units in each of two hidden layers.
        bound: largest absolute value of the learned part of u sqrt(dt), which keeps early steps finite.
        elbo: the divergence in the bound that is climbed, "pathwise" or "energy".
        around: a control to start from and to learn a correction of, such as `linear_control_of(program)`; "linear"
            takes that of the path linearised about its mean, at every draw's values of the other unknowns, for data
            that are linear with Gaussian noise: exact for linear paths.
        context: a module that turns the data, a dict by observed site, into features (size,) or (steps, size) for the
            network; its parameters are learned with the guide, which then fits other data too.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Process
        >>> path = Path(Process(lambda x, t: -x), torch.linspace(0.2, 1, 5))
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[-1, 0], 0.5), obs=y)
        >>> engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(width=16), steps=50, lr=0.01))
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), engine, draws=10, progress=False)
        >>> posterior.draws["x"].shape
        torch.Size([1, 10, 5, 1])
    """

    width: int = 64
    bound: float = 5.0
    elbo: Literal["pathwise", "energy"] = "pathwise"
    around: LinearControl | Literal["linear"] | None = field(default=None, repr=False)
    context: torch.nn.Module | None = field(default=None, repr=False)
    data: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False, compare=False, kw_only=True)
    near: bool = field(default=False, repr=False, compare=False, kw_only=True)
    remarks: tuple[str, ...] = field(default=(), repr=False, compare=False, kw_only=True)
    rounds: int = field(default=1, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or not (math.isfinite(self.bound) and self.bound > 0):
            raise OptionError(f"width and bound must be positive, got {self.width} and {self.bound}")
        if self.elbo not in ("pathwise", "energy"):
            raise OptionError(f'elbo must be "pathwise" or "energy", got {self.elbo!r}')
        if not (self.around is None or self.around == "linear" or isinstance(self.around, LinearControl)):
            raise OptionError(f'around must be "linear", or a control such as linear_control_of, got {self.around!r}')
        if self.context is not None and not isinstance(self.context, torch.nn.Module):
            raise OptionError(f"context must be a torch.nn.Module, got {self.context!r}")

    def bind(self, layout: Layout, program: Program | None = None) -> ControlGuide:
        """The guide, told where the path's driving numbers are.

        Raises:
            CapabilityError: no lifted path of this size, or several and no name; data that have no linear control;
                a path that no noise moves where data see it.
            OptionError: options that need a program without one, or a control of another path.
        """
        name, path, own, places = self.found(layout, program)
        if program is None and (self.context is not None or self.around == "linear"):
            raise OptionError("a control with a context, or around that of the data, needs the program it is for")
        if isinstance(self.around, LinearControl) and self.around.offset.shape != (path.steps, path.noises):
            raise OptionError(
                f"`around` controls {tuple(self.around.offset.shape)} steps and noises, but the path has "
                f"{(path.steps, path.noises)}; make it for this path"
            )
        data = None if program is None else linear_data(program, name, path, self.around == "linear")
        refuse_unmoved(path, None if data is None else data[0])
        remark = None if data is None else coarse_steps(path, *data)
        return replace(
            self,
            path=path,
            read=self.read or self.path is None,
            places=places,
            own=own,
            program=program,
            data=data,
            rounds=1 if path.is_linear else ROUNDS,
            near=self.around is not None and layout.dim == path.noise_shape.numel(),
            remarks=() if remark is None else (remark,),
        )

    # The guide.

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """No control beyond `around`: without it, the prior of the path."""
        path, (a, b, c) = self._path, self.places
        first = FullRank().init(dim - (b - a), dtype, device, generator)
        first["log_scale"][a : a + c - b] = 0.0  # the factors' start: its prior, or what `around` says of it
        params = {FIRST + n: v for n, v in first.items()}
        if self.context is not None:
            named = self.context.named_parameters()
            params |= {CONTEXT + n: v.detach().clone().to(device=device, dtype=dtype) for n, v in named}
        features = self._features(params)
        more = 0 if features is None else features.shape[1]
        inputs = 1 + path.event_shape[1] + path.noises * path.process.noise.size + dim - (c - a) + more
        for i, (size, out) in enumerate([(inputs, self.width), (self.width, self.width)]):
            weight = torch.randn(size, out, dtype=dtype, device=device, generator=generator)
            params[f"w{i}"] = weight / math.sqrt(size)
            params[f"b{i}"] = torch.zeros(out, dtype=dtype, device=device)
        params["w2"] = torch.zeros(self.width, path.noises, dtype=dtype, device=device)
        params["b2"] = torch.zeros(path.noises, dtype=dtype, device=device)
        params["gain"] = torch.zeros(path.steps, inputs, path.noises, dtype=dtype, device=device)
        params["log_scale"] = torch.zeros(path.noises, path.steps, dtype=dtype, device=device)
        return params

    def rsample_and_cost(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws and what the bound subtracts from log p: log q, or with the same mean what leaves the energy."""
        if self.elbo == "pathwise":
            return self.rsample_and_log_prob(params, noise, path=path)
        z, log_q, excess = self.drawn(params, noise, False)  # the energy has no score term to leave out
        return z, log_q + excess

    def laws(self, params: Params, path: Path, like: Tensor) -> Laws:
        """Scales of the driving numbers, features of the data, and the control that the learned one is added to."""
        roots = torch.diag_embed(params["log_scale"].exp().mT)
        control = self.around if isinstance(self.around, LinearControl) else None
        if self.around == "linear" and self.data is not None:
            control = linearised_control(path, *self.data, self.rounds)
        if control is not None:
            roots = control.factor.to(like) @ roots
        return Laws(roots, self._features(params), control)

    def mean(self, params: Params, laws: Laws, path: Path, now: Now) -> Tensor:
        """u sqrt(dt) of a step, (lanes, m); of what it sees the first, the time, is never zero."""
        n, x = now.n, now.x
        time = 1 + now.time / path.increments.grid[-1]
        parts = [time.expand(len(x), 1), x, now.factors.seen.flatten(1), now.others]
        parts += [] if laws.features is None else [laws.features[n].expand(len(x), -1)]
        seen = torch.cat(parts, 1)
        hidden = torch.tanh(seen @ params["w0"] + params["b0"])
        hidden = torch.tanh(hidden @ params["w1"] + params["b1"])
        value = seen @ params["gain"][n] + hidden @ params["w2"] + params["b2"]
        value = self.bound * torch.tanh(value / self.bound)
        if laws.control is None:
            return value
        return value + laws.control.mean(n, x.double(), now.factors.y.double()).to(value)

    def _features(self, params: Params) -> Tensor | None:
        """(steps, size) what the context makes of the data."""
        if self.context is None or self.program is None:
            return None
        found: Tensor = torch.func.functional_call(self.context, part(params, CONTEXT), (dict(self.program.data),))
        if found.ndim not in (1, 2) or (found.ndim == 2 and len(found) != self._path.steps):
            raise ShapeError(f"a context gives (size,) or ({self._path.steps}, size), got {tuple(found.shape)}")
        return found.expand(self._path.steps, -1)

"""Episode networks: any torch module as a function of one parameter vector, and the laws of its targets.

theta in R^d holds all parameters of the module;   y | x, theta ~ likelihood(module_theta(x))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from models.meta.episodes import Points
from ppl.errors import DataError, OptionError, ProgramError, ShapeError

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Network", "check_fit", "mlp"]


class Network:
    """A torch module as a function of one vector that holds all its parameters.

    The module is called as it stands; its own parameters are the start of training and are never changed.

    Args:
        module: takes (points, *x), returns (points, *outputs), point by point.

    Raises:
        ProgramError: the module has no parameters, or state or randomness that one call would leave behind or draw:
            batch normalisation or dropout in training mode.

    Example:
        >>> network = Network(nn.Linear(2, 1))
        >>> network.dim, network(torch.zeros(4, network.dim), torch.ones(4, 5, 2)).shape
        (3, torch.Size([4, 5, 1]))
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ProgramError(f"an episode network is a torch module, got {type(module).__name__}")
        _check_module(module)
        self.module = module
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.dim = sum(self.sizes)
        if not self.dim:
            raise ProgramError("the episode network has no parameters: there is nothing to infer")
        if len({p.dtype for p in module.parameters()}) != 1:
            raise ProgramError("the parameters of the episode network have several types; use one: module.double()")

    @property
    def start(self) -> Tensor:
        """(dim,) the module's own parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self.module.parameters()])

    def unravel(self, theta: Tensor) -> dict[str, Tensor]:
        """(dim,) -> parameters by name."""
        parts = theta.split(self.sizes)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def one(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs of one episode: theta (dim,), x (points, *x) -> (points, *outputs)."""
        return functional_call(self.module, self.unravel(theta), (x,))

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs of many episodes: theta (*batch, dim), x (*batch, points, *x) -> (*batch, points, *outputs)."""
        if theta.ndim == 1:
            return self.one(theta, x)
        return vmap(self.__call__)(theta, x)

    def jacobian(self, theta: Tensor, x: Tensor) -> Tensor:
        """Derivatives of the outputs in theta: (b, dim), x (b, points, *x) -> (b, points, numel of outputs, dim)."""

        def alone(theta: Tensor, x: Tensor) -> Tensor:
            return self.one(theta, x[None])[0].flatten()

        # Point by point: a derivative through all points at once would cost as many times more.
        return vmap(vmap(jacrev(alone), (None, 0)))(theta, x)

    def shared(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs of many episodes under one theta: theta (dim,), x (b, points, *x) -> (b, points, *outputs)."""
        return self.one(theta, x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def check(self, x: Tensor) -> Tensor:
        """The outputs at x, (points, *x), of a module whose call changes nothing and draws nothing.

        Raises:
            ProgramError: a buffer changes, two calls differ, or points are not treated one by one.
            ShapeError: the module does not take such points, or does not return one row for each.
        """
        theta = self.start.to(x)
        before = {name: b.clone() for name, b in self.module.named_buffers()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                first, second, alone = self.one(theta, x), self.one(theta, x), self.one(theta, x[:1])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ShapeError(f"the episode network cannot take points {tuple(x.shape)}: {error}") from error
        if not isinstance(first, Tensor):
            raise ShapeError(f"the episode network returned a {type(first).__name__}, expected one tensor of outputs")
        changed = [name for name, b in self.module.named_buffers() if not torch.equal(before[name], b)]
        for name, b in self.module.named_buffers():
            b.data.copy_(before[name])
        if changed:
            raise ProgramError(
                f"a call of the episode network changes its buffers {changed}: episodes would leak into each other. "
                "Call module.eval(), or use a layer without running statistics (GroupNorm, LayerNorm)"
            )
        if not torch.equal(first, second):
            raise ProgramError(
                "two calls of the episode network on the same input differ: it draws random numbers, which no density "
                "can hold. Call module.eval(), or leave the noise out"
            )
        if first.ndim < 1 or len(first) != len(x):
            raise ShapeError(
                f"the episode network returned {tuple(first.shape)} for {len(x)} points; expected one row each"
            )
        if alone.shape != first[:1].shape or not torch.allclose(alone, first[:1], rtol=1e-3, atol=1e-4):
            raise ProgramError(
                "the output of the episode network for a point depends on the other points, padded ones among them; "
                "treat points one by one (GroupNorm or LayerNorm in place of statistics of the batch)"
            )
        return first

    def __repr__(self) -> str:
        return f"Network({type(self.module).__name__}, dim={self.dim})"


def _check_module(module: nn.Module) -> None:
    """Raise for layers whose call depends on, or changes, what is no parameter."""
    for name, part in module.named_modules():
        where = f"layer {name!r} ({type(part).__name__})" if name else type(part).__name__
        if isinstance(part, nn.modules.batchnorm._NormBase) and (part.training or part.running_mean is None):
            batch = not isinstance(part, nn.modules.instancenorm._InstanceNorm)
            if batch or part.track_running_stats:
                raise ProgramError(
                    f"{where} normalises by the batch and changes its running statistics in every call: the density "
                    "of an episode would depend on the others and on the order of calls. Call module.eval() on a "
                    "trained module, or use GroupNorm or LayerNorm"
                )
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ProgramError(
                f"{where} drops units at random in training mode, so that theta has no density of the data. Call "
                "module.eval() or remove the layer: the posterior of theta does the regularising"
            )


def mlp(
    sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh, generator: torch.Generator | None = None
) -> Network:
    """A small fully connected network; two sizes give linear (or logistic) regression.

    Weights start as N(0, 1 / inputs), biases at zero.

    Args:
        sizes: inputs, hidden layers, outputs.
        activation: between layers.
        generator: of the start; seed 0 when None.

    Example:
        >>> mlp([1, 40, 40, 1]).dim
        1761
    """
    if len(sizes) < 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise OptionError(f"sizes are at least two positive integers, inputs first, got {list(sizes)}")
    generator = generator or torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / math.sqrt(inputs))
            linear.bias.zero_()
        layers += [linear, activation()]
    return Network(nn.Sequential(*layers[:-1]))


# Likelihoods ----------------------------------------------------------------------------------------------------------


class Likelihood(Protocol):
    """The law of targets given outputs, and its first two derivatives with respect to outputs."""

    def law(self, outputs: Tensor, sigma: Tensor | None = None) -> dist.TorchDistribution:
        """The law of y, with batch shape (*batch, points) and the event shape of one target."""
        ...

    def curvature(self, outputs: Tensor, y: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradient of -log p(y | outputs), (points, k), and a root W of its Fisher information W W', (points, k, k)."""
        ...

    def check(self, points: Points) -> None:
        """Raise DataError for targets that the law cannot have."""
        ...


def check_fit(network: Network, likelihood: Likelihood, points: Points) -> None:
    """See that network, likelihood and targets suit each other.

    Raises:
        DataError: targets that the likelihood cannot have, or not with so many outputs.
        ShapeError: inputs, outputs or targets of another shape.
        ProgramError: see `Network.check`.
    """
    likelihood.check(points)
    outputs = network.check(points.x[0])
    with pyro.validation_enabled(False):
        law = likelihood.law(outputs)
    wanted, own = points.y.shape[1:], law.batch_shape + law.event_shape
    if wanted != own:
        raise ShapeError(
            f"the episode network returns {tuple(outputs.shape)} for {len(outputs)} points, of which {likelihood!r} "
            f"makes targets {tuple(own)}; y has {tuple(wanted)} for each episode"
        )
    seen = points.y[points.mask]
    if law.support is not None and not bool(law.support.check(seen).all()):
        raise DataError(
            f"targets from {float(seen.min()):g} to {float(seen.max()):g} are outside the law of {likelihood!r} with "
            f"{outputs.shape[-1]} outputs; relabel the classes from 0, or give the network an output for each"
        )


@dataclass(frozen=True)
class Gaussian:
    """Regression: y ~ N(outputs, sigma^2), all coordinates of a target alike.

    Args:
        sigma: standard deviation of the noise, in the unit of y.
        learned: learn sigma together with the global law; the number given is then the start.
        scalar: targets have no axis of their own, y is (episodes, points); the network's last axis is then dropped.

    Raises:
        OptionError: sigma is not positive.
    """

    sigma: float = 1.0
    learned: bool = False
    scalar: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise OptionError(f"sigma is a standard deviation and must be positive and finite, got {self.sigma!r}")

    def law(self, outputs: Tensor, sigma: Tensor | None = None) -> dist.TorchDistribution:
        """See `Likelihood`."""
        mean = outputs.squeeze(-1) if self.scalar else outputs
        normal = dist.Normal(mean, outputs.new_tensor(self.sigma) if sigma is None else sigma)
        return normal if self.scalar else normal.to_event(1)

    def curvature(self, outputs: Tensor, y: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Likelihood`."""
        scale = outputs.new_tensor(self.sigma) if sigma is None else sigma
        flat = outputs.reshape(len(outputs), -1)
        root = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device) / scale
        return (flat - y.reshape(flat.shape)) / scale**2, root.expand(len(flat), -1, -1)

    def check(self, points: Points) -> None:
        """See `Likelihood`."""
        if not points.y.is_floating_point():
            raise DataError(f"Gaussian targets are floating-point numbers, got {points.y.dtype}")
        if self.scalar and points.y.ndim != 2:
            raise ShapeError(
                f"y is {tuple(points.y.shape)}; Gaussian(scalar=True) takes (episodes, points): pass scalar=False"
            )


@dataclass(frozen=True)
class Bernoulli:
    """Logistic regression: y in {0, 1}, outputs (points, 1) are logits."""

    def law(self, outputs: Tensor, sigma: Tensor | None = None) -> dist.TorchDistribution:
        """See `Likelihood`."""
        return dist.Bernoulli(logits=outputs.squeeze(-1))

    def curvature(self, outputs: Tensor, y: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Likelihood`."""
        p = outputs.sigmoid()
        return p - y.reshape(p.shape).to(p), (p * (1 - p)).sqrt()[..., None]

    def check(self, points: Points) -> None:
        """See `Likelihood`."""
        seen = points.y[points.mask]
        if not bool(((seen == 0) | (seen == 1)).all()):
            raise DataError("Bernoulli targets are 0 or 1; use Categorical for more classes")


@dataclass(frozen=True)
class Categorical:
    """Classes: y in 0..way-1, outputs (points, way) are logits."""

    def law(self, outputs: Tensor, sigma: Tensor | None = None) -> dist.TorchDistribution:
        """See `Likelihood`."""
        return dist.Categorical(logits=outputs)

    def curvature(self, outputs: Tensor, y: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Likelihood`; diag(p) - p p' = W W' with W = diag(sqrt p) - p sqrt(p)'."""
        p = outputs.softmax(-1)
        half = p.sqrt()
        hot = torch.nn.functional.one_hot(y.long(), p.shape[-1]).to(p)
        return p - hot, torch.diag_embed(half) - p[..., :, None] * half[..., None, :]

    def check(self, points: Points) -> None:
        """See `Likelihood`."""
        if points.y.is_floating_point():
            raise DataError(f"class labels are integers, got {points.y.dtype}; use y.long()")

"""Training the denoiser of an amortised posterior.

min E_{p(z, y)} E_{sigma, n} lambda(sigma) |D(z + sigma n, sigma, y) - z|^2, with optimum D = E[z | z + sigma n, y]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inverse.variational.amortised_network import ResidualMLP, Shaped
from ppl.amortised.pairs import Pairs
from ppl.amortised.training import Scales, Training, dtype_of, judged_rows
from ppl.errors import OptionError
from ppl.trace import seeded
from sde.denoiser import EDMDenoiser

if TYPE_CHECKING:
    from inverse.variational.amortised import AmortisedDenoiser

__all__ = ["DenoiserTraining", "build_network", "judge"]


def build_network(options: AmortisedDenoiser, pairs: Pairs, generator: torch.Generator) -> nn.Module:
    """The network on vectors: a new MLP, or a copy of the user's own."""
    if options.network is None:
        with seeded(generator):
            network = ResidualMLP(pairs.dim, pairs.data_dim, options.width, options.depth)
        return network.to(pairs.program.device, torch.float32)
    shapes = [s[0] if len(s) == 1 else (n,) for s, n in _shapes(pairs)]
    own_network = Shaped(copy.deepcopy(options.network).to(pairs.program.device), *shapes)
    own = next((p for p in own_network.parameters()), None)
    if own is None:
        raise OptionError("the network has no parameters, so there is nothing to train")
    x, y = (torch.zeros(2, n, dtype=own.dtype, device=own.device) for n in (pairs.dim, pairs.data_dim))
    with torch.no_grad(), seeded(generator):
        try:
            own_network(x, x[:, 0], y)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OptionError(
                f"the network cannot be called with (x: (rows, {', '.join(map(str, shapes[0]))}), level: (rows,), "
                f"data: (rows, {', '.join(map(str, shapes[1]))})), or does not return what has the shape of x: {error}"
            ) from error
    return own_network


def judge(
    network: nn.Module, options: Mapping[str, float], scales: Scales, pairs: Pairs, seed: int
) -> tuple[float, float, float]:
    """Mean denoising loss on fresh pairs, its standard error, and how far the pairs are from those of the training.

    Noise levels are the quantiles of the law trained on, so that their scatter adds nothing to the error.
    """
    generator = torch.Generator(pairs.program.device).manual_seed(seed)
    rows = judged_rows(pairs)
    raw = pairs.draw(rows, generator)
    clean, data = (v.to(dtype_of(network)) for v in scales.standard(*raw))
    ranks = (torch.arange(rows, dtype=torch.float64, device=clean.device) + 0.5) / rows
    sigma = torch.exp(options["p_mean"] + options["p_std"] * torch.special.ndtri(ranks)).to(clean)
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=generator.device)
    was = network.training
    with torch.no_grad(), seeded(generator):
        network.eval()
        parts = [
            EDMDenoiser(network, 1.0).loss(*part)
            for part in zip(*(v.split(512) for v in (clean, sigma, noise, data)), strict=True)
        ]
    network.train(was)
    loss = torch.cat(parts).double()
    # Neighbours share their noise level all but exactly: their differences are what is left to chance.
    stderr = float((loss.diff().square().mean() / (2 * rows)).sqrt())
    return float(loss.mean()), stderr, scales.distance(*raw)


class DenoiserTraining(Training):
    """Training of a denoiser: lambda(sigma) |D(z + sigma n, sigma, y) - z|^2, levels and noise fresh at every step."""

    options: AmortisedDenoiser

    def measure(self, z: Tensor, y: Tensor) -> Scales:
        """One scale per site for a network of arrays, one per entry for the MLP."""
        return Scales.of(z, y, self.pairs, entrywise=self.options.network is None)

    def build(self, generator: torch.Generator) -> nn.Module:
        """A new MLP, or a copy of the user's own network."""
        return build_network(self.options, self.pairs, generator)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean weighted denoising error."""
        sigma, noise = _levels(self.options.levels_of_training, z, self.generator)
        with seeded(self.generator):  # a network with dropout draws from the global generator
            return EDMDenoiser(self.network, 1.0).loss(z, sigma, noise, y).mean()


def _levels(options: Mapping[str, float], clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels (rows,) and noise (rows, dim) of one batch."""
    own: dict[str, Any] = {"dtype": clean.dtype, "device": generator.device}
    sigma = torch.exp(options["p_mean"] + options["p_std"] * torch.randn(len(clean), generator=generator, **own))
    return sigma, torch.randn(clean.shape, generator=generator, **own)


def _shapes(pairs: Pairs) -> list[tuple[list[tuple[int, ...]], int]]:
    """Shapes of the latents and of the data, each with the length of their vector."""
    return [(list(pairs.latent_shapes.values()), pairs.dim), (list(pairs.data_shapes.values()), pairs.data_dim)]

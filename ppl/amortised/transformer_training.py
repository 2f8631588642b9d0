"""Training of a Distribution Transformer: forward KL to every posterior at once, by joint samples alone.

L = E_{p(phi, z, y)} [-log q(z | y, phi) - log q(z | phi)], the second term where the prior is learned
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ppl.amortised.mixture import Mixture
from ppl.amortised.mixture_pairs import MixturePairs
from ppl.amortised.training import Scales, Training, dtype_of, judged_rows
from ppl.amortised.transformer_network import TransformerNetwork, Whitened, features_of
from ppl.trace import seeded

if TYPE_CHECKING:
    from ppl.amortised.transformer import DistributionTransformer

__all__ = ["TransformerTraining", "build_transformer", "judge_transformer", "knows_no_more", "predict"]


def build_transformer(
    options: DistributionTransformer, pairs: MixturePairs, generator: torch.Generator
) -> TransformerNetwork:
    """A new network in single precision."""
    form = (options.components, options.width, options.heads, options.depth, options.feedforward)
    with seeded(generator):
        network = TransformerNetwork(pairs.dim, *form, pairs.columns)
    return network.to(pairs.program.device, torch.float32)


def whitened(network: nn.Module, scales: Scales, y: Tensor) -> tuple[Whitened, Whitened]:
    """Prior and posterior (in standard units) of standardised rows (rows, data_dim)."""
    assert isinstance(network, TransformerNetwork)
    if not network.columns.packed:
        return network(None, None, y)
    weights, means, root = Mixture.unpacked(y[:, : network.columns.packed], network.components, network.dim)
    mean, sd = scales.z_mean.to(y), scales.z_sd.to(y)
    means, root = (means - mean) / sd, root / sd[:, None]
    return network(Whitened.of(weights, means, root), features_of(weights, means, root), y)


def predict(network: nn.Module, scales: Scales, y: Tensor) -> tuple[Mixture, Mixture]:
    """Prior and posterior (in standard units) of rows (rows, data_dim) as they were simulated."""
    prior, posterior = whitened(network, scales, scales.standard_data(y))
    return prior.mixture(), posterior.mixture()


def judge_transformer(network: nn.Module, scales: Scales, pairs: MixturePairs, seed: int) -> tuple[float, float, float]:
    """Mean -log q(z | y, phi) on fresh pairs, its standard error, and how far they are from those of the training."""
    generator = torch.Generator(pairs.program.device).manual_seed(seed)
    rows = judged_rows(pairs)
    raw = pairs.draw(rows, generator)
    z, y = (v.to(dtype_of(network)) for v in scales.standard(*raw))
    loss = _losses(network, scales, z, y)[1]
    return float(loss.mean()), float(loss.std()) / math.sqrt(rows), scales.distance(*raw)


def knows_no_more(network: nn.Module, scales: Scales, pairs: MixturePairs) -> bool:
    """Whether posteriors are no better, on fresh pairs and within two standard errors, than the prior."""
    raw = pairs.draw(judged_rows(pairs), torch.Generator(pairs.program.device).manual_seed(2))
    z, y = (v.to(dtype_of(network)) for v in scales.standard(*raw))
    prior, posterior = _losses(network, scales, z, y)
    gain = prior - posterior
    return bool(gain.mean() < 2 * gain.std() / math.sqrt(len(gain)))


def _losses(network: nn.Module, scales: Scales, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """-log q of prior and of posterior on standardised pairs, (rows,) each."""
    with torch.no_grad():
        parts = [
            [-law.log_prob(a) for law in whitened(network, scales, b)]
            for a, b in zip(z.split(512), y.split(512), strict=True)
        ]
    prior, posterior = (torch.cat(column).double() for column in zip(*parts, strict=True))
    return prior, posterior


class TransformerTraining(Training):
    """Training of a Distribution Transformer."""

    options: DistributionTransformer
    pairs: MixturePairs

    def measure(self, z: Tensor, y: Tensor) -> Scales:
        """Scales by deciles."""
        return self.pairs.measure(z, y)

    def build(self, generator: torch.Generator) -> nn.Module:
        """A new network."""
        return build_transformer(self.options, self.pairs, generator)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean -log q(z | y, phi), plus -log q(z | phi) where the prior is learned."""
        prior, posterior = whitened(self.network, self.scales, y)
        value = -posterior.log_prob(z).mean()
        return value if self.pairs.columns.packed else value - prior.log_prob(z).mean()

"""The network of a Distribution Transformer: components of the prior are tokens, and come out as the posterior's.

r_k = U_k (W_k z - b_k) - d_k,   log q(z) = log sum_k w_k |U_k W_k| N(r_k; 0, I)

(W_k, b_k) whiten component k of the prior, (U_k, d_k) and the change of its weight are read off token k: where the
data tell nothing they are (1, 0) and 0, and the posterior is the prior, whatever it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ppl.amortised.mixture import LOG_2PI, Mixture
from ppl.amortised.mixture_pairs import Columns

__all__ = ["TransformerNetwork", "Whitened"]

LARGEST = 1e30
LARGEST_LOG = 8.0  # of a diagonal entry of a whitening
LEAST_LOG_WEIGHT = -12.0


class Whitened:
    """A batch of mixtures, each component by what whitens it: r = W z - b.

    Args:
        log_weight: (rows, components), normalised.
        matrix: (rows, components, dim, dim), lower triangular.
        offset: (rows, components, dim).
    """

    def __init__(self, log_weight: Tensor, matrix: Tensor, offset: Tensor) -> None:
        self.log_weight, self.matrix, self.offset = log_weight, matrix, offset

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Whitened:
        """From weights (rows, k), means (rows, k, n) and Cholesky factors (rows, k, n, n)."""
        n = means.shape[-1]
        eye = torch.eye(n, dtype=means.dtype, device=means.device).expand(scale_tril.shape)
        matrix = 1 / scale_tril if n == 1 else torch.linalg.solve_triangular(scale_tril, eye, upper=False)
        return cls(weights.log(), matrix, (matrix @ means[..., None])[..., 0])

    def residual(self, z: Tensor) -> Tensor:
        """(rows, dim) -> (rows, components, dim)."""
        return (self.matrix @ z[:, None, :, None])[..., 0] - self.offset

    def log_prob(self, z: Tensor) -> Tensor:
        """Normalised log density (rows,) of (rows, dim)."""
        log_det = self.matrix.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        square = self.residual(z).square().sum(-1)
        return (self.log_weight + log_det - 0.5 * square).logsumexp(-1) - 0.5 * z.shape[1] * LOG_2PI

    def after(self, change: Tensor, matrix: Tensor, offset: Tensor) -> Whitened:
        """The mixture whose residuals are matrix r - offset, with log weights changed and normalised again."""
        log_weight = torch.log_softmax(self.log_weight + change, -1)
        return Whitened(log_weight, matrix @ self.matrix, (matrix @ self.offset[..., None])[..., 0] + offset)

    def detach(self) -> Whitened:
        """Cut off from gradients."""
        return Whitened(self.log_weight.detach(), self.matrix.detach(), self.offset.detach())

    def mixture(self) -> Mixture:
        """The same as weights, means and Cholesky factors."""
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        root = torch.linalg.solve_triangular(self.matrix, eye.expand(self.matrix.shape), upper=False)
        return Mixture(self.log_weight.softmax(-1), (root @ self.offset[..., None])[..., 0], root)


class TransformerNetwork(nn.Module):
    """Prior and data in, whitened posterior out; all in units of the simulations' spread.

    Args:
        dim: length of the latent vectors.
        components: of the mixtures.
        width: of a token; a multiple of heads.
        heads: of attention.
        depth: layers.
        feedforward: hidden units of a layer.
        columns: what the entries of a data vector are.

    Source: Whittle et al. (2025), code [read]: tokens without places for components, one or more for each source of
        data, self-attention and feed-forward branches that start at zero. Reading the tokens in the frame of the
        prior's component, and places for rows of data, are ours.
    """

    def __init__(
        self, dim: int, components: int, width: int, heads: int, depth: int, feedforward: int, columns: Columns
    ) -> None:
        super().__init__()
        self.dim, self.components, self.columns = dim, components, columns
        self.lower = dim * (dim - 1) // 2
        numbers = 1 + dim + dim + self.lower
        if columns.packed:
            self.prior_in = _mlp(numbers, width, width)
        else:
            self.prior_in = _mlp(max(1, len(columns.prior)), width, width)
            self.spread_out = nn.Linear(width, components * width)
            self.prior_out = _reader(width, numbers, 0.3)
        self.data_in = nn.ModuleList(_mlp(len(group[0]), width, width) for group in columns.tokens)
        self.places = nn.ParameterList(torch.zeros(len(group), width) for group in columns.tokens)
        self.data_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, heads, feedforward) for _ in range(depth))
        # The posterior starts as the prior; a learned prior starts as normals of unequal weights.
        self.read = _reader(width, numbers, 0.0)

    def forward(self, prior: Whitened | None, features: Tensor | None, y: Tensor) -> tuple[Whitened, Whitened]:
        """Prior and posterior.

        Args:
            prior: the mixture of each row; None where the network has its own.
            features: (rows, components, numbers) of that mixture, from `features_of`.
            y: (rows, data_dim) standardised, the packed part unused.

        Returns:
            the prior, cut off from nothing, and the posterior.
        """
        # Numbers of heavy tails would blow up the network, and the largest are infinite in float32.
        y = y.clamp(-LARGEST, LARGEST).asinh()
        if prior is None or features is None:
            own = y[:, self.columns.prior] if self.columns.prior else y.new_zeros(len(y), 1)
            tokens = self.spread_out(self.prior_in(own)).reshape(len(y), self.components, -1)
            prior = self._standard(y).after(*self._maps(self.prior_out(tokens)))
        else:
            tokens = self.prior_in(features)
        context = [
            net(y[:, place]) + self.places[i]
            for i, (net, place) in enumerate(zip(self.data_in, self.columns.tokens, strict=True))
        ]
        if context:
            data = self.data_norm(torch.cat(context, 1))
            for layer in self.layers:
                tokens = layer(tokens, data)
        return prior, prior.detach().after(*self._maps(self.read(tokens)))

    def _standard(self, y: Tensor) -> Whitened:
        """Copies of the standard normal with weights 1 : 2 : ..."""
        k, n = self.components, self.dim
        share = torch.arange(1, k + 1, dtype=y.dtype, device=y.device)
        eye = torch.eye(n, dtype=y.dtype, device=y.device).expand(len(y), k, n, n)
        return Whitened((share / share.sum()).log().expand(len(y), k), eye, y.new_zeros(len(y), k, n))

    def _maps(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Change of log weight, lower triangular matrix and offset, from the numbers of a token."""
        change, offset, log_diagonal, below = numbers.split([1, self.dim, self.dim, self.lower], -1)
        diagonal = (LARGEST_LOG * (log_diagonal / LARGEST_LOG).tanh()).exp()
        matrix = torch.diag_embed(diagonal)
        if self.lower:
            row, column = torch.tril_indices(self.dim, self.dim, -1, device=below.device)
            matrix = matrix.index_put((*_every(matrix.shape[:2], below.device), row, column), below)
        return change[..., 0], matrix, offset


def features_of(weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    """The numbers (rows, k, 1 + 2 n + n (n - 1) / 2) by which tokens show mixtures in standard units."""
    n = means.shape[-1]
    log_weight = weights.log().clamp(min=LEAST_LOG_WEIGHT)
    parts = [log_weight[..., None] / 3, means, scale_tril.diagonal(dim1=-2, dim2=-1).log()]
    if n > 1:
        row, column = torch.tril_indices(n, n, -1)
        parts.append(scale_tril[..., row, column])
    numbers = torch.cat(parts, -1)
    return numbers.asinh()


def _every(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index tensors of all rows and components, to be broadcast with entries of a matrix."""
    rows, parts = shape
    return torch.arange(rows, device=device)[:, None, None], torch.arange(parts, device=device)[None, :, None]


def _mlp(numbers: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(numbers, width), nn.GELU(), nn.Linear(width, out))


def _reader(width: int, numbers: int, size: float) -> nn.Sequential:
    """From tokens to numbers, that start small."""
    last = nn.Linear(width, numbers)
    with torch.no_grad():
        last.weight.mul_(size)
        last.bias.zero_()
    return nn.Sequential(nn.LayerNorm(width), last)


class _Layer(nn.Module):
    """Self-attention of components, attention to the data, feed-forward; each behind a normalisation, added on."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.query_key_value = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.data_out = nn.Linear(width, width)
        self.hidden = nn.Linear(width, feedforward)
        self.out = nn.Linear(feedforward, width)
        with torch.no_grad():
            for layer in (self.self_out, self.out):
                layer.weight.zero_()
                layer.bias.zero_()

    def forward(self, tokens: Tensor, data: Tensor) -> Tensor:
        """(rows, components, width), (rows, data tokens, width) -> (rows, components, width)."""
        query, key, value = self.query_key_value(self.norms[0](tokens)).chunk(3, -1)
        tokens = tokens + self.self_out(self._attend(query, key, value))
        key, value = self.key_value(data).chunk(2, -1)
        if data.shape[1] == 1:  # all attention is on the one token
            tokens = tokens + self.data_out(value)
        else:
            tokens = tokens + self.data_out(self._attend(self.query(self.norms[1](tokens)), key, value))
        return tokens + self.out(nn.functional.gelu(self.hidden(self.norms[2](tokens))))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, count, width = query.shape
        query, key, value = (v.reshape(rows, -1, self.heads, width // self.heads) for v in (query, key, value))
        # Written out: a fused kernel is slower on a handful of tokens, and is not the same on every device.
        score = torch.einsum("rihc,rjhc->rhij", query, key) / math.sqrt(width // self.heads)
        return torch.einsum("rhij,rjhc->rihc", score.softmax(-1), value).reshape(rows, count, width)

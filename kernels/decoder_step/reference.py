"""The definition of a decoder's step in plain fp32 torch."""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear, rms_norm, silu

from kvlens.kernels.decoder_step import Attend, DecoderWeights


class Decoder:
    """See `kvlens.kernels.decoder_step.decoder`."""

    def __init__(self, weights: DecoderWeights, num_rows: int = 1) -> None:
        self._weights = weights

    def run(self, tokens: Sequence[int], cosine: torch.Tensor, sine: torch.Tensor, attend: Attend) -> torch.Tensor:
        weights = self._weights
        hidden = weights.embedding[list(tokens)].float()
        for number, layer in enumerate(weights.layers):
            normed = self._norm(hidden, layer.attention_norm)
            query, key, value = (
                linear(normed, rows.float(), bias).unflatten(-1, (-1, weights.head_dim))
                for rows, bias in (
                    (layer.query, layer.query_bias), (layer.key, layer.key_bias), (layer.value, layer.value_bias)
                )
            )  # fmt: skip
            query = _rotated(self._norm(query, layer.query_norm), cosine, sine)
            key = _rotated(self._norm(key, layer.key_norm), cosine, sine)
            hidden = hidden + linear(attend(number, query, key, value).flatten(1), layer.output.float())
            normed = self._norm(hidden, layer.mlp_norm)
            gated = silu(linear(normed, layer.gate.float())) * linear(normed, layer.up.float())
            hidden = hidden + linear(gated, layer.down.float())
        return linear(self._norm(hidden, weights.norm), weights.head.float())

    def _norm(self, vectors: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return vectors if weight is None else rms_norm(vectors, weight.shape, weight, self._weights.epsilon)


def _rotated(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Channel i turned with channel i + D/2. Shapes: heads `[B, N, D]`, cosine and sine `[B, D/2]`."""
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

"""The way of one token of each sequence through a decoder of the Llama family, attention aside.

A layer is `x += O · attend(rotate(Q·n, K·n), V·n)` with n = norm(x), then `x += D · (silu(G·m) * (U·m))` with
m = norm(x). Llama, Mistral, Qwen2 (biases) and Qwen3 (norms of queries and keys) differ in options only. Weights are
kept in the bits they are stored in; arithmetic is fp32.

Attention is the caller's: a function, or tasks that the native program runs in the same breath.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(layer, query [B, HQ, D], key [B, HK, D], value [B, HK, D])` to `[B, HQ, D]`, all fp32."""


@dataclass(frozen=True)
class LayerWeights:
    """Shapes: query `[HQ*D, H]`, key and value `[HK*D, H]`, output `[H, HQ*D]`, gate and up `[I, H]`, down `[H, I]`;
    norms fp32 `[H]` or `[D]`, biases fp32 of their rows, None where a model has none.
    """

    attention_norm: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """Shapes: embedding and head `[V, H]`, maybe one tensor; norm fp32 `[H]`. `epsilon` is that of every norm."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    head_dim: int
    epsilon: float


def decoder(weights: DecoderWeights, num_rows: int = 1):
    """Something with `run(tokens, cosine, sine, attend) -> logits` for `num_rows` sequences, whatever computes it here.

    Shapes: tokens `[B]`, cosine and sine fp32 `[B, D/2]` of each token's position, logits fp32 `[B, V]`, a tensor of
    its own.
    Raises: ValueError for sizes that the kernels do not read.
    """
    return dispatch.implementation("decoder_step", weights.embedding.device).Decoder(weights, num_rows)

"""Hands Hugging Face attention to the cache.

An attention block calls `past_key_values.update(...)` and passes what it returns straight to the attention
function of the model's `_attn_implementation`. Ours is registered under `kvlens`, with its mask twin
(without the twin a padding mask is lost in silence). With a `KVCache` the block receives layer handles
and the function calls their `attend`; with any other cache it receives plain tensors and runs torch's
fused attention. The model's code is untouched.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from kvlens.engine.errors import ModelError
from kvlens.engine.layer import LayerHandle

NAME = "kvlens"
"""The attention implementation to ask transformers for."""

_UNSERVED = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks learned by the model",
    "sliding_window": "sliding-window attention",
}


def install() -> None:
    """Register the attention function and its mask. Safe to call again."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | LayerHandle,
    value: torch.Tensor | LayerHandle,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one layer.

    Shapes: query `[B, HQ, T, D]`, key and value handles or `[B, HK, T', D]`, attention_mask bool
    `[B, T']` or None; output `[B, T, HQ, D]`.
    Raises: ModelError for kinds of attention that would silently come out wrong.
    """
    for option, what in _UNSERVED.items():
        if options.get(option) is not None:
            raise ModelError(f"This model uses {what}, which KVLens does not serve yet. Choose another model.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, LayerHandle):
        output = key.attend(query, scaling=scaling, mask=attention_mask)
    else:
        output = _plain(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    *, mask_function=causal_mask_function, attention_mask: torch.Tensor | None = None, **sizes
) -> torch.Tensor | None:
    """The 2-D padding mask unchanged: the attention function is causal by itself.

    Raises: ModelError for any other pattern, such as a sliding window.
    """
    if mask_function is not causal_mask_function:
        raise ModelError(
            "This model masks attention in a pattern other than plain causal (a sliding window, packed "
            "sequences or two-way blocks), which KVLens does not serve yet. Choose another model."
        )
    return attention_mask


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None, *,
    scaling: float, dropout: float,
) -> torch.Tensor:  # fmt: skip
    num_queries, num_keys = query.shape[2], key.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    visible = visible.tril(num_keys - num_queries)
    if padding is not None:
        # A padded query sees itself, so that its row of the softmax is not empty.
        itself = torch.eye(num_queries, num_keys, dtype=torch.bool, device=query.device)
        itself = itself.roll(num_keys - num_queries, dims=-1)
        visible = (visible & padding[:, None, None, :num_keys]) | itself
    return scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip

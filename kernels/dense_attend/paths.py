"""The ways to attend to exact buffers that are worth measuring, and what each is called on the screen."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvlens.kernels import dispatch


def fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *,
    scaling: float, longest: int, is_ragged: bool,
) -> torch.Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention."""
    mask = _mask(length, longest)[:, None, None] if is_ragged else None
    output = scaled_dot_product_attention(
        query.unsqueeze(2).to(keys.dtype), keys[:, :, :longest], values[:, :, :longest], attn_mask=mask,
        scale=scaling, enable_gqa=query.shape[1] != keys.shape[1],
    )  # fmt: skip
    return output.squeeze(2).to(query.dtype)


def products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *,
    scaling: float, longest: int, is_ragged: bool,
) -> torch.Tensor:  # fmt: skip
    """Two batched products, all query heads of a KV head together, softmax in fp32."""
    grouped = (query * scaling).to(keys.dtype).unflatten(1, (keys.shape[1], -1))
    scores = torch.matmul(grouped, keys[:, :, :longest].transpose(-1, -2)).float()
    if is_ragged:
        scores = scores.masked_fill(~_mask(length, longest)[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).to(values.dtype)
    return torch.matmul(weights, values[:, :, :longest]).flatten(1, 2).to(query.dtype)


def native(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *,
    scaling: float, longest: int, is_ragged: bool,
) -> torch.Tensor:  # fmt: skip
    """Our own kernel for the device; it needs no length of the host."""
    module = dispatch.implementation("dense_attend", query.device)
    return module.dense_attend(query, keys, values, length, scaling=scaling)


def _mask(length: torch.Tensor, longest: int) -> torch.Tensor:
    """True where a token exists. Shapes: `[B, longest]`."""
    return torch.arange(longest, device=length.device) < length.unsqueeze(-1)


PATHS = {"fused": fused, "products": products, "native": native}
DESCRIPTIONS = {
    "fused": "torch fused attention",
    "products": "two batched products",
    "native": "KVLens' own kernel on exact tokens",
}

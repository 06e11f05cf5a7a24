"""The ways to attend to exact buffers that are worth measuring, and what each is called on the screen."""

from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout, packed_attend
from kvlens.kernels.quantize_pack import Packed


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
    """Our own packed attention with nothing packed: reads 16 bits a value, computes in fp32."""
    return packed_attend(query, *as_packed(keys, values, length), scaling=scaling).output


def as_packed(keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor) -> tuple[PackedPast, ExactTokens]:
    """Exact buffers as a packed cache in which nothing is packed yet."""
    past = _nothing_packed(keys.shape[0], keys.shape[1], keys.shape[3], str(keys.device))
    return past, ExactTokens(keys, values, keys[:, :, :0], values[:, :, :0], length)


@cache
def _nothing_packed(batch_size: int, num_heads: int, head_dim: int, device: str) -> PackedPast:
    def no_pages(*size: int) -> Packed:
        codes = torch.empty(0, num_heads, *size, dtype=torch.int16, device=device)
        return Packed(codes, codes[..., :1].half(), codes[..., :1].half())

    layout = PageLayout(page_tokens=32, key_bits=2, value_bits=2, key_group_size=32, value_group_size=head_dim)
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    table = torch.zeros(batch_size, 0, dtype=torch.int32, device=device)
    return PackedPast(layout, no_pages(head_dim, 4), no_pages(32, head_dim // 8), table, zero, zero)


def _mask(length: torch.Tensor, longest: int) -> torch.Tensor:
    """True where a token exists. Shapes: `[B, longest]`."""
    return torch.arange(longest, device=length.device) < length.unsqueeze(-1)


PATHS = {"fused": fused, "products": products, "native": native}
DESCRIPTIONS = {
    "fused": "torch fused attention",
    "products": "two batched products",
    "native": "KVLens' own kernel on exact tokens",
}

"""Dense decode attention on the CPU: packed attention with nothing packed reads 16 bits a value, computes in fp32."""

from functools import cache

import torch

from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout, packed_attend
from kvlens.kernels.quantize_pack import Packed


def dense_attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """See `kvlens.kernels.dense_attend.dense_attend`."""
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

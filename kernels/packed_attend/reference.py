"""The definition of packed attention: rebuild each sequence in fp32, then one softmax over it.

It is what the fast kernels are tested against, and what runs where neither Triton nor the native CPU
kernels load.
"""

import torch

from kvlens.kernels.exact_tokens import Attended, ExactTokens
from kvlens.kernels.packed_attend import PackedPast
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.quantize_pack.reference import dequantize
from kvlens.kernels.rebuilt import attend_rebuilt, join


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`."""
    return attend_rebuilt(query, exact.length, lambda row: rebuild(past, exact, row), scaling=scaling)


def rebuild(past: PackedPast, exact: ExactTokens, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of sequence `row` in fp32. Shapes: `[HK, length, D]` each."""
    layout, pages = past.layout, past.page_table[row]
    length = int(exact.length[row])
    packed_keys = _unpack(
        past.keys, pages, int(past.num_keys[row]), layout.page_tokens, layout.key_bits,
        layout.key_group_size, tokens_last=True,
    )  # fmt: skip
    packed_values = _unpack(
        past.values, pages, int(past.num_values[row]), layout.page_tokens, layout.value_bits,
        layout.value_group_size, tokens_last=False,
    )  # fmt: skip
    keys = join(exact.sink_keys[row], packed_keys, exact.keys[row], length)
    values = join(exact.sink_values[row], packed_values, exact.values[row], length)
    return keys, values


def _unpack(
    packed: Packed,
    pages: torch.Tensor,
    num_tokens: int,
    page_tokens: int,
    bits: int,
    group_size: int,
    tokens_last: bool,
) -> torch.Tensor:
    """The first `num_tokens` packed tokens of a sequence in fp32. Shapes: `[HK, num_tokens, D]`."""
    used = pages[: -(-num_tokens // page_tokens)].long()
    rows = dequantize(packed[used], bits=bits, group_size=group_size)
    if tokens_last:
        rows = rows.transpose(-1, -2)
    return rows.transpose(0, 1).flatten(1, 2)[:, :num_tokens]

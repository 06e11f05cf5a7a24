"""The definition of packed attention: rebuild each sequence in fp32, then one softmax over it.

Slow and memory-hungry on purpose. It is what the fast kernels are tested against, and what runs where
neither Triton nor the native CPU kernels load.
"""

import torch

from kvlens.kernels.packed_attend import Attended, ExactTokens, PackedPast
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.quantize_pack.reference import dequantize


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`."""
    output = torch.zeros_like(query)
    log_sum_exp = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    for row in range(query.shape[0]):
        if exact.length[row] == 0:
            continue
        keys, values = rebuild(past, exact, row)
        queries = query[row].float().unflatten(0, (keys.shape[0], -1))
        scores = scaling * queries @ keys.transpose(-1, -2)
        log_sum_exp[row] = scores.logsumexp(dim=-1).flatten()
        output[row] = (scores.softmax(dim=-1) @ values).flatten(0, 1).to(query.dtype)
    return Attended(output, log_sum_exp)


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
    keys = _join(exact.sink_keys[row], packed_keys, exact.keys[row], length)
    values = _join(exact.sink_values[row], packed_values, exact.values[row], length)
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


def _join(sinks: torch.Tensor, packed: torch.Tensor, ring: torch.Tensor, length: int) -> torch.Tensor:
    num_sinks = min(sinks.shape[1], length)
    start = num_sinks + packed.shape[1]
    slots = torch.arange(start, length, device=ring.device) % ring.shape[1]
    return torch.cat([sinks[:, :num_sinks].float(), packed, ring[:, slots].float()], dim=1)

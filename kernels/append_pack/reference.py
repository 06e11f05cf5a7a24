"""The definition of append-and-pack in plain torch, a sequence at a time. Reads the lengths on the host."""

import torch

from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import PackedPast
from kvlens.kernels.quantize_pack.reference import quantize_pack


def append_pack(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> None:
    """See `kvlens.kernels.append_pack.append_pack`."""
    sides = ((keys, exact.keys, exact.sink_keys), (values, exact.values, exact.sink_values))
    for row, length in enumerate(exact.length.tolist()):
        if length == 0:
            continue
        for side, (fresh, ring, sinks) in enumerate(sides):
            token = length - 1
            if token < rule.num_sinks:
                sinks[row, :, token] = fresh[row]
            else:
                ring[row, :, token % ring.shape[2]] = fresh[row]
            if past is not None:
                packed, due = (rule.packed(side, count) for count in (token, length))
                (past.num_values if side else past.num_keys)[row] = packed
                slots = (rule.num_sinks + torch.arange(packed, due, device=ring.device)) % ring.shape[2]
                (_pack_values if side else _pack_keys)(past, row, packed, ring[row][:, slots])


def _pack_keys(past: PackedPast, row: int, packed: int, tokens: torch.Tensor) -> None:
    """Pack whole pages of keys behind the `packed` ones. Shapes: tokens `[HK, t, D]`."""
    layout = past.layout
    for index, block in enumerate(tokens.split(layout.page_tokens, dim=1) if tokens.shape[1] else ()):
        page = past.page_table[row, packed // layout.page_tokens + index]
        past.keys[page] = quantize_pack(block.mT, bits=layout.key_bits, group_size=layout.key_group_size)


def _pack_values(past: PackedPast, row: int, packed: int, tokens: torch.Tensor) -> None:
    """Pack values behind the `packed` ones, token by token. Shapes: tokens `[HK, t, D]`."""
    layout = past.layout
    for index, token in enumerate(tokens.unbind(dim=1)):
        page, slot = divmod(packed + index, layout.page_tokens)
        at = past.page_table[row, page], slice(None), slot
        past.values[at] = quantize_pack(token, bits=layout.value_bits, group_size=layout.value_group_size)

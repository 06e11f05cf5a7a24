"""How packed attention is cut into programs and tiles: everything static about a launch.

Plain numbers, from shapes alone; the kernels read them as one constant. Every number is a field, because
Triton tells compiled kernels apart by what a constant prints as. This module computes nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kvlens.kernels.packed_attend import ExactTokens, PackedPast

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
DOT_ROWS = 16  # the least that a tensor-core product takes


@dataclass(frozen=True)
class Configuration:
    """What is chosen by measurement. `programs` is how many run at once on a multiprocessor."""

    num_stages: int
    programs: int
    exact_tokens: int = 16


# By (compute capability, bits of the keys, head dim); the first line that fits is taken.
CONFIGURATIONS = (
    ((80, 2, 128), Configuration(num_stages=3, programs=8)),
    ((90, 2, 128), Configuration(num_stages=3, programs=8)),
    ((90, 4, 128), Configuration(num_stages=3, programs=8)),
    ((120, 2, 128), Configuration(num_stages=2, programs=6)),
    ((120, 4, 128), Configuration(num_stages=2, programs=4)),
)
OTHERWISE = Configuration(num_stages=2, programs=8)


@dataclass(frozen=True)
class Tiling:
    """The constants of the kernels."""

    # The cache
    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    page_tokens: int
    num_sinks: int
    key_ring: int
    value_ring: int
    # Packed keys: a page is `key_words` words of each channel, `key_slots` tokens to a word
    key_bits: int
    key_slots: int
    key_words: int
    key_group_size: int
    key_groups: int
    # Packed values: a token is `value_words` words, `value_slots` channels to a word
    value_bits: int
    value_slots: int
    value_words: int
    value_group_size: int
    value_groups: int
    # Tiles: `tile_words` words of each channel's keys, and the values of the tokens in them
    tile_words: int
    tile_tokens: int
    is_tile_in_page: bool
    is_tile_page: bool
    folds_keys: bool  # each run of a tile lies in one group of tokens of one page
    folds_values: bool  # each slot of a token lies in one group of channels
    splits_key_scales: bool  # a tile's scales and minima are loaded in one piece, then parted by group
    splits_value_scales: bool
    key_minima_step: int  # the minima of group g meet the tensor cores in row g * step
    value_minima_step: int
    masks_channels: bool
    # Blocks: sizes padded for the tensor cores
    block_d: int
    block_heads: int
    block_key_groups: int
    block_value_words: int
    block_value_groups: int
    # Programs
    head_blocks: int
    num_exact_parts: int
    num_splits: int
    num_parts: int
    exact_tokens: int
    exact_channels: int
    num_stages: int
    # Arithmetic: products over packed tokens (codes are exact in fp16) and over exact ones
    packed_dtype: tl.dtype
    exact_dtype: tl.dtype
    is_interpreted: bool


def tiling_of(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> Tiling:
    """The tiling for these tensors. It depends on their shapes, dtypes and device only."""
    layout, head_dim, num_kv_heads = past.layout, query.shape[-1], exact.keys.shape[1]
    configuration = _configuration(query.device, layout.key_bits, head_dim)
    heads_per_kv = query.shape[1] // num_kv_heads
    block_heads = 8 if heads_per_kv <= 8 else 16
    head_blocks = triton.cdiv(heads_per_kv, block_heads)

    group_size = layout.key_group_size
    key_slots, value_slots = 16 // layout.key_bits, 16 // layout.value_bits
    key_words, value_words = layout.page_tokens // key_slots, head_dim // value_slots
    tile_words = DOT_ROWS
    is_tile_in_page = key_words % tile_words == 0
    is_tile_page = key_words == tile_words
    key_groups, value_groups = layout.page_tokens // group_size, head_dim // layout.value_group_size
    is_run_in_group = group_size % tile_words == 0 and 0 in (group_size % key_words, key_words % group_size)

    folds_keys = is_tile_in_page and is_run_in_group
    folds_values = layout.value_group_size % value_words == 0
    splits_key_scales = folds_keys and group_size % key_words == 0 and key_groups in (1, 2, 4, 8, 16)
    splits_value_scales = folds_values and is_tile_in_page and value_groups in (1, 2, 4, 8, 16)

    num_tiles = triton.cdiv(past.page_table.shape[1] * key_words, tile_words)
    num_programs = query.shape[0] * num_kv_heads * head_blocks
    num_splits = triton.cdiv(_num_programs(query.device, configuration), max(1, num_programs))
    num_splits = min(num_tiles, num_splits, 256)
    rings = exact.keys.shape[2], exact.values.shape[2]
    num_exact_parts = triton.cdiv(exact.sink_keys.shape[2] + max(rings), configuration.exact_tokens)

    is_interpreted = triton.knobs.runtime.interpret
    is_one_dtype = query.dtype == exact.keys.dtype == exact.values.dtype
    exact_dtype = DTYPES[query.dtype] if is_one_dtype else tl.float32
    if is_interpreted and exact_dtype == tl.bfloat16:
        exact_dtype = tl.float32  # the interpreter's bf16 products are wrong
    return Tiling(
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        page_tokens=layout.page_tokens,
        num_sinks=exact.sink_keys.shape[2],
        key_ring=max(1, rings[0]),
        value_ring=max(1, rings[1]),
        key_bits=layout.key_bits,
        key_slots=key_slots,
        key_words=key_words,
        key_group_size=group_size,
        key_groups=key_groups,
        value_bits=layout.value_bits,
        value_slots=value_slots,
        value_words=value_words,
        value_group_size=layout.value_group_size,
        value_groups=value_groups,
        tile_words=tile_words,
        tile_tokens=tile_words * key_slots,
        is_tile_in_page=is_tile_in_page,
        is_tile_page=is_tile_page,
        folds_keys=folds_keys,
        folds_values=folds_values,
        splits_key_scales=splits_key_scales,
        splits_value_scales=splits_value_scales,
        key_minima_step=DOT_ROWS // key_groups if splits_key_scales else 1,
        value_minima_step=DOT_ROWS // value_groups if splits_value_scales else 1,
        masks_channels=_padded(head_dim) != head_dim,
        block_d=_padded(head_dim),
        block_heads=block_heads,
        block_key_groups=_padded(key_groups),
        block_value_words=_padded(value_words),
        block_value_groups=_padded(value_groups),
        head_blocks=head_blocks,
        num_exact_parts=num_exact_parts,
        num_splits=num_splits,
        num_parts=num_exact_parts + num_splits,
        exact_tokens=configuration.exact_tokens,
        exact_channels=min(32, _padded(head_dim)),
        num_stages=configuration.num_stages,
        packed_dtype=tl.float32 if query.dtype == torch.float32 else tl.float16,
        exact_dtype=exact_dtype,
        is_interpreted=is_interpreted,
    )


def _padded(size: int) -> int:
    return max(DOT_ROWS, triton.next_power_of_2(size))


def _configuration(device: torch.device, key_bits: int, head_dim: int) -> Configuration:
    arch = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    for (least_arch, bits, dim), configuration in CONFIGURATIONS:
        if arch >= least_arch and key_bits == bits and head_dim == dim:
            return configuration
    return OTHERWISE


@cache
def _num_programs(device: torch.device, configuration: Configuration) -> int:
    """Programs that keep the device busy: two waves of them."""
    if device.type != "cuda":
        return 8
    return 2 * configuration.programs * torch.cuda.get_device_properties(device).multi_processor_count

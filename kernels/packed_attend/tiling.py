"""How packed attention is cut into programs and tiles: everything static about a launch.

Plain numbers, from shapes alone; the kernels read them as one constant. Every number is a field, because
Triton tells compiled kernels apart by what a constant prints as. This module computes nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import num_multiprocessors
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout
from kvlens.kernels.split_k import DOT_ROWS, num_splits_of, padded, product_dtype
from kvlens.kernels.tuning import PackedConfiguration, configuration_for

SPLITS = (1, 2, 4, 8, 16)  # groups of a page or token that are parted in registers
MOST_CHANNELS = 128  # of keys that are multiplied at a time: registers hold their words
MOST_SUMS = 1.5  # for each product of values, where channels of one lie in several groups

INTERPRETED = PackedConfiguration(num_stages=1, programs=1, exact_tokens=64)


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
    folds_keys: bool  # each run of a tile lies in one group of tokens of one page
    folds_values: bool  # the channels of most products lie in one group
    key_chunks: int  # of `key_channels` channels each, the subject of a product with all its tokens
    key_channels: int
    # Products of values: `value_rows` channels of a slot, which is one or more such blocks of them
    value_rows: int
    value_blocks: int
    value_sums: tuple[tuple[int, int], ...]  # (which rows, which group): one for each group that the rows lie in
    num_value_sums: int
    splits_key_scales: bool  # a tile's scales and minima are loaded in one piece, then parted by group
    splits_value_scales: bool
    value_scale_columns: int  # that a tile's scales are parted into, more than groups where those are no power of two
    key_minima_step: int  # the minima of group g meet the tensor cores in row g * step
    value_minima_step: int
    # Masks that are not known to hold
    masks_channels: bool
    # Blocks: sizes padded for the tensor cores
    block_d: int
    block_heads: int
    block_key_groups: int
    block_value_rows: int
    block_value_groups: int
    # Programs
    head_blocks: int
    num_exact_parts: int
    exact_tokens: int
    exact_channels: int
    mixes_packed: bool  # a token's key may be packed while its value is exact
    num_stages: int
    # Arithmetic: products over packed tokens (codes are exact in fp16) and over exact ones
    packed_dtype: tl.dtype
    exact_dtype: tl.dtype
    is_interpreted: bool


@dataclass(frozen=True)
class Plan:
    """A launch: its constants, and the splits of each sequence, which kernels read off the grid.

    Batch and capacity decide the number of splits, and no kernel is compiled anew for another one.
    """

    tiling: Tiling
    num_splits: int

    @property
    def num_parts(self) -> int:
        return self.tiling.num_exact_parts + self.num_splits


def plan_of(
    query: torch.Tensor,
    past: PackedPast,
    exact: ExactTokens,
    *,
    arch: int | None = None,
    configuration: PackedConfiguration | None = None,
) -> Plan:
    """The plan for these tensors, from their shapes, dtypes and device alone.

    `arch` asks for the one of a compute capability that is not here, `configuration` for another than the saved.
    Raises: ValueError below 80.
    """
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads = exact.keys.shape[1]
    if configuration is None:
        bits = past.layout.key_bits
        configuration = configuration_for("packed_attend", query, num_kv_heads, bits=bits, arch=arch)
    return _plan(
        past.layout,
        query.dtype,
        product_dtype(query.dtype, exact.keys.dtype, exact.values.dtype),
        batch,
        num_query_heads,
        head_dim,
        num_kv_heads,
        past.page_table.shape[1],
        (exact.sink_keys.shape[2], exact.keys.shape[2], exact.values.shape[2]),
        INTERPRETED if triton.knobs.runtime.interpret else configuration,
        num_multiprocessors(query.device),
    )


@cache
def _plan(
    layout: PageLayout,
    dtype: torch.dtype,
    exact_dtype: tl.dtype,
    batch: int,
    num_query_heads: int,
    head_dim: int,
    num_kv_heads: int,
    num_pages: int,
    capacities: tuple[int, int, int],
    configuration: PackedConfiguration,
    multiprocessors: int,
) -> Plan:
    heads_per_kv = num_query_heads // num_kv_heads
    block_heads = 8 if heads_per_kv <= 8 else 16
    head_blocks = triton.cdiv(heads_per_kv, block_heads)

    group_size = layout.key_group_size
    key_slots, value_slots = 16 // layout.key_bits, 16 // layout.value_bits
    key_words, value_words = layout.page_tokens // key_slots, head_dim // value_slots
    key_groups, value_groups = layout.page_tokens // group_size, head_dim // layout.value_group_size
    tile_words = DOT_ROWS
    is_tile_in_page = key_words % tile_words == 0
    is_run_in_group = group_size % tile_words == 0 and 0 in (group_size % key_words, key_words % group_size)
    folds_keys = is_tile_in_page and is_run_in_group
    key_channels = _largest_chunk(head_dim) if folds_keys else padded(head_dim)
    value_rows, value_sums = _products_of_values(head_dim, value_words, layout.value_group_size)
    folds_values = len(value_sums) <= MOST_SUMS * head_dim // value_rows
    if not folds_values:
        value_rows, value_sums = value_words, tuple((slot, 0) for slot in range(value_slots))
    value_scale_columns = triton.next_power_of_2(value_groups)
    splits_key_scales = folds_keys and group_size % key_words == 0 and key_groups in SPLITS
    splits_value_scales = folds_values and is_tile_in_page and value_scale_columns in SPLITS

    num_sinks, key_ring, value_ring = capacities
    num_exact_parts = triton.cdiv(num_sinks + max(key_ring, value_ring), configuration.exact_tokens)
    num_tiles = triton.cdiv(num_pages * key_words, tile_words)
    num_splits = num_splits_of(batch * num_kv_heads * head_blocks, num_tiles, configuration.programs * multiprocessors)

    tiling = Tiling(
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        page_tokens=layout.page_tokens,
        num_sinks=num_sinks,
        key_ring=max(1, key_ring),
        value_ring=max(1, value_ring),
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
        folds_keys=folds_keys,
        folds_values=folds_values,
        key_chunks=triton.cdiv(head_dim, key_channels),
        key_channels=key_channels,
        value_rows=value_rows,
        value_blocks=value_words // value_rows,
        value_sums=value_sums,
        num_value_sums=len(value_sums),
        splits_key_scales=splits_key_scales,
        splits_value_scales=splits_value_scales,
        value_scale_columns=value_scale_columns,
        key_minima_step=DOT_ROWS // key_groups if splits_key_scales else 1,
        value_minima_step=DOT_ROWS // value_scale_columns if splits_value_scales else 1,
        masks_channels=head_dim % key_channels != 0,
        block_d=padded(head_dim),
        block_heads=block_heads,
        block_key_groups=padded(key_groups),
        block_value_rows=padded(value_rows),
        block_value_groups=padded(value_groups),
        head_blocks=head_blocks,
        num_exact_parts=num_exact_parts,
        exact_tokens=configuration.exact_tokens,
        exact_channels=min(configuration.exact_channels, padded(head_dim)),
        mixes_packed=True,
        num_stages=configuration.num_stages,
        packed_dtype=tl.float32 if dtype == torch.float32 else tl.float16,
        exact_dtype=exact_dtype,
        is_interpreted=triton.knobs.runtime.interpret,
    )
    return Plan(tiling, num_splits)


def _largest_chunk(head_dim: int) -> int:
    """The channels of one product of keys: as many as divide the head, so that none is a padding."""
    chunk = MOST_CHANNELS
    while head_dim % chunk != 0:
        chunk //= 2
    return chunk if chunk >= DOT_ROWS else padded(head_dim)


def _products_of_values(head_dim: int, words: int, group_size: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Rows of one product of values, and the groups in which the channels of each lie, as (product, group).

    The `words` of a slot may span groups: they are halved for as long as that helps and a tensor core is filled.
    """
    rows = words
    while rows > group_size and rows % (2 * DOT_ROWS) == 0:
        rows //= 2
    groups = range(head_dim // group_size)
    return rows, tuple(
        (product, group)
        for product in range(head_dim // rows)
        for group in groups
        if product * rows < (group + 1) * group_size and group * group_size < (product + 1) * rows
    )

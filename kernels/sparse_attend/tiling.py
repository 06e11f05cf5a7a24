"""How attention over sparse codes is cut into programs and tiles: everything static about its launches.

Plain numbers, from shapes alone; the kernels read them as one constant. This module computes nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import num_multiprocessors
from kvlens.kernels.sparse_attend import ExactTokens, SparseLayout, SparsePast
from kvlens.kernels.split_k import num_splits_of, padded, product_dtype
from kvlens.kernels.tuning import SparseConfiguration, configuration_for

MAX_LANES = 16
INTERPRETED = SparseConfiguration(programs=1)
DICTIONARY_ATOMS, OUTPUT_CHANNELS, TURN_CHANNELS = 64, 32, 8


@dataclass(frozen=True)
class Tiling:
    """The constants of the kernels. The names that `packed_attend.exact_part` reads are its own."""

    # The cache
    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    page_tokens: int
    num_sinks: int
    key_ring: int
    value_ring: int
    is_packed: bool
    key_atoms: int
    value_atoms: int
    value_parts: int
    num_key_atoms: int  # of the dictionaries; 0 where keys are turned: they have no table
    num_value_atoms: int
    has_value_means: bool
    # Keys that are coded before RoPE, else 0 and False
    turned_channels: int
    has_key_means: bool
    turn_channels: int  # pairs that are restored at a time
    # Blocks: lanes are the query heads of a table row, padded to `block_heads` for the tensor cores
    lanes: int
    block_heads: int
    head_blocks: int
    block_d: int
    part_channels: int
    block_channels: int
    tile_tokens: int
    is_tile_in_page: bool
    # Programs
    num_exact_parts: int
    exact_tokens: int
    exact_channels: int
    mixes_packed: bool
    exact_dtype: tl.dtype


@dataclass(frozen=True)
class Plan:
    """The launches: their constants, and the splits of each sequence, for which no kernel is compiled anew."""

    tiling: Tiling
    num_tiles: int  # at most, of a sequence
    num_splits: int

    @property
    def num_parts(self) -> int:
        return self.tiling.num_exact_parts + self.num_splits


def plan_of(
    query: torch.Tensor,
    past: SparsePast,
    exact: ExactTokens,
    *,
    arch: int | None = None,
    configuration: SparseConfiguration | None = None,
) -> Plan:
    """The plan for these tensors, from their shapes, dtypes and device alone.

    `arch` asks for the one of a compute capability that is not here, `configuration` for another than the saved.
    Raises: ValueError below 80.
    """
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads = exact.keys.shape[1]
    configuration = configuration or configuration_for("sparse_attend", query, num_kv_heads, arch=arch)
    return _plan(
        past.layout,
        product_dtype(query.dtype, exact.keys.dtype, exact.values.dtype),
        batch,
        num_query_heads,
        head_dim,
        num_kv_heads,
        (0 if past.turn else len(past.keys.dictionary), len(past.values.dictionary)),
        (past.keys.means is not None, past.values.means is not None),
        2 * len(past.turn.inverse_frequencies) if past.turn else 0,
        past.page_table.shape[1],
        (exact.sink_keys.shape[2], exact.keys.shape[2], exact.values.shape[2]),
        INTERPRETED if triton.knobs.runtime.interpret else configuration,
        num_multiprocessors(query.device),
    )


@cache
def _plan(
    layout: SparseLayout,
    exact_dtype: tl.dtype,
    batch: int,
    num_query_heads: int,
    head_dim: int,
    num_kv_heads: int,
    num_atoms: tuple[int, int],
    has_means: tuple[bool, bool],
    turned_channels: int,
    num_pages: int,
    capacities: tuple[int, int, int],
    configuration: SparseConfiguration,
    multiprocessors: int,
) -> Plan:
    heads_per_kv = num_query_heads // num_kv_heads
    lanes = min(MAX_LANES, triton.next_power_of_2(heads_per_kv))
    head_blocks = triton.cdiv(heads_per_kv, lanes)
    num_sinks, key_ring, value_ring = capacities
    exact_tokens = 64 if triton.knobs.runtime.interpret else 16
    num_exact_parts = triton.cdiv(num_sinks + max(key_ring, value_ring), exact_tokens)
    num_tiles = triton.cdiv(num_pages * layout.page_tokens, configuration.tile_tokens)
    num_splits = num_splits_of(batch * num_kv_heads * head_blocks, num_tiles, configuration.programs * multiprocessors)
    part_channels = head_dim // layout.value_parts
    tiling = Tiling(
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        page_tokens=layout.page_tokens,
        num_sinks=num_sinks,
        key_ring=max(1, key_ring),
        value_ring=max(1, value_ring),
        is_packed=layout.is_packed,
        key_atoms=layout.key_atoms,
        value_atoms=layout.value_atoms,
        value_parts=layout.value_parts,
        num_key_atoms=num_atoms[0],
        num_value_atoms=num_atoms[1],
        has_value_means=has_means[1],
        turned_channels=turned_channels,
        has_key_means=has_means[0],
        turn_channels=TURN_CHANNELS,
        lanes=lanes,
        block_heads=max(8, lanes),
        head_blocks=head_blocks,
        block_d=padded(head_dim),
        part_channels=part_channels,
        block_channels=min(OUTPUT_CHANNELS, padded(part_channels)),
        tile_tokens=configuration.tile_tokens,
        is_tile_in_page=layout.page_tokens % configuration.tile_tokens == 0,
        num_exact_parts=num_exact_parts,
        exact_tokens=exact_tokens,
        exact_channels=min(32, padded(head_dim)),
        mixes_packed=False,
        exact_dtype=exact_dtype,
    )
    return Plan(tiling, num_tiles, num_splits)

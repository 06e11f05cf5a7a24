"""How attention to exact buffers is cut into programs and tiles: everything static about a launch.

Plain numbers, from shapes alone; the kernel reads them as one constant. This module computes nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import num_multiprocessors
from kvlens.kernels.split_k import DOT_ROWS, num_splits_of, padded, product_dtype
from kvlens.kernels.tuning import DenseConfiguration, configuration_for


@dataclass(frozen=True)
class Tiling:
    """The constants of the kernel."""

    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    tile_tokens: int
    masks_channels: bool
    # Blocks: sizes padded for the tensor cores
    block_d: int
    block_heads: int
    # Programs
    head_blocks: int
    is_whole: bool  # one part a sequence
    num_stages: int
    num_warps: int
    product_dtype: tl.dtype


@dataclass(frozen=True)
class Plan:
    """A launch: its constants, and the parts of each sequence, which the kernel reads off the grid."""

    tiling: Tiling
    num_parts: int


def plan_of(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    arch: int | None = None,
    configuration: DenseConfiguration | None = None,
) -> Plan:
    """The plan for these tensors, from their shapes, dtypes and device alone.

    `arch` asks for the one of a compute capability that is not here, `configuration` for another than the saved.
    Raises: ValueError below 80.
    """
    batch, num_query_heads, head_dim = query.shape
    configuration = configuration or configuration_for("dense_attend", query, keys.shape[1], arch=arch)
    return _plan(
        product_dtype(query.dtype, keys.dtype, values.dtype),
        batch,
        num_query_heads,
        head_dim,
        *keys.shape[1:3],
        keys.element_size(),
        configuration,
        num_multiprocessors(query.device),
    )


@cache
def _plan(
    dtype: tl.dtype,
    batch: int,
    num_query_heads: int,
    head_dim: int,
    num_kv_heads: int,
    capacity: int,
    value_bytes: int,
    configuration: DenseConfiguration,
    multiprocessors: int,
) -> Plan:
    heads_per_kv = num_query_heads // num_kv_heads
    block_heads = 8 if heads_per_kv <= 8 else 16
    head_blocks = triton.cdiv(heads_per_kv, block_heads)
    block_d = padded(head_dim)
    tile_tokens = max(DOT_ROWS, configuration.tile_bytes // (block_d * value_bytes))
    is_large = block_d > 128 or block_heads > 8  # more than the registers of one warp hold
    num_parts = num_splits_of(
        batch * num_kv_heads * head_blocks,
        triton.cdiv(capacity, tile_tokens),
        configuration.programs * multiprocessors,
    )
    tiling = Tiling(
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        tile_tokens=tile_tokens,
        masks_channels=block_d != head_dim,
        block_d=block_d,
        block_heads=block_heads,
        head_blocks=head_blocks,
        is_whole=num_parts == 1,
        num_stages=configuration.num_stages,
        num_warps=4 if dtype == tl.float32 else configuration.num_warps * (1 + is_large),
        product_dtype=dtype,
    )
    return Plan(tiling, num_parts)

"""How attention to exact buffers is cut into programs and tiles: everything static about a launch.

Plain numbers, from shapes alone; the kernel reads them as one constant. This module computes nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import arch_of, num_multiprocessors
from kvlens.kernels.split_k import DOT_ROWS, num_splits_of, padded, product_dtype

TILE_BYTES = 8192  # of keys, and as many of values


@dataclass(frozen=True)
class Configuration:
    """What is chosen by measurement, not by shapes."""

    num_stages: int  # tiles in flight
    programs: int  # that run at once on a multiprocessor
    num_warps: int = 1  # twice as many where one would need more registers than it has
    tile_bytes: int = TILE_BYTES


# The least compute capability that a line is for; the first that fits is taken. A program has 33 to 41 KiB of shared
# memory: two buffers each for a tile of keys and of values.
CONFIGURATIONS = (
    (120, Configuration(num_stages=3, programs=2)),
    (90, Configuration(num_stages=3, programs=6)),
    (81, Configuration(num_stages=3, programs=2)),
    (80, Configuration(num_stages=3, programs=4)),
)


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
    num_parts: int
    num_stages: int
    num_warps: int
    product_dtype: tl.dtype


def tiling_of(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, arch: int | None = None) -> Tiling:
    """The tiling for these tensors, from their shapes, dtypes and device alone.

    `arch` asks for the one of a compute capability that is not here. Raises: ValueError below 80.
    """
    return _tiling(
        product_dtype(query.dtype, keys.dtype, values.dtype),
        *query.shape,
        *keys.shape[1:3],
        keys.element_size(),
        arch or arch_of(query.device),
        num_multiprocessors(query.device),
    )


@cache
def _tiling(
    dtype: tl.dtype,
    batch: int,
    num_query_heads: int,
    head_dim: int,
    num_kv_heads: int,
    capacity: int,
    value_bytes: int,
    arch: int,
    multiprocessors: int,
) -> Tiling:
    configuration = next((found for least, found in CONFIGURATIONS if arch >= least), None)
    if configuration is None:
        raise ValueError(f"Triton attention needs compute capability 80 or newer; got {arch}")
    heads_per_kv = num_query_heads // num_kv_heads
    block_heads = 8 if heads_per_kv <= 8 else 16
    head_blocks = triton.cdiv(heads_per_kv, block_heads)
    block_d = padded(head_dim)
    tile_tokens = max(DOT_ROWS, configuration.tile_bytes // (block_d * value_bytes))
    num_parts = num_splits_of(
        batch * num_kv_heads * head_blocks,
        triton.cdiv(capacity, tile_tokens),
        configuration.programs * multiprocessors,
    )
    return Tiling(
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        tile_tokens=tile_tokens,
        masks_channels=block_d != head_dim,
        block_d=block_d,
        block_heads=block_heads,
        head_blocks=head_blocks,
        num_parts=num_parts,
        num_stages=configuration.num_stages,
        num_warps=4 if dtype == tl.float32 else configuration.num_warps * (1 + (block_d * block_heads > 1024)),
        product_dtype=dtype,
    )

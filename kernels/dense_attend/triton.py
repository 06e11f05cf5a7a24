"""Decode attention over exact buffers in Triton: flash-decoding, the rival that compressed caches must beat.

Grid `[B * HK * head blocks, parts]`: a program reads a share of a sequence's tokens for all query heads of a
key/value head, in tiles that are copied asynchronously while earlier ones are computed. As in packed
attention, tokens and channels are the rows of the products and query heads their columns, 8 of them, padded:
scores^T = K q^T and output^T = V^T p^T. A second launch merges the parts; where one part a sequence fills the
GPU there is none. The launch shape depends on nothing but static sizes and lengths are read on the device,
so the launches can be captured in a CUDA graph.

Source: Dao et al., Flash-Decoding for long-context inference, 2023.
Limits: rows of channels must be contiguous, and values lie as keys do (both are copied if not). What lies behind a
sequence's last token is never read.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import COUNTS, Launch, rows_contiguous, strides
from kvlens.kernels.dense_attend.tiling import plan_of
from kvlens.kernels.exact_tokens import Attended
from kvlens.kernels.split_k import LOG2_E, dot, empty_parts, empty_result, merge, store_part
from kvlens.kernels.tuning import DenseConfiguration


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def _attend_kernel(
    query_ptr, scaling, length_ptr, keys_ptr, values_ptr, part_output_ptr, part_log_sum_exp_ptr,
    stride_query_row, stride_query_head, stride_row, stride_head, stride_token, TILING: tl.constexpr,
):  # fmt: skip
    """One part of the attention of the query heads that share a key/value head."""
    TOKENS: tl.constexpr = TILING.tile_tokens
    head_block = tl.program_id(0) % TILING.head_blocks
    head = (tl.program_id(0) // TILING.head_blocks % TILING.num_kv_heads).to(tl.int64)
    row = (tl.program_id(0) // (TILING.head_blocks * TILING.num_kv_heads)).to(tl.int64)
    part, num_parts = tl.program_id(1), tl.num_programs(1)

    offs_n = head_block * TILING.block_heads + tl.arange(0, TILING.block_heads)
    mask_n = offs_n < TILING.heads_per_kv
    query_head = head * TILING.heads_per_kv + offs_n
    offs_d = tl.arange(0, TILING.block_d)
    offs_t = tl.arange(0, TOKENS)
    mask_d = offs_d < TILING.head_dim
    query = tl.load(
        query_ptr + row * stride_query_row + query_head[None, :] * stride_query_head + offs_d[:, None],
        mask=mask_n[None, :] & mask_d[:, None], other=0.0,
    ).to(TILING.product_dtype)  # fmt: skip
    keys_ptr += row * stride_row + head * stride_head
    values_ptr += row * stride_row + head * stride_head
    offs_keys = offs_t[:, None] * stride_token + offs_d[None, :]
    offs_values = offs_t[None, :] * stride_token + offs_d[:, None]

    maximum = tl.full((TILING.block_heads,), -1e30, tl.float32)  # finite: no difference is inf - inf
    total = tl.full((TILING.block_heads,), 0.0, tl.float32)
    output = tl.full((TILING.block_d, TILING.block_heads), 0.0, tl.float32)
    length = tl.load(length_ptr + row)
    num_tiles = tl.cdiv(length, TOKENS)
    first_tile = (part * num_tiles) // num_parts
    last_tile = ((part + 1) * num_tiles) // num_parts
    for tile in tl.range(first_tile, last_tile, num_stages=TILING.num_stages):
        first = tl.cast(tile, tl.int64) * TOKENS * stride_token
        mask_t = offs_t < length - tile * TOKENS
        mask = mask_t[:, None] & mask_d[None, :] if TILING.masks_channels else mask_t[:, None]
        keys = tl.load(keys_ptr + first + offs_keys, mask=mask, other=0.0)
        scores = dot(keys.to(TILING.product_dtype), query) * scaling
        scores = tl.where(mask_t[:, None], scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        probabilities = tl.exp2(scores - new_maximum[None, :])
        total = total * decay + tl.sum(probabilities, axis=0)
        maximum = new_maximum
        mask = mask_t[None, :] & mask_d[:, None] if TILING.masks_channels else mask_t[None, :]
        values = tl.load(values_ptr + first + offs_values, mask=mask, other=0.0)
        output = dot(values.to(TILING.product_dtype), probabilities.to(TILING.product_dtype), output * decay[None, :])

    part_head = (row * TILING.num_kv_heads * TILING.heads_per_kv + query_head) * num_parts + part
    store_part(
        part_output_ptr + part_head * TILING.head_dim, part_log_sum_exp_ptr + part_head, mask_n, maximum, total,
        (output,), 1, TILING.block_d, TILING.head_dim, TILING.is_whole,
    )  # fmt: skip


def dense_attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """See `kvlens.kernels.dense_attend.dense_attend`."""
    result, launches = prepare(query, keys, values, length, scaling=scaling)
    for launch in launches:
        launch.run()
    return result.output


def prepare(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    scaling: float,
    arch: int | None = None,
    configuration: DenseConfiguration | None = None,
) -> tuple[Attended, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (on `arch`, if not this GPU).

    `configuration` stands in for the saved one.
    Shapes: query `[B, HQ, D]`, keys and values `[B, HK, capacity, D]`, length int32 `[B]`, at most capacity.
    """
    plan = plan_of(query, keys, values, arch=arch, configuration=configuration)
    tiling = plan.tiling
    query = rows_contiguous(query)
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    result = empty_result(query)
    parts = (result.output, result.log_sum_exp) if tiling.is_whole else empty_parts(query, plan.num_parts)
    arguments = {
        "query_ptr": query,
        "scaling": float(scaling) * LOG2_E,
        "length_ptr": length.contiguous(),
        "keys_ptr": keys,
        "values_ptr": values,
        "part_output_ptr": parts[0],
        "part_log_sum_exp_ptr": parts[1],
        **strides("query", query, "row", "head"),
        **{f"stride_{dim}": keys.stride(i) for i, dim in enumerate(("row", "head", "token"))},
        "TILING": tiling,
        "num_warps": tiling.num_warps,
        "enable_fp_fusion": True,
    }
    grid = (len(query) * tiling.num_kv_heads * tiling.head_blocks, plan.num_parts)
    attend = Launch(_attend_kernel, grid, arguments)
    return result, (attend,) if tiling.is_whole else (attend, merge(*parts, result))

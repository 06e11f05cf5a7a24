"""Fused decode attention over packed pages in Triton: one launch over all parts, one to merge them.

How it works
    Grid `[B * HK * head blocks, parts]`, one warp a program. The first parts read a few exact tokens each
    (sinks, then window); the others share the packed pages evenly, by the length found on the device.
    Every part writes its normalized output and log-sum-exp; a second kernel merges the parts. The launch
    shape depends on nothing but static sizes, so the pair can be captured in a CUDA graph.

Tiles
    Tokens and channels are the rows of every product and query heads its columns (8 of them, padded):
    scores^T = K q^T and output^T = V^T p^T. With heads as rows the tensor core would need 16, and half of
    the softmax would be spent on padding.
    Packed keys are walked in tiles of 16 words of each channel. A slot of the planar layout is then a run of
    16 tokens, so a tile holds 16 / bits runs, each the subject of one product that needs no interleaving.
    Values likewise: a slot is a run of channels.

Folding (KIVI's stored form is code * scale + minimum)
    scores: sum_d (q_d s_d) code_d + q·minimum, with q s formed once for a group of tokens;
    output: sum_t (p_t s_t) code_t + sum_t p_t minimum_t, with p s formed once for a group of channels.
    So a code meets no arithmetic before the product. Values whose channels lie in two groups (heads of 96) are
    summed once for each, and every channel keeps the sum of its own. Where a run spans more groups (pages of 32
    tokens, values of 8 channels a group) the tile is restored first: right for every layout, but slower.

Codes as fp16 without conversion
    The bits of a small integer, read as fp16, are the subnormal number code * 2^(place - 24): masking a
    slot where it lies is all the decoding there is, and the factor leaves with the fp32 sums. Slots above
    the ten mantissa bits are read from a copy of the words shifted down by 6. Tensor cores take subnormal
    inputs as they are (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). Source of the trick:
    xformers' split-k attention, which still multiplies every code by 2^24.

Files: `tiling.py` fixes the sizes, `packed_part.py` and `exact_part.py` hold the two kinds of part, `registers.py`
what the first does with codes and scales once they are loaded.
Limits: rows of codes, scales and tokens must be contiguous (they are copied if not). For half-precision
queries q * scale and p * scale must fit fp16, as they do where keys and values do. This module does not know
how pages are filled or chosen.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import COUNTS, Launch, rows_contiguous, strides
from kvlens.kernels.packed_attend import Attended, ExactTokens, PackedPast
from kvlens.kernels.packed_attend.exact_part import attend_exact
from kvlens.kernels.packed_attend.packed_part import attend_packed
from kvlens.kernels.packed_attend.tiling import plan_of
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.split_k import LOG2_E, empty_parts, empty_result, merge, store_part
from kvlens.kernels.tuning import PackedConfiguration


@triton.jit
def _place(TILING: tl.constexpr):
    """Of this program: sequence, key/value head, and `[N]` which of its columns are heads and which of the query's."""
    head_block = tl.program_id(0) % TILING.head_blocks
    head = (tl.program_id(0) // TILING.head_blocks % TILING.num_kv_heads).to(tl.int64)
    row = (tl.program_id(0) // (TILING.head_blocks * TILING.num_kv_heads)).to(tl.int64)
    offs_n = head_block * TILING.block_heads + tl.arange(0, TILING.block_heads)
    return row, head, offs_n < TILING.heads_per_kv, head * TILING.heads_per_kv + offs_n


@triton.jit
def _part_head(TILING: tl.constexpr):
    """Which part of which head `[N]` this program is. Asked again in the end: kept, it would take registers."""
    row, _, mask_n, query_head = _place(TILING)
    part = (row * TILING.num_kv_heads * TILING.heads_per_kv + query_head) * tl.num_programs(1) + tl.program_id(1)
    return part, mask_n


@triton.jit(do_not_specialize=["stride_table_row"], do_not_specialize_on_alignment=COUNTS)
def _attend_kernel(
    query_ptr, scaling, page_table_ptr, num_keys_ptr, num_values_ptr, length_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, value_codes_ptr, value_scale_ptr, value_minimum_ptr,
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr, part_output_ptr, part_log_sum_exp_ptr,
    stride_query_row, stride_query_head, stride_table_row,
    stride_key_codes_page, stride_key_codes_head, stride_key_scale_page, stride_key_scale_head,
    stride_value_codes_page, stride_value_codes_head, stride_value_scale_page, stride_value_scale_head,
    stride_key_row, stride_key_head, stride_key_token, stride_value_row, stride_value_head, stride_value_token,
    stride_sink_key_row, stride_sink_key_head, stride_sink_key_token,
    stride_sink_value_row, stride_sink_value_head, stride_sink_value_token,
    TILING: tl.constexpr,
):  # fmt: skip
    """One part of the attention of the query heads that share a key/value head."""
    row, head, mask_n, query_head = _place(TILING)
    part = tl.program_id(1)
    query_ptr = query_ptr + row * stride_query_row + query_head * stride_query_head
    num_keys = tl.load(num_keys_ptr + row)
    num_values = tl.load(num_values_ptr + row)
    page_table_ptr += row * stride_table_row
    key_codes_ptr += head * stride_key_codes_head
    key_scale_ptr += head * stride_key_scale_head
    key_minimum_ptr += head * stride_key_scale_head
    value_codes_ptr += head * stride_value_codes_head
    value_scale_ptr += head * stride_value_scale_head
    value_minimum_ptr += head * stride_value_scale_head

    if part < TILING.num_exact_parts:
        maximum, total, chunks = attend_exact(
            query_ptr, mask_n, scaling, num_keys, num_values, tl.load(length_ptr + row), part,
            (
                page_table_ptr,
                key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
                value_codes_ptr, value_scale_ptr, value_minimum_ptr,
                stride_value_codes_page, stride_value_scale_page,
            ),
            keys_ptr + row * stride_key_row + head * stride_key_head,
            values_ptr + row * stride_value_row + head * stride_value_head,
            sink_keys_ptr + row * stride_sink_key_row + head * stride_sink_key_head,
            sink_values_ptr + row * stride_sink_value_row + head * stride_sink_value_head,
            stride_key_token, stride_value_token, stride_sink_key_token, stride_sink_value_token, TILING,
        )  # fmt: skip
        part_head, mask_n = _part_head(TILING)
        store_part(
            part_output_ptr + part_head * TILING.head_dim, part_log_sum_exp_ptr + part_head, mask_n,
            maximum, total, chunks, TILING.block_d // TILING.exact_channels, TILING.exact_channels, TILING.head_dim,
        )  # fmt: skip
    else:
        maximum, total, products = attend_packed(
            query_ptr, mask_n, scaling, tl.minimum(num_keys, num_values), part - TILING.num_exact_parts,
            page_table_ptr,
            key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
            value_codes_ptr, value_scale_ptr, value_minimum_ptr,
            stride_value_codes_page, stride_value_scale_page, TILING,
        )  # fmt: skip
        part_head, mask_n = _part_head(TILING)
        store_part(
            part_output_ptr + part_head * TILING.head_dim, part_log_sum_exp_ptr + part_head, mask_n,
            maximum, total, products, TILING.head_dim // TILING.value_rows, TILING.value_rows, TILING.head_dim,
        )  # fmt: skip


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`."""
    result, launches = prepare(query, past, exact, scaling=scaling)
    for launch in launches:
        launch.run()
    return result


def prepare(
    query: torch.Tensor,
    past: PackedPast,
    exact: ExactTokens,
    *,
    scaling: float,
    arch: int | None = None,
    configuration: PackedConfiguration | None = None,
) -> tuple[Attended, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (on `arch`, if not this GPU).

    `configuration` stands in for the saved one.
    """
    plan = plan_of(query, past, exact, arch=arch, configuration=configuration)
    tiling = plan.tiling
    query = rows_contiguous(query)
    key_codes, key_scale, key_minimum = _pages_contiguous(past.keys)
    value_codes, value_scale, value_minimum = _pages_contiguous(past.values)
    keys, values = rows_contiguous(exact.keys), rows_contiguous(exact.values)
    sink_keys, sink_values = rows_contiguous(exact.sink_keys), rows_contiguous(exact.sink_values)
    page_table = rows_contiguous(past.page_table)

    part_output, part_log_sum_exp = empty_parts(query, plan.num_parts)
    result = empty_result(query)
    attend = Launch(
        _attend_kernel,
        (len(query) * tiling.num_kv_heads * tiling.head_blocks, plan.num_parts),
        {
            "query_ptr": query,
            "scaling": float(scaling) * LOG2_E,
            "page_table_ptr": page_table,
            "num_keys_ptr": past.num_keys.contiguous(),
            "num_values_ptr": past.num_values.contiguous(),
            "length_ptr": exact.length.contiguous(),
            "key_codes_ptr": key_codes,
            "key_scale_ptr": key_scale,
            "key_minimum_ptr": key_minimum,
            "value_codes_ptr": value_codes,
            "value_scale_ptr": value_scale,
            "value_minimum_ptr": value_minimum,
            "keys_ptr": keys,
            "values_ptr": values,
            "sink_keys_ptr": sink_keys,
            "sink_values_ptr": sink_values,
            "part_output_ptr": part_output,
            "part_log_sum_exp_ptr": part_log_sum_exp,
            **strides("query", query, "row", "head"),
            **strides("table", page_table, "row"),
            **strides("key_codes", key_codes, "page", "head"),
            **strides("key_scale", key_scale, "page", "head"),
            **strides("value_codes", value_codes, "page", "head"),
            **strides("value_scale", value_scale, "page", "head"),
            **strides("key", keys, "row", "head", "token"),
            **strides("value", values, "row", "head", "token"),
            **strides("sink_key", sink_keys, "row", "head", "token"),
            **strides("sink_value", sink_values, "row", "head", "token"),
            "TILING": tiling,
            "num_warps": 1,
            "enable_fp_fusion": True,
        },
    )
    return result, (attend, merge(part_output, part_log_sum_exp, result))


def _pages_contiguous(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and minimum with each page's rows back to back; scale and minimum share their strides."""

    def is_contiguous(pages: torch.Tensor) -> bool:
        return pages.stride(-1) == 1 and pages.stride(-2) == pages.shape[-1]

    codes, scale, minimum = packed.codes, packed.scale, packed.minimum
    if not is_contiguous(codes):
        codes = codes.contiguous()
    if not is_contiguous(scale) or scale.stride() != minimum.stride():
        scale, minimum = scale.contiguous(), minimum.contiguous()
    return codes, scale, minimum

"""Packed attention on the CPU: picks the compiled kernels, fills in the addresses, makes one call.

The course of the computation is in `kvlens.kernels.native.attend`, the call in `attend_call`, the inner loops
in `packed_rows` and `dense_rows` beside them. The first call with a new layout compiles them (or loads them
from Numba's disk cache); `warm_up` does that ahead of time.

Limits: pages, rings and sinks must have contiguous rows, and scale and minimum contiguous pages of a head;
others are copied first, the whole pool of them.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from kvlens.kernels.exact_tokens import Attended, ExactTokens
from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.attend_arguments import Side
from kvlens.kernels.native.attend_call import (
    CACHE_LINE,
    ELEMENTS,
    AttendCall,
    AttendKernels,
    CallShape,
    as_dtype,
    element_of,
    exact_kernels,
    heads_together,
    kept_call,
    lines,
    with_strides,
)
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.packed_rows import MAX_HEADS, accumulate_rows
from kvlens.kernels.packed_attend import PackedPast, PageLayout
from kvlens.kernels.quantize_pack import Packed

jit.require_half_floats()


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`.

    Raises: ValueError for an element type that the kernels do not read.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    log_sum_exp = torch.empty(query.shape[:2], dtype=torch.float32)
    call = _call(query, past, exact)
    # Whatever had to be copied must live until the kernel returns.
    copies = (
        _place_packed(call.arguments.keys, past.keys, past.num_keys),
        _place_packed(call.arguments.values, past.values, past.num_values),
    )
    call.enter(query, past.page_table, exact, output, log_sum_exp, scaling)
    del copies
    return Attended(output, log_sum_exp)


def warm_up(
    layout: PageLayout,
    *,
    head_dim: int,
    heads_per_group: int,
    query_dtype: torch.dtype,
    exact_dtype: torch.dtype,
) -> float:
    """Compile what attention over `layout` needs; gives the milliseconds spent.

    Safe on a background thread: a call that needs a kernel meanwhile waits for it.
    """
    known = set(jit.compiled())
    query, exact = ELEMENTS[query_dtype], ELEMENTS[exact_dtype]
    shape = CallShape(head_dim, heads_per_group, layout.page_tokens, 0, query, query, exact, jit.has_lookups())
    _kernels(shape, layout)
    return sum(kernel.compile_ms for kernel in jit.compiled() if kernel not in known)


def packed_rows_kernel(bits, row_values, group_size, num_heads, has_lookups, source):
    def accumulate(
        codes, codes_stride, scale, minimum, next_codes, next_scale, next_minimum,
        factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride,
    ):  # fmt: skip
        depends_on(source)
        accumulate_rows(
            (codes, codes_stride, scale, minimum, next_codes, next_scale, next_minimum,
             factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride),
            bits, row_values, group_size, num_heads, has_lookups,
        )  # fmt: skip

    return accumulate


@lru_cache(maxsize=256)
def _kernels(shape: CallShape, layout: PageLayout) -> AttendKernels:
    def packed(*rows: int) -> dict[str, int]:
        return {
            f"packed_by_{count}": jit.kernel(packed_rows_kernel, *rows, count, int(shape.has_lookups)).address
            for count in heads_together(shape.heads_per_group)
        }

    exact = exact_kernels(shape)
    return replace(
        exact,
        keys=exact.keys | packed(layout.key_bits, layout.page_tokens, layout.key_group_size),
        values=exact.values | packed(layout.value_bits, shape.head_dim, layout.value_group_size),
    )


def _call(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> AttendCall:
    """The call kept for inputs of this kind, or a new one."""
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads, num_sinks = exact.sink_keys.shape[1:3]
    layout, has_lookups, num_threads = past.layout, jit.has_lookups(), threads.num_threads()

    def build() -> AttendCall:
        element = element_of(query)
        shape = CallShape(
            head_dim, num_query_heads // num_kv_heads, layout.page_tokens, num_sinks, element, element,
            element_of(exact.keys), has_lookups,
        )  # fmt: skip
        key_factors = (head_dim + 1) * (layout.page_tokens // layout.key_group_size)
        value_factors = (layout.page_tokens + 1) * (head_dim // layout.value_group_size)
        factors_bytes = lines(4 * max(key_factors, value_factors)) + CACHE_LINE
        return AttendCall(
            shape, _kernels(shape, layout), batch=batch, num_kv_heads=num_kv_heads, num_threads=num_threads,
            own_scratch_bytes=MAX_HEADS * factors_bytes, factors_bytes=factors_bytes,
        )  # fmt: skip

    key = (layout, query.shape, num_kv_heads, num_sinks, query.dtype, exact.keys.dtype, has_lookups, num_threads)
    return kept_call(key, build)


def _place_packed(side: Side, packed: Packed, num_packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    num_packed = as_dtype(torch.int32, num_packed).contiguous()
    codes, (page, head, row, _) = with_strides(packed.codes)
    side.codes_page_stride, side.codes_head_stride, side.codes_row_stride = 2 * page, 2 * head, 2 * row
    scale, minimum = packed.scale, packed.minimum
    page, head, row, group = scale.stride()
    if (row, group) != (scale.shape[3], 1) or minimum.stride() != (page, head, row, group):
        scale, minimum = scale.contiguous(), minimum.contiguous()
        page, head, _, _ = scale.stride()
    side.scale_page_stride, side.scale_head_stride = 2 * page, 2 * head
    side.codes, side.scale, side.minimum = codes.data_ptr(), scale.data_ptr(), minimum.data_ptr()
    side.num_packed = num_packed.data_ptr()
    return codes, scale, minimum, num_packed

"""The argument block of attention, shared by the caller (ctypes) and the kernels (by offset).

Every field is an int64 but one. A `*_stride` counts bytes; a kernel is its address.
"""

import ctypes

from kvlens.kernels.native.scalars import field_access


def _int64_fields(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, ctypes.c_int64) for name in names)


class Side(ctypes.Structure):
    """Where the keys, or the values, of all sequences lie, and which kernels read them.

    `packed_by_*` and `exact_by_*`: the kernels for one, two and four query heads together, or 0. `coded`: the
    kernel for all heads where tokens are sparse codes, or 0; then `codes` are its words, `scale` its
    coefficients, and there is no minimum.
    """

    _fields_ = (
        *_int64_fields("packed_by_1", "packed_by_2", "packed_by_4", "exact_by_1", "exact_by_2", "exact_by_4"),
        *_int64_fields("coded", "scale_row_stride"),
        *_int64_fields("num_packed"),
        *_int64_fields("codes", "codes_page_stride", "codes_head_stride", "codes_row_stride"),
        *_int64_fields("scale", "minimum", "scale_page_stride", "scale_head_stride"),
        *_int64_fields("ring", "ring_batch_stride", "ring_head_stride", "ring_row_stride", "ring_slots"),
        *_int64_fields("sinks", "sinks_batch_stride", "sinks_head_stride", "sinks_row_stride"),
    )


class AttendArguments(ctypes.Structure):
    """Everything that a call needs."""

    _fields_ = (
        *_int64_fields("parallel_address", "worker", "num_threads", "min_parallel_work"),
        *_int64_fields("batch", "num_kv_heads", "heads_per_group", "head_dim", "row_bytes"),
        *_int64_fields("page_tokens", "tile_tokens", "num_sinks"),
        *_int64_fields("query", "query_batch_stride", "query_head_stride", "read_query"),
        *_int64_fields("output", "output_batch_stride", "output_head_stride", "write_output"),
        *_int64_fields("log_sum_exp", "length", "page_table", "page_table_stride"),
        ("keys", Side),
        ("values", Side),
        # The workspace: item numbers, finished items and partial results; then each thread's scratch memory.
        *_int64_fields("first_items", "num_finished", "partials", "partial_bytes"),
        *_int64_fields("scratch", "scratch_bytes", "scores_bytes", "factors_bytes"),
        # Sparse codes: a table row for every query head of the batch, its accumulators, and their kernels.
        *_int64_fields("lanes", "weave_rows", "part_table", "tables", "table_row_bytes"),
        *_int64_fields("accumulators", "accumulator_row_bytes", "accumulator_part_bytes", "accumulator_bytes"),
        *_int64_fields("value_parts", "totals_offset"),
        # Keys that are coded before RoPE (`turned_rows`): atoms are 0 where there are none, means where they have none.
        *_int64_fields("atoms", "turn_steps", "turn_starts", "turn_starts_stride", "turn_scratch_offset"),
        *_int64_fields("turn_means", "means", "means_stride"),
        # Set by the plan, counted up by the workers.
        *_int64_fields("next_item", "next_thread", "tiles_per_item"),
        ("query_factor", ctypes.c_float),
    )


field, field_address = field_access(AttendArguments)
side, side_address = field_access(Side)

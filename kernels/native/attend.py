"""The course of packed attention: shares out the work, walks the pages, keeps the running softmax.

An item is a run of tiles of one key/value head of one sequence, with all its query heads. Threads draw items
from a counter. A tile is `tile_tokens` packed tokens (whole pages); the first also takes the sinks, the last
the rest of the window. Where a head has several items, the one that ends last merges them by log-sum-exp.

Scores are kept in units of log2 (the query is multiplied by scaling * log2(e)), so the softmax is powers of 2.
This module does not know bits or element types: those are in the kernels that it calls by address.
"""

import ctypes
import math

from kvlens.kernels.native.dense_rows import add_scaled, exponentiate, highest_score, scale_floats
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.scalars import (
    atomic_add,
    call,
    enter_team,
    field_access,
    read_float,
    read_int32,
    read_int64,
    write_float,
    write_int64,
)
from numba import float32, int64, njit

ITEMS_PER_THREAD = 4
_LOG_2 = math.log(2)


class AttendArguments(ctypes.Structure):
    """Everything a call needs. Addresses and counts; `*_stride` in bytes; kernels are addresses."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            # the team
            "parallel_address", "worker", "num_threads", "min_parallel_work",
            # the kernels, for one query head and for `heads_at_once`
            "heads_at_once", "read_query", "write_output",
            "score_packed_one", "score_packed_many", "sum_packed_one", "sum_packed_many",
            "score_exact_one", "score_exact_many", "sum_exact_one", "sum_exact_many",
            # shapes
            "batch", "num_kv_heads", "heads_per_group", "head_dim", "row_bytes", "page_tokens", "tile_tokens",
            # query and result
            "query", "query_batch_stride", "query_head_stride",
            "output", "output_batch_stride", "output_head_stride", "log_sum_exp",
            # packed tokens
            "page_table", "page_table_stride", "num_keys", "num_values", "length",
            "key_codes", "key_codes_page_stride", "key_codes_head_stride", "key_codes_row_stride",
            "key_scale", "key_minimum", "key_scale_page_stride", "key_scale_head_stride",
            "value_codes", "value_codes_page_stride", "value_codes_head_stride", "value_codes_row_stride",
            "value_scale", "value_minimum", "value_scale_page_stride", "value_scale_head_stride",
            "value_scale_row_stride",
            # exact tokens
            "num_sinks", "key_ring_slots", "value_ring_slots",
            "ring_keys", "ring_keys_batch_stride", "ring_keys_head_stride", "ring_keys_row_stride",
            "ring_values", "ring_values_batch_stride", "ring_values_head_stride", "ring_values_row_stride",
            "sink_keys", "sink_keys_batch_stride", "sink_keys_head_stride", "sink_keys_row_stride",
            "sink_values", "sink_values_batch_stride", "sink_values_head_stride", "sink_values_row_stride",
            # the workspace
            "counters", "first_items", "num_finished", "partials", "partial_bytes",
            "scratch", "scratch_bytes", "scores_bytes", "factors_bytes",
        )),
        ("query_factor", ctypes.c_float),
    )  # fmt: skip


NUM_COUNTERS = 8
_NEXT_ITEM, _NEXT_THREAD, _TILES_PER_ITEM = 0, 8, 16  # bytes into the counters

field, field_address = field_access(AttendArguments)


def attend_entry(source):
    """The kernel that a caller enters: plan, then run the worker on one thread or on the team."""

    def entry(arguments):
        depends_on(source)
        num_items, work = _plan(arguments)
        num_threads = min(field(arguments, "num_threads"), num_items)
        if num_threads > 1 and work >= field(arguments, "min_parallel_work"):
            enter_team(
                field(arguments, "parallel_address"), field(arguments, "worker"), arguments, num_threads
            )
        else:
            call(field(arguments, "worker"), (arguments,))

    return entry


def attend_worker(source):
    """The kernel that every thread runs: draw items until none is left."""

    def worker(arguments):
        depends_on(source)
        counters = field(arguments, "counters")
        thread = atomic_add(counters + _NEXT_THREAD, 1)
        scratch = field(arguments, "scratch") + thread * field(arguments, "scratch_bytes")
        batch, first_items = field(arguments, "batch"), field(arguments, "first_items")
        num_items = read_int64(first_items + 8 * batch)
        item = atomic_add(counters + _NEXT_ITEM, 1)
        while item < num_items:
            row = 0
            while item >= read_int64(first_items + 8 * (row + 1)):
                row += 1
            _attend_item(arguments, scratch, item, row)
            item = atomic_add(counters + _NEXT_ITEM, 1)

    return worker


@njit(error_model="numpy")
def _num_tiles(arguments, row):
    """Tiles of a sequence; at least 1, so that an empty one is answered too."""
    length = int64(read_int32(field(arguments, "length") + 4 * row))
    tile = field(arguments, "tile_tokens")
    return max(1, (length - field(arguments, "num_sinks") + tile - 1) // tile)


@njit(error_model="numpy")
def _plan(arguments):
    """Number the items of every sequence. Gives the number of items and of score products."""
    batch, heads = field(arguments, "batch"), field(arguments, "num_kv_heads")
    num_tiles, num_tokens = 0, 0
    for row in range(batch):
        num_tiles += _num_tiles(arguments, row)
        num_tokens += int64(read_int32(field(arguments, "length") + 4 * row))
    wanted = ITEMS_PER_THREAD * field(arguments, "num_threads")
    tiles_per_item = max(1, (num_tiles * heads + wanted - 1) // wanted)
    item = 0
    for row in range(batch):
        write_int64(field(arguments, "first_items") + 8 * row, item)
        item += heads * ((_num_tiles(arguments, row) + tiles_per_item - 1) // tiles_per_item)
    write_int64(field(arguments, "first_items") + 8 * batch, item)
    for index in range(batch * heads):
        write_int64(field(arguments, "num_finished") + 8 * index, 0)
    counters = field(arguments, "counters")
    write_int64(counters + _NEXT_ITEM, 0)
    write_int64(counters + _NEXT_THREAD, 0)
    write_int64(counters + _TILES_PER_ITEM, tiles_per_item)
    work = num_tokens * heads * field(arguments, "heads_per_group") * field(arguments, "head_dim")
    return item, work


@njit(error_model="numpy")
def _attend_item(arguments, scratch, item, row):
    """Attend to the tokens of one item and write, or merge, its result.

    Scratch: queries, sums (rows of fp32), highest scores, totals, scores, scaled factors.
    """
    heads, num_heads = field(arguments, "num_kv_heads"), field(arguments, "heads_per_group")
    first_item = read_int64(field(arguments, "first_items") + 8 * row)
    num_splits = (read_int64(field(arguments, "first_items") + 8 * (row + 1)) - first_item) // heads
    head, split = (item - first_item) // num_splits, (item - first_item) % num_splits
    row_bytes, state_bytes = field(arguments, "row_bytes"), _state_bytes(num_heads)
    queries = scratch
    partial = field(arguments, "partials") + item * field(arguments, "partial_bytes")
    scores = queries + num_heads * row_bytes

    call(field(arguments, "read_query"), (
        field(arguments, "query") + row * field(arguments, "query_batch_stride")
        + head * num_heads * field(arguments, "query_head_stride"),
        field(arguments, "query_head_stride"), num_heads, queries, field_address(arguments, "query_factor"),
    ))  # fmt: skip
    scale_floats(partial + state_bytes, num_heads * (row_bytes // 4), float32(0.0))
    for index in range(num_heads):
        write_float(partial + 4 * index, float32(-math.inf))
        write_float(partial + 4 * (num_heads + index), float32(0.0))

    length = int64(read_int32(field(arguments, "length") + 4 * row))
    num_tiles = _num_tiles(arguments, row)
    tiles_per_item = read_int64(field(arguments, "counters") + _TILES_PER_ITEM)
    last_tile = min(num_tiles, (split + 1) * tiles_per_item)
    for tile in range(split * tiles_per_item, last_tile):
        start = tile * field(arguments, "tile_tokens") + field(arguments, "num_sinks")
        stop = min(length, start + field(arguments, "tile_tokens"))
        start = 0 if tile == 0 else start
        if start < stop:
            _score_tile(arguments, row, head, start, stop, queries, scores)
            _softmax_tile(arguments, stop - start, scores, partial)
            _sum_tile(arguments, row, head, start, stop, scores, partial + state_bytes)

    if num_splits == 1:
        _write_result(arguments, row, head, partial)
    elif atomic_add(field(arguments, "num_finished") + 8 * (row * heads + head), 1) == num_splits - 1:
        first = field(arguments, "partials") + (item - split) * field(arguments, "partial_bytes")
        for other in range(1, num_splits):
            _merge(arguments, first, first + other * field(arguments, "partial_bytes"))
        _write_result(arguments, row, head, first)


@njit(error_model="numpy")
def _state_bytes(num_heads):
    """Highest score and total of every head, filled up to whole vectors."""
    return (2 * 4 * num_heads + 63) // 64 * 64


@njit(error_model="numpy")
def _score_tile(arguments, row, head, start, stop, queries, scores):
    """scores[h, t - start] of tokens start..stop-1. Shapes: scores `[num_heads, scores_bytes / 4]`."""
    num_sinks, page_tokens = field(arguments, "num_sinks"), field(arguments, "page_tokens")
    num_keys = int64(read_int32(field(arguments, "num_keys") + 4 * row))
    stride = field(arguments, "scores_bytes")
    if start < num_sinks:
        rows = (
            field(arguments, "sink_keys") + row * field(arguments, "sink_keys_batch_stride")
            + head * field(arguments, "sink_keys_head_stride")
        )  # fmt: skip
        _score_exact(arguments, rows, field(arguments, "sink_keys_row_stride"), min(stop, num_sinks), queries, scores)

    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    factors = scores + num_heads * stride
    first_packed, last_packed = max(start - num_sinks, 0), min(stop - num_sinks, num_keys)
    table = field(arguments, "page_table") + row * field(arguments, "page_table_stride")
    for token in range(first_packed, last_packed, page_tokens):
        page = int64(read_int32(table + 4 * (token // page_tokens)))
        target = scores + 4 * (token + num_sinks - start)
        codes = (
            field(arguments, "key_codes") + page * field(arguments, "key_codes_page_stride")
            + head * field(arguments, "key_codes_head_stride")
        )  # fmt: skip
        offset = page * field(arguments, "key_scale_page_stride") + head * field(arguments, "key_scale_head_stride")
        done = 0
        while done < num_heads:
            is_many = num_heads - done >= field(arguments, "heads_at_once")
            count = field(arguments, "heads_at_once") if is_many else 1
            for index in range(count):
                scale_floats(target + (done + index) * stride, page_tokens, float32(0.0))
            call(field(arguments, "score_packed_many") if is_many else field(arguments, "score_packed_one"), (
                codes, field(arguments, "key_codes_row_stride"),
                field(arguments, "key_scale") + offset, field(arguments, "key_minimum") + offset,
                queries + done * row_bytes, row_bytes, field(arguments, "head_dim"),
                target + done * stride, stride, factors, field(arguments, "factors_bytes"),
            ))  # fmt: skip
            done += count

    slots = field(arguments, "key_ring_slots")
    rows = (
        field(arguments, "ring_keys") + row * field(arguments, "ring_keys_batch_stride")
        + head * field(arguments, "ring_keys_head_stride")
    )  # fmt: skip
    row_stride = field(arguments, "ring_keys_row_stride")
    token = max(start, num_sinks + num_keys)
    while token < stop:
        slot = token % slots
        count = min(stop - token, slots - slot)
        _score_exact(arguments, rows + slot * row_stride, row_stride, count, queries, scores + 4 * (token - start))
        token += count


@njit(error_model="numpy")
def _score_exact(arguments, rows, row_stride, count, queries, scores):
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    stride = field(arguments, "scores_bytes")
    done = 0
    while done < num_heads:
        is_many = num_heads - done >= field(arguments, "heads_at_once")
        call(field(arguments, "score_exact_many") if is_many else field(arguments, "score_exact_one"), (
            rows, row_stride, count, queries + done * row_bytes, scores + done * stride, stride,
        ))  # fmt: skip
        done += field(arguments, "heads_at_once") if is_many else 1


@njit(error_model="numpy")
def _softmax_tile(arguments, count, scores, partial):
    """Turn scores into powers of 2 of their distance to the highest yet; bring what is summed up in line."""
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    for head in range(num_heads):
        row = scores + head * field(arguments, "scores_bytes")
        highest_place, total_place = partial + 4 * head, partial + 4 * (num_heads + head)
        before = read_float(highest_place)
        highest = max(before, highest_score(row, count))
        shrunk = float32(2.0 ** (before - highest)) if before < highest else float32(1.0)
        if before < highest:
            sums = partial + _state_bytes(num_heads) + head * row_bytes
            scale_floats(sums, row_bytes // 4, shrunk)
        write_float(highest_place, highest)
        write_float(total_place, read_float(total_place) * shrunk + exponentiate(row, count, highest))


@njit(error_model="numpy")
def _sum_tile(arguments, row, head, start, stop, scores, sums):
    """sums[h] += powers[h, t - start] * value[t] of tokens start..stop-1."""
    num_sinks, page_tokens = field(arguments, "num_sinks"), field(arguments, "page_tokens")
    num_values = int64(read_int32(field(arguments, "num_values") + 4 * row))
    stride = field(arguments, "scores_bytes")
    if start < num_sinks:
        rows = (
            field(arguments, "sink_values") + row * field(arguments, "sink_values_batch_stride")
            + head * field(arguments, "sink_values_head_stride")
        )  # fmt: skip
        _sum_exact(arguments, rows, field(arguments, "sink_values_row_stride"), min(stop, num_sinks), scores, sums)

    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    factors = scores + num_heads * stride
    first_packed, last_packed = max(start - num_sinks, 0), min(stop - num_sinks, num_values)
    table = field(arguments, "page_table") + row * field(arguments, "page_table_stride")
    for token in range(first_packed, last_packed, page_tokens):
        page = int64(read_int32(table + 4 * (token // page_tokens)))
        count_rows = min(page_tokens, last_packed - token)
        powers = scores + 4 * (token + num_sinks - start)
        codes = (
            field(arguments, "value_codes") + page * field(arguments, "value_codes_page_stride")
            + head * field(arguments, "value_codes_head_stride")
        )  # fmt: skip
        offset = page * field(arguments, "value_scale_page_stride") + head * field(arguments, "value_scale_head_stride")
        done = 0
        while done < num_heads:
            is_many = num_heads - done >= field(arguments, "heads_at_once")
            call(field(arguments, "sum_packed_many") if is_many else field(arguments, "sum_packed_one"), (
                codes, field(arguments, "value_codes_row_stride"),
                field(arguments, "value_scale") + offset, field(arguments, "value_minimum") + offset,
                powers + done * stride, stride, count_rows,
                sums + done * row_bytes, row_bytes, factors, field(arguments, "factors_bytes"),
            ))  # fmt: skip
            done += field(arguments, "heads_at_once") if is_many else 1

    slots = field(arguments, "value_ring_slots")
    rows = (
        field(arguments, "ring_values") + row * field(arguments, "ring_values_batch_stride")
        + head * field(arguments, "ring_values_head_stride")
    )  # fmt: skip
    row_stride = field(arguments, "ring_values_row_stride")
    token = max(start, num_sinks + num_values)
    while token < stop:
        slot = token % slots
        count = min(stop - token, slots - slot)
        _sum_exact(arguments, rows + slot * row_stride, row_stride, count, scores + 4 * (token - start), sums)
        token += count


@njit(error_model="numpy")
def _sum_exact(arguments, rows, row_stride, count, powers, sums):
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    stride = field(arguments, "scores_bytes")
    done = 0
    while done < num_heads:
        is_many = num_heads - done >= field(arguments, "heads_at_once")
        call(field(arguments, "sum_exact_many") if is_many else field(arguments, "sum_exact_one"), (
            rows, row_stride, count, powers + done * stride, stride, sums + done * row_bytes,
        ))  # fmt: skip
        done += field(arguments, "heads_at_once") if is_many else 1


@njit(error_model="numpy")
def _merge(arguments, into, other):
    """Join two partial softmaxes of the same heads."""
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    for head in range(num_heads):
        total = 4 * (num_heads + head)
        sums = _state_bytes(num_heads) + head * row_bytes
        highest = max(read_float(into + 4 * head), read_float(other + 4 * head))
        ours = float32(2.0 ** (read_float(into + 4 * head) - highest))
        theirs = float32(2.0 ** (read_float(other + 4 * head) - highest))
        scale_floats(into + sums, row_bytes // 4, ours)
        add_scaled(into + sums, other + sums, row_bytes // 4, theirs)
        write_float(into + total, read_float(into + total) * ours + read_float(other + total) * theirs)
        write_float(into + 4 * head, highest)


@njit(error_model="numpy")
def _write_result(arguments, row, head, partial):
    """Divide by the total, round to the query's element, and leave the log-sum-exp in natural units."""
    num_heads = field(arguments, "heads_per_group")
    first_head = head * num_heads
    place = field(arguments, "log_sum_exp") + 4 * (row * field(arguments, "num_kv_heads") * num_heads + first_head)
    for index in range(num_heads):
        total_place = partial + 4 * (num_heads + index)
        total = read_float(total_place)
        is_empty = total == float32(0.0)
        log2_total = -math.inf if is_empty else read_float(partial + 4 * index) + math.log2(total)
        write_float(place + 4 * index, float32(log2_total * _LOG_2))
        write_float(total_place, float32(0.0) if is_empty else float32(1.0) / total)
    call(field(arguments, "write_output"), (
        field(arguments, "output") + row * field(arguments, "output_batch_stride")
        + first_head * field(arguments, "output_head_stride"),
        field(arguments, "output_head_stride"), num_heads,
        partial + _state_bytes(num_heads), partial + 4 * num_heads,
    ))  # fmt: skip

"""The course of attention over a compressed cache: shares out the work, walks the pages, keeps the running softmax.

An item is a run of tiles of one key/value head of one sequence, with all its query heads. Threads draw items
from a counter. A tile is `tile_tokens` packed tokens (whole pages); the first also takes the sinks, the last
the rest of the window. Where a head has several items, the one that ends last merges them by log-sum-exp.

Scores are in units of log2 (the query is multiplied by scaling * log2(e)): the softmax is powers of 2.
This module does not know bits or element types: those are in the kernels that it calls by address.
"""

import math
from typing import NamedTuple

from numba import float32, int64, njit

from kvlens.kernels.native.attend_arguments import field, field_address, side, side_address
from kvlens.kernels.native.coded import (
    add_accumulators,
    coded_tokens,
    prepare_keys,
    shrink_accumulators,
    write_accumulators,
)
from kvlens.kernels.native.dense_rows import add_scaled, exponentiate, highest_score, scale_floats
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.scalars import (
    atomic_add,
    call,
    enter_team,
    read_float,
    read_int32,
    read_int64,
    write_float,
    write_int64,
)

ITEMS_PER_THREAD = 4
_LOG_2 = math.log(2)


class Task(NamedTuple):
    """What an item is about, and memory for the kernels' own use."""

    arguments: int
    row: int
    head: int
    scratch: int


class Operand(NamedTuple):
    """fp32 numbers of a tile in scratch memory.

    `token_step` is 4 where a head has one for every token (scores), and 0 where it has one row for all of
    them (the query, the sums).
    """

    address: int
    head_stride: int
    token_step: int


def attend_entry(source):
    """The kernel that a caller enters: plan, then run the worker on one thread or on the team."""

    def entry(arguments):
        depends_on(source)
        num_items, work = _plan(arguments)
        num_threads = min(field(arguments, "num_threads"), num_items)
        if num_threads > 1 and work >= field(arguments, "min_parallel_work"):
            enter_team(field(arguments, "parallel_address"), field(arguments, "worker"), arguments, num_threads)
        else:
            call(field(arguments, "worker"), (arguments,))

    return entry


def attend_worker(source):
    """The kernel that every thread runs: draw items until none is left."""

    def worker(arguments):
        depends_on(source)
        thread = atomic_add(field_address(arguments, "next_thread"), 1)
        scratch = field(arguments, "scratch") + thread * field(arguments, "scratch_bytes")
        batch, first_items = field(arguments, "batch"), field(arguments, "first_items")
        num_items = read_int64(first_items + 8 * batch)
        item = atomic_add(field_address(arguments, "next_item"), 1)
        while item < num_items:
            row = 0
            while item >= read_int64(first_items + 8 * (row + 1)):
                row += 1
            _attend_item(arguments, scratch, item, row)
            item = atomic_add(field_address(arguments, "next_item"), 1)

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
    write_int64(field_address(arguments, "next_item"), 0)
    write_int64(field_address(arguments, "next_thread"), 0)
    write_int64(field_address(arguments, "tiles_per_item"), tiles_per_item)
    return item, num_tokens * heads * field(arguments, "heads_per_group") * field(arguments, "head_dim")


@njit(error_model="numpy")
def _attend_item(arguments, scratch, item, row):
    """Attend to the tokens of one item, then write its result or merge it with its siblings'.

    Scratch: queries `[heads_per_group, row]`, scores `[heads_per_group, tile]`, then the kernels' own (for codes:
    tables first).
    """
    heads, num_heads = field(arguments, "num_kv_heads"), field(arguments, "heads_per_group")
    first_item = read_int64(field(arguments, "first_items") + 8 * row)
    num_splits = (read_int64(field(arguments, "first_items") + 8 * (row + 1)) - first_item) // heads
    head, split = (item - first_item) // num_splits, (item - first_item) % num_splits
    partial = field(arguments, "partials") + item * field(arguments, "partial_bytes")
    keys, values = field_address(arguments, "keys"), field_address(arguments, "values")

    row_bytes, scores_bytes = field(arguments, "row_bytes"), field(arguments, "scores_bytes")
    queries = Operand(scratch, row_bytes, 0)
    scores = Operand(scratch + num_heads * row_bytes, scores_bytes, 4)
    sums = Operand(partial + _state_bytes(num_heads), row_bytes, 0)
    task = Task(arguments, row, head, scores.address + num_heads * scores_bytes)

    query = field(arguments, "query") + row * field(arguments, "query_batch_stride")
    query += head * num_heads * field(arguments, "query_head_stride")
    factor = field_address(arguments, "query_factor")
    call(
        field(arguments, "read_query"),
        (query, field(arguments, "query_head_stride"), num_heads, scratch, factor),
    )
    _clear_partial(arguments, partial)
    if field(arguments, "accumulator_bytes") > 0:
        prepare_keys(arguments, row, head, task.scratch)

    length = int64(read_int32(field(arguments, "length") + 4 * row))
    tiles_per_item = field(arguments, "tiles_per_item")
    for tile in range(split * tiles_per_item, min(_num_tiles(arguments, row), (split + 1) * tiles_per_item)):
        start = tile * field(arguments, "tile_tokens") + field(arguments, "num_sinks")
        stop = min(length, start + field(arguments, "tile_tokens"))
        start = 0 if tile == 0 else start
        if start < stop:
            _walk(task, keys, values, start, stop, queries, scores)
            _softmax_tile(arguments, stop - start, scores, partial)
            _walk(task, values, keys, start, stop, scores, sums)

    if num_splits == 1:
        _write_result(arguments, row, head, partial)
    elif atomic_add(field(arguments, "num_finished") + 8 * (row * heads + head), 1) == num_splits - 1:
        first = partial - split * field(arguments, "partial_bytes")
        for other in range(1, num_splits):
            _merge(arguments, first, first + other * field(arguments, "partial_bytes"))
        _write_result(arguments, row, head, first)


# ---------------------------------------------------------------------------------------------------------
# Keys and values. Both are walked alike: sinks, pages, ring.


@njit(error_model="numpy")
def _walk(task, here, other, start, stop, factors, results):
    """Run the kernels of the side `here` over the tokens start .. stop-1."""
    arguments, row, head = task.arguments, task.row, task.head
    num_sinks, page_tokens = field(arguments, "num_sinks"), field(arguments, "page_tokens")
    num_packed = int64(read_int32(side(here, "num_packed") + 4 * row))

    if start < num_sinks:
        sinks = side(here, "sinks") + row * side(here, "sinks_batch_stride")
        sinks += head * side(here, "sinks_head_stride")
        count = min(stop, num_sinks) - start
        _exact_tokens(task, here, sinks, side(here, "sinks_row_stride"), 0, count, factors, results)

    first, last = max(start - num_sinks, 0), min(stop - num_sinks, num_packed)
    for token in range(first, last, page_tokens):
        page = _page(task, here, token)
        if token + page_tokens < last:
            following = _page(task, here, token + page_tokens)
        else:
            following = _first_page_after(task, here, other, first, page)
        count = min(page_tokens, last - token)
        _packed_tokens(task, here, page, following, token, token + num_sinks - start, count, factors, results)

    slots, row_stride = side(here, "ring_slots"), side(here, "ring_row_stride")
    ring = side(here, "ring") + row * side(here, "ring_batch_stride") + head * side(here, "ring_head_stride")
    token = max(start, num_sinks + num_packed)
    while token < stop:
        slot = token % slots
        count = min(stop - token, slots - slot)
        rows = ring + slot * row_stride
        _exact_tokens(task, here, rows, row_stride, token - start, count, factors, results)
        token += count


@njit(error_model="numpy")
def _page(task, here, token):
    """Addresses of codes, scale and minimum of the page that holds a packed token."""
    arguments = task.arguments
    table = field(arguments, "page_table") + task.row * field(arguments, "page_table_stride")
    page = int64(read_int32(table + 4 * (token // field(arguments, "page_tokens"))))
    codes = page * side(here, "codes_page_stride") + task.head * side(here, "codes_head_stride")
    scale = page * side(here, "scale_page_stride") + task.head * side(here, "scale_head_stride")
    return side(here, "codes") + codes, side(here, "scale") + scale, side(here, "minimum") + scale


@njit(error_model="numpy")
def _first_page_after(task, here, other, first, page):
    """What is read after a side's last page of a tile: values of the same tile, or keys of the next."""
    is_keys = here == field_address(task.arguments, "keys")
    token = first if is_keys else first + field(task.arguments, "tile_tokens")
    if token < int64(read_int32(side(other, "num_packed") + 4 * task.row)):
        return _page(task, other, token)
    return page


@njit(error_model="numpy")
def _heads_together(num_left):
    """Heads that the next kernel takes: four, two or one."""
    return 4 if num_left >= 4 else 2 if num_left >= 2 else 1


@njit(error_model="numpy")
def _packed_tokens(task, here, page, following, token, offset, num_tokens, factors, results):
    """Run the packed kernel over one page, for all heads.

    `token`: its first, among the packed ones; `offset`: the same in the tile.
    """
    arguments = task.arguments
    if side(here, "coded") != 0:
        coded_tokens(task, here, page, following, token, offset, num_tokens, factors, results)
        return
    page_tokens, num_heads = field(arguments, "page_tokens"), field(arguments, "heads_per_group")
    is_keys = here == field_address(arguments, "keys")
    num_rows = field(arguments, "head_dim") if is_keys else num_tokens
    done = 0
    while done < num_heads:
        count = _heads_together(num_heads - done)
        factor = factors.address + offset * factors.token_step + done * factors.head_stride
        result = results.address + offset * results.token_step + done * results.head_stride
        if is_keys:  # the kernel adds to what is there
            for index in range(count):
                scale_floats(result + index * results.head_stride, page_tokens, float32(0.0))
        call(read_int64(side_address(here, "packed_by_1") + 8 * (count // 2)), (
            page[0], side(here, "codes_row_stride"), page[1], page[2], following[0], following[1], following[2],
            factor, factors.head_stride, num_rows, result, results.head_stride,
            task.scratch, field(arguments, "factors_bytes"),
        ))  # fmt: skip
        done += count


@njit(error_model="numpy")
def _exact_tokens(task, here, rows, row_stride, offset, num_tokens, factors, results):
    """Run the exact kernel over neighbouring rows, for all heads."""
    num_heads = field(task.arguments, "heads_per_group")
    done = 0
    while done < num_heads:
        count = _heads_together(num_heads - done)
        factor = factors.address + offset * factors.token_step + done * factors.head_stride
        result = results.address + offset * results.token_step + done * results.head_stride
        call(
            read_int64(side_address(here, "exact_by_1") + 8 * (count // 2)),
            (rows, row_stride, num_tokens, factor, factors.head_stride, result, results.head_stride),
        )
        done += count


# ---------------------------------------------------------------------------------------------------------
# Softmax. A partial result is: highest score, total and latest factor of every head; sums of every head; for
# codes, accumulators.


@njit(error_model="numpy")
def _state_bytes(num_heads):
    """Highest scores, totals and factors, filled up to whole cache lines."""
    return (3 * 4 * num_heads + 63) // 64 * 64


@njit(error_model="numpy")
def _accumulators(arguments, partial):
    num_heads = field(arguments, "heads_per_group")
    return partial + _state_bytes(num_heads) + num_heads * field(arguments, "row_bytes")


@njit(error_model="numpy")
def _clear_partial(arguments, partial):
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    for head in range(num_heads):
        write_float(partial + 4 * head, float32(-math.inf))
        write_float(partial + 4 * (num_heads + head), float32(0.0))
    size = num_heads * row_bytes + field(arguments, "accumulator_bytes")
    scale_floats(partial + _state_bytes(num_heads), size // 4, float32(0.0))


@njit(error_model="numpy")
def _softmax_tile(arguments, count, scores, partial):
    """Turn scores into powers of 2 of their distance to the highest yet; bring the sums so far in line."""
    num_heads, row_bytes = field(arguments, "heads_per_group"), field(arguments, "row_bytes")
    has_risen = False
    for head in range(num_heads):
        row = scores.address + head * scores.head_stride
        highest_place, total_place = partial + 4 * head, partial + 4 * (num_heads + head)
        before = read_float(highest_place)
        highest = max(before, highest_score(row, count))
        shrunk = float32(1.0)
        if before < highest:
            has_risen = before > -math.inf
            shrunk = float32(2.0 ** (before - highest))
            scale_floats(partial + _state_bytes(num_heads) + head * row_bytes, row_bytes // 4, shrunk)
        write_float(highest_place, highest)
        write_float(partial + 4 * (2 * num_heads + head), shrunk)
        write_float(total_place, read_float(total_place) * shrunk + exponentiate(row, count, highest))
    if has_risen and field(arguments, "accumulator_bytes") > 0:
        shrink_accumulators(arguments, _accumulators(arguments, partial), partial + 8 * num_heads)


@njit(error_model="numpy")
def _merge(arguments, into, other):
    """Join two partial results of the same heads."""
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
        write_float(into + 4 * (2 * num_heads + head), ours)
        write_float(other + 4 * (2 * num_heads + head), theirs)
    if field(arguments, "accumulator_bytes") > 0:
        places = _accumulators(arguments, into), _accumulators(arguments, other)
        shrink_accumulators(arguments, places[0], into + 8 * num_heads)
        add_accumulators(arguments, places[0], places[1], other + 8 * num_heads)


@njit(error_model="numpy")
def _write_result(arguments, row, head, partial):
    """Divide by the total, round to the query's element, and leave the log-sum-exp in natural units."""
    num_heads = field(arguments, "heads_per_group")
    first_head = row * field(arguments, "num_kv_heads") * num_heads + head * num_heads
    for index in range(num_heads):
        total_place = partial + 4 * (num_heads + index)
        total = read_float(total_place)
        is_empty = total == float32(0.0)
        log2_sum = -math.inf if is_empty else read_float(partial + 4 * index) + math.log2(total)
        write_float(field(arguments, "log_sum_exp") + 4 * (first_head + index), float32(log2_sum * _LOG_2))
        write_float(total_place, float32(0.0) if is_empty else float32(1.0) / total)
    output = field(arguments, "output") + row * field(arguments, "output_batch_stride")
    output += head * num_heads * field(arguments, "output_head_stride")
    sums = partial + _state_bytes(num_heads)
    call(
        field(arguments, "write_output"),
        (output, field(arguments, "output_head_stride"), num_heads, sums, partial + 4 * num_heads),
    )
    if field(arguments, "accumulator_bytes") > 0:
        write_accumulators(arguments, _accumulators(arguments, partial), partial + 4 * num_heads, first_head)

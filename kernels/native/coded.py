"""What attention over sparse codes adds to the course of `attend`: tables before, accumulators beside the sums.

Before the first tile an item weaves the rows of its heads' table (`tables`, query · dictionary^T) into lanes, or,
where keys are coded before RoPE (`atoms`), turns its head's mean. Its partial result then has, after the sums of
exact values, accumulators for every atom of the value dictionary and one for the probabilities themselves,
`[blocks of lanes, parts, atoms, lanes]`; they shrink and merge like sums, and leave as rows
`[heads, parts, atoms]`, to meet the dictionary outside. Where heads do not fill whole blocks of lanes the
last block takes some again.

Where nothing is coded `accumulator_bytes` is 0 and nothing here is called.
"""

from numba import njit

from kvlens.kernels.native.attend_arguments import field, field_address, side
from kvlens.kernels.native.dense_rows import add_scaled_lanes, scale_lanes
from kvlens.kernels.native.scalars import call


@njit(error_model="numpy")
def num_blocks(arguments):
    lanes = field(arguments, "lanes")
    return (field(arguments, "heads_per_group") + lanes - 1) // lanes


@njit(error_model="numpy")
def first_head(arguments, block):
    """The first query head of a block of lanes, within its key/value head."""
    lanes = field(arguments, "lanes")
    return max(0, min(block * lanes, field(arguments, "heads_per_group") - lanes))


@njit(error_model="numpy")
def block_bytes(arguments):
    """Accumulators of one block of lanes."""
    return field(arguments, "accumulator_part_bytes") * field(arguments, "value_parts")


@njit(error_model="numpy")
def prepare_keys(arguments, row, head, scratch):
    """What an item needs before its first key: tables in lanes (one head's stays where it is), or turned means."""
    row_bytes, lanes = field(arguments, "table_row_bytes"), field(arguments, "lanes")
    if field(arguments, "atoms") != 0:
        if field(arguments, "means") != 0:
            mean = field(arguments, "means") + head * field(arguments, "means_stride")
            target = scratch + field(arguments, "turn_scratch_offset")
            call(field(arguments, "turn_means"), (mean, field(arguments, "turn_steps"), target))
    elif lanes > 1:
        first_row = (row * field(arguments, "num_kv_heads") + head) * field(arguments, "heads_per_group")
        for block in range(num_blocks(arguments)):
            rows = field(arguments, "tables") + (first_row + first_head(arguments, block)) * row_bytes
            call(
                field(arguments, "weave_rows"),
                (rows, row_bytes, row_bytes // 4, scratch + block * row_bytes * lanes),
            )


@njit(error_model="numpy")
def coded_tokens(task, here, page, following, token, offset, num_tokens, factors, results):
    """Run the kernel of coded tokens over one page, for all heads.

    `token`: the first of the page among the coded ones; `offset`: the same in the tile.
    """
    arguments, lanes = task.arguments, field(task.arguments, "lanes")
    row_bytes, is_keys = field(arguments, "table_row_bytes"), here == field_address(arguments, "keys")
    num_heads, blocks = field(arguments, "heads_per_group"), num_blocks(arguments)
    rows = results if is_keys else factors
    for block in range(blocks):
        first = first_head(arguments, block)
        rows_address = rows.address + offset * rows.token_step + first * rows.head_stride
        if is_keys and field(arguments, "atoms") != 0:
            start = token // field(arguments, "page_tokens") * field(arguments, "turn_starts_stride")
            call(side(here, "coded"), (
                page[0], side(here, "codes_row_stride"), page[1], side(here, "scale_row_stride"), following[0],
                following[1], num_tokens, field(arguments, "atoms"), field(arguments, "turn_steps"),
                field(arguments, "turn_starts") + start, factors.address + first * factors.head_stride,
                factors.head_stride, rows_address, rows.head_stride,
                task.scratch + field(arguments, "turn_scratch_offset"),
            ))  # fmt: skip
            continue
        totals = results.address
        if not is_keys:
            table = results.address + num_heads * results.head_stride + block * block_bytes(arguments)
            totals = table + field(arguments, "totals_offset")
        elif lanes > 1:
            table = task.scratch + block * row_bytes * lanes
        else:
            heads_before = (task.row * field(arguments, "num_kv_heads") + task.head) * num_heads
            table = field(arguments, "tables") + heads_before * row_bytes
        call(side(here, "coded"), (
            page[0], side(here, "codes_row_stride"), page[1], side(here, "scale_row_stride"), following[0],
            following[1], num_tokens, table, field(arguments, "accumulator_part_bytes"), totals,
            rows_address, rows.head_stride, task.scratch + blocks * row_bytes * lanes,
        ))  # fmt: skip


@njit(error_model="numpy")
def shrink_accumulators(arguments, accumulators, factors):
    """Multiply the accumulators by their heads' factors, fp32 numbers at `factors`."""
    for block in range(num_blocks(arguments)):
        size = block_bytes(arguments)
        place = accumulators + block * size
        scale_lanes(place, size // 4, factors + 4 * first_head(arguments, block), field(arguments, "lanes"))


@njit(error_model="numpy")
def add_accumulators(arguments, into, other, factors):
    """Add the accumulators at `other`, multiplied by their heads' factors, to those at `into`."""
    for block in range(num_blocks(arguments)):
        size = block_bytes(arguments)
        add_scaled_lanes(
            into + block * size, other + block * size, size // 4,
            factors + 4 * first_head(arguments, block), field(arguments, "lanes"),
        )  # fmt: skip


@njit(error_model="numpy")
def write_accumulators(arguments, accumulators, factors, first_row):
    """Leave the accumulators, multiplied by their heads' factors, as rows `first_row` on."""
    parts, row_bytes = field(arguments, "value_parts"), field(arguments, "accumulator_row_bytes")
    part_bytes = field(arguments, "accumulator_part_bytes")
    for block in range(num_blocks(arguments)):
        first = first_head(arguments, block)
        for part in range(parts):
            call(field(arguments, "part_table"), (
                accumulators + (block * parts + part) * part_bytes, row_bytes // parts // 4, factors + 4 * first,
                field(arguments, "accumulators") + (first_row + first) * row_bytes + part * (row_bytes // parts),
                row_bytes,
            ))  # fmt: skip

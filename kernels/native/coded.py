"""What attention over sparse codes adds to the course of `attend`: tables before, accumulators beside the sums.

Before the first tile an item weaves the rows of its heads' table (`tables`, query · dictionary^T) into lanes.
Its partial result then has, after the sums of exact values, accumulators for every atom of the value
dictionary, `[blocks of lanes, parts, atoms, lanes]`; they shrink and merge like sums, and leave as rows
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
def weave_tables(arguments, first_row, scratch):
    """Put the tables of a key/value head's queries, rows `first_row` on, into lanes; one head's stays where it is."""
    row_bytes, lanes = field(arguments, "table_row_bytes"), field(arguments, "lanes")
    if lanes > 1:
        for block in range(num_blocks(arguments)):
            rows = field(arguments, "tables") + (first_row + first_head(arguments, block)) * row_bytes
            call(
                field(arguments, "weave_rows"),
                (rows, row_bytes, row_bytes // 4, scratch + block * row_bytes * lanes),
            )


@njit(error_model="numpy")
def coded_tokens(task, here, page, following, offset, num_tokens, factors, results):
    """Run the kernel of coded tokens over one page, for all heads. `offset`: of its first token in the tile."""
    arguments, lanes = task.arguments, field(task.arguments, "lanes")
    row_bytes, is_keys = field(arguments, "table_row_bytes"), here == field_address(arguments, "keys")
    num_heads, blocks = field(arguments, "heads_per_group"), num_blocks(arguments)
    for block in range(blocks):
        first = first_head(arguments, block)
        if not is_keys:
            table = results.address + num_heads * results.head_stride + block * block_bytes(arguments)
        elif lanes > 1:
            table = task.scratch + block * row_bytes * lanes
        else:
            heads_before = (task.row * field(arguments, "num_kv_heads") + task.head) * num_heads
            table = field(arguments, "tables") + heads_before * row_bytes
        rows = results if is_keys else factors
        call(side(here, "coded"), (
            page[0], side(here, "codes_row_stride"), page[1], side(here, "scale_row_stride"), following[0],
            following[1], num_tokens, table, field(arguments, "accumulator_part_bytes"),
            rows.address + offset * rows.token_step + first * rows.head_stride, rows.head_stride,
            task.scratch + blocks * row_bytes * lanes,
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

"""Weighted sums over packed rows: the inner loop of attention, for keys and for values alike.

    sums[h, i] += sum over rows r of factors[h, r] * (scale[r, i // G] * codes[r, i] + minimum[r, i // G])

For keys a row is a channel of a page (N = page_tokens, factors = the query) and the sums are scores; for
values a row is a token (N = head_dim, factors = the probabilities) and the sums are the output.

The trick. A group's scale turns the handful of possible codes into a table of finished products, so that
a value costs a shift, a lookup and an addition, and no conversion from int to float:

    4 bits: table[j] = (factor * scale) * j, sixteen entries.
    2 bits: two rows at once. Their codes are merged into nibbles, and the table holds the sixteen sums
            table[j + 4*k] = (factor0 * scale0) * j + (factor1 * scale1) * k.

The minima need no code at all: factor * minimum is summed over the rows once a group. Other widths, groups
that do not fill a vector, and machines without AVX-512 convert the codes and multiply.

This module does not know about pages, heads' grouping or softmax.
"""

from dataclasses import dataclass

from kvlens.kernels.native.vectors import (
    FP16,
    NUM_LANES,
    Lanes,
    at,
    constant,
    load_broadcast,
    load_floats,
    load_words,
)
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_LOW_PAIRS = 0x3333  # the lower two bits of every nibble of a word
_MAX_ACCUMULATORS = 16  # half of the 512-bit registers


@dataclass(frozen=True)
class RowFormat:
    """What is fixed when a kernel is compiled: rows of N planar codes, for `num_heads` factors at once."""

    bits: int
    row_values: int
    group_size: int
    num_heads: int
    has_lookups: bool

    @property
    def num_words(self) -> int:
        return self.row_values * self.bits // 16

    @property
    def num_groups(self) -> int:
        return self.row_values // self.group_size

    @property
    def uses_tables(self) -> bool:
        """Lookups pay where sixteen neighbours always share a scale."""
        return self.has_lookups and self.bits in (2, 4) and self.group_size % NUM_LANES == 0

    @property
    def rows_per_step(self) -> int:
        return 2 if self.uses_tables and self.bits == 2 else 1

    def slabs(self) -> list["Slab"]:
        """The row cut into parts whose sums fit the registers, if its words come in whole vectors."""
        num_vectors = -(-self.row_values // NUM_LANES)
        num_slabs = 1
        if self.num_words % NUM_LANES == 0:
            choices = [n for n in range(1, self.num_words // NUM_LANES + 1) if self.num_words // NUM_LANES % n == 0]
            fits = [n for n in choices if num_vectors // n * self.num_heads <= _MAX_ACCUMULATORS]
            num_slabs = fits[0] if fits else choices[-1]
        width = self.num_words // num_slabs
        return [Slab(self, index * width, width) for index in range(num_slabs)]


@dataclass(frozen=True)
class Slab:
    """Words `first_word .. first_word + num_words - 1` of every row."""

    format: RowFormat
    first_word: int
    num_words: int

    def vectors(self) -> list[list[int]]:
        """The values in these words, as runs of sixteen. A run past the row's end repeats its last value."""
        row, words = self.format.row_values, self.format.num_words
        if self.num_words == words:
            starts = range(0, row, NUM_LANES)
        else:
            starts = [
                slot * words + self.first_word + word
                for slot in range(16 // self.format.bits)
                for word in range(0, self.num_words, NUM_LANES)
            ]
        return [[min(start + lane, row - 1) for lane in range(NUM_LANES)] for start in starts]

    def source(self, value: int) -> tuple[int, int]:
        """Word (within the slab) and slot of a value."""
        slot, word = divmod(value, self.format.num_words)
        return word - self.first_word, slot


@dataclass(frozen=True)
class _Arguments:
    """Addresses and counts, all int64. Strides in bytes."""

    codes: ir.Value
    codes_stride: ir.Value
    scale: ir.Value
    minimum: ir.Value
    factors: ir.Value
    factors_stride: ir.Value
    num_rows: ir.Value
    sums: ir.Value
    sums_stride: ir.Value
    scratch: ir.Value
    scratch_stride: ir.Value


def emit_accumulate(builder: ir.IRBuilder, arguments: list[ir.Value], row_format: RowFormat) -> None:
    """Emit the whole kernel for one `RowFormat`."""
    given = _Arguments(*arguments)
    offsets = _emit_scaled_factors(builder, given, row_format)
    for slab in row_format.slabs():
        _emit_slab(builder, given, slab, offsets)


def _head(builder, base: ir.Value, stride: ir.Value, head: int) -> ir.Value:
    return builder.add(base, builder.mul(stride, stride.type(head)))


def _emit_scaled_factors(builder, given: _Arguments, form: RowFormat) -> list[Lanes]:
    """Write factor * scale of every row and group to scratch; give sum(factor * minimum) of every group.

    Shapes: scratch fp32 `[num_heads, num_rows + 1, num_groups]`, the last row zero; result `[num_groups]` a head.
    """
    groups = form.num_groups
    rows_at_once = NUM_LANES // groups if groups <= NUM_LANES and NUM_LANES % groups == 0 else 1
    num_whole = builder.mul(builder.udiv(given.num_rows, given.num_rows.type(rows_at_once)), given.num_rows.type(rows_at_once))
    factors = [_head(builder, given.factors, given.factors_stride, head) for head in range(form.num_heads)]
    scratch = [_head(builder, given.scratch, given.scratch_stride, head) for head in range(form.num_heads)]

    def pass_over(start, stop, num_rows: int) -> list[Lanes]:
        width = num_rows * groups
        kind = ir.VectorType(ir.FloatType(), width)
        totals = [cgutils.alloca_once_value(builder, constant(kind, 0)) for _ in range(form.num_heads)]
        with cgutils.for_range_slice(builder, start, stop, start.type(num_rows)) as (row, _):
            half_offset = builder.mul(row, row.type(2 * groups))
            scale = load_floats(builder, builder.add(given.scale, half_offset), width, element=FP16)
            minimum = load_floats(builder, builder.add(given.minimum, half_offset), width, element=FP16)
            for head in range(form.num_heads):
                address = builder.add(factors[head], builder.mul(row, row.type(4)))
                factor = load_floats(builder, address, num_rows).pick([lane // groups for lane in range(width)])
                target = builder.add(scratch[head], builder.mul(row, row.type(4 * groups)))
                builder.store((factor * scale).value, at(builder, target, kind), align=4)
                total = Lanes(builder, builder.load(totals[head]))
                builder.store(factor.times_plus(minimum, total).value, totals[head])
        return [Lanes(builder, builder.load(total)) for total in totals]

    zero = given.num_rows.type(0)
    totals = pass_over(zero, num_whole, rows_at_once)
    while totals[0].num_lanes > groups:
        half = totals[0].num_lanes // 2
        totals = [t.pick(list(range(half))) + t.pick(list(range(half, 2 * half))) for t in totals]
    if rows_at_once > 1:
        rest = pass_over(num_whole, given.num_rows, 1)
        totals = [total + more for total, more in zip(totals, rest, strict=True)]
    for address in scratch:
        end = builder.add(address, builder.mul(given.num_rows, zero.type(4 * groups)))
        kind = ir.VectorType(ir.FloatType(), groups)
        builder.store(constant(kind, 0), at(builder, end, kind), align=4)
    return totals


def _emit_slab(builder, given: _Arguments, slab: Slab, offsets: list[Lanes]) -> None:
    form, vectors = slab.format, slab.vectors()
    groups_of = [[value // form.group_size for value in run] for run in vectors]
    sums = [_head(builder, given.sums, given.sums_stride, head) for head in range(form.num_heads)]
    scratch = [_head(builder, given.scratch, given.scratch_stride, head) for head in range(form.num_heads)]

    accumulators = {}
    for head in range(form.num_heads):
        for index, run in enumerate(vectors):
            start = load_floats(builder, builder.add(sums[head], sums[head].type(4 * run[0])), NUM_LANES)
            first = start + offsets[head].pick(groups_of[index])
            accumulators[head, index] = cgutils.alloca_once_value(builder, first.value)

    def add(head: int, index: int, term) -> None:
        place = accumulators[head, index]
        builder.store(term(Lanes(builder, builder.load(place))).value, place)

    zero = given.num_rows.type(0)
    with cgutils.for_range_slice(builder, zero, given.num_rows, zero.type(form.rows_per_step)) as (row, _):
        words = [_load_row_words(builder, given, slab, row, more) for more in range(form.rows_per_step)]
        coefficients = [
            builder.add(address, builder.mul(row, row.type(4 * form.num_groups))) for address in scratch
        ]
        if form.uses_tables:
            nibbles = _merge_pairs(words[0], words[1]) if form.bits == 2 else words[0]
            indices = [_nibble_indices(slab, nibbles, run) for run in vectors]
            for head in range(form.num_heads):
                tables = {}
                for index, groups in enumerate(groups_of):
                    group = groups[0]
                    if group not in tables:
                        tables[group] = _product_table(builder, form, coefficients[head], group)
                    found = indices[index].looked_up_in(tables[group], index_bits=4)
                    add(head, index, lambda total, found=found: total + found)
        else:
            for index, run in enumerate(vectors):
                codes = _codes(slab, words[0], run)
                for head in range(form.num_heads):
                    scale = _group_lanes(builder, form, coefficients[head], groups_of[index])
                    add(head, index, lambda total, s=scale, c=codes: c.times_plus(s, total))

    for (head, index), place in accumulators.items():
        address = builder.add(sums[head], sums[head].type(4 * vectors[index][0]))
        value = builder.load(place)
        builder.store(value, at(builder, address, value.type), align=4)


def _load_row_words(builder, given: _Arguments, slab: Slab, row: ir.Value, more: int) -> Lanes:
    """The slab's words of row `row + more`; past the last row those of `row` again (its factor is 0)."""
    wanted = builder.add(row, row.type(more))
    if more:
        wanted = builder.select(builder.icmp_unsigned("<", wanted, given.num_rows), wanted, row)
    address = builder.add(given.codes, builder.mul(wanted, given.codes_stride))
    return load_words(builder, builder.add(address, address.type(2 * slab.first_word)), slab.num_words)


def _merge_pairs(row0: Lanes, row1: Lanes) -> Lanes:
    """Nibbles `code0 + 4 * code1` of two rows of 2-bit words: those of even slots, then those of odd slots."""
    even = (row0 & _LOW_PAIRS) | ((row1 << 2) & ~_LOW_PAIRS)
    odd = ((row0 >> 2) & _LOW_PAIRS) | (row1 & ~_LOW_PAIRS)
    return even.pick(list(range(2 * row0.num_lanes)), odd)


def _nibble_indices(slab: Slab, nibbles: Lanes, run: list[int]) -> Lanes:
    """Lanes whose low four bits select a value's product. What lies above them is not looked at."""
    if slab.format.bits == 4:
        lanes, shifts = zip(*((word, 4 * slot) for word, slot in map(slab.source, run)), strict=True)
    else:
        lanes, shifts = zip(
            *((word + slab.num_words * (slot % 2), 4 * (slot // 2)) for word, slot in map(slab.source, run)),
            strict=True,
        )
    return nibbles.pick(list(lanes)) >> list(shifts)


def _product_table(builder, form: RowFormat, coefficients: ir.Value, group: int) -> Lanes:
    first = load_broadcast(builder, coefficients, 4 * group)
    if form.bits == 4:
        return first * list(range(16))
    second = load_broadcast(builder, coefficients, 4 * (form.num_groups + group))
    return second.times_plus([j // 4 for j in range(16)], first * [j % 4 for j in range(16)])


def _codes(slab: Slab, words: Lanes, run: list[int]) -> Lanes:
    lanes, slots = zip(*map(slab.source, run), strict=True)
    bits = slab.format.bits
    return ((words.pick(list(lanes)) >> [bits * slot for slot in slots]) & (2**bits - 1)).as_float()


def _group_lanes(builder, form: RowFormat, coefficients: ir.Value, groups: list[int]) -> Lanes:
    if len(set(groups)) == 1:
        return load_broadcast(builder, coefficients, 4 * groups[0])
    return load_floats(builder, coefficients, form.num_groups).pick(groups)


@intrinsic(prefer_literal=True)
def accumulate_rows(typing, arguments, bits, row_values, group_size, num_heads, has_lookups):
    """Run the kernel on a tuple of the eleven int64 of `_Arguments`; the rest are literals of `RowFormat`."""
    literals = [bits, row_values, group_size, num_heads, has_lookups]
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    row_format = RowFormat(*(literal.literal_value for literal in literals))

    def codegen(context, builder, signature, values):
        emit_accumulate(builder, cgutils.unpack_tuple(builder, values[0]), row_format)
        return context.get_dummy_value()

    return types.void(arguments, *literals), codegen

"""Weighted sums over packed rows: the inner loop of attention, for keys and for values alike.

    sums[h, i] += sum over rows r of factors[h, r] * (scale[r, i // G] * codes[r, i] + minimum[r, i // G])

For keys a row is a channel of a page (N = page_tokens, factors = the query) and the sums are scores; for
values a row is a token (N = head_dim, factors = the probabilities) and the sums are the output.

Scale and minimum never meet a code. First, for all rows, factor * scale goes to scratch memory and
factor * minimum is summed up once a group. Then a vector of sixteen values costs

- 2 bits, one head: 2.25 instructions. Two rows at once; their codes, merged into nibbles, select from a
  table of the sixteen sums `j * (factor0 * scale0) + k * (factor1 * scale1)`. No conversion, half the adds.
- else: shift, look the code up as a float, and one fused multiply-add a head. Without AVX-512 the lookup is
  a mask and a conversion.

This module does not know about pages, the grouping of heads, or softmax.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.vectors import (
    FP16,
    NUM_LANES,
    Lanes,
    constant,
    load_broadcast,
    load_floats,
    load_words,
    prefetch,
    splat,
    store_floats,
)

MAX_HEADS = 4
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
    def merges_rows(self) -> bool:
        """Tables of finished products pay for one head, where sixteen neighbours always share a scale."""
        is_uniform = self.group_size % NUM_LANES == 0
        return self.has_lookups and self.bits == 2 and self.num_heads == 1 and is_uniform

    @property
    def rows_per_step(self) -> int:
        return 2 if self.merges_rows else 1

    def slabs(self) -> list[list[list[int]]]:
        """The row's values as vectors of sixteen, in slabs of as many as leave their sums in registers.

        A vector past the row's end repeats the last value; there is room for its sums.
        """
        words = self.num_words
        starts = list(range(0, self.row_values, NUM_LANES))
        if words % NUM_LANES == 0:  # vectors out of the same words go together
            starts.sort(key=lambda start: (start % words, start // words))
        vectors = [[min(start + lane, self.row_values - 1) for lane in range(NUM_LANES)] for start in starts]
        size = max(1, _MAX_ACCUMULATORS // self.num_heads)
        return [vectors[first : first + size] for first in range(0, len(vectors), size)]

    def place(self, value: int) -> tuple[int, int]:
        """Word and slot of a value."""
        slot, word = divmod(value, self.num_words)
        return word, slot


@dataclass(frozen=True)
class RowArguments:
    """The parameters of a kernel: addresses, counts, and strides in bytes.

    Shapes: codes int16 `[num_rows, num_words]` with any row stride; scale, minimum fp16
    `[num_rows, num_groups]` without gaps; factors fp32 `[num_heads, num_rows]`, sums fp32 `[num_heads, N]`,
    scratch fp32 `[num_heads, num_rows + 1, num_groups]`. `next_*` is what the next call reads, to prefetch.
    """

    codes: ir.Value
    codes_stride: ir.Value
    scale: ir.Value
    minimum: ir.Value
    next_codes: ir.Value
    next_scale: ir.Value
    next_minimum: ir.Value
    factors: ir.Value
    factors_stride: ir.Value
    num_rows: ir.Value
    sums: ir.Value
    sums_stride: ir.Value
    scratch: ir.Value
    scratch_stride: ir.Value


def emit_accumulate(builder: ir.IRBuilder, arguments: list[ir.Value], row_format: RowFormat) -> None:
    """Emit the whole kernel for one `RowFormat`."""
    given = RowArguments(*arguments)
    offsets = _emit_scaled_factors(builder, given, row_format)
    for index, vectors in enumerate(row_format.slabs()):
        _emit_slab(builder, given, row_format, vectors, offsets, is_first=index == 0)


def _heads(builder, base: ir.Value, stride: ir.Value, num_heads: int) -> list[ir.Value]:
    return [builder.add(base, builder.mul(stride, stride.type(head))) for head in range(num_heads)]


def _plus(builder, base: ir.Value, index: ir.Value, stride: int) -> ir.Value:
    return builder.add(base, builder.mul(index, index.type(stride)))


def _emit_scaled_factors(builder, given: RowArguments, form: RowFormat) -> list[Lanes]:
    """Write factor * scale of every row and group to scratch; give sum(factor * minimum) of every group.

    The row after the last is zero. Shapes: result `[num_groups]` a head.
    """
    groups = form.num_groups
    rows_at_once = NUM_LANES // groups if groups <= NUM_LANES and NUM_LANES % groups == 0 else 1
    factors = _heads(builder, given.factors, given.factors_stride, form.num_heads)
    scratch = _heads(builder, given.scratch, given.scratch_stride, form.num_heads)
    zero = given.num_rows.type(0)

    def pass_over(start, stop, num_rows: int) -> list[Lanes]:
        width = num_rows * groups
        zeros = constant(ir.VectorType(ir.FloatType(), width), 0)
        totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(form.num_heads)]
        with cgutils.for_range_slice(builder, start, stop, zero.type(num_rows)) as (row, _):
            places = [_plus(builder, base, row, 2 * groups) for base in (given.scale, given.minimum)]
            scale, minimum = (load_floats(builder, place, width, element=FP16) for place in places)
            for base in (given.next_scale, given.next_minimum):
                prefetch(builder, _plus(builder, base, row, 2 * groups), 2 * width)
            for head in range(form.num_heads):
                factor = load_floats(builder, _plus(builder, factors[head], row, 4), num_rows)
                factor = factor.pick([lane // groups for lane in range(width)])
                store_floats(builder, factor * scale, _plus(builder, scratch[head], row, 4 * groups))
                total = Lanes(builder, builder.load(totals[head]))
                builder.store(factor.times_plus(minimum, total).value, totals[head])
        return [Lanes(builder, builder.load(total)) for total in totals]

    num_whole = builder.and_(given.num_rows, zero.type(-rows_at_once))
    totals = pass_over(zero, num_whole, rows_at_once)
    while totals[0].num_lanes > groups:
        half = totals[0].num_lanes // 2
        totals = [t.pick(list(range(half))) + t.pick(list(range(half, 2 * half))) for t in totals]
    if rows_at_once > 1:
        rest = pass_over(num_whole, given.num_rows, 1)
        totals = [total + more for total, more in zip(totals, rest, strict=True)]
    for address in scratch:
        end = _plus(builder, address, given.num_rows, 4 * groups)
        zeros = constant(ir.VectorType(ir.FloatType(), groups), 0)
        store_floats(builder, Lanes(builder, zeros), end)
    return totals


def _emit_slab(
    builder, given: RowArguments, form: RowFormat, vectors: list[list[int]], offsets: list[Lanes], *, is_first: bool
) -> None:
    """Walk over all rows for one slab of the sums, which stay in registers meanwhile."""
    sums = _heads(builder, given.sums, given.sums_stride, form.num_heads)
    scratch = _heads(builder, given.scratch, given.scratch_stride, form.num_heads)
    places = {
        (head, index): builder.add(sums[head], sums[head].type(4 * values[0]))
        for head in range(form.num_heads)
        for index, values in enumerate(vectors)
    }
    accumulators = {}
    for (head, index), place in places.items():
        offset = offsets[head].pick([value // form.group_size for value in vectors[index]])
        start = load_floats(builder, place, NUM_LANES) + offset
        accumulators[head, index] = cgutils.alloca_once_value(builder, start.value)

    first_word = min(form.place(value)[0] for values in vectors for value in values)
    last_word = max(form.place(value)[0] for values in vectors for value in values)
    zero = given.num_rows.type(0)
    with cgutils.for_range_slice(builder, zero, given.num_rows, zero.type(form.rows_per_step)) as (row, _):
        words = []
        for more in range(form.rows_per_step):
            wanted = builder.add(row, zero.type(more))
            if more:  # past the last row the same one again: its factor is 0
                wanted = builder.select(builder.icmp_unsigned("<", wanted, given.num_rows), wanted, row)
            address = builder.add(given.codes, builder.mul(wanted, given.codes_stride))
            address = builder.add(address, zero.type(2 * first_word))
            words.append(load_words(builder, address, last_word + 1 - first_word))
        if is_first:
            ahead = builder.add(given.next_codes, builder.mul(row, given.codes_stride))
            prefetch(builder, ahead, form.rows_per_step * 2 * form.num_words)
        coefficients = [_plus(builder, address, row, 4 * form.num_groups) for address in scratch]
        step = _merged_rows_step if form.merges_rows else _one_row_step
        step(builder, form, words, first_word, vectors, coefficients, accumulators)

    for key, place in places.items():
        store_floats(builder, Lanes(builder, builder.load(accumulators[key])), place)


def _add_to(builder, accumulator: ir.Value, term) -> None:
    builder.store(term(Lanes(builder, builder.load(accumulator))).value, accumulator)


def _merged_rows_step(builder, form, words, first_word, vectors, coefficients, accumulators) -> None:
    """Two rows of 2-bit codes for one head, by tables of products."""
    row0, row1 = words
    even = ((row0 ^ (row1 << 2)) & _LOW_PAIRS) ^ (row1 << 2)  # code0 + 4 * code1 of the even slots
    odd = (((row0 >> 2) ^ row1) & _LOW_PAIRS) ^ row1
    nibbles = even.pick(list(range(2 * row0.num_lanes)), odd)
    tables = {}
    for index, values in enumerate(vectors):
        group = values[0] // form.group_size
        if group not in tables:
            factor0 = load_broadcast(builder, coefficients[0], 4 * group)
            factor1 = load_broadcast(builder, coefficients[0], 4 * (form.num_groups + group))
            products = factor0 * [j % 4 for j in range(16)]
            tables[group] = factor1.times_plus([j // 4 for j in range(16)], products)
        places = [form.place(value) for value in values]
        lanes = [word - first_word + row0.num_lanes * (slot % 2) for word, slot in places]
        indices = nibbles.pick(lanes) >> [4 * (slot // 2) for _, slot in places]
        found = indices.looked_up_in(tables[group])
        _add_to(builder, accumulators[0, index], lambda total, found=found: total + found)


def _one_row_step(builder, form, words, first_word, vectors, coefficients, accumulators) -> None:
    """One row for all heads: codes as floats, then a multiply-add a head."""
    for index, values in enumerate(vectors):
        places = [form.place(value) for value in values]
        slots = words[0].pick([word - first_word for word, _ in places]) >> [form.bits * slot for _, slot in places]
        if form.has_lookups and form.bits == 2:
            codes = slots.looked_up_in_quarters(splat(builder, [j % 4 for j in range(16)]))
        elif form.has_lookups and form.bits == 4:
            codes = slots.looked_up_in(splat(builder, list(range(16))))
        else:
            codes = (slots & (2**form.bits - 1)).as_float()
        groups = [value // form.group_size for value in values]
        for head in range(form.num_heads):
            if len(set(groups)) == 1:
                scale = load_broadcast(builder, coefficients[head], 4 * groups[0])
            else:
                scale = load_floats(builder, coefficients[head], form.num_groups).pick(groups)
            _add_to(builder, accumulators[head, index], lambda total, c=codes, s=scale: c.times_plus(s, total))


@intrinsic(prefer_literal=True)
def accumulate_rows(typing, arguments, bits, row_values, group_size, num_heads, has_lookups):
    """Run the kernel on a tuple of int64, `RowArguments` in order; the rest are literals of `RowFormat`."""
    literals = [bits, row_values, group_size, num_heads, has_lookups]
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    row_format = RowFormat(*(literal.literal_value for literal in literals))

    def codegen(context, builder, signature, values):
        emit_accumulate(builder, cgutils.unpack_tuple(builder, values[0]), row_format)
        return context.get_dummy_value()

    return types.void(arguments, *literals), codegen

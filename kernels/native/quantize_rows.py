"""The inner loops of quantize-and-pack: rows whose values are neighbours, and rows that lie across storage.

Both follow the definition in `quantize_pack.reference` to the last bit: fp32 arithmetic on the stored fp16
scale and minimum, a true division, and rounding half to even. Codes of a row go to scratch memory as int32;
words are then gathered from their planar slots. Addresses and strides are int64 in bytes.

This module does not know how rows are shared among threads.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.vectors import (
    ELEMENT_BYTES,
    FP16,
    NUM_LANES,
    Lanes,
    broadcast,
    load_floats,
    load_integers,
    splat,
    store_floats,
    store_integers,
)


def _loop(builder, stop: ir.Value, step: int = 1):
    return cgutils.for_range_slice(builder, stop.type(0), stop, stop.type(step))


def _plus(builder, address: ir.Value, index: ir.Value, stride) -> ir.Value:
    stride = stride if isinstance(stride, ir.Value) else index.type(stride)
    return builder.add(address, builder.mul(index, stride))


def _scale_and_minimum(low: Lanes, high: Lanes, bits: int) -> tuple[Lanes, Lanes]:
    """What is stored for groups with these extremes, rounded to fp16."""
    return ((high - low) / float(2**bits - 1)).rounded_to_half(), low.rounded_to_half()


def _codes(values: Lanes, scale: Lanes, minimum: Lanes, bits: int) -> Lanes:
    """int32 codes; 0 where the scale is 0."""
    steps = (values - minimum) / scale.where_zero(math.inf)
    clamped = steps.larger(splat(steps.builder, 0.0)).smaller(splat(steps.builder, 2.0**bits - 1))
    return clamped.call("roundeven").as_int()


def emit_quantize_rows(
    builder, values, values_stride, num_rows, row_values, codes, scale, minimum, scratch, bits, group_size, element
) -> None:
    """Rows whose values are neighbours. Shapes: codes, scale, minimum contiguous `[num_rows, ...]`."""
    num_groups = builder.udiv(row_values, row_values.type(group_size))
    num_words = builder.udiv(row_values, row_values.type(16 // bits))
    runs = [(start, min(NUM_LANES, group_size - start)) for start in range(0, group_size, NUM_LANES)]
    with _loop(builder, num_rows) as (row, _):
        source = _plus(builder, values, row, values_stride)
        with _loop(builder, num_groups) as (group, _):
            place = _plus(builder, source, group, group_size * ELEMENT_BYTES[element])
            target = _plus(builder, scratch, group, 4 * group_size)
            vectors = []
            for start, count in runs:
                here = builder.add(place, place.type(start * ELEMENT_BYTES[element]))
                short = load_floats(builder, here, count, element=element)
                vectors.append(short.pick([min(lane, count - 1) for lane in range(NUM_LANES)]))
            low = high = vectors[0]
            for vector in vectors[1:]:
                low, high = low.smaller(vector), high.larger(vector)
            extremes = broadcast(builder, low.smallest()), broadcast(builder, high.largest())
            step, start_of_group = _scale_and_minimum(*extremes, bits)
            index = builder.add(builder.mul(row, num_groups), group)
            store_floats(builder, step.resized(1), _plus(builder, scale, index, 2), element=FP16)
            store_floats(builder, start_of_group.resized(1), _plus(builder, minimum, index, 2), element=FP16)
            for (start, count), vector in zip(runs, vectors, strict=True):
                found = _codes(vector, step, start_of_group, bits).resized(count)
                store_integers(builder, found, target, 4 * start)
        words = _plus(builder, codes, builder.mul(row, num_words), 2)
        _emit_pack(builder, scratch, 1, num_words, words, None, bits)


def emit_quantize_columns(
    builder, values, values_stride, row_values, codes, scale, minimum, scratch, bits, group_size, element
) -> None:
    """Sixteen neighbouring rows that lie across storage: value i of all of them at `values + i * values_stride`.

    Shapes: codes, scale, minimum contiguous `[16, ...]`.
    """
    num_groups = builder.udiv(row_values, row_values.type(group_size))
    num_words = builder.udiv(row_values, row_values.type(16 // bits))
    count = row_values.type(group_size)
    with _loop(builder, num_groups) as (group, _):
        source = _plus(builder, values, builder.mul(group, count), values_stride)
        target = _plus(builder, scratch, group, 4 * group_size * NUM_LANES)
        first = load_floats(builder, source, NUM_LANES, element=element).value
        low, high = (cgutils.alloca_once_value(builder, first) for _ in range(2))
        builder.store(first, low)
        builder.store(first, high)
        with _loop(builder, count) as (token, _):
            vector = load_floats(builder, _plus(builder, source, token, values_stride), NUM_LANES, element=element)
            builder.store(vector.smaller(Lanes(builder, builder.load(low))).value, low)
            builder.store(vector.larger(Lanes(builder, builder.load(high))).value, high)
        extremes = Lanes(builder, builder.load(low)), Lanes(builder, builder.load(high))
        step, start_of_group = _scale_and_minimum(*extremes, bits)
        group_bytes = builder.mul(num_groups, num_groups.type(2))
        for lanes, place in ((step, scale), (start_of_group, minimum)):
            for lane in range(NUM_LANES):
                here = _plus(builder, _plus(builder, place, group, 2), group_bytes, lane)
                store_floats(builder, lanes.pick([lane]), here, element=FP16)
        with _loop(builder, count) as (token, _):
            vector = load_floats(builder, _plus(builder, source, token, values_stride), NUM_LANES, element=element)
            found = _codes(vector, step, start_of_group, bits)
            store_integers(builder, found, _plus(builder, target, token, 4 * NUM_LANES))
    _emit_pack(builder, scratch, NUM_LANES, num_words, codes, builder.mul(num_words, num_words.type(2)), bits)


def _emit_pack(builder, scratch, num_rows: int, num_words, words, words_stride, bits: int) -> None:
    """Gather int32 codes into planar words.

    One row: codes are neighbours, and sixteen words at a time are gathered. Sixteen rows: the lanes are rows.
    """

    def gathered(word: ir.Value, count: int) -> Lanes:
        total = None
        for slot in range(16 // bits):
            value = builder.add(builder.mul(num_words, num_words.type(slot)), word)
            codes = load_integers(builder, _plus(builder, scratch, value, 4 * num_rows), count) << bits * slot
            total = codes if total is None else total | codes
        return total

    if num_rows > 1:
        with _loop(builder, num_words) as (word, _):
            column = gathered(word, num_rows)
            for lane in range(num_rows):
                place = _plus(builder, _plus(builder, words, word, 2), words_stride, lane)
                store_integers(builder, column.pick([lane]), place, bits=16)
        return
    num_whole = builder.and_(num_words, num_words.type(-NUM_LANES))
    with _loop(builder, num_whole, NUM_LANES) as (word, _):
        store_integers(builder, gathered(word, NUM_LANES), _plus(builder, words, word, 2), bits=16)
    with cgutils.for_range_slice(builder, num_whole, num_words, num_words.type(1)) as (word, _):
        store_integers(builder, gathered(word, 1), _plus(builder, words, word, 2), bits=16)


def _intrinsic_of(emit):
    @intrinsic(prefer_literal=True)
    def loop(typing, arguments, bits, group_size, element):
        literals = [bits, group_size, element]
        if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
            return None
        numbers = [literal.literal_value for literal in literals]

        def codegen(context, builder, signature, values):
            emit(builder, *cgutils.unpack_tuple(builder, values[0]), *numbers)
            return context.get_dummy_value()

        return types.void(arguments, *literals), codegen

    return loop


quantize_rows = _intrinsic_of(emit_quantize_rows)
quantize_columns = _intrinsic_of(emit_quantize_columns)

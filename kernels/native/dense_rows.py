"""The inner loops over exact rows of fp32, fp16 or bf16: read, write, score and sum up.

A row has `head_dim` values; in fp32 scratch memory it is filled with zeros up to whole vectors. Addresses and
strides are int64 in bytes. This module does not know where rows come from.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.vectors import (
    ELEMENT_BYTES,
    NUM_LANES,
    Lanes,
    broadcast,
    load_broadcast,
    load_floats,
    splat,
    store_floats,
)


def padded(head_dim: int) -> int:
    """Values of a row in scratch memory."""
    return -(-head_dim // NUM_LANES) * NUM_LANES


def _load_row(builder, address: ir.Value, element: int, head_dim: int) -> list[Lanes]:
    """A row as vectors, zeros after its end."""
    vectors = []
    for start in range(0, head_dim, NUM_LANES):
        place = builder.add(address, address.type(start * ELEMENT_BYTES[element]))
        count = min(NUM_LANES, head_dim - start)
        vectors.append(load_floats(builder, place, count, element=element).resized(NUM_LANES))
    return vectors


def _rows(builder, count: ir.Value):
    return cgutils.for_range_slice(builder, count.type(0), count, count.type(1))


def _plus(builder, address: ir.Value, index: ir.Value, stride) -> ir.Value:
    stride = stride if isinstance(stride, ir.Value) else index.type(stride)
    return builder.add(address, builder.mul(index, stride))


def _loop_intrinsic(emit):
    """An intrinsic `(tuple of int64, literals...)` that runs `emit(builder, *int64s, *numbers)`."""

    @intrinsic(prefer_literal=True)
    def loop(typing, arguments, element, head_dim, num_heads):
        literals = [element, head_dim, num_heads]
        if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
            return None
        numbers = [literal.literal_value for literal in literals]

        def codegen(context, builder, signature, values):
            emit(builder, *cgutils.unpack_tuple(builder, values[0]), *numbers)
            return context.get_dummy_value()

        return types.void(arguments, *literals), codegen

    return loop


@_loop_intrinsic
def read_rows(builder, rows, rows_stride, count, target, factor, element, head_dim, num_heads):
    """target[row] = rows[row] * (the fp32 number at `factor`), in fp32, filled with zeros."""
    scale = load_broadcast(builder, factor)
    with _rows(builder, count) as (row, _):
        vectors = _load_row(builder, _plus(builder, rows, row, rows_stride), element, head_dim)
        place = _plus(builder, target, row, 4 * padded(head_dim))
        for index, vector in enumerate(vectors):
            store_floats(builder, vector * scale, place, 4 * NUM_LANES * index)


@_loop_intrinsic
def write_rows(builder, rows, rows_stride, count, source, factors, element, head_dim, num_heads):
    """rows[row] = source[row] * factors[row], rounded to the element."""
    with _rows(builder, count) as (row, _):
        place = _plus(builder, rows, row, rows_stride)
        vectors = _load_row(builder, _plus(builder, source, row, 4 * padded(head_dim)), 0, head_dim)
        factor = load_broadcast(builder, _plus(builder, factors, row, 4))
        for index, vector in enumerate(vectors):
            count_here = min(NUM_LANES, head_dim - NUM_LANES * index)
            offset = NUM_LANES * index * ELEMENT_BYTES[element]
            store_floats(builder, (vector * factor).resized(count_here), place, offset, element=element)


@_loop_intrinsic
def score_rows(
    builder, rows, rows_stride, count, queries, queries_stride, scores, scores_stride, element, head_dim, num_heads
):
    """scores[h, row] = sum(queries[h] * rows[row])."""
    with _rows(builder, count) as (row, _):
        keys = _load_row(builder, _plus(builder, rows, row, rows_stride), element, head_dim)
        for head in range(num_heads):
            query = _plus(builder, queries, row.type(head), queries_stride)
            products = splat(builder, 0.0)
            for index, key in enumerate(keys):
                place = builder.add(query, query.type(4 * NUM_LANES * index))
                products = key.times_plus(load_floats(builder, place, NUM_LANES), products)
            score = products.sum()
            target = _plus(builder, _plus(builder, scores, row.type(head), scores_stride), row, 4)
            builder.store(score, builder.inttoptr(target, score.type.as_pointer()), align=4)


@_loop_intrinsic
def sum_rows(
    builder, rows, rows_stride, count, factors, factors_stride, sums, sums_stride, element, head_dim, num_heads
):
    """sums[h] += sum over rows of factors[h, row] * rows[row]."""
    places = [
        [
            builder.add(_plus(builder, sums, sums.type(head), sums_stride), sums.type(4 * start))
            for start in range(0, head_dim, NUM_LANES)
        ]
        for head in range(num_heads)
    ]
    totals = [
        [cgutils.alloca_once_value(builder, load_floats(builder, place, NUM_LANES).value) for place in head]
        for head in places
    ]
    with _rows(builder, count) as (row, _):
        values = _load_row(builder, _plus(builder, rows, row, rows_stride), element, head_dim)
        for head in range(num_heads):
            factor_row = _plus(builder, factors, row.type(head), factors_stride)
            factor = load_broadcast(builder, _plus(builder, factor_row, row, 4))
            for total, value in zip(totals[head], values, strict=True):
                more = value.times_plus(factor, Lanes(builder, builder.load(total)))
                builder.store(more.value, total)
    for head in range(num_heads):
        for total, place in zip(totals[head], places[head], strict=True):
            store_floats(builder, Lanes(builder, builder.load(total)), place)


# ---------------------------------------------------------------------------------------------------------
# One row of scores


def _vectors(builder, address: ir.Value, count: ir.Value):
    """Loop over the vectors that hold `count` floats at `address`."""
    vectors = builder.udiv(builder.add(count, count.type(NUM_LANES - 1)), count.type(NUM_LANES))
    return cgutils.for_range_slice(builder, count.type(0), vectors, count.type(1))


@intrinsic
def highest_score(typing, scores, count):
    """The largest of `count` fp32 scores. The fifteen after them are overwritten with -inf."""

    def codegen(context, builder, signature, values):
        scores, count = values
        lowest = splat(builder, -math.inf)
        store_floats(builder, lowest, _plus(builder, scores, count, 4))
        highest = cgutils.alloca_once_value(builder, lowest.value)
        with _vectors(builder, scores, count) as (index, _):
            vector = load_floats(builder, _plus(builder, scores, index, 4 * NUM_LANES), NUM_LANES)
            builder.store(vector.larger(Lanes(builder, builder.load(highest))).value, highest)
        return Lanes(builder, builder.load(highest)).largest()

    return types.float32(scores, count), codegen


@intrinsic
def exponentiate(typing, scores, count, highest):
    """scores = 2 ** (scores - highest) in place; gives their sum."""

    def codegen(context, builder, signature, values):
        scores, count, highest = values
        shift = broadcast(builder, highest)
        total = cgutils.alloca_once_value(builder, splat(builder, 0.0).value)
        with _vectors(builder, scores, count) as (index, _):
            place = _plus(builder, scores, index, 4 * NUM_LANES)
            power = (load_floats(builder, place, NUM_LANES) - shift).two_to_the()
            store_floats(builder, power, place)
            builder.store((Lanes(builder, builder.load(total)) + power).value, total)
        return Lanes(builder, builder.load(total)).sum()

    return types.float32(scores, count, types.float32), codegen


@intrinsic
def add_scaled(typing, target, source, count, factor):
    """target = target + source * factor, whole vectors."""

    def codegen(context, builder, signature, values):
        target, source, count, factor = values
        scale = broadcast(builder, factor)
        with _vectors(builder, target, count) as (index, _):
            place = _plus(builder, target, index, 4 * NUM_LANES)
            more = load_floats(builder, _plus(builder, source, index, 4 * NUM_LANES), NUM_LANES)
            store_floats(builder, more.times_plus(scale, load_floats(builder, place, NUM_LANES)), place)
        return context.get_dummy_value()

    return types.void(target, source, count, types.float32), codegen


@intrinsic
def scale_floats(typing, target, count, factor):
    """target = target * factor, whole vectors; a factor of 0 clears even NaN."""

    def codegen(context, builder, signature, values):
        target, count, factor = values
        scale = broadcast(builder, factor)
        is_zero = builder.fcmp_ordered("==", factor, factor.type(0.0))
        with _vectors(builder, target, count) as (index, _):
            place = _plus(builder, target, index, 4 * NUM_LANES)
            scaled = load_floats(builder, place, NUM_LANES) * scale
            cleared = builder.select(is_zero, splat(builder, 0.0).value, scaled.value)
            store_floats(builder, Lanes(builder, cleared), place)
        return context.get_dummy_value()

    return types.void(target, count, types.float32), codegen


# ---------------------------------------------------------------------------------------------------------
# Tables with a lane for every head


def _in_turns(builder, factors: ir.Value, lanes: ir.Value) -> Lanes:
    """The fp32 numbers at `factors`, `lanes` of them (a power of two) over and over."""
    turns = splat(builder, 0.0).value
    for lane in range(NUM_LANES):
        index = builder.and_(lanes.type(lane), builder.sub(lanes, lanes.type(1)))
        number = builder.load(
            builder.inttoptr(_plus(builder, factors, index, 4), turns.type.element.as_pointer()), align=4
        )
        turns = builder.insert_element(turns, number, ir.Constant(ir.IntType(32), lane))
    return Lanes(builder, turns)


@intrinsic
def scale_lanes(typing, target, count, factors, lanes):
    """target[i] = target[i] * factors[i % lanes], whole vectors."""

    def codegen(context, builder, signature, values):
        target, count, factors, lanes = values
        scale = _in_turns(builder, factors, lanes)
        with _vectors(builder, target, count) as (index, _):
            place = _plus(builder, target, index, 4 * NUM_LANES)
            store_floats(builder, load_floats(builder, place, NUM_LANES) * scale, place)
        return context.get_dummy_value()

    return types.void(target, count, factors, lanes), codegen


@intrinsic
def add_scaled_lanes(typing, target, source, count, factors, lanes):
    """target[i] = target[i] + source[i] * factors[i % lanes], whole vectors."""

    def codegen(context, builder, signature, values):
        target, source, count, factors, lanes = values
        scale = _in_turns(builder, factors, lanes)
        with _vectors(builder, target, count) as (index, _):
            place = _plus(builder, target, index, 4 * NUM_LANES)
            more = load_floats(builder, _plus(builder, source, index, 4 * NUM_LANES), NUM_LANES)
            store_floats(builder, more.times_plus(scale, load_floats(builder, place, NUM_LANES)), place)
        return context.get_dummy_value()

    return types.void(target, source, count, factors, lanes), codegen

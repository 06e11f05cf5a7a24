"""The inner loops of a token's way through a decoder: products with weights, norms, the gate.

Weights are rows of fp32, fp16 or bf16 and are widened to fp32 as they are read: arithmetic is fp32 throughout.
Addresses and strides are int64 in bytes; lengths are multiples of 16 values.

This module does not know what a weight is for.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.vectors import (
    CACHE_LINE_BYTES,
    ELEMENT_BYTES,
    NUM_LANES,
    Lanes,
    broadcast,
    load_floats,
    prefetch,
    splat,
    store_floats,
)

ROWS_TOGETHER = 8
"""Rows whose sums are folded into one vector."""
SUMS = 4
"""Sums of a vector that grow side by side: enough to hide the latency of an addition."""
AHEAD_BYTES = 2048
"""How far ahead of its use a weight is asked for."""


def _plus(builder, address: ir.Value, index: ir.Value, stride) -> ir.Value:
    stride = stride if isinstance(stride, ir.Value) else index.type(stride)
    return builder.add(address, builder.mul(index, stride))


def _vectors(builder, count: ir.Value):
    """Loop over the places of `count` values, sixteen at a time."""
    return cgutils.for_range_slice(builder, count.type(0), count, count.type(NUM_LANES))


def _zero(builder) -> ir.Value:
    """Where sixteen sums grow, from 0."""
    zero = splat(builder, 0.0).value
    place = cgutils.alloca_once(builder, zero.type)
    builder.store(zero, place)
    return place


def _total(builder, places: list[ir.Value]) -> Lanes:
    """The vectors at these places, added up."""
    first, *others = (Lanes(builder, builder.load(place)) for place in places)
    return sum(others, start=first)


def _sums(rows: list[Lanes]) -> Lanes:
    """The sums of the lanes of eight vectors, as one vector of eight: neighbours are folded into each other."""
    width = NUM_LANES
    while True:
        low = [lane for start in range(0, NUM_LANES, width) for lane in range(start, start + width // 2)]
        high = [lane + width // 2 for lane in low]
        if len(rows) == 1:
            return rows[0].pick(low) + rows[0].pick(high)
        rows = [
            left.pick([*low, *(lane + NUM_LANES for lane in low)], right)
            + left.pick([*high, *(lane + NUM_LANES for lane in high)], right)
            for left, right in zip(rows[::2], rows[1::2], strict=True)
        ]
        width //= 2


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing, rows, row_bytes, count, columns, vectors, vector_bytes, products, product_bytes, element, num_vectors
):
    """products[v, r] = sum(rows[r] * vectors[v]) for `count` rows, a multiple of eight, and one, two or four vectors.

    A weight is read and widened once for all vectors. Rows are read from their first weight to their last, one
    after the other (two at a time where several vectors share them): a stream that the processor foresees.
    Shapes: rows `[count, columns]`; the strides of vectors and products are given.
    """
    literals = [element, num_vectors]
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    kind, together = (literal.literal_value for literal in literals)
    rows_here = 1 if together == 1 else 2

    def codegen(context, builder, signature, values):
        rows, row_bytes, count, columns, vectors, vector_bytes, products, product_bytes, *_ = values
        sources = [_plus(builder, vectors, vectors.type(index), vector_bytes) for index in range(together)]
        targets = [_plus(builder, products, products.type(index), product_bytes) for index in range(together)]
        width = SUMS // rows_here
        run = columns.type(NUM_LANES * width)
        whole = builder.mul(builder.udiv(columns, run), run)

        def sums_of(places: list[ir.Value]) -> list[list[Lanes]]:
            """The products of these rows with each vector, still in lanes."""
            totals = [[[_zero(builder) for _ in range(width)] for _ in places] for _ in sources]

            def step(column, num_parts: int) -> None:
                for part in range(num_parts):
                    here = builder.add(column, column.type(NUM_LANES * part))
                    factors = [load_floats(builder, _plus(builder, place, here, 4), NUM_LANES) for place in sources]
                    for row, place in enumerate(places):
                        address = _plus(builder, place, here, ELEMENT_BYTES[kind])
                        weights = load_floats(builder, address, NUM_LANES, element=kind)
                        if part * NUM_LANES * ELEMENT_BYTES[kind] % CACHE_LINE_BYTES == 0:
                            prefetch(builder, builder.add(address, address.type(AHEAD_BYTES)), 1)
                        for factor, sums in zip(factors, totals, strict=True):
                            more = weights.times_plus(factor, Lanes(builder, builder.load(sums[row][part])))
                            builder.store(more.value, sums[row][part])

            with cgutils.for_range_slice(builder, columns.type(0), whole, run) as (column, _):
                step(column, width)
            with cgutils.for_range_slice(builder, whole, columns, columns.type(NUM_LANES)) as (column, _):
                step(column, 1)
            return [[_total(builder, parts) for parts in rows] for rows in totals]

        with cgutils.for_range_slice(builder, count.type(0), count, count.type(ROWS_TOGETHER)) as (row, _):
            first = _plus(builder, rows, row, row_bytes)
            places = [_plus(builder, first, row.type(index), row_bytes) for index in range(ROWS_TOGETHER)]
            found: list[list[Lanes]] = [[] for _ in sources]
            for start in range(0, ROWS_TOGETHER, rows_here):
                for all_rows, more in zip(found, sums_of(places[start : start + rows_here]), strict=True):
                    all_rows += more
            for all_rows, target in zip(found, targets, strict=True):
                store_floats(builder, _sums(all_rows), _plus(builder, target, row, 4))
        return context.get_dummy_value()

    parameters = (rows, row_bytes, count, columns, vectors, vector_bytes, products, product_bytes, *literals)
    return types.void(*parameters), codegen


@intrinsic
def sum_of_squares(typing, vector, count):
    """Of `count` fp32 numbers."""

    def codegen(context, builder, signature, values):
        vector, count = values
        total = cgutils.alloca_once(builder, splat(builder, 0.0).value.type)
        builder.store(splat(builder, 0.0).value, total)
        with _vectors(builder, count) as (index, _):
            lanes = load_floats(builder, _plus(builder, vector, index, 4), NUM_LANES)
            builder.store(lanes.times_plus(lanes, Lanes(builder, builder.load(total))).value, total)
        return Lanes(builder, builder.load(total)).sum()

    return types.float32(vector, count), codegen


@intrinsic
def scale_by(typing, vector, weights, count, factor, target):
    """target = vector * factor * weights, all fp32."""

    def codegen(context, builder, signature, values):
        vector, weights, count, factor, target = values
        scale = broadcast(builder, factor)
        with _vectors(builder, count) as (index, _):
            lanes = load_floats(builder, _plus(builder, vector, index, 4), NUM_LANES) * scale
            weight = load_floats(builder, _plus(builder, weights, index, 4), NUM_LANES)
            store_floats(builder, weight * lanes, _plus(builder, target, index, 4))
        return context.get_dummy_value()

    return types.void(vector, weights, count, types.float32, target), codegen


@intrinsic
def add_to(typing, target, source, count):
    """target = target + source for `count` fp32 numbers, a multiple of eight."""

    def codegen(context, builder, signature, values):
        target, source, count = values
        with cgutils.for_range_slice(builder, count.type(0), count, count.type(8)) as (index, _):
            place = _plus(builder, target, index, 4)
            lanes = load_floats(builder, place, 8) + load_floats(builder, _plus(builder, source, index, 4), 8)
            store_floats(builder, lanes, place)
        return context.get_dummy_value()

    return types.void(target, source, count), codegen


@intrinsic
def gate(typing, gates, others, count, target):
    """target = silu(gates) * others for `count` fp32 numbers, a multiple of eight."""

    def codegen(context, builder, signature, values):
        gates, others, count, target = values
        highest = Lanes(builder, splat(builder, 127.0).resized(8).value)
        with cgutils.for_range_slice(builder, count.type(0), count, count.type(8)) as (index, _):
            lanes = load_floats(builder, _plus(builder, gates, index, 4), 8)
            other = load_floats(builder, _plus(builder, others, index, 4), 8)
            power = (lanes * (-1 / math.log(2))).smaller(highest).resized(NUM_LANES).two_to_the().resized(8)
            store_floats(builder, lanes * other / (power + 1.0), _plus(builder, target, index, 4))
        return context.get_dummy_value()

    return types.void(gates, others, count, target), codegen


@intrinsic(prefer_literal=True)
def widen(typing, source, count, target, element):
    """target = source as fp32, for `count` values."""
    if not isinstance(element, types.IntegerLiteral):
        return None
    kind = element.literal_value

    def codegen(context, builder, signature, values):
        source, count, target, _ = values
        with _vectors(builder, count) as (index, _):
            lanes = load_floats(builder, _plus(builder, source, index, ELEMENT_BYTES[kind]), NUM_LANES, element=kind)
            store_floats(builder, lanes, _plus(builder, target, index, 4))
        return context.get_dummy_value()

    return types.void(source, count, target, element), codegen


@intrinsic(prefer_literal=True)
def narrow(typing, source, count, target, element):
    """target = source, which is fp32, rounded to the element, for `count` values."""
    if not isinstance(element, types.IntegerLiteral):
        return None
    kind = element.literal_value

    def codegen(context, builder, signature, values):
        source, count, target, _ = values
        with _vectors(builder, count) as (index, _):
            lanes = load_floats(builder, _plus(builder, source, index, 4), NUM_LANES)
            store_floats(builder, lanes, _plus(builder, target, index, ELEMENT_BYTES[kind]), element=kind)
        return context.get_dummy_value()

    return types.void(source, count, target, element), codegen

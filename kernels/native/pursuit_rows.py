"""The inner loops of Matching Pursuit over a Gram matrix, for a group of eight vectors.

`products` holds <R, d> of every atom for each vector of the group. To take c times atom i out of the residual R is
to take c times row i of the Gram matrix out of the products, so the residual itself is never needed. Counts of atoms
are multiples of `SWEEP_ATOMS`: whoever calls pads with atoms of zeros. Addresses and strides are int64 in bytes.

This module does not know how groups are shared among threads.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.dense_rows import padded
from kvlens.kernels.native.vectors import (
    NUM_LANES,
    Lanes,
    at,
    broadcast,
    load_broadcast,
    load_floats,
    splat,
    store_floats,
)

GROUP_VECTORS = 8
TILE_ATOMS = 32  # of the transposed dictionary: `[N / 32, W, 32]`
SWEEP_ATOMS = 64
LANE_BYTES = 4 * GROUP_VECTORS  # one number of each vector of the group, side by side


def _loop(builder, stop: ir.Value, step: int = 1, start: ir.Value | None = None):
    start = stop.type(0) if start is None else start
    return cgutils.for_range_slice(builder, start, stop, stop.type(step))


def _plus(builder, address: ir.Value, index: ir.Value, stride) -> ir.Value:
    stride = stride if isinstance(stride, ir.Value) else index.type(stride)
    return builder.add(address, builder.mul(index, stride))


class _Sum:
    """Lanes that live in registers through a loop of the generated code."""

    def __init__(self, builder: ir.IRBuilder, start: Lanes):
        self.builder, self.place = builder, cgutils.alloca_once_value(builder, start.value)
        builder.store(start.value, self.place)  # the alloca's own store is run once, this one in every round

    @property
    def lanes(self) -> Lanes:
        return Lanes(self.builder, self.builder.load(self.place))

    @lanes.setter
    def lanes(self, lanes: Lanes) -> None:
        self.builder.store(lanes.value, self.place)


def _intrinsic_of(returned: types.Type):
    """An intrinsic of a tuple of int64 that runs `emit(builder, *int64s)`."""

    def decorate(emit):
        @intrinsic
        def loop(typing, arguments):
            def codegen(context, builder, signature, values):
                result = emit(builder, *cgutils.unpack_tuple(builder, values[0]))
                return context.get_dummy_value() if result is None else result

            return returned(arguments), codegen

        return loop

    return decorate


def _intrinsic_of_width(emit):
    """An intrinsic `(tuple of int64, literal, literal)` that runs `emit(builder, *int64s, *numbers)`."""

    @intrinsic(prefer_literal=True)
    def loop(typing, arguments, width, num_vectors):
        literals = [width, num_vectors]
        if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
            return None

        def codegen(context, builder, signature, values):
            numbers = [literal.literal_value for literal in literals]
            emit(builder, *cgutils.unpack_tuple(builder, values[0]), *numbers)
            return context.get_dummy_value()

        return types.void(arguments, *literals), codegen

    return loop


# ---------------------------------------------------------------------------------------------------------
# Products with all atoms


@_intrinsic_of_width
def multiply_group(builder, vectors, tiles, num_atoms, products, width, tile_vectors):
    """products[v, n] = <vectors[v], atom n>, `tile_vectors` vectors at a time.

    Shapes: vectors fp32 `[8, padded(W)]`, tiles fp32 `[N / 32, W, 32]`, products fp32 `[8, N]`.
    """
    row_bytes = 4 * padded(width)
    starts = range(0, TILE_ATOMS, NUM_LANES)
    num_tiles = builder.udiv(num_atoms, num_atoms.type(TILE_ATOMS))
    for first in range(0, GROUP_VECTORS, tile_vectors):
        group = range(first, first + tile_vectors)
        with _loop(builder, num_tiles) as (tile, _):
            atoms = _plus(builder, tiles, tile, 4 * TILE_ATOMS * width)
            sums = [[_Sum(builder, splat(builder, 0.0)) for _ in starts] for _ in group]
            with _loop(builder, num_atoms.type(width)) as (channel, _):
                here = _plus(builder, atoms, channel, 4 * TILE_ATOMS)
                blocks = [load_floats(builder, builder.add(here, here.type(4 * s)), NUM_LANES) for s in starts]
                for vector, row in zip(group, sums, strict=True):
                    number = load_broadcast(builder, _plus(builder, vectors, channel, 4), row_bytes * vector)
                    for total, block in zip(row, blocks, strict=True):
                        total.lanes = block.times_plus(number, total.lanes)
            target = _plus(builder, products, tile, 4 * TILE_ATOMS)
            for vector, row in zip(group, sums, strict=True):
                place = _plus(builder, target, num_atoms.type(4 * vector), num_atoms)
                for start, total in zip(starts, row, strict=True):
                    store_floats(builder, total.lanes, place, 4 * start)


# ---------------------------------------------------------------------------------------------------------
# One vector's products: take an atom out, and find the strongest of what is left


@_intrinsic_of(types.int64)
def strongest(builder, products, num_atoms):
    """The first index of the largest |product|; NaN is never chosen, and 0 given where all are NaN."""
    return _sweep(builder, products, num_atoms)


@_intrinsic_of(types.int64)
def subtract_row(builder, products, num_atoms, row, factor):
    """products -= (the fp32 number at `factor`) * row; gives what `strongest` would give next."""
    return _sweep(builder, products, num_atoms, row, load_broadcast(builder, factor) * -1.0)


def _sweep(builder, products, num_atoms, row=None, factor: Lanes | None = None) -> ir.Value:
    """Several vectors of running maxima, so that one comparison does not wait for the one before."""
    num_maxima = SWEEP_ATOMS // NUM_LANES
    bests = [_Sum(builder, splat(builder, -1.0)) for _ in range(num_maxima)]
    starts = [_Sum(builder, splat(builder, 0.0)) for _ in range(num_maxima)]
    with _loop(builder, num_atoms, SWEEP_ATOMS) as (start, _):
        place = _plus(builder, products, start, 4)
        here = broadcast(builder, builder.sitofp(start, ir.FloatType()))  # an index is exact in fp32
        for i, (best, found) in enumerate(zip(bests, starts, strict=True)):
            offset = 4 * NUM_LANES * i
            product = load_floats(builder, builder.add(place, place.type(offset)), NUM_LANES)
            if row is not None:
                entries = load_floats(builder, builder.add(_plus(builder, row, start, 4), row.type(offset)), NUM_LANES)
                product = entries.times_plus(factor, product)
                store_floats(builder, product, place, offset)
            strength = product.call("fabs")
            is_stronger = builder.fcmp_ordered(">", strength.value, best.lanes.value)
            best.lanes = Lanes(builder, builder.select(is_stronger, strength.value, best.lanes.value))
            found.lanes = Lanes(builder, builder.select(is_stronger, here.value, found.lanes.value))
    highest = bests[0].lanes
    for best in bests[1:]:
        highest = best.lanes.larger(highest)
    highest = broadcast(builder, highest.largest())
    first = splat(builder, math.inf)
    for i, (best, found) in enumerate(zip(bests, starts, strict=True)):
        is_highest = builder.fcmp_ordered("==", best.lanes.value, highest.value)
        index = found.lanes + [float(NUM_LANES * i + lane) for lane in range(NUM_LANES)]
        first = Lanes(builder, builder.select(is_highest, index.value, splat(builder, math.inf).value)).smaller(first)
    return builder.fptosi(first.smallest(), ir.IntType(64))


# ---------------------------------------------------------------------------------------------------------
# Least squares, the eight vectors of a group in eight lanes. Tables are `[..., 8]` fp32.


@_intrinsic_of(types.void)
def factor_row(builder, j, sparsity, min_pivot, gram, lower, inverse, half_way, coefficients):
    """Row j of the LDL factorization of the chosen atoms' products, and of its forward substitution.

    gram[j, :j] becomes the row before it is divided by the pivots; half_way[j] holds <R, d_j> and becomes
    <x, d_j>, with x = R + sum_k coefficients[k] d_k, less what the rows before j explain. An atom whose pivot is
    at most the fp32 number at `min_pivot` drops out. Shapes: gram, lower `[s, s, 8]`, the others `[s, 8]`.
    """

    def place(table, index):
        return _plus(builder, table, index, LANE_BYTES)

    def load(table, index) -> Lanes:
        return load_floats(builder, place(table, index), GROUP_VECTORS)

    start_of_row = builder.mul(j, sparsity)
    row, lower_row = place(gram, start_of_row), place(lower, start_of_row)
    half = _Sum(builder, load(half_way, j))
    with _loop(builder, j) as (k, _):
        half.lanes = load(coefficients, k).times_plus(load(row, k), half.lanes)
    with _loop(builder, j) as (k, _):
        entry, other = _Sum(builder, load(row, k)), place(lower, builder.mul(k, sparsity))
        with _loop(builder, k) as (m, _):
            entry.lanes = entry.lanes - load(row, m) * load(other, m)
        store_floats(builder, entry.lanes, place(row, k))
    pivot = _Sum(builder, load(row, j))
    with _loop(builder, j) as (k, _):
        entry = load(row, k)
        divided = entry * load(inverse, k)
        store_floats(builder, divided, place(lower_row, k))
        pivot.lanes = pivot.lanes - entry * divided
        half.lanes = half.lanes - divided * load(half_way, k)
    smallest = load_broadcast(builder, min_pivot).resized(GROUP_VECTORS)
    is_far = builder.fcmp_ordered(">", pivot.lanes.value, smallest.value)
    one, nothing = (splat(builder, number).resized(GROUP_VECTORS) for number in (1.0, 0.0))
    reciprocal = Lanes(builder, builder.select(is_far, (one / pivot.lanes).value, nothing.value))
    store_floats(builder, reciprocal, place(inverse, j))
    store_floats(builder, half.lanes, place(half_way, j))


@_intrinsic_of(types.void)
def substitute_back(builder, count, sparsity, lower, inverse, half_way, coefficients, changes):
    """coefficients[:count] as least squares has them; `changes` is by how much each of them grew."""

    def place(table, index):
        return _plus(builder, table, index, LANE_BYTES)

    def load(table, index) -> Lanes:
        return load_floats(builder, place(table, index), GROUP_VECTORS)

    with _loop(builder, count) as (step, _):
        j = builder.sub(builder.sub(count, step), count.type(1))
        total = _Sum(builder, load(half_way, j) * load(inverse, j))
        with _loop(builder, count, start=builder.add(j, j.type(1))) as (m, _):
            below = builder.add(builder.mul(m, sparsity), j)
            total.lanes = total.lanes - load(lower, below) * load(coefficients, m)
        store_floats(builder, total.lanes - load(coefficients, j), place(changes, j))
        store_floats(builder, total.lanes, place(coefficients, j))


# ---------------------------------------------------------------------------------------------------------
# The way back


@_intrinsic_of_width
def sum_atoms(builder, indices, coefficients, sparsity, dictionary, vectors, count, width, num_vectors):
    """vectors[v] = sum_j coefficients[v, j] * dictionary[indices[v, j]] for `count` vectors, one at a time.

    Shapes: indices int16 and coefficients fp32 `[count, s]`, dictionary fp32 `[N, W]`, vectors fp32 `[count, W]`.
    """
    starts = range(0, width, NUM_LANES)
    counts = [min(NUM_LANES, width - start) for start in starts]
    with _loop(builder, count) as (vector, _):
        sums = [_Sum(builder, splat(builder, 0.0).resized(size)) for size in counts]
        first = builder.mul(vector, sparsity)
        with _loop(builder, builder.add(first, sparsity), start=first) as (j, _):
            index = builder.load(at(builder, _plus(builder, indices, j, 2), ir.IntType(16)), align=2)
            atom = _plus(builder, dictionary, builder.sext(index, ir.IntType(64)), 4 * width)
            factor = load_broadcast(builder, _plus(builder, coefficients, j, 4))
            for start, size, total in zip(starts, counts, sums, strict=True):
                block = load_floats(builder, builder.add(atom, atom.type(4 * start)), size)
                total.lanes = block.times_plus(factor.resized(size), total.lanes)
        target = _plus(builder, vectors, vector, 4 * width)
        for start, total in zip(starts, sums, strict=True):
            store_floats(builder, total.lanes, target, 4 * start)

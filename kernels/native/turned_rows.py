"""The inner loops of scores against keys that are coded before RoPE: restore a key in registers, turn it, multiply.

    scores[h, t] = queries[h] · R(t) (mean + sum over slots j of coefficient[j, t] * atoms[index[j, t]])

R(t) turns channel p with channel p + W/2 by the angle f_p t. A product does not change if both sides are turned
back: the queries are turned by R(-b) once for every block of sixteen tokens b, b+1, .. (exactly at the first token of a
page, from there on by R(-16)), and the key of token b + i by R(i). So all the angles that keys need are sixteen rows of
cosines and sines, which stay in the first-level cache while the atoms stream through it; so do the
sixteen turned means R(i) mean, which cost nothing: they are what the turn is added to.

With `is_half` (AVX512-FP16) atoms are kept and summed in fp16, thirty-two channels at once; from the turn on everything
is fp32. So are the means, the larger part of a key. A sum is then some two roundings of an fp16 key away from the
true one: too far for fp32 queries, which are answered in fp32, and less than queries of 16 bits lose anyway.

Rows of atoms, means, waves and turned queries have their channels in vectors: those of the first half of each
pair, those of the second, those that are not turned; each filled up with zeros (`row_lanes`).

This module does not know about pages, positions, or softmax.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native.code_blocks import Block, Codes, atoms_of, for_each_block, plus, scales_of
from kvlens.kernels.native.vectors import (
    NUM_LANES,
    Lanes,
    at,
    broadcast,
    load_floats,
    load_halves,
    store_floats,
    store_integers,
)

_ROW = 4 * NUM_LANES  # bytes of sixteen fp32 numbers


def row_lanes(head_dim: int, width: int) -> list[tuple[int, int]]:
    """First channel and number of channels of each vector of a row, of which `width` channels are turned."""
    half = width // 2
    return [
        (start, min(NUM_LANES, stop - start))
        for first, stop in ((0, half), (half, width), (width, head_dim))
        for start in range(first, stop, NUM_LANES)
    ]


def waves_bytes(width: int) -> int:
    """Of one row of cosines and sines."""
    return 2 * _ROW * -(-(width // 2) // NUM_LANES)


def scratch_bytes(slots: int, num_heads: int, head_dim: int, width: int) -> int:
    """Scratch memory: offsets and coefficients of sixteen tokens, products, turned queries, turned means."""
    return _ROW * (2 * slots + NUM_LANES * num_heads + (num_heads + NUM_LANES) * len(row_lanes(head_dim, width)))


@dataclass(frozen=True)
class TurnFormat:
    """What is fixed when a kernel is compiled: `slots` atoms a key, `width` turned channels, `num_heads` heads."""

    slots: int
    is_packed: bool
    num_heads: int
    head_dim: int
    width: int
    has_means: bool
    is_half: bool

    @property
    def lanes(self) -> list[tuple[int, int]]:
        return row_lanes(self.head_dim, self.width)

    @property
    def pairs(self) -> int:
        """Vectors of one half of the turned channels."""
        return -(-(self.width // 2) // NUM_LANES)

    @property
    def row_bytes(self) -> int:
        """Of a row in fp32."""
        return _ROW * len(self.lanes)

    @property
    def atom_bytes(self) -> int:
        return self.row_bytes // 2 if self.is_half else self.row_bytes


@dataclass(frozen=True)
class TurnArguments(Codes):
    """The parameters of a kernel: codes, addresses, and strides in bytes.

    Shapes: atoms fp16 or fp32 `[N, row]`; steps fp32 `[16 + 1, waves]`: of R(0) .. R(15) with their scale, then of
    R(16) without; start fp32 `[waves]`: of R(the first token), without; mean fp32 `[row]`; queries fp32
    `[num_heads, head_dim]`; rows fp32 `[num_heads, tokens]`, scores to write (up to fifteen more than there are
    tokens); scratch of `scratch_bytes`. Waves are cosines, then sines.
    """

    atoms: ir.Value
    steps: ir.Value
    start: ir.Value
    queries: ir.Value
    queries_stride: ir.Value
    rows: ir.Value
    rows_stride: ir.Value
    scratch: ir.Value


@dataclass(frozen=True)
class _Scratch:
    """Addresses in scratch memory."""

    means: ir.Value
    queries: ir.Value
    products: ir.Value
    atoms: ir.Value


def _scratch(builder, base: ir.Value, form: TurnFormat) -> _Scratch:
    queries = plus(builder, base, NUM_LANES, form.row_bytes)
    products = plus(builder, queries, form.num_heads, form.row_bytes)
    return _Scratch(base, queries, products, plus(builder, products, form.num_heads * NUM_LANES, _ROW))


def _load_waves(builder, place: ir.Value, form: TurnFormat) -> list[tuple[Lanes, Lanes]]:
    """Cosine and sine of every vector of pairs."""
    return [
        tuple(load_floats(builder, plus(builder, place, index, _ROW), NUM_LANES) for index in (pair, form.pairs + pair))
        for pair in range(form.pairs)
    ]


def _turned_back(vectors: list[Lanes], waves: list[tuple[Lanes, Lanes]]) -> list[Lanes]:
    """A row turned against the waves."""
    pairs = len(waves)
    low = [x * cos for x, (cos, _) in zip(vectors, waves, strict=False)]
    high = [y * cos for y, (cos, _) in zip(vectors[pairs:], waves, strict=False)]
    low = [vectors[pairs + index].times_plus(sin, low[index]) for index, (_, sin) in enumerate(waves)]
    high = [vectors[index].times_plus(sin.negative(), high[index]) for index, (_, sin) in enumerate(waves)]
    return low + high + vectors[2 * pairs :]


def _turned(vectors: list[Lanes], waves: list[tuple[Lanes, Lanes]], terms: list[Lanes] | None) -> list[Lanes]:
    """A row turned along the waves, added to `terms`."""
    pairs = len(waves)
    result = []
    for index, (cos, sin) in enumerate(waves + waves):
        own, other = vectors[index], vectors[(index + pairs) % (2 * pairs)]
        first = own * cos if terms is None else own.times_plus(cos, terms[index])
        result.append(other.times_plus(sin.negative() if index < pairs else sin, first))
    rest = vectors[2 * pairs :]
    return result + (rest if terms is None else [x + y for x, y in zip(rest, terms[2 * pairs :], strict=True)])


def _load_row(builder, place: ir.Value, form: TurnFormat) -> list[Lanes]:
    return [load_floats(builder, plus(builder, place, index, _ROW), NUM_LANES) for index in range(len(form.lanes))]


def _store_row(builder, vectors: list[Lanes], place: ir.Value) -> None:
    for index, vector in enumerate(vectors):
        store_floats(builder, vector, place, _ROW * index)


def emit_turn_means(builder, mean: ir.Value, steps: ir.Value, target: ir.Value, form: TurnFormat) -> None:
    """target[i] = R(i) mean, sixteen rows."""
    row = _load_row(builder, mean, form)
    for step in range(NUM_LANES):
        waves = _load_waves(builder, plus(builder, steps, step, waves_bytes(form.width)), form)
        _store_row(builder, _turned(row, waves, None), plus(builder, target, step, form.row_bytes))


def emit_score_turned(builder, given: TurnArguments, form: TurnFormat) -> None:
    """Scores of the tokens of a page, overwriting what was there."""
    scratch = _scratch(builder, given.scratch, form)
    start = _load_waves(builder, given.start, form)
    for head in range(form.num_heads):
        place = plus(builder, given.queries, head, given.queries_stride)
        query = [load_floats(builder, plus(builder, place, first, 4), count).resized(NUM_LANES)
                 for first, count in form.lanes]  # fmt: skip
        _store_row(builder, _turned_back(query, start), plus(builder, scratch.queries, head, form.row_bytes))

    def emit(block: Block) -> None:
        _leave_atoms(builder, given, form, block, scratch.atoms)
        end = plus(builder, scratch.atoms, 1, _ROW)
        with cgutils.for_range_slice(builder, scratch.atoms, end, scratch.atoms.type(4)) as (place, _):
            step = builder.udiv(builder.sub(place, scratch.atoms), place.type(4))
            waves = _load_waves(builder, plus(builder, given.steps, step, waves_bytes(form.width)), form)
            mean = _load_row(builder, plus(builder, scratch.means, step, form.row_bytes), form)
            key = _turned(_restored(builder, given, form, place), waves, mean if form.has_means else None)
            for head in range(form.num_heads):
                query = _load_row(builder, plus(builder, scratch.queries, head, form.row_bytes), form)
                products = plus(builder, plus(builder, scratch.products, head * NUM_LANES, _ROW), step, _ROW)
                store_floats(builder, _product(key, query), products)
        last = _load_waves(builder, plus(builder, given.steps, NUM_LANES, waves_bytes(form.width)), form)
        for head in range(form.num_heads):
            products = plus(builder, scratch.products, head * NUM_LANES, _ROW)
            vectors = [load_floats(builder, plus(builder, products, i, _ROW), NUM_LANES) for i in range(NUM_LANES)]
            place = plus(builder, plus(builder, given.rows, head, given.rows_stride), block.token, 4)
            store_floats(builder, _sums(vectors), place)
            query = plus(builder, scratch.queries, head, form.row_bytes)
            _store_row(builder, _turned_back(_load_row(builder, query, form), last), query)

    for_each_block(builder, given.num_tokens, emit)


def _leave_atoms(builder, given: TurnArguments, form: TurnFormat, block: Block, target: ir.Value) -> None:
    """Write a block's offsets of atoms, then its coefficients, to scratch: a row of sixteen a slot.

    An fp16 coefficient is written twice, as a pair: a pair is broadcast by a load alone.
    """
    scales = scales_of(builder, given, block, is_packed=form.is_packed)
    for slot in range(form.slots):
        indices, coefficients = atoms_of(builder, given, block, slot, is_packed=form.is_packed)
        coefficients = coefficients * scales
        place = plus(builder, target, form.slots + slot, _ROW)
        store_integers(builder, indices * form.atom_bytes, target, _ROW * slot)
        if form.is_half:
            halves = builder.fptrunc(coefficients.value, ir.VectorType(ir.HalfType(), NUM_LANES))
            bits = builder.bitcast(halves, ir.VectorType(ir.IntType(16), NUM_LANES))
            bits = Lanes(builder, builder.zext(bits, ir.VectorType(ir.IntType(32), NUM_LANES)))
            store_integers(builder, bits | (bits << 16), place)
        else:
            store_floats(builder, coefficients, place)


def _restored(builder, given: TurnArguments, form: TurnFormat, place: ir.Value) -> list[Lanes]:
    """The fp32 sum of the atoms of the token whose offsets lie at `place`.

    The last slot comes first: a pursuit chooses large coefficients before small ones, and while a sum is small fp16
    rounds it less.
    """
    count = len(form.lanes)
    sums: list[Lanes] = []
    for slot in reversed(range(form.slots)):
        offset = builder.load(at(builder, place, ir.IntType(32), _ROW * slot), align=4)
        atom = builder.add(given.atoms, builder.zext(offset, place.type))
        code = _ROW * (form.slots + slot)
        if form.is_half:
            pair = broadcast(builder, builder.load(at(builder, place, ir.IntType(32), code), align=4))
            factor = Lanes(builder, builder.bitcast(pair.value, ir.VectorType(ir.HalfType(), 2 * NUM_LANES)))
            row = [
                load_halves(builder, atom, NUM_LANES * min(2, count - index), 2 * NUM_LANES * index)
                for index in range(0, count, 2)
            ]
        else:
            factor = broadcast(builder, builder.load(at(builder, place, ir.FloatType(), code), align=4))
            row = [load_floats(builder, plus(builder, atom, index, _ROW), NUM_LANES) for index in range(count)]
        factors = [factor.resized(vector.num_lanes) for vector in row]
        if not sums:
            sums = [x * y for x, y in zip(row, factors, strict=True)]
        else:
            sums = [x.times_plus(y, total) for x, y, total in zip(row, factors, sums, strict=True)]
    if not form.is_half:
        return sums
    return [
        total.pick(list(range(start, start + NUM_LANES))).widened()
        for total in sums
        for start in range(0, total.num_lanes, NUM_LANES)
    ]


def _product(key: list[Lanes], query: list[Lanes]) -> Lanes:
    """Sixteen sums of products, in two chains."""
    chains = [x * y for x, y in zip(key[:2], query[:2], strict=True)]
    for index in range(2, len(key)):
        chains[index % 2] = key[index].times_plus(query[index], chains[index % 2])
    return chains[0] if len(chains) == 1 else chains[0] + chains[1]


def _sums(vectors: list[Lanes]) -> Lanes:
    """Of sixteen vectors the sum of each, in order."""
    run = NUM_LANES // 2
    while len(vectors) > 1:
        half = len(vectors) // 2
        low = [NUM_LANES * each + start + lane for start in range(0, NUM_LANES, 2 * run) for each in (0, 1)
               for lane in range(run)]  # fmt: skip
        high = [lane + run for lane in low]
        vectors = [vectors[i].pick(low, vectors[half + i]) + vectors[i].pick(high, vectors[half + i])
                   for i in range(half)]  # fmt: skip
        run //= 2
    return vectors[0]


def _kernel_intrinsic(emit):
    """An intrinsic `(tuple of int64, literals of TurnFormat)` that runs `emit`."""

    @intrinsic(prefer_literal=True)
    def kernel(typing, arguments, slots, is_packed, num_heads, head_dim, width, has_means, is_half):
        literals = [slots, is_packed, num_heads, head_dim, width, has_means, is_half]
        if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
            return None
        form = TurnFormat(*(literal.literal_value for literal in literals))

        def codegen(context, builder, signature, values):
            emit(builder, cgutils.unpack_tuple(builder, values[0]), form)
            return context.get_dummy_value()

        return types.void(arguments, *literals), codegen

    return kernel


score_turned = _kernel_intrinsic(lambda builder, given, form: emit_score_turned(builder, TurnArguments(*given), form))
turn_means = _kernel_intrinsic(lambda builder, given, form: emit_turn_means(builder, *given, form))

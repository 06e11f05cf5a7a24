"""The inner loops of attention over sparse codes: scores by lookup, values by scatter.

    keys:    scores[h, t] = scale_t * sum over slots j of code[j, t] * table[index[j, t], h]
    values:  table[index[j, t], h] += probabilities[h, t] * scale_t * code[j, t]

A table has a row for every atom and a lane for every query head of a key/value head (1, 2, 4, 8 or 16), so
that one load, one multiply-add and, for values, one store serve all heads. Sixteen tokens of a slot are
neighbours: their indices and codes are taken apart by vectors and left in scratch memory, from where the loop
over tokens reads them one by one. With a single head, keys need no such loop: sixteen tokens are sixteen
lanes of one gather.

This module does not know about pages, dictionaries, or softmax.
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
    gather,
    load_floats,
    splat,
    store_floats,
    store_integers,
)

MAX_LANES = 16
_ROW = 4 * NUM_LANES  # bytes of sixteen numbers in scratch memory


def lanes_of(num_heads: int) -> int:
    """Lanes of a table: the least power of two with room for all heads, at most 16."""
    return min(MAX_LANES, 1 << (num_heads - 1).bit_length())


def block_bytes(slots: int, num_heads: int) -> int:
    """Scratch memory of sixteen tokens: offsets and codes of every slot, then a number a lane and token."""
    return _ROW * (2 * slots + lanes_of(num_heads))


@dataclass(frozen=True)
class CodeFormat:
    """What is fixed when a kernel is compiled: `slots` atoms a token in `parts` parts, for `num_heads` heads."""

    slots: int
    parts: int
    is_packed: bool
    num_heads: int
    has_lookups: bool

    @property
    def lanes(self) -> int:
        return lanes_of(self.num_heads)


@dataclass(frozen=True)
class CodeArguments(Codes):
    """The parameters of a kernel: codes, addresses, and strides in bytes.

    Shapes: table fp32 `[parts, atoms, lanes]`, `part_stride` bytes a part; totals fp32 `[lanes]` (values alone), to
    which the probabilities themselves are added; rows fp32 `[num_heads, tokens]`, scores to write (up to fifteen
    more than there are tokens) or probabilities to read; scratch of `block_bytes`.
    """

    table: ir.Value
    part_stride: ir.Value
    totals: ir.Value
    rows: ir.Value
    rows_stride: ir.Value
    scratch: ir.Value


def _leave_atoms(builder, given: CodeArguments, form: CodeFormat, block: Block) -> None:
    """Write a block's offsets in the table, then its codes, to scratch: a row of sixteen a slot."""
    for slot in range(form.slots):
        indices, codes = atoms_of(builder, given, block, slot, is_packed=form.is_packed)
        store_integers(builder, indices << (4 * form.lanes).bit_length() - 1, given.scratch, _ROW * slot)
        store_floats(builder, codes, given.scratch, _ROW * (form.slots + slot))


def _for_each_token(builder, given: CodeArguments, form: CodeFormat):
    """Loop over sixteen tokens: the address of each one's number in every row of scratch memory."""
    return cgutils.for_range_slice(builder, given.scratch, plus(builder, given.scratch, 1, _ROW), given.scratch.type(4))


def _atom(builder, form: CodeFormat, place: ir.Value, table: ir.Value, slot: int) -> tuple[ir.Value, ir.Value]:
    """The address of a token's table row, and its code in all lanes."""
    offset = builder.load(at(builder, place, ir.IntType(32), _ROW * slot), align=4)
    code = builder.load(at(builder, place, ir.FloatType(), _ROW * (form.slots + slot)), align=4)
    return builder.add(table, builder.zext(offset, table.type)), broadcast(builder, code, form.lanes)


def _place_of_lanes(builder, given: CodeArguments, form: CodeFormat, place: ir.Value) -> ir.Value:
    """Where the lanes of the token at `place` lie, after all rows of atoms."""
    token = builder.sub(place, given.scratch)
    return builder.add(plus(builder, given.scratch, token, form.lanes), place.type(_ROW * 2 * form.slots))


def emit_score(builder, given: CodeArguments, form: CodeFormat) -> None:
    """Scores of all tokens, overwriting what was there."""

    def emit(block: Block) -> None:
        scales = scales_of(builder, given, block, is_packed=form.is_packed)
        if form.lanes == 1:
            total = splat(builder, 0.0)
            for slot in range(form.slots):
                indices, codes = atoms_of(builder, given, block, slot, is_packed=form.is_packed)
                found = gather(builder, given.table, indices, has_lookups=form.has_lookups)
                total = codes.times_plus(found, total)
            totals = [total]
        else:
            _leave_atoms(builder, given, form, block)
            with _for_each_token(builder, given, form) as (place, _):
                total = splat(builder, 0.0).resized(form.lanes)
                for slot in range(form.slots):
                    row, code = _atom(builder, form, place, given.table, slot)
                    total = code.times_plus(load_floats(builder, row, form.lanes), total)
                store_floats(builder, total, _place_of_lanes(builder, given, form, place))
            lanes = builder.add(given.scratch, given.scratch.type(_ROW * 2 * form.slots))
            totals = parted(_vectors(builder, lanes, form.lanes))
        for head in range(form.num_heads):
            place = plus(builder, plus(builder, given.rows, head, given.rows_stride), block.token, 4)
            store_floats(builder, totals[head] * scales, place)

    for_each_block(builder, given.num_tokens, emit)


def emit_scatter(builder, given: CodeArguments, form: CodeFormat) -> None:
    """Add the tokens' probabilities to the atoms of the table, and to the totals."""
    tables = [plus(builder, given.table, part, given.part_stride) for part in range(form.parts)]
    totals = [cgutils.alloca_once_value(builder, splat(builder, 0.0).value) for _ in range(form.num_heads)]

    def emit(block: Block) -> None:
        _leave_atoms(builder, given, form, block)
        scales = scales_of(builder, given, block, is_packed=form.is_packed)
        weights = []
        for head in range(form.num_heads):
            place = plus(builder, plus(builder, given.rows, head, given.rows_stride), block.token, 4)
            weight = load_floats(builder, place, NUM_LANES, mask=block.mask)
            builder.store((Lanes(builder, builder.load(totals[head])) + weight).value, totals[head])
            weights.append(weight * scales)
        weights += [splat(builder, 0.0)] * (form.lanes - form.num_heads)
        for index, vector in enumerate(woven(weights)):
            store_floats(builder, vector, given.scratch, _ROW * (2 * form.slots + index))
        with _for_each_token(builder, given, form) as (place, _):
            weight = load_floats(builder, _place_of_lanes(builder, given, form, place), form.lanes)
            for slot in range(form.slots):
                row, code = _atom(builder, form, place, tables[slot * form.parts // form.slots], slot)
                store_floats(builder, weight.times_plus(code, load_floats(builder, row, form.lanes)), row)

    for_each_block(builder, given.num_tokens, emit)
    for head, total in enumerate(totals):
        place = at(builder, given.totals, ir.FloatType(), 4 * head)
        more = Lanes(builder, builder.load(total)).sum()
        builder.store(builder.fadd(builder.load(place, align=4), more), place, align=4)


# ---------------------------------------------------------------------------------------------------------
# Rows of heads, and tables with a lane for every head


def _vectors(builder, address: ir.Value, count: int) -> list[Lanes]:
    return [load_floats(builder, builder.add(address, address.type(_ROW * i)), NUM_LANES) for i in range(count)]


def woven(heads: list[Lanes]) -> list[Lanes]:
    """A vector a head as a table of sixteen rows: row r is lane r of every head. A power of two of them."""
    if len(heads) == 1:
        return heads
    low, high = list(range(NUM_LANES // 2)), list(range(NUM_LANES // 2, NUM_LANES))
    half = len(heads) // 2
    pairs = []
    for first, second in zip(woven(heads[:half]), woven(heads[half:]), strict=True):
        # Both are rows of `half` heads: take their rows in turns.
        pairs += [first.pick(_in_turns(lanes, half), second) for lanes in (low, high)]
    return pairs


def _in_turns(lanes: list[int], run: int) -> list[int]:
    """Runs of `run` lanes out of two vectors in turns."""
    if run > len(lanes):
        run = len(lanes)
    picked = []
    for start in range(0, len(lanes), run):
        here = lanes[start : start + run]
        picked += here + [NUM_LANES + lane for lane in here]
    return picked


def parted(vectors: list[Lanes]) -> list[Lanes]:
    """The inverse of `woven`: a vector a head from a table of sixteen rows."""
    if len(vectors) == 1:
        return vectors
    half = len(vectors) // 2
    lower = [lane for lane in range(2 * NUM_LANES) if lane // half % 2 == 0]
    upper = [lane for lane in range(2 * NUM_LANES) if lane // half % 2 == 1]
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    return [
        head for picked in (lower, upper) for head in parted([first.pick(picked, second) for first, second in pairs])
    ]


def emit_weave(builder, rows, rows_stride, num_atoms, table, form: CodeFormat) -> None:
    """table[n, h] = rows[h, n] for whole vectors of atoms; lanes without a head are 0."""
    with cgutils.for_range_slice(builder, num_atoms.type(0), num_atoms, num_atoms.type(NUM_LANES)) as (atom, _):
        heads = [
            load_floats(builder, plus(builder, plus(builder, rows, head, rows_stride), atom, 4), NUM_LANES)
            for head in range(form.num_heads)
        ]
        heads += [splat(builder, 0.0)] * (form.lanes - form.num_heads)
        for index, vector in enumerate(woven(heads)):
            store_floats(builder, vector, plus(builder, table, atom, 4 * form.lanes), _ROW * index)


def emit_part(builder, table, num_atoms, factors, rows, rows_stride, form: CodeFormat) -> None:
    """rows[h, n] = table[n, h] * factors[h] for whole vectors of atoms."""
    factors = [
        broadcast(builder, builder.load(at(builder, factors, ir.FloatType(), 4 * head), align=4))
        for head in range(form.num_heads)
    ]
    with cgutils.for_range_slice(builder, num_atoms.type(0), num_atoms, num_atoms.type(NUM_LANES)) as (atom, _):
        heads = parted(_vectors(builder, plus(builder, table, atom, 4 * form.lanes), form.lanes))
        for head, factor in enumerate(factors):
            place = plus(builder, plus(builder, rows, head, rows_stride), atom, 4)
            store_floats(builder, heads[head] * factor, place)


def _kernel_intrinsic(emit):
    """An intrinsic `(tuple of int64, literals of CodeFormat)` that runs `emit`."""

    @intrinsic(prefer_literal=True)
    def kernel(typing, arguments, slots, parts, is_packed, num_heads, has_lookups):
        literals = [slots, parts, is_packed, num_heads, has_lookups]
        if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
            return None
        form = CodeFormat(*(literal.literal_value for literal in literals))

        def codegen(context, builder, signature, values):
            emit(builder, cgutils.unpack_tuple(builder, values[0]), form)
            return context.get_dummy_value()

        return types.void(arguments, *literals), codegen

    return kernel


score_codes = _kernel_intrinsic(lambda builder, given, form: emit_score(builder, CodeArguments(*given), form))
scatter_codes = _kernel_intrinsic(lambda builder, given, form: emit_scatter(builder, CodeArguments(*given), form))
weave_rows = _kernel_intrinsic(lambda builder, given, form: emit_weave(builder, *given, form))
part_table = _kernel_intrinsic(lambda builder, given, form: emit_part(builder, *given, form))

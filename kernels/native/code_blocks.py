"""Sparse codes of a page taken apart: sixteen neighbouring tokens of a slot as vectors of indices and coefficients.

This module does not know what is done with them.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils

from kvlens.kernels.native.vectors import (
    FP16,
    NUM_LANES,
    Lanes,
    broadcast,
    load_floats,
    load_words,
    prefetch,
    splat,
)

INDEX_BITS, LARGEST_CODE = 10, 31  # of a packed word, see `kvlens.kernels.sparse_attend`


@dataclass(frozen=True)
class Codes:
    """Where the codes of a page lie: addresses, and strides in bytes.

    Shapes: words int16 `[slots, tokens]`; coefficients fp16, the same or (packed) `[tokens]`; `next_*` is what the
    next call reads, to prefetch.
    """

    words: ir.Value
    words_stride: ir.Value
    coefficients: ir.Value
    coefficients_stride: ir.Value
    next_words: ir.Value
    next_coefficients: ir.Value
    num_tokens: ir.Value


@dataclass(frozen=True)
class Block:
    """Sixteen tokens from `token` on; of the last of a row, those that `mask` names."""

    token: ir.Value
    mask: ir.Value | None


def plus(builder, base: ir.Value, index, stride) -> ir.Value:
    """base + index * stride; index and stride are values or numbers."""
    index, stride = (each if isinstance(each, ir.Value) else base.type(each) for each in (index, stride))
    return builder.add(base, builder.mul(index, stride))


def for_each_block(builder, num_tokens: ir.Value, emit) -> None:
    """Emit the loop over whole blocks, and the rest as a masked one."""
    step = num_tokens.type(NUM_LANES)
    whole = builder.and_(num_tokens, num_tokens.type(-NUM_LANES))
    with cgutils.for_range_slice(builder, num_tokens.type(0), whole, step) as (token, _):
        emit(Block(token, None))
    with builder.if_then(builder.icmp_unsigned("<", whole, num_tokens)):
        left = builder.trunc(builder.sub(num_tokens, whole), ir.IntType(32))
        lanes = splat(builder, list(range(NUM_LANES)), kind=ir.IntType(32))
        emit(Block(whole, builder.icmp_unsigned("<", lanes.value, broadcast(builder, left).value)))


def atoms_of(builder, codes: Codes, block: Block, slot: int, *, is_packed: bool) -> tuple[Lanes, Lanes]:
    """Indices (int32) and codes or coefficients (fp32) of one slot of a block; 0 and 0 past its end."""
    here = _places(builder, block, slot, codes.words, codes.next_words, codes.words_stride)
    words = load_words(builder, here, NUM_LANES, is_signed=is_packed, mask=block.mask)
    if is_packed:
        return words & (2**INDEX_BITS - 1), words.shifted_down(INDEX_BITS).as_float()
    here = _places(builder, block, slot, codes.coefficients, codes.next_coefficients, codes.coefficients_stride)
    return words, load_floats(builder, here, NUM_LANES, element=FP16, mask=block.mask)


def scales_of(builder, codes: Codes, block: Block, *, is_packed: bool) -> Lanes:
    """What the codes of each token of a block are multiplied by."""
    if not is_packed:
        return splat(builder, 1.0)
    here = _places(builder, block, 0, codes.coefficients, codes.next_coefficients, codes.coefficients_stride)
    return load_floats(builder, here, NUM_LANES, element=FP16, mask=block.mask) * (1 / LARGEST_CODE)


def _places(builder, block: Block, slot: int, base: ir.Value, next_base: ir.Value, stride: ir.Value) -> ir.Value:
    """Where a slot's 16-bit numbers of a block lie; those of the next call are asked for."""
    prefetch(builder, plus(builder, plus(builder, next_base, slot, stride), block.token, 2), 2 * NUM_LANES)
    return plus(builder, plus(builder, base, slot, stride), block.token, 2)

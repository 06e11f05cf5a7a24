"""What packed attention does within registers, in Triton: codes as numbers, and blocks taken apart and put together."""

import triton
import triton.language as tl


@triton.jit
def code_numbers(words, SLOT: tl.constexpr, BITS: tl.constexpr, TILING: tl.constexpr):
    """The codes of a slot, short of `codes_factor`.

    Two words share a register on the GPU (`pack=2`): an fp16 code costs half an instruction.
    """
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    MASK: tl.constexpr = ((1 << BITS) - 1) << (SLOT * BITS - SHIFT)
    if TILING.packed_dtype == tl.float32:
        codes = exact_codes(words, SLOT, BITS)
    elif TILING.is_interpreted:
        codes = ((words >> SHIFT) & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        if SHIFT:
            words = tl.inline_asm_elementwise(
                f"shr.b32 $0, $1, {SHIFT};", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
            )
        codes = tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {MASK | MASK << 16};", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    return codes


@triton.jit
def codes_factor(SLOT: tl.constexpr, BITS: tl.constexpr, TILING: tl.constexpr):
    """What the products of `code_numbers` must be multiplied by."""
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    return 1.0 if TILING.packed_dtype == tl.float32 else 1.0 * (1 << (24 + SHIFT - SLOT * BITS))


@triton.jit
def exact_codes(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The codes of a slot as fp32."""
    return ((words >> (SLOT * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def scale_rows(rows, scale, TILING: tl.constexpr):
    """rows `[R, N]` * scale `[R]`. Left to itself the compiler multiplies fp16 one by one, not by two."""
    scale = scale.to(TILING.packed_dtype)[:, None]
    if TILING.is_interpreted or TILING.packed_dtype == tl.float32:
        scaled = rows * scale
    else:
        scaled = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [rows, scale], dtype=tl.float16, is_pure=True, pack=2
        )
    return scaled


@triton.jit
def pin(scale, TILING: tl.constexpr):
    """scale itself, made opaque (`is_pure=False`): to bring it and the weights into one layout the compiler
    then moves these few numbers instead of their products with all weights."""
    if not TILING.is_interpreted and TILING.packed_dtype == tl.float16:
        scale = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [scale], dtype=tl.float16, is_pure=False, pack=2)
    return scale


@triton.jit
def row_of(block, row):
    """Row `row` of a block `[R, N]`, as `[1, N]`."""
    return tl.gather(block, tl.full((1, block.shape[1]), 0, tl.int32) + row, axis=0)


@triton.jit
def stack(blocks, NUM: tl.constexpr):
    """A tuple of NUM blocks `[R, N]` (NUM a power of two) as one block `[NUM * R, N]`."""
    if NUM == 1:
        stacked = blocks[0]
    else:
        pairs = ()
        for i in tl.static_range(NUM // 2):
            pair = tl.permute(tl.join(blocks[2 * i], blocks[2 * i + 1]), (2, 0, 1))
            pairs += (tl.reshape(pair, (2 * pair.shape[1], pair.shape[2])),)
        stacked = stack(pairs, NUM // 2)
    return stacked


@triton.jit
def columns_of(flat, NUM: tl.constexpr):
    """A row-major `[R, NUM]` block, given flat, as a tuple of NUM columns `[R]` (NUM a power of two).

    The scales of a page are loaded in one piece and parted in registers: column by column they would be
    2-byte loads that no asynchronous copy can make.
    """
    columns = ()
    if NUM == 1:
        columns += (flat,)
    else:
        even, odd = tl.split(tl.reshape(flat, (flat.shape[0] // 2, 2)))
        evens = columns_of(even, NUM // 2)
        odds = columns_of(odd, NUM // 2)
        for i in tl.static_range(NUM // 2):
            columns += (evens[i], odds[i])
    return columns


@triton.jit
def spread_rows(block, NUM: tl.constexpr):
    """`[R, NUM]` as `[16, R]`, column i in row i * 16 / NUM and zeros between (NUM a power of two)."""
    if NUM == 16:
        rows = tl.trans(block)
    else:
        block = tl.join(block, tl.zeros_like(block))
        rows = spread_rows(tl.reshape(block, (block.shape[0], 2 * NUM)), 2 * NUM)
    return rows

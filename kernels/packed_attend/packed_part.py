"""The part of packed attention that reads packed tokens, in Triton. See `triton.py` for the method."""

import triton
import triton.language as tl

from kvlens.kernels.split_k import dot


@triton.jit
def attend_packed(
    query_ptr, mask_n, scaling, num_tokens, split, page_table_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
    value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
    TILING: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one share of the packed tokens, and its outputs, not yet divided by the sum.

    Shapes: query_ptr and mask_n `[N]`, each head's query; maximum, total `[N]`; outputs, a tuple of
    `[VW, N]`: the channels of each slot.
    """
    NUM_HEADS: tl.constexpr = TILING.block_heads
    VALUE_SLOTS: tl.constexpr = TILING.value_slots
    VALUE_WORDS: tl.constexpr = TILING.block_value_words
    VALUE_GROUPS: tl.constexpr = TILING.block_value_groups
    offs_d = tl.arange(0, TILING.block_d)
    offs_vw = tl.arange(0, VALUE_WORDS)
    mask_d = offs_d < TILING.head_dim
    mask_vw = offs_vw < TILING.value_words
    query = tl.load(
        query_ptr[None, :] + offs_d[:, None], mask=mask_n[None, :] & mask_d[:, None], other=0.0
    ).to(TILING.packed_dtype)  # fmt: skip

    maximum = tl.full((NUM_HEADS,), -1e30, tl.float32)  # finite: no difference is inf - inf
    total = tl.zeros((NUM_HEADS,), tl.float32)
    minima = tl.zeros((VALUE_GROUPS, NUM_HEADS), tl.float32)
    outputs = ()
    for _ in tl.static_range(VALUE_SLOTS):
        outputs += (tl.zeros((VALUE_WORDS, NUM_HEADS), tl.float32),)

    # A sequence's pages laid end to end are one row of words for each channel; a tile is a piece of it.
    num_tiles = tl.cdiv(tl.cdiv(num_tokens, TILING.page_tokens) * TILING.key_words, TILING.tile_words)
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(1) - TILING.num_exact_parts)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    for tile in tl.range(first_tile, last_tile, num_stages=TILING.num_stages):
        key_page, word, mask_w, value_page, token, mask_t, first_word, num_left = _locate(
            tile, num_tokens, page_table_ptr, TILING
        )
        mask_words = mask_w[:, None] & mask_d[None, :]
        words = _load(
            _down(key_codes_ptr + key_page * stride_key_codes_page, TILING)
            + (offs_d[None, :] * TILING.key_words + word[:, None]),
            mask_words, TILING.masks_key_words,
        )  # fmt: skip
        offs_page = key_page * stride_key_scale_page
        if TILING.folds_keys:
            scores = _fold_keys(
                query, words, scaling, key_scale_ptr + offs_page, key_minimum_ptr + offs_page, first_word, TILING
            )
        else:
            scores = _restore_keys(
                query, words, mask_words, scaling, key_scale_ptr + offs_page, key_minimum_ptr + offs_page, word,
                TILING,
            )  # fmt: skip
        scores = tl.where(mask_t[:, None], scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        probabilities = tl.exp2(scores - new_maximum[None, :])
        total = total * decay + tl.sum(probabilities, axis=0)
        maximum = new_maximum
        weights = probabilities.to(TILING.packed_dtype)
        minima *= decay[None, :]
        decayed = ()
        for slot in tl.static_range(VALUE_SLOTS):
            decayed += (outputs[slot] * decay[None, :],)

        words = _load(
            _across(value_codes_ptr + value_page * stride_value_codes_page, TILING)
            + (token[None, :] * TILING.value_words + offs_vw[:, None]),
            mask_vw[:, None] if TILING.is_tile_in_page else mask_t[None, :] & mask_vw[:, None],
            TILING.masks_value_words,
        )  # fmt: skip
        offs_page = value_page * stride_value_scale_page
        if TILING.folds_values:
            outputs, minima = _fold_values(
                decayed, minima, weights, words, value_scale_ptr + offs_page, value_minimum_ptr + offs_page,
                token, mask_t, first_word, num_left, TILING,
            )  # fmt: skip
        else:
            outputs = _restore_values(
                decayed, weights, words, value_scale_ptr + offs_page, value_minimum_ptr + offs_page,
                token, mask_t, TILING,
            )  # fmt: skip

    if TILING.folds_values:
        complete = ()
        for slot in tl.static_range(VALUE_SLOTS):
            group = slot * TILING.value_words // TILING.value_group_size
            share = _row(minima, group * TILING.value_minima_step)
            complete += (outputs[slot] * _codes_factor(slot, TILING.value_bits, TILING) + share,)
        outputs = complete
    return maximum, total, outputs


@triton.jit
def _locate(tile, num_tokens, page_table_ptr, TILING: tl.constexpr):
    """Where a tile's words of keys, and the values of their tokens, lie.

    Returns the page, the place in it and whether it exists, of each word `[W]`; the same of each token
    `[tile tokens]`; the first word and how many tokens the page has left, which mean something only to a tile
    in one page. Such a tile has one page for all: a scalar, so that addresses need little arithmetic.
    """
    offs_w = tl.arange(0, TILING.tile_words)
    offs_t = tl.arange(0, TILING.tile_tokens)
    if TILING.is_tile_in_page:
        TILES: tl.constexpr = TILING.key_words // TILING.tile_words
        first_word = tile % TILES * TILING.tile_words if TILES > 1 else 0
        word = first_word + offs_w
        mask_w = offs_w >= 0
        token = _page_token(offs_t, first_word, TILING)
        num_left = num_tokens - tile // TILES * TILING.page_tokens
        mask_t = token < num_left
        key_page = tl.load(page_table_ptr + tile // TILES).to(tl.int64)
        value_page = key_page
    else:
        first_word = 0
        num_left = num_tokens
        column = tile * TILING.tile_words + offs_w
        word = column % TILING.key_words
        mask_w = column // TILING.key_words * TILING.page_tokens < num_tokens
        key_page = tl.load(page_table_ptr + column // TILING.key_words, mask=mask_w, other=0).to(tl.int64)
        column = tile * TILING.tile_words + offs_t % TILING.tile_words
        token = offs_t // TILING.tile_words * TILING.key_words + column % TILING.key_words
        mask_t = column // TILING.key_words * TILING.page_tokens + token < num_tokens
        value_page = tl.load(page_table_ptr + column // TILING.key_words, mask=mask_t, other=0).to(tl.int64)
    return key_page, word, mask_w, value_page, token, mask_t, first_word, num_left


@triton.jit
def _fold_keys(query, words, scaling, scale_ptr, minimum_ptr, first_word, TILING: tl.constexpr):
    """Scores of a tile's tokens, run after run, in units of log 2; each run lies in one group.

    Shapes: query `[D, N]`, words `[W, D]`, result `[tile tokens, N]`. The pointers are to the page's scales.
    """
    NUM_SLOTS: tl.constexpr = TILING.key_slots
    NUM_GROUPS: tl.constexpr = TILING.key_groups
    BLOCK_D: tl.constexpr = TILING.block_d
    if TILING.splits_key_scales:
        offs = tl.arange(0, BLOCK_D * NUM_GROUPS)
        mask = offs < TILING.head_dim * NUM_GROUPS
        scales = _columns(_load(scale_ptr + offs, mask, TILING.masks_channels), NUM_GROUPS)
        minimum = _load(minimum_ptr + offs, mask, TILING.masks_channels)
        minimum = _spread_rows(tl.reshape(minimum, (BLOCK_D, NUM_GROUPS)), NUM_GROUPS)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        offs_g = tl.arange(0, TILING.block_key_groups)
        mask_d = offs_d < TILING.head_dim
        minimum = tl.load(
            minimum_ptr + (offs_d[None, :] * NUM_GROUPS + offs_g[:, None]),
            mask=mask_d[None, :] & (offs_g < NUM_GROUPS)[:, None], other=0.0,
        )  # fmt: skip
    biases = dot(minimum.to(TILING.packed_dtype), query) * scaling
    runs = ()
    for slot in tl.static_range(NUM_SLOTS):
        if slot * TILING.key_words % TILING.key_group_size == 0:
            if TILING.splits_key_scales:
                group = slot * TILING.key_words // TILING.key_group_size
                scale = scales[slot * TILING.key_words // TILING.key_group_size]
            else:
                group = (slot * TILING.key_words + first_word) // TILING.key_group_size
                scale = tl.load(scale_ptr + offs_d * NUM_GROUPS + group, mask=mask_d, other=0.0)
            scaled_query = _scaled(query, scale, TILING)
            bias = _row(biases, group * TILING.key_minima_step)
        run = _dot_codes(words, scaled_query, None, slot, TILING.key_bits, TILING)
        runs += (run * (scaling * _codes_factor(slot, TILING.key_bits, TILING)) + bias,)
    return _stack(runs, NUM_SLOTS)


@triton.jit
def _restore_keys(query, words, mask, scaling, scale_ptr, minimum_ptr, word, TILING: tl.constexpr):
    """The same for any groups: keys are restored before the product. The pointers are to each word's page."""
    NUM_SLOTS: tl.constexpr = TILING.key_slots
    offs_d = tl.arange(0, TILING.block_d)
    runs = ()
    for slot in tl.static_range(NUM_SLOTS):
        group = (slot * TILING.key_words + word) // TILING.key_group_size
        offs = group[:, None] + offs_d[None, :] * TILING.key_groups
        scale = tl.load(_down(scale_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(_down(minimum_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        keys = _codes(words, slot, TILING.key_bits) * scale + minimum
        runs += (dot(keys.to(TILING.packed_dtype), query) * scaling,)
    return _stack(runs, NUM_SLOTS)


@triton.jit
def _fold_values(
    outputs, minima, weights, words, scale_ptr, minimum_ptr, token, mask_t, first_word, num_left,
    TILING: tl.constexpr,
):  # fmt: skip
    """The outputs (a tuple, one block a slot) and the sums of p * minimum, with a tile's tokens added.

    Shapes: weights `[tokens, N]`, words `[VW, tokens]`, outputs `[VW, N]` each, minima `[groups, N]`. `token`
    `[tokens]` is each one's place in its page; the pointers are to the page's scales (or to each token's).
    """
    NUM_SLOTS: tl.constexpr = TILING.value_slots
    NUM_GROUPS: tl.constexpr = TILING.value_groups
    TOKENS: tl.constexpr = TILING.tile_tokens
    if TILING.splits_value_scales:
        offs = tl.arange(0, TOKENS * NUM_GROUPS)
        offs_row = _page_token(offs // NUM_GROUPS, first_word, TILING) * NUM_GROUPS
        mask = offs_row < num_left * NUM_GROUPS
        offs = offs_row + offs % NUM_GROUPS
        scales = _columns(tl.load(scale_ptr + offs, mask=mask, other=0.0), NUM_GROUPS)
        minimum = tl.load(minimum_ptr + offs, mask=mask, other=0.0)
        minimum = _spread_rows(tl.reshape(minimum, (TOKENS, NUM_GROUPS)), NUM_GROUPS)
    else:
        offs_g = tl.arange(0, TILING.block_value_groups)
        minimum = tl.load(
            _across(minimum_ptr, TILING) + (token[None, :] * NUM_GROUPS + offs_g[:, None]),
            mask=mask_t[None, :] & (offs_g < NUM_GROUPS)[:, None], other=0.0,
        )  # fmt: skip
    minima = dot(minimum.to(TILING.packed_dtype), weights, minima)
    new_outputs = ()
    for slot in tl.static_range(NUM_SLOTS):
        if slot * TILING.value_words % TILING.value_group_size == 0:
            if TILING.splits_value_scales:
                scale = _pinned(scales[slot * TILING.value_words // TILING.value_group_size], TILING)
            else:
                group = slot * TILING.value_words // TILING.value_group_size
                scale = tl.load(scale_ptr + token * NUM_GROUPS + group, mask=mask_t, other=0.0)
            scaled_weights = _scaled(weights, scale, TILING)
        new_outputs += (_dot_codes(words, scaled_weights, outputs[slot], slot, TILING.value_bits, TILING),)
    return new_outputs, minima


@triton.jit
def _restore_values(outputs, weights, words, scale_ptr, minimum_ptr, token, mask_t, TILING: tl.constexpr):
    """The same for any groups: values are restored before the product."""
    NUM_SLOTS: tl.constexpr = TILING.value_slots
    offs_vw = tl.arange(0, TILING.block_value_words)
    mask = mask_t[None, :] & (offs_vw < TILING.value_words)[:, None]
    new_outputs = ()
    for slot in tl.static_range(NUM_SLOTS):
        group = (slot * TILING.value_words + offs_vw) // TILING.value_group_size
        offs = token[None, :] * TILING.value_groups + group[:, None]
        scale = tl.load(_across(scale_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(_across(minimum_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        values = _codes(words, slot, TILING.value_bits) * scale + minimum
        new_outputs += (dot(values.to(TILING.packed_dtype), weights, outputs[slot]),)
    return new_outputs


@triton.jit
def _dot_codes(words, weights, accumulator, SLOT: tl.constexpr, BITS: tl.constexpr, TILING: tl.constexpr):
    """accumulator + codes of a slot · weights, short of `_codes_factor`.

    Two words share a register on the GPU (`pack=2`): an fp16 code costs half an instruction.
    """
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    MASK: tl.constexpr = ((1 << BITS) - 1) << (SLOT * BITS - SHIFT)
    if TILING.packed_dtype == tl.float32:
        codes = _codes(words, SLOT, BITS)
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
    return dot(codes, weights, accumulator)


@triton.jit
def _codes_factor(SLOT: tl.constexpr, BITS: tl.constexpr, TILING: tl.constexpr):
    """What the products of `_dot_codes` must be multiplied by."""
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    return 1.0 if TILING.packed_dtype == tl.float32 else 1.0 * (1 << (24 + SHIFT - SLOT * BITS))


@triton.jit
def _codes(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The codes of a slot as fp32."""
    return ((words >> (SLOT * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _scaled(rows, scale, TILING: tl.constexpr):
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
def _pinned(scale, TILING: tl.constexpr):
    """scale itself, made opaque (`is_pure=False`): to bring it and the weights into one layout the compiler
    then moves these few numbers instead of their products with all weights."""
    if not TILING.is_interpreted and TILING.packed_dtype == tl.float16:
        scale = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [scale], dtype=tl.float16, is_pure=False, pack=2)
    return scale


@triton.jit
def _page_token(row, first_word, TILING: tl.constexpr):
    """The place in its page of token `row` of a tile that lies in one page."""
    if TILING.tile_words < TILING.key_words:
        row = first_word + row // TILING.tile_words * TILING.key_words + row % TILING.tile_words
    return row


@triton.jit
def _load(ptrs, mask, IS_MASKED: tl.constexpr):
    """A mask that cannot fail still costs address registers: it is left out where it is known to hold."""
    return tl.load(ptrs, mask=mask, other=0) if IS_MASKED else tl.load(ptrs)


@triton.jit
def _down(page, TILING: tl.constexpr):
    """One page for a whole tile as it is, or a page for each word as a column."""
    return page if TILING.is_tile_in_page else page[:, None]


@triton.jit
def _across(page, TILING: tl.constexpr):
    """One page for a whole tile as it is, or a page for each token as a row."""
    return page if TILING.is_tile_in_page else page[None, :]


@triton.jit
def _row(block, row):
    """Row `row` of a block `[R, N]`, as `[1, N]`."""
    return tl.gather(block, tl.full((1, block.shape[1]), 0, tl.int32) + row, axis=0)


@triton.jit
def _stack(blocks, NUM: tl.constexpr):
    """A tuple of NUM blocks `[R, N]` (NUM a power of two) as one block `[NUM * R, N]`."""
    if NUM == 1:
        stacked = blocks[0]
    else:
        pairs = ()
        for i in tl.static_range(NUM // 2):
            pair = tl.permute(tl.join(blocks[2 * i], blocks[2 * i + 1]), (2, 0, 1))
            pairs += (tl.reshape(pair, (2 * pair.shape[1], pair.shape[2])),)
        stacked = _stack(pairs, NUM // 2)
    return stacked


@triton.jit
def _columns(flat, NUM: tl.constexpr):
    """A row-major `[R, NUM]` block, given flat, as a tuple of NUM columns `[R]` (NUM a power of two).

    The scales of a page are loaded in one piece and parted in registers: column by column they would be
    2-byte loads that no asynchronous copy can make.
    """
    columns = ()
    if NUM == 1:
        columns += (flat,)
    else:
        even, odd = tl.split(tl.reshape(flat, (flat.shape[0] // 2, 2)))
        evens = _columns(even, NUM // 2)
        odds = _columns(odd, NUM // 2)
        for i in tl.static_range(NUM // 2):
            columns += (evens[i], odds[i])
    return columns


@triton.jit
def _spread_rows(block, NUM: tl.constexpr):
    """`[R, NUM]` as `[16, R]`, column i in row i * 16 / NUM and zeros between (NUM a power of two)."""
    if NUM == 16:
        rows = tl.trans(block)
    else:
        block = tl.join(block, tl.zeros_like(block))
        rows = _spread_rows(tl.reshape(block, (block.shape[0], 2 * NUM)), 2 * NUM)
    return rows

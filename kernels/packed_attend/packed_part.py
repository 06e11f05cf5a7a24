"""The part of packed attention that reads packed tokens, in Triton. See `triton.py` for the method."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, accumulator=None):
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _stack(blocks, NUM: tl.constexpr):
    """A tuple of NUM blocks `[R, N]` (NUM a power of two) as one block `[NUM * R, N]`."""
    if NUM == 1:
        return blocks[0]
    else:
        pairs = ()
        for i in tl.static_range(NUM // 2):
            pair = tl.permute(tl.join(blocks[2 * i], blocks[2 * i + 1]), (2, 0, 1))
            pairs += (tl.reshape(pair, (2 * pair.shape[1], pair.shape[2])),)
        return _stack(pairs, NUM // 2)


@triton.jit
def _columns(flat, NUM: tl.constexpr):
    """A row-major `[R, NUM]` block, given flat, as a tuple of NUM columns `[R]` (NUM a power of two)."""
    if NUM == 1:
        return (flat,)
    else:
        even, odd = tl.split(tl.reshape(flat, (flat.shape[0] // 2, 2)))
        evens = _columns(even, NUM // 2)
        odds = _columns(odd, NUM // 2)
        columns = ()
        for i in tl.static_range(NUM // 2):
            columns += (evens[i], odds[i])
        return columns


@triton.jit
def _spread_rows(block, NUM: tl.constexpr):
    """`[R, NUM]` as `[16, R]`, with column i in row i * 16 / NUM and zeros between (NUM a power of two)."""
    if NUM >= 16:
        return tl.trans(block)
    else:
        block = tl.join(block, tl.zeros_like(block))
        return _spread_rows(tl.reshape(block, (block.shape[0], 2 * NUM)), 2 * NUM)


@triton.jit
def _row(block, row):
    """Row `row` of a block `[R, N]`, as `[1, N]`."""
    return tl.gather(block, tl.full((1, block.shape[1]), 0, tl.int32) + row, axis=0)


@triton.jit
def _pinned(column, T: tl.constexpr):
    """column, in an opaque wrapping: the compiler then moves it, not what it is multiplied with."""
    if T.is_interpreted or T.packed_dtype == tl.float32:
        return column
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [column], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def _page_token(row, first_word, T: tl.constexpr):
    """The place in its page of token `row` of a tile that lies in one page."""
    if T.is_tile_page:
        return row
    else:
        return first_word + row // T.tile_words * T.key_words + row % T.tile_words


@triton.jit
def _load(ptrs, mask, IS_MASKED: tl.constexpr):
    if IS_MASKED:
        return tl.load(ptrs, mask=mask, other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def _down(page, T: tl.constexpr):
    """One page for a whole tile, or a page for each word or token, as a column."""
    return page if T.is_tile_in_page else page[:, None]


@triton.jit
def _across(page, T: tl.constexpr):
    return page if T.is_tile_in_page else page[None, :]


@triton.jit
def _scaled(rows, scale, T: tl.constexpr):
    """rows `[R, N]` * scale `[R]`. Left to itself the compiler multiplies fp16 one by one, not by two."""
    scale = scale.to(T.packed_dtype)[:, None]
    if T.packed_dtype == tl.float32 or T.is_interpreted:
        return rows * scale
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [rows, scale], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def _codes(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The codes of a slot as fp32."""
    return ((words >> (SLOT * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _dot_codes(words, weights, accumulator, SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """accumulator + codes of a slot · weights, short of `_codes_factor`.

    Two words share a register on the GPU (`pack=2`): an fp16 code costs half an instruction.
    """
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    MASK: tl.constexpr = ((1 << BITS) - 1) << (SLOT * BITS - SHIFT)
    if T.packed_dtype == tl.float32:
        codes = _codes(words, SLOT, BITS)
    elif T.is_interpreted:
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
def _codes_factor(SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """What the products of `_dot_codes` must be multiplied by."""
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    return 1.0 if T.packed_dtype == tl.float32 else 1.0 * (1 << (24 + SHIFT - SLOT * BITS))


@triton.jit
def _key_scores(query, words, mask, scaling, scale_ptr, minimum_ptr, word, first_word, T: tl.constexpr):
    """Scores of a tile's tokens, run after run, in units of log 2.

    Shapes: query `[D, N]`, words and mask `[W, D]`, result `[tile tokens, N]`. `word` `[W]` is each column's
    place in its page, `first_word` the first; the pointers are to the page's scales (or to each word's).
    """
    NUM_SLOTS: tl.constexpr = T.key_slots
    BLOCK_D: tl.constexpr = T.block_d
    KEY_GROUPS: tl.constexpr = T.key_groups
    offs_d = tl.arange(0, T.block_d)
    mask_d = offs_d < T.head_dim
    runs = ()
    if T.folds_keys:
        if T.splits_key_scales:
            offs = tl.arange(0, T.block_d * T.key_groups)
            mask = offs < T.head_dim * T.key_groups
            scales = _columns(_load(scale_ptr + offs, mask, T.masks_channels), T.key_groups)
            minimum = _load(minimum_ptr + offs, mask, T.masks_channels)
            minimum = _spread_rows(tl.reshape(minimum, (BLOCK_D, KEY_GROUPS)), KEY_GROUPS)
        else:
            offs_g = tl.arange(0, T.block_key_groups)
            minimum = tl.load(
                minimum_ptr + (offs_d[None, :] * T.key_groups + offs_g[:, None]),
                mask=mask_d[None, :] & (offs_g < T.key_groups)[:, None], other=0.0,
            )  # fmt: skip
        biases = dot(minimum.to(T.packed_dtype), query) * scaling
        for slot in tl.static_range(NUM_SLOTS):
            if slot * T.key_words % T.key_group_size == 0:
                group = (slot * T.key_words + first_word) // T.key_group_size
                if T.splits_key_scales:
                    scale = scales[slot * T.key_words // T.key_group_size]
                    bias = _row(biases, slot * T.key_words // T.key_group_size * T.key_minima_step)
                else:
                    scale = tl.load(scale_ptr + offs_d * T.key_groups + group, mask=mask_d, other=0.0)
                    bias = _row(biases, group)
                scaled_query = _scaled(query, scale, T)
            run = _dot_codes(words, scaled_query, None, slot, T.key_bits, T)
            runs += (run * (scaling * _codes_factor(slot, T.key_bits, T)) + bias,)
    else:
        for slot in tl.static_range(NUM_SLOTS):
            group = (slot * T.key_words + word) // T.key_group_size
            offs = group[:, None] + offs_d[None, :] * T.key_groups
            scale = tl.load(_down(scale_ptr, T) + offs, mask=mask, other=0.0).to(tl.float32)
            minimum = tl.load(_down(minimum_ptr, T) + offs, mask=mask, other=0.0).to(tl.float32)
            keys = _codes(words, slot, T.key_bits) * scale + minimum
            runs += (dot(keys.to(T.packed_dtype), query) * scaling,)
    return _stack(runs, NUM_SLOTS)


@triton.jit
def _add_values(
    outputs, offset, weights, words, scale_ptr, minimum_ptr, token, mask_t, first_word, num_left, T: tl.constexpr
):
    """The outputs (a tuple, one block a slot) and the share of the minima, with a tile's tokens added.

    Shapes: weights `[tokens, N]`, words `[VW, tokens]`, outputs `[VW, N]` each, offset `[groups, N]`. `token`
    `[tokens]` is each one's place in its page; the pointers are to the page's scales (or to each token's).
    """
    NUM_SLOTS: tl.constexpr = T.value_slots
    TILE_TOKENS: tl.constexpr = T.tile_tokens
    VALUE_GROUPS: tl.constexpr = T.value_groups
    new_outputs = ()
    if T.folds_values:
        if T.splits_value_scales:
            offs = tl.arange(0, T.tile_tokens * T.value_groups)
            offs_row = _page_token(offs // T.value_groups, first_word, T) * T.value_groups
            mask = offs_row < num_left * T.value_groups
            offs = offs_row + offs % T.value_groups
            scales = _columns(tl.load(scale_ptr + offs, mask=mask, other=0.0), T.value_groups)
            minimum = tl.load(minimum_ptr + offs, mask=mask, other=0.0)
            minimum = _spread_rows(tl.reshape(minimum, (TILE_TOKENS, VALUE_GROUPS)), VALUE_GROUPS)
        else:
            offs_g = tl.arange(0, T.block_value_groups)
            minimum = tl.load(
                _across(minimum_ptr, T) + (token[None, :] * T.value_groups + offs_g[:, None]),
                mask=mask_t[None, :] & (offs_g < T.value_groups)[:, None], other=0.0,
            )  # fmt: skip
        offset = dot(minimum.to(T.packed_dtype), weights, offset)
        for slot in tl.static_range(NUM_SLOTS):
            if slot * T.value_words % T.value_group_size == 0:
                group = slot * T.value_words // T.value_group_size
                if T.splits_value_scales:
                    scale = _pinned(scales[slot * T.value_words // T.value_group_size], T)
                else:
                    scale = tl.load(scale_ptr + token * T.value_groups + group, mask=mask_t, other=0.0)
                scaled_weights = _scaled(weights, scale, T)
            new_outputs += (_dot_codes(words, scaled_weights, outputs[slot], slot, T.value_bits, T),)
    else:
        offs_vw = tl.arange(0, T.block_value_words)
        mask = mask_t[None, :] & (offs_vw < T.value_words)[:, None]
        for slot in tl.static_range(NUM_SLOTS):
            group = (slot * T.value_words + offs_vw) // T.value_group_size
            offs = token[None, :] * T.value_groups + group[:, None]
            scale = tl.load(_across(scale_ptr, T) + offs, mask=mask, other=0.0).to(tl.float32)
            minimum = tl.load(_across(minimum_ptr, T) + offs, mask=mask, other=0.0).to(tl.float32)
            values = _codes(words, slot, T.value_bits) * scale + minimum
            new_outputs += (dot(values.to(T.packed_dtype), weights, outputs[slot]),)
    return new_outputs, offset


@triton.jit
def attend_packed(
    query_ptr, mask_n, scaling, num_tokens, split, page_table_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
    value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
    T: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one share of the packed tokens, and its outputs, not yet divided by the sum.

    Shapes: query_ptr and mask_n `[N]`, each head's query; maximum, total `[N]`; outputs, a tuple of
    `[VW, N]`: the channels of each slot.
    """
    NUM_HEADS: tl.constexpr = T.block_heads
    VALUE_SLOTS: tl.constexpr = T.value_slots
    VALUE_WORDS: tl.constexpr = T.block_value_words
    VALUE_GROUPS: tl.constexpr = T.block_value_groups
    offs_d = tl.arange(0, T.block_d)
    offs_w = tl.arange(0, T.tile_words)
    offs_t = tl.arange(0, T.tile_tokens)
    offs_vw = tl.arange(0, T.block_value_words)
    mask_d = offs_d < T.head_dim
    mask_vw = offs_vw < T.value_words
    query = tl.load(
        query_ptr[None, :] + offs_d[:, None], mask=mask_n[None, :] & mask_d[:, None], other=0.0
    ).to(T.packed_dtype)  # fmt: skip

    maximum = tl.full((NUM_HEADS,), -1e30, tl.float32)  # finite: no difference is inf - inf
    total = tl.zeros((NUM_HEADS,), tl.float32)
    offset = tl.zeros((VALUE_GROUPS, NUM_HEADS), tl.float32)
    outputs = ()
    for _ in tl.static_range(VALUE_SLOTS):
        outputs += (tl.zeros((VALUE_WORDS, NUM_HEADS), tl.float32),)

    # A sequence's pages laid end to end are one row of words for each channel; a tile is a piece of it.
    num_tiles = tl.cdiv(tl.cdiv(num_tokens, T.page_tokens) * T.key_words, T.tile_words)
    tiles_per_split = tl.cdiv(num_tiles, T.num_splits)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    for tile in tl.range(first_tile, last_tile, num_stages=T.num_stages):
        first_word = 0
        num_left = num_tokens
        if T.is_tile_in_page:
            page_index = tile // (T.key_words // T.tile_words)
            if not T.is_tile_page:
                first_word = tile % (T.key_words // T.tile_words) * T.tile_words
            word = first_word + offs_w
            token = _page_token(offs_t, first_word, T)
            num_left = num_tokens - page_index * T.page_tokens
            mask_t = token < num_left
            key_page = tl.load(page_table_ptr + page_index).to(tl.int64)
            value_page = key_page
            mask_key_words = mask_d[None, :]
            mask_value_words = mask_vw[:, None]
        else:
            column = tile * T.tile_words + offs_w
            word = column % T.key_words
            mask_w = column // T.key_words * T.page_tokens < num_tokens
            key_page = tl.load(page_table_ptr + column // T.key_words, mask=mask_w, other=0).to(tl.int64)
            mask_key_words = mask_w[:, None] & mask_d[None, :]
            column = tile * T.tile_words + offs_t % T.tile_words
            token = offs_t // T.tile_words * T.key_words + column % T.key_words
            mask_t = column // T.key_words * T.page_tokens + token < num_tokens
            value_page = tl.load(page_table_ptr + column // T.key_words, mask=mask_t, other=0).to(tl.int64)
            mask_value_words = mask_vw[:, None] & mask_t[None, :]

        words = _load(
            _down(key_codes_ptr + key_page * stride_key_codes_page, T)
            + (offs_d[None, :] * T.key_words + word[:, None]),
            mask_key_words, T.masks_channels or not T.is_tile_in_page,
        )  # fmt: skip
        scores = _key_scores(
            query, words, mask_key_words, scaling, key_scale_ptr + key_page * stride_key_scale_page,
            key_minimum_ptr + key_page * stride_key_scale_page, word, first_word, T,
        )  # fmt: skip
        scores = tl.where(mask_t[:, None], scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        probabilities = tl.exp2(scores - new_maximum[None, :])
        total = total * decay + tl.sum(probabilities, axis=0)
        maximum = new_maximum

        words = _load(
            _across(value_codes_ptr + value_page * stride_value_codes_page, T)
            + (token[None, :] * T.value_words + offs_vw[:, None]),
            mask_value_words, T.block_value_words != T.value_words or not T.is_tile_in_page,
        )  # fmt: skip
        decayed = ()
        for slot in tl.static_range(VALUE_SLOTS):
            decayed += (outputs[slot] * decay[None, :],)
        outputs, offset = _add_values(
            decayed, offset * decay[None, :], probabilities.to(T.packed_dtype), words,
            value_scale_ptr + value_page * stride_value_scale_page,
            value_minimum_ptr + value_page * stride_value_scale_page, token, mask_t, first_word, num_left, T,
        )  # fmt: skip

    if T.folds_values:
        complete = ()
        for slot in tl.static_range(VALUE_SLOTS):
            minima = _row(offset, slot * T.value_words // T.value_group_size * T.value_minima_step)
            complete += (outputs[slot] * _codes_factor(slot, T.value_bits, T) + minima,)
        outputs = complete
    return maximum, total, outputs

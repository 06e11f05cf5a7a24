"""The part of packed attention that reads packed tokens, in Triton. See `triton.py` for the method."""

import triton
import triton.language as tl

from kvlens.kernels.packed_attend.registers import (
    code_numbers,
    codes_factor,
    columns_of,
    exact_codes,
    pin,
    row_of,
    scale_rows,
    spread_rows,
    stack,
)
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
    `[value rows, N]`: consecutive channels.
    """
    NUM_HEADS: tl.constexpr = TILING.block_heads
    NUM_SUMS: tl.constexpr = TILING.num_value_sums
    NUM_CHUNKS: tl.constexpr = TILING.key_chunks
    queries = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        offs_d = chunk * TILING.key_channels + tl.arange(0, TILING.key_channels)
        mask = mask_n[None, :] & (offs_d < TILING.head_dim)[:, None]
        queries += (tl.load(query_ptr[None, :] + offs_d[:, None], mask=mask, other=0.0).to(TILING.packed_dtype),)

    maximum = tl.full((NUM_HEADS,), -1e30, tl.float32)  # finite: no difference is inf - inf
    total = tl.zeros((NUM_HEADS,), tl.float32)
    minima = tl.full((TILING.block_value_groups, NUM_HEADS), 0.0, tl.float32)
    outputs = ()
    for _ in tl.static_range(NUM_SUMS):
        outputs += (tl.full((TILING.block_value_rows, NUM_HEADS), 0.0, tl.float32),)

    # A sequence's pages laid end to end are one row of words for each channel; a tile is a piece of it.
    num_tiles = tl.cdiv(tl.cdiv(num_tokens, TILING.page_tokens) * TILING.key_words, TILING.tile_words)
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(1) - TILING.num_exact_parts)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    for tile in tl.range(first_tile, last_tile, num_stages=TILING.num_stages):
        key_page, word, mask_w, value_page, token, mask_t, first_word, num_left = _locate(
            tile, num_tokens, page_table_ptr, TILING
        )
        codes_ptr = key_codes_ptr + key_page * stride_key_codes_page
        offs_page = key_page * stride_key_scale_page
        if TILING.folds_keys:
            scores = _fold_keys(
                queries, scaling, codes_ptr, key_scale_ptr + offs_page, key_minimum_ptr + offs_page, word, first_word,
                TILING,
            )  # fmt: skip
        else:
            scores = _restore_keys(
                queries[0], scaling, codes_ptr, key_scale_ptr + offs_page, key_minimum_ptr + offs_page, word, mask_w,
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
        for index in tl.static_range(NUM_SUMS):
            decayed += (outputs[index] * decay[None, :],)

        codes_ptr = value_codes_ptr + value_page * stride_value_codes_page
        offs_page = value_page * stride_value_scale_page
        if TILING.folds_values:
            outputs, minima = _fold_values(
                decayed, minima, weights, codes_ptr, value_scale_ptr + offs_page, value_minimum_ptr + offs_page,
                token, mask_t, first_word, num_left, TILING,
            )  # fmt: skip
        else:
            outputs = _restore_values(
                decayed, weights, codes_ptr, value_scale_ptr + offs_page, value_minimum_ptr + offs_page,
                token, mask_t, TILING,
            )  # fmt: skip

    if TILING.folds_values:
        outputs = _complete_values(outputs, minima, TILING)
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
def _fold_keys(queries, scaling, codes_ptr, scale_ptr, minimum_ptr, word, first_word, TILING: tl.constexpr):
    """Scores of a tile's tokens `[tile tokens, N]`, run after run, in units of log 2; each run lies in one group.

    Channels are taken `key_channels` at a time: queries is a tuple of `[channels, N]`. The pointers are to the
    page's words and scales.
    """
    NUM_SLOTS: tl.constexpr = TILING.key_slots
    NUM_GROUPS: tl.constexpr = TILING.key_groups
    NUM_CHUNKS: tl.constexpr = TILING.key_chunks
    CHANNELS: tl.constexpr = TILING.key_channels
    runs = ()
    biases = None
    for chunk in tl.static_range(NUM_CHUNKS):
        offs_d = chunk * CHANNELS + tl.arange(0, CHANNELS)
        mask_d = offs_d < TILING.head_dim
        words = _load(
            codes_ptr + (offs_d[None, :] * TILING.key_words + word[:, None]), mask_d[None, :], TILING.masks_channels
        )
        if TILING.splits_key_scales:
            offs = chunk * CHANNELS * NUM_GROUPS + tl.arange(0, CHANNELS * NUM_GROUPS)
            mask = offs < TILING.head_dim * NUM_GROUPS
            scales = columns_of(_load(scale_ptr + offs, mask, TILING.masks_channels), NUM_GROUPS)
            minimum = _load(minimum_ptr + offs, mask, TILING.masks_channels)
            minimum = spread_rows(tl.reshape(minimum, (CHANNELS, NUM_GROUPS)), NUM_GROUPS)
        else:
            offs_g = tl.arange(0, TILING.block_key_groups)
            minimum = tl.load(
                minimum_ptr + (offs_d[None, :] * NUM_GROUPS + offs_g[:, None]),
                mask=mask_d[None, :] & (offs_g < NUM_GROUPS)[:, None], other=0.0,
            )  # fmt: skip
        biases = dot(minimum.to(TILING.packed_dtype), queries[chunk], biases)
        if chunk == NUM_CHUNKS - 1:
            biases *= scaling
        new_runs = ()
        for slot in tl.static_range(NUM_SLOTS):
            if slot * TILING.key_words % TILING.key_group_size == 0:
                if TILING.splits_key_scales:
                    group = slot * TILING.key_words // TILING.key_group_size
                    scale = scales[slot * TILING.key_words // TILING.key_group_size]
                else:
                    group = (slot * TILING.key_words + first_word) // TILING.key_group_size
                    scale = tl.load(scale_ptr + offs_d * NUM_GROUPS + group, mask=mask_d, other=0.0)
                scaled_query = scale_rows(queries[chunk], scale, TILING)
                if chunk == NUM_CHUNKS - 1:
                    bias = row_of(biases, group * TILING.key_minima_step)
            codes = code_numbers(words, slot, TILING.key_bits, TILING)
            run = dot(codes, scaled_query, runs[slot] if chunk > 0 else None)
            if chunk == NUM_CHUNKS - 1:
                run = run * (scaling * codes_factor(slot, TILING.key_bits, TILING)) + bias
            new_runs += (run,)
        runs = new_runs
    return stack(runs, NUM_SLOTS)


@triton.jit
def _restore_keys(query, scaling, codes_ptr, scale_ptr, minimum_ptr, word, mask_w, TILING: tl.constexpr):
    """The same for any groups: keys are restored before the product. The pointers are to each word's page."""
    NUM_SLOTS: tl.constexpr = TILING.key_slots
    offs_d = tl.arange(0, TILING.block_d)
    mask = mask_w[:, None] & (offs_d < TILING.head_dim)[None, :]
    words = tl.load(_down(codes_ptr, TILING) + (offs_d[None, :] * TILING.key_words + word[:, None]), mask=mask, other=0)
    runs = ()
    for slot in tl.static_range(NUM_SLOTS):
        group = (slot * TILING.key_words + word) // TILING.key_group_size
        offs = group[:, None] + offs_d[None, :] * TILING.key_groups
        scale = tl.load(_down(scale_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(_down(minimum_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        keys = exact_codes(words, slot, TILING.key_bits) * scale + minimum
        runs += (dot(keys.to(TILING.packed_dtype), query) * scaling,)
    return stack(runs, NUM_SLOTS)


@triton.jit
def _fold_values(
    outputs, minima, weights, codes_ptr, scale_ptr, minimum_ptr, token, mask_t, first_word, num_left,
    TILING: tl.constexpr,
):  # fmt: skip
    """The sums of p * scale * code and of p * minimum, with a tile's tokens added.

    Shapes: weights `[tokens, N]`, outputs, a tuple of `[value rows, N]`, minima `[groups, N]`. `token` `[tokens]` is
    each one's place in its page; the pointers are to the page's words and scales (or to each token's).
    Rows of channels that lie in two groups have a sum for each; in the end every channel takes that of its group.
    """
    NUM_GROUPS: tl.constexpr = TILING.value_groups
    NUM_SUMS: tl.constexpr = TILING.num_value_sums
    BLOCKS: tl.constexpr = TILING.value_blocks
    offs_r = tl.arange(0, TILING.block_value_rows) % TILING.value_rows  # rows beyond repeat others: nobody reads them
    blocks = ()
    for block in tl.static_range(BLOCKS):
        words = _load(
            _across(codes_ptr, TILING)
            + (token[None, :] * TILING.value_words + (block * TILING.value_rows + offs_r)[:, None]),
            mask_t[None, :], not TILING.is_tile_in_page,
        )  # fmt: skip
        blocks += (words,)
    scales = ()
    if TILING.splits_value_scales:
        COLUMNS: tl.constexpr = TILING.value_scale_columns
        offs = tl.arange(0, TILING.tile_tokens * COLUMNS)
        offs_row = _page_token(offs // COLUMNS, first_word, TILING) * NUM_GROUPS
        mask = offs_row < num_left * NUM_GROUPS
        if COLUMNS != NUM_GROUPS:
            mask &= offs % COLUMNS < NUM_GROUPS
        offs = offs_row + offs % COLUMNS
        scales = columns_of(tl.load(scale_ptr + offs, mask=mask, other=0.0), COLUMNS)
        minimum = tl.load(minimum_ptr + offs, mask=mask, other=0.0)
        minimum = spread_rows(tl.reshape(minimum, (TILING.tile_tokens, COLUMNS)), COLUMNS)
    else:
        offs_g = tl.arange(0, TILING.block_value_groups)
        minimum = tl.load(
            _across(minimum_ptr, TILING) + (token[None, :] * NUM_GROUPS + offs_g[:, None]),
            mask=mask_t[None, :] & (offs_g < NUM_GROUPS)[:, None], other=0.0,
        )  # fmt: skip
    minima = dot(minimum.to(TILING.packed_dtype), weights, minima)
    new_outputs = ()
    for index in tl.static_range(NUM_SUMS):
        if index == 0 or _group_of(index, TILING) != _group_of(index - 1, TILING):
            if TILING.splits_value_scales:
                scale = pin(scales[_group_of(index, TILING)], TILING)
            else:
                scale = tl.load(scale_ptr + token * NUM_GROUPS + _group_of(index, TILING), mask=mask_t, other=0.0)
            scaled_weights = scale_rows(weights, scale, TILING)
        codes = code_numbers(
            blocks[_rows_of(index, TILING) % BLOCKS], _rows_of(index, TILING) // BLOCKS, TILING.value_bits, TILING
        )
        new_outputs += (dot(codes, scaled_weights, outputs[index]),)
    return new_outputs, minima


@triton.jit
def _complete_values(outputs, minima, TILING: tl.constexpr):
    """The outputs as numbers of channels: their codes' factors, and their groups' sums of p * minimum."""
    NUM_SUMS: tl.constexpr = TILING.num_value_sums
    offs_r = tl.arange(0, TILING.block_value_rows)[:, None]
    complete = ()
    rows = outputs[0]
    for index in tl.static_range(NUM_SUMS):
        factor = codes_factor(_rows_of(index, TILING) // TILING.value_blocks, TILING.value_bits, TILING)
        output = outputs[index] * factor + row_of(minima, _group_of(index, TILING) * TILING.value_minima_step)
        if index > 0 and _rows_of(index, TILING) == _rows_of(index - 1, TILING):
            first = _group_of(index, TILING) * TILING.value_group_size - _rows_of(index, TILING) * TILING.value_rows
            output = tl.where(offs_r >= first, output, rows)
        rows = output
        if index == NUM_SUMS - 1 or _rows_of(index, TILING) != _rows_of(index + 1, TILING):
            complete += (rows,)
    return complete


@triton.constexpr_function
def _rows_of(index, tiling):
    """Which rows of channels sum `index` is of."""
    return tiling.value_sums[index][0]


@triton.constexpr_function
def _group_of(index, tiling):
    """Which group's scales it has."""
    return tiling.value_sums[index][1]


@triton.jit
def _restore_values(outputs, weights, codes_ptr, scale_ptr, minimum_ptr, token, mask_t, TILING: tl.constexpr):
    """The same for any groups: values are restored before the product."""
    NUM_SLOTS: tl.constexpr = TILING.value_slots
    offs_w = tl.arange(0, TILING.block_value_rows)
    mask = mask_t[None, :] & (offs_w < TILING.value_words)[:, None]
    words = tl.load(
        _across(codes_ptr, TILING) + (token[None, :] * TILING.value_words + offs_w[:, None]), mask=mask, other=0
    )
    new_outputs = ()
    for slot in tl.static_range(NUM_SLOTS):
        group = (slot * TILING.value_words + offs_w) // TILING.value_group_size
        offs = token[None, :] * TILING.value_groups + group[:, None]
        scale = tl.load(_across(scale_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(_across(minimum_ptr, TILING) + offs, mask=mask, other=0.0).to(tl.float32)
        values = exact_codes(words, slot, TILING.value_bits) * scale + minimum
        new_outputs += (dot(values.to(TILING.packed_dtype), weights, outputs[slot]),)
    return new_outputs


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

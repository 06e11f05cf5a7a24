"""Fused decode attention over packed pages in Triton: one launch over all parts, one to merge them.

How it works
    Grid `[B * HK * head blocks, parts]`, one warp a program. The first parts read a few exact tokens each
    (sinks, then window); the others share the packed pages evenly, by the length found on the device.
    Every part writes its normalized output and log-sum-exp; a second kernel merges the parts. The launch
    shape depends on nothing but static sizes, so the pair can be captured in a CUDA graph.

Tiles
    Tokens and channels are the rows of every product and query heads its columns (8 of them, padded):
    scores^T = K q^T and output^T = V^T p^T. With heads as rows the tensor core would need 16, and half of
    the softmax would be spent on padding.
    Packed keys are walked in tiles of `tile_words` words of each channel. A slot of the planar layout is
    then a run of as many tokens, so a tile holds 16 / bits runs, each the subject of one product that needs
    no interleaving. Values likewise: a slot is a run of channels.

Folding (KIVI's stored form is code * scale + minimum)
    scores: sum_d (q_d s_d) code_d + q·minimum, with q s formed once for a group of tokens;
    output: sum_t (p_t s_t) code_t + sum_t p_t minimum_t, with p s formed once for a group of channels.
    So a code meets no arithmetic before the product. Where a run spans several groups (small pages, odd
    groups) the tile is dequantized first: right for every layout, but slower.

Codes as fp16 without conversion
    The bits of a small integer, read as fp16, are the subnormal number code * 2^(place - 24): masking a
    slot where it lies is all the decoding there is, and the factor leaves with the fp32 sums. Slots above
    the ten mantissa bits are read from a copy of the words shifted down by 6. Tensor cores take subnormal
    inputs as they are (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). Source of the trick:
    xformers' split-k attention, which still multiplies every code by 2^24.

Limits: rows of codes, scales and tokens must be contiguous (they are copied if not). This module does
not know how pages are filled or chosen.
"""

import torch
import triton
import triton.language as tl
from kvlens.kernels.compiled import Launch
from kvlens.kernels.packed_attend import Attended, ExactTokens, PackedPast
from kvlens.kernels.packed_attend.tiling import tiling_of
from kvlens.kernels.quantize_pack import Packed

LOG2_E = 1.4426950408889634


@triton.jit
def _dot(a, b, accumulator=None):
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _stack_rows(blocks, NUM: tl.constexpr):
    """A tuple of NUM blocks `[R, N]` (NUM a power of two) as one block `[NUM * R, N]`."""
    if NUM == 1:
        return blocks[0]
    else:
        pairs = ()
        for i in tl.static_range(NUM // 2):
            pair = tl.permute(tl.join(blocks[2 * i], blocks[2 * i + 1]), (2, 0, 1))
            pairs += (tl.reshape(pair, (2 * pair.shape[1], pair.shape[2])),)
        return _stack_rows(pairs, NUM // 2)


@triton.jit
def _row(block, row):
    """Row `row` of a block `[R, N]`."""
    return tl.sum(tl.where((tl.arange(0, block.shape[0]) == row)[:, None], block, 0.0), axis=0)


@triton.jit
def _codes(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The codes of a slot as fp32."""
    return ((words >> (SLOT * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _dot_codes(words, weights, accumulator, SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """accumulator + codes of a slot · weights, short of `_codes_factor`.

    Two words share a register on the GPU (`pack=2`): fp16 codes cost half an instruction each.
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
    return _dot(codes, weights, accumulator)


@triton.jit
def _codes_factor(SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """What the products of `_dot_codes` must be multiplied by."""
    SHIFT: tl.constexpr = 0 if (SLOT + 1) * BITS <= 10 else 6
    return 1.0 if T.packed_dtype == tl.float32 else 1.0 * (1 << (24 + SHIFT - SLOT * BITS))


@triton.jit
def _read_packed(
    codes_ptr, scale_ptr, minimum_ptr, rows, place, mask,
    ROW_LENGTH: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Values code * scale + minimum in fp32, one by one: value `place` of row `rows` of each page.

    Pointers and indices broadcast to the shape of `mask`. For the few tokens of which only the key or only
    the value is packed.
    """
    WORDS: tl.constexpr = ROW_LENGTH * BITS // 16
    words = tl.load(codes_ptr + rows * WORDS + place % WORDS, mask=mask, other=0).to(tl.int32)
    codes = ((words >> (place // WORDS * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    offs_groups = rows * (ROW_LENGTH // GROUP_SIZE) + place // GROUP_SIZE
    scale = tl.load(scale_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
    return codes * scale + minimum


@triton.jit
def _read_exact(
    ring_ptr, stride_ring_token, sinks_ptr, stride_sink_token, tokens, in_ring, in_sinks, mask_d,
    RING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Exact tokens, 0 where they are packed. Shapes: tokens `[BT]`, result `[BT, D]`."""
    offs_d = tl.arange(0, T.block_d)
    offs_ring = (tokens % RING).to(tl.int64) * stride_ring_token
    rows = tl.load(
        ring_ptr + offs_ring[:, None] + offs_d[None, :], mask=in_ring[:, None] & mask_d[None, :], other=0.0
    )
    if T.num_sinks > 0:
        offs_sinks = tokens.to(tl.int64) * stride_sink_token
        rows += tl.load(
            sinks_ptr + offs_sinks[:, None] + offs_d[None, :],
            mask=in_sinks[:, None] & mask_d[None, :],
            other=0.0,
        )
    return rows.to(T.exact_dtype)


@triton.jit
def _key_scores(query, words, mask_words, scaling, scale_ptr, minimum_ptr, offs_scale, word, first_word,
                mask_d, T: tl.constexpr):  # fmt: skip
    """Scores of the tokens of a tile, run after run, in units of log 2.

    Shapes: query `[D, N]`, words `[W, D]`, result `[tile tokens, N]`; word `[W]` is a column's place in its
    page and offs_scale `[W]`, or a scalar if all lie in one page, that page's scales.
    """
    offs_d = tl.arange(0, T.block_d)
    runs = ()
    if T.folds_keys:
        offs_g = tl.arange(0, T.key_group_rows)
        minimum = tl.load(
            minimum_ptr + offs_scale + offs_d[None, :] * T.key_groups + offs_g[:, None],
            mask=mask_d[None, :] & (offs_g < T.key_groups)[:, None], other=0.0,
        )  # fmt: skip
        biases = _dot(minimum.to(T.packed_dtype), query) * scaling
        for slot in tl.static_range(T.key_slots):
            if slot * T.key_words % T.layout.key_group_size == 0:
                group = (slot * T.key_words + first_word) // T.layout.key_group_size
                scale = tl.load(
                    scale_ptr + offs_scale + offs_d * T.key_groups + group, mask=mask_d, other=0.0
                )
                scaled_query = query * scale.to(T.packed_dtype)[:, None]
                bias = _row(biases, group)
            run = _dot_codes(words, scaled_query, None, slot, T.layout.key_bits, T)
            runs += (run * (scaling * _codes_factor(slot, T.layout.key_bits, T)) + bias[None, :],)
    else:
        for slot in tl.static_range(T.key_slots):
            group = (slot * T.key_words + word) // T.layout.key_group_size
            offs = (offs_scale + group)[:, None] + offs_d[None, :] * T.key_groups
            scale = tl.load(scale_ptr + offs, mask=mask_words, other=0.0).to(tl.float32)
            minimum = tl.load(minimum_ptr + offs, mask=mask_words, other=0.0).to(tl.float32)
            keys = _codes(words, slot, T.layout.key_bits) * scale + minimum
            runs += (_dot(keys.to(T.packed_dtype), query) * scaling,)
    return _stack_rows(runs, T.key_slots)


@triton.jit
def _add_values(outputs, offset, weights, words, scale_ptr, minimum_ptr, offs_scale, mask_t, T: tl.constexpr):
    """The outputs (a tuple, one block a slot) and the share of the minima, with a tile's tokens added.

    Shapes: weights `[tokens, N]`, words `[VW, tokens]`, outputs `[VW, N]` each, offset `[groups, N]`;
    offs_scale `[tokens]`, each token's scales.
    """
    new_outputs = ()
    if T.folds_values:
        offs_g = tl.arange(0, T.value_group_rows)
        minimum = tl.load(
            minimum_ptr + offs_scale[None, :] + offs_g[:, None],
            mask=mask_t[None, :] & (offs_g < T.value_groups)[:, None], other=0.0,
        )  # fmt: skip
        offset = _dot(minimum.to(T.packed_dtype), weights, offset)
        for slot in tl.static_range(T.value_slots):
            if slot * T.value_words % T.layout.value_group_size == 0:
                group = slot * T.value_words // T.layout.value_group_size
                scale = tl.load(scale_ptr + offs_scale + group, mask=mask_t, other=0.0)
                scaled_weights = weights * scale.to(T.packed_dtype)[:, None]
            new_outputs += (_dot_codes(words, scaled_weights, outputs[slot], slot, T.layout.value_bits, T),)
    else:
        offs_vw = tl.arange(0, T.value_rows)
        mask = mask_t[None, :] & (offs_vw < T.value_words)[:, None]
        for slot in tl.static_range(T.value_slots):
            group = (slot * T.value_words + offs_vw) // T.layout.value_group_size
            offs = offs_scale[None, :] + group[:, None]
            scale = tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            minimum = tl.load(minimum_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            values = _codes(words, slot, T.layout.value_bits) * scale + minimum
            new_outputs += (_dot(values.to(T.packed_dtype), weights, outputs[slot]),)
    return new_outputs, offset


@triton.jit
def _attend_packed(
    query, scaling, num_tokens, split, page_table_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
    value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
    T: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one share of the packed tokens, and its outputs, not yet divided by the sum.

    Shapes: maximum, total `[N]`; outputs, a tuple of `[VW, N]`: the channels of each slot.
    """
    offs_d = tl.arange(0, T.block_d)
    offs_w = tl.arange(0, T.tile_words)
    offs_t = tl.arange(0, T.tile_tokens)
    offs_vw = tl.arange(0, T.value_rows)
    mask_d = offs_d < T.head_dim
    mask_vw = offs_vw < T.value_words
    packed_query = query.to(T.packed_dtype)

    maximum = tl.full((T.block_heads,), -1e30, tl.float32)  # finite: no difference is inf - inf
    total = tl.zeros((T.block_heads,), tl.float32)
    offset = tl.zeros((T.value_group_rows, T.block_heads), tl.float32)
    outputs = ()
    for _ in tl.static_range(T.value_slots):
        outputs += (tl.zeros((T.value_rows, T.block_heads), tl.float32),)

    # A sequence's pages laid end to end are one row of words for each channel; a tile is a piece of it.
    num_tiles = tl.cdiv(tl.cdiv(num_tokens, T.layout.page_tokens) * T.key_words, T.tile_words)
    tiles_per_split = tl.cdiv(num_tiles, T.num_splits)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    for tile in tl.range(first_tile, last_tile, num_stages=T.num_stages):
        if T.is_tile_in_page:
            page_index = tile * T.tile_words // T.key_words
            first_word = 0
            if T.tile_words < T.key_words:
                first_word = tile * T.tile_words % T.key_words
            word = first_word + offs_w
            token = first_word + offs_t
            if T.tile_words < T.key_words:
                token = first_word + offs_t // T.tile_words * T.key_words + offs_t % T.tile_words
            mask_t = page_index * T.layout.page_tokens + token < num_tokens
            key_page = tl.load(page_table_ptr + page_index).to(tl.int64)
            value_page = key_page
            mask_key_words = mask_d[None, :]
            mask_value_words = mask_vw[:, None]
        else:
            first_word = 0
            column = tile * T.tile_words + offs_w
            word = column % T.key_words
            mask_w = column // T.key_words * T.layout.page_tokens < num_tokens
            key_page = tl.load(page_table_ptr + column // T.key_words, mask=mask_w, other=0).to(tl.int64)
            mask_key_words = mask_w[:, None] & mask_d[None, :]
            column = tile * T.tile_words + offs_t % T.tile_words
            page_index = column // T.key_words
            token = offs_t // T.tile_words * T.key_words + column % T.key_words
            mask_t = page_index * T.layout.page_tokens + token < num_tokens
            value_page = tl.load(page_table_ptr + page_index, mask=mask_t, other=0).to(tl.int64)
            mask_value_words = mask_vw[:, None] & mask_t[None, :]

        offs_key_codes = key_page * stride_key_codes_page + word
        key_words = tl.load(
            key_codes_ptr + offs_key_codes[:, None] + offs_d[None, :] * T.key_words,
            mask=mask_key_words,
            other=0,
        )
        offs_value_codes = value_page * stride_value_codes_page + token * T.value_words
        value_words = tl.load(
            value_codes_ptr + offs_value_codes[None, :] + offs_vw[:, None], mask=mask_value_words, other=0
        )
        scores = _key_scores(
            packed_query, key_words, mask_key_words, scaling, key_scale_ptr, key_minimum_ptr,
            key_page * stride_key_scale_page, word, first_word, mask_d, T,
        )  # fmt: skip
        scores = tl.where(mask_t[:, None], scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        probabilities = tl.exp2(scores - new_maximum[None, :])
        total = total * decay + tl.sum(probabilities, axis=0)
        maximum = new_maximum
        decayed = ()
        for slot in tl.static_range(T.value_slots):
            decayed += (outputs[slot] * decay[None, :],)
        outputs, offset = _add_values(
            decayed, offset * decay[None, :], probabilities.to(T.packed_dtype), value_words, value_scale_ptr,
            value_minimum_ptr, value_page * stride_value_scale_page + token * T.value_groups, mask_t, T,
        )  # fmt: skip

    if T.folds_values:
        complete = ()
        for slot in tl.static_range(T.value_slots):
            minima = _row(offset, slot * T.value_words // T.layout.value_group_size)
            factor = _codes_factor(slot, T.layout.value_bits, T)
            complete += (outputs[slot] * factor + minima[None, :],)
        outputs = complete
    return maximum, total, outputs


@triton.jit
def _attend_exact(
    query, scaling, num_keys, num_values, length, part, page_table_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
    value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr,
    stride_key_token, stride_value_token, stride_sink_key_token, stride_sink_value_token,
    T: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output (not yet divided) of a few tokens that are not packed, or only by half.

    Shapes: maximum, total `[N]`; output `[D, N]`.
    """
    offs_d = tl.arange(0, T.block_d)
    mask_d = offs_d < T.head_dim
    num_packed = tl.minimum(num_keys, num_values)
    offs_t = part * T.exact_tokens + tl.arange(0, T.exact_tokens)
    token = tl.where(offs_t < T.num_sinks, offs_t, offs_t + num_packed)
    place = token - T.num_sinks  # among the packed tokens, if it is one
    mask_t = token < length
    in_sinks = mask_t & (offs_t < T.num_sinks)
    has_packed_key = mask_t & (place >= num_packed) & (place < num_keys)
    has_packed_value = mask_t & (place >= num_packed) & (place < num_values)
    has_exact_key = mask_t & (place >= num_keys)
    has_exact_value = mask_t & (place >= num_values)
    is_any_half_packed = num_packed + tl.maximum(part * T.exact_tokens - T.num_sinks, 0) < tl.maximum(
        num_keys, num_values
    )
    page = tl.load(
        page_table_ptr + place // T.layout.page_tokens, mask=has_packed_key | has_packed_value, other=0
    ).to(tl.int64)[:, None]
    place_in_page = (place % T.layout.page_tokens)[:, None]

    keys = _read_exact(
        keys_ptr, stride_key_token, sink_keys_ptr, stride_sink_key_token, token, has_exact_key, in_sinks, mask_d,
        T.key_ring, T,
    )  # fmt: skip
    scores = _dot(keys, query.to(T.exact_dtype))
    if is_any_half_packed:
        packed_keys = _read_packed(
            key_codes_ptr + page * stride_key_codes_page, key_scale_ptr + page * stride_key_scale_page,
            key_minimum_ptr + page * stride_key_scale_page, offs_d[None, :], place_in_page,
            has_packed_key[:, None] & mask_d[None, :],
            T.layout.page_tokens, T.layout.key_bits, T.layout.key_group_size,
        )  # fmt: skip
        scores = _dot(packed_keys.to(T.packed_dtype), query.to(T.packed_dtype), scores)
    scores = tl.where(mask_t[:, None], scores * scaling, float("-inf"))
    maximum = tl.maximum(tl.max(scores, axis=0), -1e30)
    probabilities = tl.exp2(scores - maximum[None, :])
    total = tl.sum(probabilities, axis=0)

    values = _read_exact(
        values_ptr, stride_value_token, sink_values_ptr, stride_sink_value_token, token, has_exact_value, in_sinks,
        mask_d, T.value_ring, T,
    )  # fmt: skip
    output = _dot(tl.trans(values), probabilities.to(T.exact_dtype))
    if is_any_half_packed:
        packed_values = _read_packed(
            value_codes_ptr + page * stride_value_codes_page, value_scale_ptr + page * stride_value_scale_page,
            value_minimum_ptr + page * stride_value_scale_page, place_in_page, offs_d[None, :],
            has_packed_value[:, None] & mask_d[None, :],
            T.head_dim, T.layout.value_bits, T.layout.value_group_size,
        )  # fmt: skip
        output = _dot(tl.trans(packed_values.to(T.packed_dtype)), probabilities.to(T.packed_dtype), output)
    return maximum, total, output


@triton.jit
def _attend_kernel(
    query_ptr, scaling, page_table_ptr, num_keys_ptr, num_values_ptr, length_ptr,
    key_codes_ptr, key_scale_ptr, key_minimum_ptr, value_codes_ptr, value_scale_ptr, value_minimum_ptr,
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr, part_output_ptr, part_log_sum_exp_ptr,
    stride_query_row, stride_query_head, stride_table_row,
    stride_key_codes_page, stride_key_codes_head, stride_key_scale_page, stride_key_scale_head,
    stride_value_codes_page, stride_value_codes_head, stride_value_scale_page, stride_value_scale_head,
    stride_key_row, stride_key_head, stride_key_token, stride_value_row, stride_value_head, stride_value_token,
    stride_sink_key_row, stride_sink_key_head, stride_sink_key_token,
    stride_sink_value_row, stride_sink_value_head, stride_sink_value_token,
    T: tl.constexpr,
):  # fmt: skip
    """One part of the attention of the query heads that share a key/value head."""
    head_block = tl.program_id(0) % T.head_blocks
    head = (tl.program_id(0) // T.head_blocks % T.num_kv_heads).to(tl.int64)
    row = (tl.program_id(0) // (T.head_blocks * T.num_kv_heads)).to(tl.int64)
    part = tl.program_id(1)

    offs_d = tl.arange(0, T.block_d)
    offs_n = head_block * T.block_heads + tl.arange(0, T.block_heads)
    mask_n = offs_n < T.heads_per_kv
    query_head = head * T.heads_per_kv + offs_n
    query = tl.load(
        query_ptr + row * stride_query_row + query_head[None, :] * stride_query_head + offs_d[:, None],
        mask=mask_n[None, :] & (offs_d < T.head_dim)[:, None], other=0.0,
    )  # fmt: skip
    num_keys = tl.load(num_keys_ptr + row)
    num_values = tl.load(num_values_ptr + row)
    page_table_ptr += row * stride_table_row
    key_codes_ptr += head * stride_key_codes_head
    key_scale_ptr += head * stride_key_scale_head
    key_minimum_ptr += head * stride_key_scale_head
    value_codes_ptr += head * stride_value_codes_head
    value_scale_ptr += head * stride_value_scale_head
    value_minimum_ptr += head * stride_value_scale_head
    part_row = (row * T.num_kv_heads * T.heads_per_kv + query_head) * T.num_parts + part

    if part < T.num_exact_parts:
        maximum, total, output = _attend_exact(
            query, scaling, num_keys, num_values, tl.load(length_ptr + row), part, page_table_ptr,
            key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
            value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
            keys_ptr + row * stride_key_row + head * stride_key_head,
            values_ptr + row * stride_value_row + head * stride_value_head,
            sink_keys_ptr + row * stride_sink_key_row + head * stride_sink_key_head,
            sink_values_ptr + row * stride_sink_value_row + head * stride_sink_value_head,
            stride_key_token, stride_value_token, stride_sink_key_token, stride_sink_value_token, T,
        )  # fmt: skip
        output /= tl.where(total == 0.0, 1.0, total)[None, :]
        tl.store(
            part_output_ptr + part_row[None, :] * T.head_dim + offs_d[:, None], output,
            mask=mask_n[None, :] & (offs_d < T.head_dim)[:, None],
        )  # fmt: skip
        tl.store(part_log_sum_exp_ptr + part_row, maximum + tl.log2(total), mask=mask_n)
    else:
        maximum, total, outputs = _attend_packed(
            query, scaling, tl.minimum(num_keys, num_values), part - T.num_exact_parts, page_table_ptr,
            key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page, stride_key_scale_page,
            value_codes_ptr, value_scale_ptr, value_minimum_ptr, stride_value_codes_page, stride_value_scale_page,
            T,
        )  # fmt: skip
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        offs_vw = tl.arange(0, T.value_rows)
        for slot in tl.static_range(T.value_slots):
            tl.store(
                part_output_ptr + part_row[None, :] * T.head_dim + (slot * T.value_words + offs_vw)[:, None],
                outputs[slot] * share[None, :],
                mask=mask_n[None, :] & (offs_vw < T.value_words)[:, None],
            )  # fmt: skip
        tl.store(part_log_sum_exp_ptr + part_row, maximum + tl.log2(total), mask=mask_n)


@triton.jit
def _merge_kernel(
    part_output_ptr, part_log_sum_exp_ptr, output_ptr, log_sum_exp_ptr,
    NUM_PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts of one query head as one softmax: each weighs 2^(its log-sum-exp - the largest)."""
    head = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_PARTS)
    maximum = float("-inf")
    for first in range(0, NUM_PARTS, BLOCK_PARTS):
        log_sum_exp = tl.load(
            part_log_sum_exp_ptr + head * NUM_PARTS + first + offs_p,
            mask=first + offs_p < NUM_PARTS, other=float("-inf"),
        )  # fmt: skip
        maximum = tl.maximum(maximum, tl.max(log_sum_exp, axis=0))
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = 0.0
    output = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, NUM_PARTS, BLOCK_PARTS):
        part = first + offs_p
        log_sum_exp = tl.load(
            part_log_sum_exp_ptr + head * NUM_PARTS + part, mask=part < NUM_PARTS, other=float("-inf")
        )
        weights = tl.exp2(log_sum_exp - reference)
        part_outputs = tl.load(
            part_output_ptr + (head * NUM_PARTS + part)[:, None] * HEAD_DIM + offs_d[None, :],
            mask=(weights > 0.0)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(weights, axis=0)
        output += tl.sum(weights[:, None] * part_outputs, axis=0)
    output /= tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + head * HEAD_DIM + offs_d, output, mask=offs_d < HEAD_DIM)
    tl.store(log_sum_exp_ptr + head, (reference + tl.log2(total)) * 0.6931471805599453)


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`."""
    result, launches = prepare(query, past, exact, scaling=scaling)
    with torch.cuda.device_of(query):
        for launch in launches:
            launch.run()
    return result


def prepare(
    query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float
) -> tuple[Attended, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them."""
    batch, num_query_heads, head_dim = query.shape
    tiling = tiling_of(query, past, exact)
    query = _rows_contiguous(query)
    key_codes, key_scale, key_minimum = _pages_contiguous(past.keys)
    value_codes, value_scale, value_minimum = _pages_contiguous(past.values)
    keys, values = _rows_contiguous(exact.keys), _rows_contiguous(exact.values)
    sink_keys, sink_values = _rows_contiguous(exact.sink_keys), _rows_contiguous(exact.sink_values)
    page_table = _rows_contiguous(past.page_table)

    heads = (batch, num_query_heads)
    part_output = query.new_empty((*heads, tiling.num_parts, head_dim), dtype=torch.float32)
    part_log_sum_exp = query.new_empty((*heads, tiling.num_parts), dtype=torch.float32)
    result = Attended(
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(heads, dtype=torch.float32),
    )
    attend = Launch(
        _attend_kernel,
        (batch * tiling.num_kv_heads * tiling.head_blocks, tiling.num_parts),
        {
            "query_ptr": query,
            "scaling": scaling * LOG2_E,
            "page_table_ptr": page_table,
            "num_keys_ptr": past.num_keys.contiguous(),
            "num_values_ptr": past.num_values.contiguous(),
            "length_ptr": exact.length.contiguous(),
            "key_codes_ptr": key_codes,
            "key_scale_ptr": key_scale,
            "key_minimum_ptr": key_minimum,
            "value_codes_ptr": value_codes,
            "value_scale_ptr": value_scale,
            "value_minimum_ptr": value_minimum,
            "keys_ptr": keys,
            "values_ptr": values,
            "sink_keys_ptr": sink_keys,
            "sink_values_ptr": sink_values,
            "part_output_ptr": part_output,
            "part_log_sum_exp_ptr": part_log_sum_exp,
            **_strides("query", query, "row", "head"),
            **_strides("table", page_table, "row"),
            **_strides("key_codes", key_codes, "page", "head"),
            **_strides("key_scale", key_scale, "page", "head"),
            **_strides("value_codes", value_codes, "page", "head"),
            **_strides("value_scale", value_scale, "page", "head"),
            **_strides("key", keys, "row", "head", "token"),
            **_strides("value", values, "row", "head", "token"),
            **_strides("sink_key", sink_keys, "row", "head", "token"),
            **_strides("sink_value", sink_values, "row", "head", "token"),
            "T": tiling,
            "num_warps": 1,
        },
    )
    merge = Launch(
        _merge_kernel,
        (batch * num_query_heads,),
        {
            "part_output_ptr": part_output,
            "part_log_sum_exp_ptr": part_log_sum_exp,
            "output_ptr": result.output,
            "log_sum_exp_ptr": result.log_sum_exp,
            "NUM_PARTS": tiling.num_parts,
            "BLOCK_PARTS": 32,
            "HEAD_DIM": head_dim,
            "BLOCK_D": tiling.block_d,
            "num_warps": 4,
        },
    )
    return result, (attend, merge)


def _strides(name: str, tensor: torch.Tensor, *dims: str) -> dict[str, int]:
    """The strides of the first dims, by the kernel's argument names."""
    return {f"stride_{name}_{dim}": tensor.stride(i) for i, dim in enumerate(dims)}


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pages_contiguous(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and minimum with each page's rows back to back; scale and minimum share their strides."""

    def is_contiguous(pages: torch.Tensor) -> bool:
        return pages.stride(-1) == 1 and pages.stride(-2) == pages.shape[-1]

    codes, scale, minimum = packed.codes, packed.scale, packed.minimum
    if not is_contiguous(codes):
        codes = codes.contiguous()
    if not is_contiguous(scale) or scale.stride() != minimum.stride():
        scale, minimum = scale.contiguous(), minimum.contiguous()
    return codes, scale, minimum

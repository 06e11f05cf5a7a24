"""The part of attention over a compressed cache that reads exact tokens, in Triton. See `triton.py` for the method.

A part takes a few tokens: sinks, then what follows the packed ones. Of some of these the key is packed and
the value is not yet, or the other way round (where `TILING.mixes_packed` says that it may be so); the packed
half is read value by value, which is slow, but there are never more such tokens than a window holds. Channels
are taken CHUNK at a time to spare registers.
"""

import triton
import triton.language as tl

from kvlens.kernels.split_k import dot


@triton.jit
def _read_packed(
    codes_ptr, scale_ptr, minimum_ptr, rows, place, mask,
    ROW_LENGTH: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Values code * scale + minimum in fp32, one by one: value `place` of row `rows` of each page.

    Pointers and indices broadcast to the shape of `mask`.
    """
    WORDS: tl.constexpr = ROW_LENGTH * BITS // 16
    words = tl.load(codes_ptr + rows * WORDS + place % WORDS, mask=mask, other=0).to(tl.int32)
    codes = ((words >> (place // WORDS * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    offs_groups = rows * (ROW_LENGTH // GROUP_SIZE) + place // GROUP_SIZE
    scale = tl.load(scale_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
    return codes * scale + minimum


@triton.jit
def _read_exact(ring_ptr, in_ring, sinks_ptr, in_sinks, offs_d, TILING: tl.constexpr):
    """Exact tokens `[tokens, CHUNK]`, 0 where they are packed. The pointers are `[tokens]`."""
    mask_d = (offs_d < TILING.head_dim)[None, :]
    rows = tl.load(ring_ptr[:, None] + offs_d[None, :], mask=in_ring[:, None] & mask_d, other=0.0)
    if TILING.num_sinks > 0:
        rows += tl.load(sinks_ptr[:, None] + offs_d[None, :], mask=in_sinks[:, None] & mask_d, other=0.0)
    return rows.to(TILING.exact_dtype)


@triton.jit
def attend_exact(
    query_ptr, mask_n, scaling, num_keys, num_values, length, part, packed,
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr,
    stride_key_token, stride_value_token, stride_sink_key_token, stride_sink_value_token,
    TILING: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one part's tokens, and its outputs, not yet divided by the sum.

    Shapes: query_ptr and mask_n `[N]`, each head's query; maximum, total `[N]`; outputs, a tuple of
    `[CHUNK, N]`: consecutive channels. `packed` is a tuple: the page table, then codes, scale, minimum and the
    page strides of codes and of scales, of keys and of values; empty where nothing is mixed.
    """
    CHUNK: tl.constexpr = TILING.exact_channels
    NUM_CHUNKS: tl.constexpr = TILING.block_d // TILING.exact_channels
    NUM_TOKENS: tl.constexpr = TILING.exact_tokens
    NUM_HEADS: tl.constexpr = TILING.block_heads
    num_packed = tl.minimum(num_keys, num_values)
    offs_t = part * NUM_TOKENS + tl.arange(0, NUM_TOKENS)
    token = tl.where(offs_t < TILING.num_sinks, offs_t, offs_t + num_packed)
    mask_t = token < length
    in_sinks = mask_t & (offs_t < TILING.num_sinks)
    place = token - TILING.num_sinks  # among the packed tokens, if it is one
    if TILING.mixes_packed:
        page_table_ptr, key_codes_ptr, key_scale_ptr, key_minimum_ptr, stride_key_codes_page = packed[:5]
        stride_key_scale_page, value_codes_ptr, value_scale_ptr, value_minimum_ptr = packed[5:9]
        stride_value_codes_page, stride_value_scale_page = packed[9:]
        has_packed_key = mask_t & (place >= num_packed) & (place < num_keys)
        has_packed_value = mask_t & (place >= num_packed) & (place < num_values)
        first_place = num_packed + tl.maximum(part * NUM_TOKENS - TILING.num_sinks, 0)
        page = tl.load(
            page_table_ptr + place // TILING.page_tokens, mask=has_packed_key | has_packed_value, other=0
        ).to(tl.int64)[:, None]  # fmt: skip
        place_in_page = (place % TILING.page_tokens)[:, None]

    scores = tl.zeros((NUM_TOKENS, NUM_HEADS), tl.float32)
    ring_ptr = keys_ptr + (token % TILING.key_ring).to(tl.int64) * stride_key_token
    sinks_ptr = sink_keys_ptr + token.to(tl.int64) * stride_sink_key_token
    for chunk in tl.static_range(NUM_CHUNKS):
        offs_d = chunk * CHUNK + tl.arange(0, CHUNK)
        mask_d = offs_d < TILING.head_dim
        query = tl.load(query_ptr[None, :] + offs_d[:, None], mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        keys = _read_exact(ring_ptr, mask_t & (place >= num_keys), sinks_ptr, in_sinks, offs_d, TILING)
        scores = dot(keys, query.to(TILING.exact_dtype), scores)
        if TILING.mixes_packed:  # noqa: SIM102 (known when compiled, the other is not)
            if first_place < num_keys:
                packed_keys = _read_packed(
                    key_codes_ptr + page * stride_key_codes_page, key_scale_ptr + page * stride_key_scale_page,
                    key_minimum_ptr + page * stride_key_scale_page, offs_d[None, :], place_in_page,
                    has_packed_key[:, None] & mask_d[None, :],
                    TILING.page_tokens, TILING.key_bits, TILING.key_group_size,
                )  # fmt: skip
                scores = dot(packed_keys.to(TILING.packed_dtype), query.to(TILING.packed_dtype), scores)
    scores = tl.where(mask_t[:, None], scores * scaling, float("-inf"))
    maximum = tl.maximum(tl.max(scores, axis=0), -1e30)
    probabilities = tl.exp2(scores - maximum[None, :])
    total = tl.sum(probabilities, axis=0)

    outputs = ()
    ring_ptr = values_ptr + (token % TILING.value_ring).to(tl.int64) * stride_value_token
    sinks_ptr = sink_values_ptr + token.to(tl.int64) * stride_sink_value_token
    for chunk in tl.static_range(NUM_CHUNKS):
        offs_d = chunk * CHUNK + tl.arange(0, CHUNK)
        values = _read_exact(ring_ptr, mask_t & (place >= num_values), sinks_ptr, in_sinks, offs_d, TILING)
        output = dot(tl.trans(values), probabilities.to(TILING.exact_dtype))
        if TILING.mixes_packed:  # noqa: SIM102 (known when compiled, the other is not)
            if first_place < num_values:
                packed_values = _read_packed(
                    value_codes_ptr + page * stride_value_codes_page,
                    value_scale_ptr + page * stride_value_scale_page,
                    value_minimum_ptr + page * stride_value_scale_page, place_in_page, offs_d[None, :],
                    has_packed_value[:, None] & (offs_d < TILING.head_dim)[None, :],
                    TILING.head_dim, TILING.value_bits, TILING.value_group_size,
                )  # fmt: skip
                output = dot(
                    tl.trans(packed_values.to(TILING.packed_dtype)), probabilities.to(TILING.packed_dtype), output
                )
        outputs += (output,)
    return maximum, total, outputs

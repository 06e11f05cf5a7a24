"""What the kernels of attention over sparse codes share, in Triton: where a program stands, and what tokens score.

See `triton.py` for the method.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(TILING: tl.constexpr):
    """Of the program: its block of query heads in the batch, key/value head, sequence, and the heads `[N]`.

    Returns also which of the heads exist and their numbers within the sequence.
    """
    block = tl.program_id(0)
    head = (block // TILING.head_blocks % TILING.num_kv_heads).to(tl.int64)
    row = (block // (TILING.head_blocks * TILING.num_kv_heads)).to(tl.int64)
    offs_n = tl.arange(0, TILING.block_heads)
    in_group = block % TILING.head_blocks * TILING.lanes + offs_n
    mask_n = (offs_n < TILING.lanes) & (in_group < TILING.heads_per_kv)
    return block.to(tl.int64), head, row, mask_n, head * TILING.heads_per_kv + in_group


@triton.jit
def lanes_of(block, head, row, TILING: tl.constexpr):
    """The query head of every lane, counted over the batch, and whether it exists."""
    in_group = block % TILING.head_blocks * TILING.lanes + tl.arange(0, TILING.lanes)
    return (row * TILING.num_kv_heads + head) * TILING.heads_per_kv + in_group, in_group < TILING.heads_per_kv


@triton.jit
def dot_exactly(a, b, accumulator):
    return tl.dot(a, b, accumulator, input_precision="tf32x3", out_dtype=tl.float32)


@triton.jit
def locate_tile(tile, num_tokens, page_table_ptr, TILING: tl.constexpr):
    """Page (one for all, or one a token), place in it, and existence of each token of a tile."""
    token = tile * TILING.tile_tokens + tl.arange(0, TILING.tile_tokens)
    mask_t = token < num_tokens
    if TILING.is_tile_in_page:
        page = tl.load(page_table_ptr + tile * TILING.tile_tokens // TILING.page_tokens).to(tl.int64)
    else:
        page = tl.load(page_table_ptr + token // TILING.page_tokens, mask=mask_t, other=0).to(tl.int64)
    return page, token % TILING.page_tokens, mask_t


@triton.jit
def atoms_of(words_ptr, coefficients_ptr, stride_words_slot, stride_coefficients_slot, slot, mask_t,
           TILING: tl.constexpr):  # fmt: skip
    """Indices and codes of one slot `[tokens]`; 0 where there is no token."""
    words = tl.load(words_ptr + slot * stride_words_slot, mask=mask_t, other=0).to(tl.int32)
    if TILING.is_packed:
        indices = words & 1023
        codes = (words >> 10).to(tl.float32)
    else:
        indices = words
        codes = tl.load(coefficients_ptr + slot * stride_coefficients_slot, mask=mask_t, other=0.0).to(tl.float32)
    return indices, codes


@triton.jit
def scales_of(coefficients_ptr, mask_t, TILING: tl.constexpr):
    """What the codes of each token are multiplied by."""
    if TILING.is_packed:
        scales = tl.load(coefficients_ptr, mask=mask_t, other=0.0).to(tl.float32) * (1.0 / 31.0)
    else:
        scales = tl.full((TILING.tile_tokens,), 1.0, tl.float32)
    return scales


@triton.jit
def scores_of(
    table_ptr, words_ptr, coefficients_ptr, stride_words_slot, stride_coefficients_slot, mask_t, TILING: tl.constexpr
):
    """Scores of a tile `[tokens, lanes]` in units of log 2, -inf where there is no token."""
    offs_l = tl.arange(0, TILING.lanes)
    scores = tl.full((TILING.tile_tokens, TILING.lanes), 0.0, tl.float32)
    NUM_SLOTS: tl.constexpr = TILING.key_atoms
    for slot in tl.static_range(NUM_SLOTS):
        indices, codes = atoms_of(
            words_ptr, coefficients_ptr, stride_words_slot, stride_coefficients_slot, slot, mask_t, TILING
        )
        scores += codes[:, None] * tl.load(table_ptr + indices[:, None] * TILING.lanes + offs_l[None, :])
    scores *= scales_of(coefficients_ptr, mask_t, TILING)[:, None]
    return tl.where(mask_t[:, None], scores, float("-inf"))


@triton.jit
def places_of(block, tile, stride_scores_block, TILING: tl.constexpr):
    """Where the scores of a tile `[tokens, lanes]` are kept."""
    token = tile * TILING.tile_tokens + tl.arange(0, TILING.tile_tokens)
    return block * stride_scores_block + token[:, None] * TILING.lanes + tl.arange(0, TILING.lanes)[None, :]


@triton.jit
def share_of(split, num_splits, num_tokens, TILING: tl.constexpr):
    """The tiles of one split: first, and one after the last."""
    num_tiles = tl.cdiv(num_tokens, TILING.tile_tokens)
    tiles_per_split = tl.cdiv(num_tiles, num_splits)
    first = split * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, num_tiles)


@triton.jit
def log_sum_exp_of(part_log_sum_exp_ptr, num_parts, row_head, mask_n):
    """Of all parts of each head, in units of log 2; -inf for an empty sequence."""
    BLOCK_PARTS: tl.constexpr = 32
    maximum = tl.full(row_head.shape, -1e30, tl.float32)
    total = tl.zeros(row_head.shape, tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        offs_p = start + tl.arange(0, BLOCK_PARTS)
        parts = tl.load(
            part_log_sum_exp_ptr + row_head[None, :] * num_parts + offs_p[:, None],
            mask=mask_n[None, :] & (offs_p < num_parts)[:, None], other=float("-inf"),
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(parts, axis=0))
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(tl.exp2(parts - new_maximum[None, :]), axis=0)
        maximum = new_maximum
    return maximum + tl.log2(total)

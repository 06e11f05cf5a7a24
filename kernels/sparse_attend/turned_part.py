"""Scores against keys that are coded before RoPE, in Triton: restored some channels at a time, turned, multiplied.

As on the CPU (`kernels.native.turned_rows`) the queries are turned back to the first token of a tile, so that a key
needs only the angles of its place in the tile: one table for all tiles, heads and layers.
"""

import triton
import triton.language as tl

from kvlens.kernels.sparse_attend.coded_part import atoms_of, scales_of


@triton.jit
def turned_scores_of(
    query_ptr, stride_query_head, scaling, head_in_block, tile, steps_ptr, starts_ptr, dictionary_ptr,
    stride_dictionary_atom, means_ptr, words_ptr, coefficients_ptr, stride_words_slot, stride_coefficients_slot, mask_t,
    TILING: tl.constexpr,
):  # fmt: skip
    """Scores of a tile `[tokens, lanes]` in units of log 2, -inf where there is no token.

    `query_ptr`: the first query head of the block, `head_in_block` its number within the key/value head.
    """
    HALF: tl.constexpr = TILING.turned_channels // 2
    CHANNELS: tl.constexpr = TILING.turn_channels
    LANES: tl.constexpr = TILING.lanes
    TURNED_CHUNKS: tl.constexpr = (HALF + CHANNELS - 1) // CHANNELS
    REST_CHUNKS: tl.constexpr = (TILING.head_dim - 2 * HALF + 2 * CHANNELS - 1) // (2 * CHANNELS)
    offs_t = tl.arange(0, TILING.tile_tokens)
    offs_l = tl.arange(0, TILING.lanes)
    scales = scales_of(coefficients_ptr, mask_t, TILING)
    scores = tl.full((TILING.tile_tokens, TILING.lanes), 0.0, tl.float32)
    for chunk in range(TURNED_CHUNKS + REST_CHUNKS):
        # Two runs of channels that are turned with each other; behind all pairs, two that pass.
        is_turned = chunk < TURNED_CHUNKS
        rest = 2 * HALF + (chunk - TURNED_CHUNKS) * 2 * CHANNELS
        offs_c = tl.arange(0, CHANNELS)
        low = tl.where(is_turned, chunk * CHANNELS, rest) + offs_c
        high = low + tl.where(is_turned, HALF, CHANNELS)
        mask_low = low < tl.where(is_turned, HALF, TILING.head_dim)
        mask_high = high < tl.where(is_turned, 2 * HALF, TILING.head_dim)
        mask_w = low < tl.where(is_turned, HALF, 0)

        x = tl.full((TILING.tile_tokens, CHANNELS), 0.0, tl.float32)
        y = tl.full((TILING.tile_tokens, CHANNELS), 0.0, tl.float32)
        for slot in range(TILING.key_atoms):
            indices, codes = atoms_of(
                words_ptr, coefficients_ptr, stride_words_slot, stride_coefficients_slot, slot, mask_t, TILING
            )
            atoms_ptr = dictionary_ptr + indices[:, None] * stride_dictionary_atom
            x += codes[:, None] * tl.load(atoms_ptr + low[None, :], mask=mask_low[None, :], other=0.0)
            y += codes[:, None] * tl.load(atoms_ptr + high[None, :], mask=mask_high[None, :], other=0.0)
        x *= scales[:, None]
        y *= scales[:, None]
        if TILING.has_key_means:
            x += tl.load(means_ptr + low, mask=mask_low, other=0.0)[None, :]
            y += tl.load(means_ptr + high, mask=mask_high, other=0.0)[None, :]
        waves_ptr = steps_ptr + offs_t[:, None] * (2 * HALF) + low[None, :]
        cos = tl.load(waves_ptr, mask=mask_w[None, :], other=1.0)
        sin = tl.load(waves_ptr + HALF, mask=mask_w[None, :], other=0.0)
        turned_x = x * cos - y * sin
        turned_y = y * cos + x * sin

        start_ptr = starts_ptr + tile * (2 * HALF) + low
        start_cos = tl.load(start_ptr, mask=mask_w, other=1.0)
        start_sin = tl.load(start_ptr + HALF, mask=mask_w, other=0.0)
        for lane in tl.static_range(LANES):
            # A lane without a head repeats the first one's scores; nobody reads them.
            exists = head_in_block + lane < TILING.heads_per_kv
            lane_ptr = query_ptr + tl.where(exists, lane, 0) * stride_query_head
            query_x = tl.load(lane_ptr + low, mask=mask_low, other=0.0).to(tl.float32)
            query_y = tl.load(lane_ptr + high, mask=mask_high, other=0.0).to(tl.float32)
            products = turned_x * (query_x * start_cos + query_y * start_sin)[None, :]
            products += turned_y * (query_y * start_cos - query_x * start_sin)[None, :]
            scores += tl.where(offs_l[None, :] == lane, tl.sum(products, axis=1)[:, None], 0.0)
    return tl.where(mask_t[:, None], scores * scaling, float("-inf"))

"""Decode attention over sparse codes in Triton: four launches, whose shapes depend on static sizes alone.

1. Table: T = scaling * dictionary · query^T for every key/value head, `[atoms, lanes]`, a lane a query head, so
   that an atom's scores of all heads are one load. The accumulators of 3 are cleared.
2. Weigh: every part finds the log-sum-exp of its share of the tokens. Parts that read exact tokens (sinks and
   window) give their output too, by the code of packed attention.
3. Scatter: with the log-sum-exp of the whole sequence known, scores are looked up once more and the finished
   probabilities added to accumulators `[parts, atoms, lanes]`: y[i] += p c.
4. Output: dictionary^T · y, plus the exact parts by their weights, plus the values' mean by the weight of all
   coded tokens.

Where keys are coded before RoPE there is no table: 2 restores and turns every key in registers and leaves the
scores of all heads to 3, since finding them again would cost more than reading them.

Why scatter, and why two passes
    Restoring a value reads head_dim numbers for every atom, out of a dictionary that no first-level cache
    holds: by the arithmetic of research/csr.md §5 that loses to plain fp16 attention at every sparsity.
    Scattering moves as many numbers as there are query heads. Triton offers no shared-memory atomics, so the
    accumulators lie in the second-level cache. Had every part its own, zeroing and merging them would cost more
    than reading the codes; in one for all parts nothing can be rescaled, so the maximum must be known first.
    Codes are small: reading those of the keys twice is cheaper than keeping scores of every head.

Files: `tiling.py` fixes the sizes, `coded_part.py` holds what 2 and 3 share, `turned_part.py` restores and turns.
Limits: the order of atomic additions is not fixed, so two runs may differ in the last bits. Tokens of a slot
and rows must be contiguous (they are copied if not). Not yet timed on a GPU. This module does not know how
pages are filled.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import COUNTS, Launch, rows_contiguous, strides
from kvlens.kernels.exact_tokens import Attended, ExactTokens
from kvlens.kernels.packed_attend.exact_part import attend_exact
from kvlens.kernels.sparse_attend import SparsePast, waves
from kvlens.kernels.sparse_attend.coded_part import (
    atoms_of,
    dot_exactly,
    lanes_of,
    locate_tile,
    log_sum_exp_of,
    place_of,
    places_of,
    scales_of,
    scores_of,
    share_of,
)
from kvlens.kernels.sparse_attend.tiling import DICTIONARY_ATOMS, Plan, plan_of
from kvlens.kernels.sparse_attend.turned_part import turned_scores_of
from kvlens.kernels.split_k import LOG2_E, empty_result, store_part
from kvlens.kernels.tuning import SparseConfiguration


@triton.jit
def _table_kernel(
    query_ptr, scaling, dictionary_ptr, table_ptr, accumulators_ptr, stride_query_row, stride_query_head,
    stride_dictionary_atom, BLOCK_ATOMS: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """A block of atoms of one table, and of its accumulators."""
    block, _, row, mask_n, query_head = place_of(TILING)
    offs_a = tl.program_id(1) * BLOCK_ATOMS + tl.arange(0, BLOCK_ATOMS)
    mask_a = offs_a < TILING.num_key_atoms
    offs_n = tl.arange(0, TILING.block_heads)
    query_ptr = query_ptr + row * stride_query_row + query_head * stride_query_head
    products = tl.full((BLOCK_ATOMS, TILING.block_heads), 0.0, tl.float32)
    # Turned keys have no table; accumulators are cleared all the same.
    NUM_CHUNKS: tl.constexpr = 0 if TILING.turned_channels else TILING.block_d // TILING.exact_channels
    for chunk in tl.static_range(NUM_CHUNKS):
        offs_d = chunk * TILING.exact_channels + tl.arange(0, TILING.exact_channels)
        mask_d = offs_d < TILING.head_dim
        atoms = tl.load(
            dictionary_ptr + offs_a[:, None] * stride_dictionary_atom + offs_d[None, :],
            mask=mask_a[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        query = tl.load(query_ptr[None, :] + offs_d[:, None], mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        products = dot_exactly(atoms, query.to(tl.float32), products)
    offs = offs_a[:, None] * TILING.lanes + offs_n[None, :]
    table_ptr += block * TILING.num_key_atoms * TILING.lanes
    tl.store(table_ptr + offs, products * scaling, mask=mask_a[:, None] & (offs_n < TILING.lanes)[None, :])
    NUM_ROWS: tl.constexpr = TILING.value_parts * TILING.num_value_atoms
    accumulators_ptr += block * NUM_ROWS * TILING.lanes
    for start in range(tl.program_id(1) * BLOCK_ATOMS, NUM_ROWS, tl.num_programs(1) * BLOCK_ATOMS):
        offs_r = start + tl.arange(0, BLOCK_ATOMS)
        mask = (offs_r < NUM_ROWS)[:, None] & (offs_n < TILING.lanes)[None, :]
        tl.store(
            accumulators_ptr + offs_r[:, None] * TILING.lanes + offs_n[None, :], tl.zeros_like(products), mask=mask
        )


@triton.jit(do_not_specialize=["stride_table_row"], do_not_specialize_on_alignment=COUNTS)
def _weigh_kernel(
    query_ptr, scaling, table_ptr, page_table_ptr, num_tokens_ptr, length_ptr, key_words_ptr, key_coefficients_ptr,
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr, part_output_ptr, part_log_sum_exp_ptr,
    stride_query_row, stride_query_head, stride_table_row,
    stride_key_words_page, stride_key_words_head, stride_key_words_slot,
    stride_key_coefficients_page, stride_key_coefficients_head, stride_key_coefficients_slot,
    stride_key_row, stride_key_head, stride_key_token, stride_value_row, stride_value_head, stride_value_token,
    stride_sink_key_row, stride_sink_key_head, stride_sink_key_token,
    stride_sink_value_row, stride_sink_value_head, stride_sink_value_token,
    steps_ptr, starts_ptr, key_dictionary_ptr, stride_key_dictionary_atom, key_means_ptr,
    scores_ptr, stride_scores_block, TILING: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of one part; of an exact one its output too, of one with turned keys their scores."""
    block, head, row, mask_n, query_head = place_of(TILING)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    num_tokens = tl.load(num_tokens_ptr + row)
    row_head = row * TILING.num_kv_heads * TILING.heads_per_kv + query_head
    if part < TILING.num_exact_parts:
        maximum, total, chunks = attend_exact(
            query_ptr + row * stride_query_row + query_head * stride_query_head, mask_n, scaling,
            num_tokens, num_tokens, tl.load(length_ptr + row), part, (),
            keys_ptr + row * stride_key_row + head * stride_key_head,
            values_ptr + row * stride_value_row + head * stride_value_head,
            sink_keys_ptr + row * stride_sink_key_row + head * stride_sink_key_head,
            sink_values_ptr + row * stride_sink_value_row + head * stride_sink_value_head,
            stride_key_token, stride_value_token, stride_sink_key_token, stride_sink_value_token, TILING,
        )  # fmt: skip
        store_part(
            part_output_ptr + (row_head * TILING.num_exact_parts + part) * TILING.head_dim,
            part_log_sum_exp_ptr + row_head * num_parts + part, mask_n, maximum, total, chunks,
            TILING.block_d // TILING.exact_channels, TILING.exact_channels, TILING.head_dim,
        )  # fmt: skip
    else:
        highest = tl.full((TILING.lanes,), -1e30, tl.float32)  # finite: no difference is inf - inf
        lane_total = tl.full((TILING.lanes,), 0.0, tl.float32)
        table_ptr += block * TILING.num_key_atoms * TILING.lanes
        key_words_ptr += head * stride_key_words_head
        key_coefficients_ptr += head * stride_key_coefficients_head
        num_splits = num_parts - TILING.num_exact_parts
        first, last = share_of(part - TILING.num_exact_parts, num_splits, num_tokens, TILING)
        for tile in range(first, last):
            page, place, mask_t = locate_tile(tile, num_tokens, page_table_ptr + row * stride_table_row, TILING)
            words_ptr = key_words_ptr + page * stride_key_words_page + place
            coefficients_ptr = key_coefficients_ptr + page * stride_key_coefficients_page + place
            if TILING.turned_channels:
                in_group = block % TILING.head_blocks * TILING.lanes
                first_head = head * TILING.heads_per_kv + in_group
                scores = turned_scores_of(
                    query_ptr + row * stride_query_row + first_head * stride_query_head, stride_query_head, scaling,
                    in_group, tile, steps_ptr, starts_ptr, key_dictionary_ptr, stride_key_dictionary_atom,
                    key_means_ptr + head * TILING.head_dim, words_ptr, coefficients_ptr, stride_key_words_slot,
                    stride_key_coefficients_slot, mask_t, TILING,
                )  # fmt: skip
                tl.store(scores_ptr + places_of(block, tile, stride_scores_block, TILING), scores)
            else:
                scores = scores_of(
                    table_ptr, words_ptr, coefficients_ptr, stride_key_words_slot, stride_key_coefficients_slot,
                    mask_t, TILING,
                )  # fmt: skip
            higher = tl.maximum(highest, tl.max(scores, axis=0))
            lane_total = lane_total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[None, :]), axis=0)
            highest = higher
        lane_head, mask_l = lanes_of(block, head, row, TILING)
        tl.store(part_log_sum_exp_ptr + lane_head * num_parts + part, highest + tl.log2(lane_total), mask=mask_l)


@triton.jit(do_not_specialize=["stride_table_row", "num_parts"], do_not_specialize_on_alignment=COUNTS)
def _scatter_kernel(
    table_ptr, page_table_ptr, num_tokens_ptr, part_log_sum_exp_ptr, accumulators_ptr,
    key_words_ptr, key_coefficients_ptr, value_words_ptr, value_coefficients_ptr, stride_table_row,
    stride_key_words_page, stride_key_words_head, stride_key_words_slot,
    stride_key_coefficients_page, stride_key_coefficients_head, stride_key_coefficients_slot,
    stride_value_words_page, stride_value_words_head, stride_value_words_slot,
    stride_value_coefficients_page, stride_value_coefficients_head, stride_value_coefficients_slot,
    scores_ptr, stride_scores_block, num_parts, TILING: tl.constexpr,
):  # fmt: skip
    """Add the probabilities of a share of the tokens to the atoms of their values."""
    NUM_SLOTS: tl.constexpr = TILING.value_parts * TILING.value_atoms
    block, head, row, _, _ = place_of(TILING)
    offs_l = tl.arange(0, TILING.lanes)
    lane_head, mask_l = lanes_of(block, head, row, TILING)
    log_sum_exp = tl.where(mask_l, log_sum_exp_of(part_log_sum_exp_ptr, num_parts, lane_head, mask_l), float("inf"))
    num_tokens = tl.load(num_tokens_ptr + row)
    table_ptr += block * TILING.num_key_atoms * TILING.lanes
    accumulators_ptr += block * TILING.value_parts * TILING.num_value_atoms * TILING.lanes
    key_words_ptr += head * stride_key_words_head
    key_coefficients_ptr += head * stride_key_coefficients_head
    value_words_ptr += head * stride_value_words_head
    value_coefficients_ptr += head * stride_value_coefficients_head
    first, last = share_of(tl.program_id(1), tl.num_programs(1), num_tokens, TILING)
    for tile in range(first, last):
        page, place, mask_t = locate_tile(tile, num_tokens, page_table_ptr + row * stride_table_row, TILING)
        if TILING.turned_channels:
            scores = tl.load(scores_ptr + places_of(block, tile, stride_scores_block, TILING))
        else:
            scores = scores_of(
                table_ptr, key_words_ptr + page * stride_key_words_page + place,
                key_coefficients_ptr + page * stride_key_coefficients_page + place,
                stride_key_words_slot, stride_key_coefficients_slot, mask_t, TILING,
            )  # fmt: skip
        words_ptr = value_words_ptr + page * stride_value_words_page + place
        coefficients_ptr = value_coefficients_ptr + page * stride_value_coefficients_page + place
        weights = tl.exp2(scores - log_sum_exp[None, :]) * scales_of(coefficients_ptr, mask_t, TILING)[:, None]
        for slot in tl.static_range(NUM_SLOTS):
            indices, codes = atoms_of(
                words_ptr, coefficients_ptr, stride_value_words_slot, stride_value_coefficients_slot, slot, mask_t,
                TILING,
            )  # fmt: skip
            rows = slot // TILING.value_atoms * TILING.num_value_atoms + indices
            tl.atomic_add(
                accumulators_ptr + rows[:, None] * TILING.lanes + offs_l[None, :], codes[:, None] * weights,
                mask=mask_t[:, None] & mask_l[None, :], sem="relaxed",
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def _output_kernel(
    accumulators_ptr, dictionary_ptr, part_output_ptr, part_log_sum_exp_ptr, output_ptr, log_sum_exp_ptr,
    means_ptr, stride_dictionary_atom, num_parts, BLOCK_ATOMS: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """A block of channels of the output: accumulators by the dictionary, exact parts by their weights."""
    CHANNELS: tl.constexpr = TILING.block_channels
    BLOCKS_PER_PART: tl.constexpr = (TILING.part_channels + CHANNELS - 1) // CHANNELS
    block, head, row, mask_n, query_head = place_of(TILING)
    part = tl.program_id(1) // BLOCKS_PER_PART
    offs_c = tl.program_id(1) % BLOCKS_PER_PART * CHANNELS + tl.arange(0, CHANNELS)
    mask_c = offs_c < TILING.part_channels
    offs_n = tl.arange(0, TILING.block_heads)
    accumulators_ptr += (block * TILING.value_parts + part) * TILING.num_value_atoms * TILING.lanes
    output = tl.full((CHANNELS, TILING.block_heads), 0.0, tl.float32)
    for start in range(0, TILING.num_value_atoms, BLOCK_ATOMS):
        offs_a = start + tl.arange(0, BLOCK_ATOMS)
        mask_a = offs_a < TILING.num_value_atoms
        atoms = tl.load(
            dictionary_ptr + offs_a[None, :] * stride_dictionary_atom + offs_c[:, None],
            mask=mask_a[None, :] & mask_c[:, None], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            accumulators_ptr + offs_a[:, None] * TILING.lanes + offs_n[None, :],
            mask=mask_a[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        output = dot_exactly(atoms, weights, output)

    row_head = row * TILING.num_kv_heads * TILING.heads_per_kv + query_head
    log_sum_exp = log_sum_exp_of(part_log_sum_exp_ptr, num_parts, row_head, mask_n)
    reference = tl.where(log_sum_exp == float("-inf"), 0.0, log_sum_exp)
    channel = part * TILING.part_channels + offs_c
    mask = mask_n[None, :] & mask_c[:, None]
    for exact in range(TILING.num_exact_parts):
        part_log_sum_exp = tl.load(
            part_log_sum_exp_ptr + row_head * num_parts + exact, mask=mask_n, other=float("-inf")
        )
        place = (row_head * TILING.num_exact_parts + exact) * TILING.head_dim
        part_output = tl.load(part_output_ptr + place[None, :] + channel[:, None], mask=mask, other=0.0)
        output += part_output * tl.exp2(part_log_sum_exp - reference)[None, :]
    if TILING.has_value_means:
        share = tl.full((TILING.block_heads,), 0.0, tl.float32)
        for coded in range(TILING.num_exact_parts, num_parts):
            part_log_sum_exp = tl.load(
                part_log_sum_exp_ptr + row_head * num_parts + coded, mask=mask_n, other=float("-inf")
            )
            share += tl.exp2(part_log_sum_exp - reference)
        means = tl.load(means_ptr + head * TILING.head_dim + channel, mask=mask_c, other=0.0)
        output += means[:, None] * share[None, :]
    tl.store(output_ptr + row_head[None, :] * TILING.head_dim + channel[:, None], output, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(log_sum_exp_ptr + row_head, log_sum_exp * 0.6931471805599453, mask=mask_n)


def sparse_attend(query: torch.Tensor, past: SparsePast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.sparse_attend.sparse_attend`."""
    result, launches = prepare(query, past, exact, scaling=scaling)
    for launch in launches:
        launch.run()
    return result


def prepare(
    query: torch.Tensor,
    past: SparsePast,
    exact: ExactTokens,
    *,
    scaling: float,
    arch: int | None = None,
    configuration: SparseConfiguration | None = None,
) -> tuple[Attended, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (on `arch`, if not this GPU).

    `configuration` stands in for the saved one.
    """
    batch, num_query_heads, head_dim = query.shape
    plan = plan_of(query, past, exact, arch=arch, configuration=configuration)
    tiling = plan.tiling
    query = rows_contiguous(query)
    key_words, key_coefficients = rows_contiguous(past.keys.words), rows_contiguous(past.keys.coefficients)
    value_words, value_coefficients = rows_contiguous(past.values.words), rows_contiguous(past.values.coefficients)
    key_dictionary, value_dictionary = rows_contiguous(past.keys.dictionary), rows_contiguous(past.values.dictionary)
    keys, values = rows_contiguous(exact.keys), rows_contiguous(exact.values)
    sink_keys, sink_values = rows_contiguous(exact.sink_keys), rows_contiguous(exact.sink_values)
    page_table, num_tokens = rows_contiguous(past.page_table), past.num_tokens.contiguous()

    blocks, heads = batch * tiling.num_kv_heads * tiling.head_blocks, (batch, num_query_heads)

    def numbers(*shape: int) -> torch.Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    num_atoms = tiling.num_key_atoms, tiling.num_value_atoms
    table = numbers(blocks, tiling.num_key_atoms, tiling.lanes)
    scores = numbers(blocks, plan.num_tiles * tiling.tile_tokens, tiling.lanes) if past.turn else table
    accumulators = numbers(blocks, tiling.value_parts, tiling.num_value_atoms, tiling.lanes)
    part_output = numbers(*heads, tiling.num_exact_parts, head_dim)
    part_log_sum_exp = numbers(*heads, plan.num_parts)
    result = empty_result(query)
    scale = float(scaling) * LOG2_E
    own = {"TILING": tiling, "num_warps": 1, "enable_fp_fusion": True}
    products = own | {"BLOCK_ATOMS": DICTIONARY_ATOMS, "num_warps": 4}
    coded_keys = {
        "table_ptr": table,
        "page_table_ptr": page_table,
        "num_tokens_ptr": num_tokens,
        "key_words_ptr": key_words,
        "key_coefficients_ptr": key_coefficients,
        "part_log_sum_exp_ptr": part_log_sum_exp,
        **strides("table", page_table, "row"),
        **_code_strides("key", key_words, key_coefficients),
    }
    return result, (
        Launch(_table_kernel, (blocks, triton.cdiv(max(num_atoms), DICTIONARY_ATOMS)), {
            "query_ptr": query,
            "scaling": scale,
            "dictionary_ptr": key_dictionary,
            "table_ptr": table,
            "accumulators_ptr": accumulators,
            **strides("query", query, "row", "head"),
            **strides("dictionary", key_dictionary, "atom"),
            **products,
        }),
        Launch(_weigh_kernel, (blocks, plan.num_parts), {
            "query_ptr": query,
            "scaling": scale,
            "length_ptr": exact.length.contiguous(),
            "keys_ptr": keys,
            "values_ptr": values,
            "sink_keys_ptr": sink_keys,
            "sink_values_ptr": sink_values,
            "part_output_ptr": part_output,
            **coded_keys,
            **strides("query", query, "row", "head"),
            **strides("key", keys, "row", "head", "token"),
            **strides("value", values, "row", "head", "token"),
            **strides("sink_key", sink_keys, "row", "head", "token"),
            **strides("sink_value", sink_values, "row", "head", "token"),
            **_turn_tensors(past, plan, absent=table),
            "key_dictionary_ptr": key_dictionary,
            **strides("key_dictionary", key_dictionary, "atom"),
            "scores_ptr": scores,
            **strides("scores", scores, "block"),
            **own,
        }),
        Launch(_scatter_kernel, (blocks, plan.num_splits), {
            "accumulators_ptr": accumulators,
            "value_words_ptr": value_words,
            "value_coefficients_ptr": value_coefficients,
            **coded_keys,
            **_code_strides("value", value_words, value_coefficients),
            "scores_ptr": scores,
            **strides("scores", scores, "block"),
            "num_parts": plan.num_parts,
            **own,
        }),
        Launch(
            _output_kernel,
            (blocks, tiling.value_parts * triton.cdiv(tiling.part_channels, tiling.block_channels)),
            {
                "accumulators_ptr": accumulators,
                "dictionary_ptr": value_dictionary,
                "part_output_ptr": part_output,
                "part_log_sum_exp_ptr": part_log_sum_exp,
                "output_ptr": result.output,
                "log_sum_exp_ptr": result.log_sum_exp,
                "means_ptr": table if past.values.means is None else past.values.means.contiguous(),
                **strides("dictionary", value_dictionary, "atom"),
                "num_parts": plan.num_parts,
                **products,
            },
        ),
    )  # fmt: skip


def _code_strides(side: str, words: torch.Tensor, coefficients: torch.Tensor) -> dict[str, int]:
    """Strides of a side's words and coefficients; packed pages have one scale for all slots."""
    of_words = strides(f"{side}_words", words, "page", "head", "slot")
    if coefficients.ndim == words.ndim:
        return of_words | strides(f"{side}_coefficients", coefficients, "page", "head", "slot")
    of_scales = strides(f"{side}_coefficients", coefficients, "page", "head")
    return of_words | of_scales | {f"stride_{side}_coefficients_slot": 0}


def _turn_tensors(past: SparsePast, plan: Plan, *, absent: torch.Tensor) -> dict[str, torch.Tensor]:
    """What turns keys; `absent` stands for what is not read."""
    if past.turn is None:
        return {"steps_ptr": absent, "starts_ptr": absent, "key_means_ptr": absent}
    size = plan.tiling.tile_tokens
    return {
        "steps_ptr": waves.steps(past.turn, size),
        "starts_ptr": waves.starts(past.turn, first=plan.tiling.num_sinks, stride=size, count=max(1, plan.num_tiles)),
        "key_means_ptr": absent if past.keys.means is None else past.keys.means.contiguous(),
    }

"""Attention over sparse codes on the CPU: two products with the dictionaries, and one native call between them.

    table = query · key dictionary^T                     torch, `[B*HQ, N]`
    scores by lookup, softmax, values by scatter         native, over all pages, sinks and windows
    output = sums of exact values + accumulators · value dictionary        torch

The course of the call is in `kvlens.kernels.native.attend`, what codes add to it in `coded`, the inner loops in
`sparse_rows`, `turned_rows` and `dense_rows` beside them. The first call with a new layout compiles them (or loads
them from Numba's disk cache); `warm_up` does that ahead of time.

Values are scattered, not restored: an atom costs a load, a multiply-add and a store of as many lanes as there
are query heads, where restoring it costs head_dim / 16 loads and multiply-adds of whole vectors out of a
dictionary that no first-level cache holds. In plain loops on one core of a 2.7 GHz Xeon with AVX-512 (8 atoms,
1024 in the dictionary, head dim 128) restoring takes 84 ns a token for one query head and 100 for four,
scattering 17 and 19. Of a call with 32 heads and 4,096 tokens half is work that no atom takes part in: the
two products, the softmax, the window, the walk over the pages.

Keys that are coded before RoPE have no table: each is restored, turned and multiplied in registers (`turned_rows`).
With 32 heads of 128 channels, 4,096 tokens, 7 + 7 atoms and a bf16 query on two such cores, with AVX512-FP16, a call
takes 1.9 ms, where the look-up takes 0.87 ms (tenth percentiles of one run): some 80 cycles a token and head against
36. An atom of a key adds 0.09 ms: 3.8 cycles for its four lines of second-level cache, near one a cycle. Widening to
fp32, turning and the products, some 45 vector instructions on two ports, are most of the rest; widening by way of
memory, which takes fewer of them, gained nothing. A query in fp32 has its atoms summed in fp32, out of a dictionary
of twice the bytes: 2.8 ms in a noisier run, in which fp16 took 2.4 ms.

Limits: the tokens of a slot, and rows of rings and sinks, must be contiguous; others are copied first.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kvlens.kernels.exact_tokens import Attended, ExactTokens
from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.attend_arguments import AttendArguments, Side
from kvlens.kernels.native.attend_call import (
    ELEMENTS,
    LOG_2,
    AttendCall,
    AttendKernels,
    CallShape,
    as_dtype,
    element_of,
    exact_kernels,
    kept_call,
    lines,
    with_strides,
)
from kvlens.kernels.native.dense_rows import padded
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.sparse_rows import (
    MAX_LANES,
    block_bytes,
    lanes_of,
    part_table,
    scatter_codes,
    score_codes,
    weave_rows,
)
from kvlens.kernels.native.turned_rows import row_lanes, score_turned, scratch_bytes, turn_means
from kvlens.kernels.native.vectors import FP32, NUM_LANES
from kvlens.kernels.sparse_attend import SparseLayout, SparsePast, SparseSide, waves

jit.require_half_floats()


def sparse_attend(query: torch.Tensor, past: SparsePast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.sparse_attend.sparse_attend`.

    Raises: ValueError for an element type that the kernels do not read.
    """
    call = _kept(query, past, exact)
    if past.turn is None:
        scaled = query.reshape(-1, query.shape[2]).float() * (scaling / LOG_2)
        torch.mm(scaled, past.keys.dictionary.t(), out=call.table[:, : len(past.keys.dictionary)])
    output = torch.empty(query.shape, dtype=torch.float32)
    log_sum_exp = torch.empty(query.shape[:2], dtype=torch.float32)
    # Whatever had to be copied must live until the kernel returns.
    copies = _place_past(call.attend.arguments, past, exact, query.dtype)
    call.attend.enter(query, past.page_table, exact, output, log_sum_exp, scaling)
    del copies
    num_atoms = len(past.values.dictionary)
    atoms = call.accumulators[:, :num_atoms]
    output.view(len(atoms), -1).addmm_(atoms, past.values.dictionary)
    if past.values.means is not None:
        heads = query.shape[0], len(past.values.means), -1
        totals = call.accumulators[:: past.layout.value_parts, num_atoms].view(*heads, 1)
        output.view(*heads, query.shape[2]).addcmul_(totals, past.values.means.unsqueeze(1))
    return Attended(output.to(query.dtype), log_sum_exp)


def warm_up(
    layout: SparseLayout,
    *,
    head_dim: int,
    heads_per_group: int,
    query_dtype: torch.dtype,
    exact_dtype: torch.dtype,
    turned_channels: int = 0,
    has_key_means: bool = False,
) -> float:
    """Compile what attention over `layout` needs; gives the milliseconds spent.

    `turned_channels`: of keys that are coded before RoPE, else 0.

    Safe on a background thread: a call that needs a kernel meanwhile waits for it.
    """
    known = set(jit.compiled())
    elements = ELEMENTS[query_dtype], FP32, ELEMENTS[exact_dtype]
    shape = CallShape(head_dim, heads_per_group, layout.page_tokens, 0, *elements, jit.has_lookups())
    _kernels(shape, layout, _Turned(turned_channels, has_key_means, _sums_in_half(query_dtype)))
    return sum(kernel.compile_ms for kernel in jit.compiled() if kernel not in known)


# ---------------------------------------------------------------------------------------------------------
# The kernels of a layout. Every factory gives a function of int64 parameters; its constants name the kernel.


def score_codes_kernel(slots, parts, is_packed, num_heads, has_lookups, source):
    def score(
        words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
        table, part_stride, totals, rows, rows_stride, scratch,
    ):  # fmt: skip
        depends_on(source)
        score_codes(
            (words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
             table, part_stride, totals, rows, rows_stride, scratch),
            slots, parts, is_packed, num_heads, has_lookups,
        )  # fmt: skip

    return score


def scatter_codes_kernel(slots, parts, is_packed, num_heads, has_lookups, source):
    def scatter(
        words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
        table, part_stride, totals, rows, rows_stride, scratch,
    ):  # fmt: skip
        depends_on(source)
        scatter_codes(
            (words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
             table, part_stride, totals, rows, rows_stride, scratch),
            slots, parts, is_packed, num_heads, has_lookups,
        )  # fmt: skip

    return scatter


def score_turned_kernel(slots, is_packed, num_heads, head_dim, width, has_means, is_half, source):
    def score(
        words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
        atoms, steps, start, queries, queries_stride, rows, rows_stride, scratch,
    ):  # fmt: skip
        depends_on(source)
        score_turned(
            (words, words_stride, coefficients, coefficients_stride, next_words, next_coefficients, num_tokens,
             atoms, steps, start, queries, queries_stride, rows, rows_stride, scratch),
            slots, is_packed, num_heads, head_dim, width, has_means, is_half,
        )  # fmt: skip

    return score


def turn_means_kernel(head_dim, width, source):
    def turn(mean, steps, target):
        depends_on(source)
        turn_means((mean, steps, target), 1, 0, 1, head_dim, width, 1, 0)

    return turn


def weave_kernel(num_heads, source):
    def weave(rows, rows_stride, num_atoms, table):
        depends_on(source)
        weave_rows((rows, rows_stride, num_atoms, table), 1, 1, 1, num_heads, 0)

    return weave


def part_kernel(num_heads, source):
    def part(table, num_atoms, factors, rows, rows_stride):
        depends_on(source)
        part_table((table, num_atoms, factors, rows, rows_stride), 1, 1, 1, num_heads, 0)

    return part


@dataclass(frozen=True)
class _Turned:
    """Keys that are coded before RoPE: `width` of their channels are turned; 0 if they were coded after it."""

    width: int
    has_means: bool
    is_half: bool


def _sums_in_half(query_dtype: torch.dtype) -> bool:
    """Whether atoms of a key are summed in fp16: where the processor can, for queries of 16 bits."""
    return query_dtype != torch.float32 and jit.has_half_arithmetic()


@lru_cache(maxsize=256)
def _kernels(shape: CallShape, layout: SparseLayout, turned: _Turned) -> AttendKernels:
    heads, is_packed = min(shape.heads_per_group, MAX_LANES), int(layout.is_packed)

    def coded(factory, *constants: int) -> dict[str, int]:
        return {"coded": jit.kernel(factory, *constants).address}

    exact, values = exact_kernels(shape), layout.value_parts
    of_codes = is_packed, heads, int(shape.has_lookups)
    common = {"part_table": jit.kernel(part_kernel, heads).address}
    if turned.width:
        row = shape.head_dim, turned.width
        keys = coded(
            score_turned_kernel, layout.key_atoms, is_packed, heads, *row, int(turned.has_means), int(turned.is_half)
        )
        if turned.has_means:
            common["turn_means"] = jit.kernel(turn_means_kernel, *row).address
    else:
        keys = coded(score_codes_kernel, layout.key_atoms, 1, *of_codes)
        common["weave_rows"] = jit.kernel(weave_kernel, heads).address
    return replace(
        exact,
        common=exact.common | common,
        keys=exact.keys | keys,
        values=exact.values | coded(scatter_codes_kernel, values * layout.value_atoms, values, *of_codes),
    )


# ---------------------------------------------------------------------------------------------------------
# One call


@dataclass(frozen=True)
class _Kept:
    """A native call, and what goes in and comes out beside it; rows are filled up to whole vectors of atoms.

    Shapes: table fp32 `[B*HQ, atoms]`, accumulators fp32 `[B*HQ*parts, atoms]`. In accumulators the number after all
    atoms is, in the first part, the probability of all coded tokens.
    """

    attend: AttendCall
    table: torch.Tensor
    accumulators: torch.Tensor


def _kept(query: torch.Tensor, past: SparsePast, exact: ExactTokens) -> _Kept:
    """The call kept for inputs of this kind, or a new one."""
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads, num_sinks = exact.sink_keys.shape[1:3]
    layout, has_lookups, num_threads = past.layout, jit.has_lookups(), threads.num_threads()
    num_atoms = len(past.keys.dictionary), len(past.values.dictionary)
    width = 0 if past.turn is None else 2 * len(past.turn.inverse_frequencies)
    turned = _Turned(width, past.keys.means is not None, _sums_in_half(query.dtype))

    def build() -> _Kept:
        heads, parts = num_query_heads // num_kv_heads, layout.value_parts
        elements = element_of(query), FP32, element_of(exact.keys)
        shape = CallShape(head_dim, heads, layout.page_tokens, num_sinks, *elements, has_lookups)
        key_atoms, value_atoms = (0 if width else padded(num_atoms[0])), padded(num_atoms[1] + 1)
        with torch.inference_mode(False):  # a tensor made inside could not be written to outside
            table = torch.zeros(batch * num_query_heads, key_atoms)
            accumulators = torch.zeros(batch * num_query_heads * parts, value_atoms)
        lanes = lanes_of(heads)
        blocks = -(-heads // lanes)
        slots = max(layout.key_atoms, parts * layout.value_atoms)
        own_bytes = lines(4 * blocks * lanes * key_atoms + block_bytes(slots, heads))
        turn_bytes = scratch_bytes(layout.key_atoms, min(heads, MAX_LANES), head_dim, width) if width else 0
        attend = AttendCall(
            shape, _kernels(shape, layout, turned), batch=batch, num_kv_heads=num_kv_heads, num_threads=num_threads,
            own_scratch_bytes=own_bytes + turn_bytes, turn_scratch_offset=own_bytes,
            accumulator_bytes=4 * blocks * lanes * parts * value_atoms,
            accumulator_part_bytes=4 * lanes * value_atoms, accumulator_row_bytes=4 * parts * value_atoms,
            lanes=lanes, value_parts=parts, table_row_bytes=4 * key_atoms,
            tables=table.data_ptr(), accumulators=accumulators.data_ptr(), totals_offset=4 * lanes * num_atoms[1],
        )  # fmt: skip
        return _Kept(attend, table, accumulators)

    key = (
        layout, query.shape, num_kv_heads, num_sinks, query.dtype, exact.keys.dtype, has_lookups, num_threads,
        num_atoms, turned,
    )  # fmt: skip
    return kept_call(key, build)


def _place_past(arguments: AttendArguments, past: SparsePast, exact: ExactTokens, query_dtype: torch.dtype) -> tuple:
    """Fill in where coded tokens lie. Gives what must live as long as the addresses are used."""
    num_tokens = as_dtype(torch.int32, past.num_tokens).contiguous()
    return (
        num_tokens,
        _place_coded(arguments.keys, past.keys, num_tokens),
        _place_coded(arguments.values, past.values, num_tokens),
        None if past.turn is None else _place_turned(arguments, past, exact, query_dtype),
    )


def _place_coded(side: Side, coded: SparseSide, num_tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    words, (page, head, slot, _) = with_strides(coded.words)
    side.codes, side.codes_page_stride, side.codes_head_stride = words.data_ptr(), 2 * page, 2 * head
    side.codes_row_stride = 2 * slot
    coefficients, (page, head, *slot) = with_strides(coded.coefficients)
    side.scale, side.scale_page_stride, side.scale_head_stride = coefficients.data_ptr(), 2 * page, 2 * head
    side.scale_row_stride = 2 * slot[0] if len(slot) == 2 else 0
    side.num_packed = num_tokens.data_ptr()
    return words, coefficients


def _place_turned(
    arguments: AttendArguments, past: SparsePast, exact: ExactTokens, query_dtype: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    """Fill in what turns keys. Gives what must live as long as the addresses are used."""
    turn, width = past.turn, 2 * len(past.turn.inverse_frequencies)
    atoms = _in_lanes(past.keys.dictionary, width, torch.float16 if _sums_in_half(query_dtype) else torch.float32)
    steps = waves.steps(turn, NUM_LANES, lanes=NUM_LANES)
    starts = waves.starts(
        turn, first=exact.sink_keys.shape[2], stride=past.layout.page_tokens, count=past.page_table.shape[1],
        lanes=NUM_LANES,
    )  # fmt: skip
    arguments.atoms, arguments.turn_steps = atoms.data_ptr(), steps.data_ptr()
    arguments.turn_starts, arguments.turn_starts_stride = starts.data_ptr(), 4 * starts.stride(0)
    means = None
    if past.keys.means is not None:
        means = _in_lanes(past.keys.means, width, torch.float32)
        arguments.means, arguments.means_stride = means.data_ptr(), 4 * means.shape[1]
    return atoms, steps, starts, means


def _in_lanes(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Atoms or means with their channels in whole vectors, see `turned_rows`. Shapes: `[n, D]` to `[n, lanes]`."""

    def make() -> torch.Tensor:
        lanes = row_lanes(rows.shape[1], width)
        made = torch.zeros(len(rows), NUM_LANES * len(lanes), dtype=dtype)
        for index, (first, count) in enumerate(lanes):
            made[:, NUM_LANES * index : NUM_LANES * index + count] = rows[:, first : first + count]
        return made

    return waves.once(rows, ("lanes", width, dtype), make)

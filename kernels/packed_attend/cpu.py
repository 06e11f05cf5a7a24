"""Packed attention on the CPU: picks the compiled kernels, fills in the addresses, makes one call.

The course of the computation is in `kvlens.kernels.native.attend`, the inner loops in `packed_rows` and
`dense_rows` beside it. The first call with a new layout compiles them (or loads them from Numba's disk
cache); `warm_up` does that ahead of time.

Limits: pages, rings and sinks must have contiguous rows, and scale and minimum contiguous pages of a head;
others are copied first, the whole pool of them.
"""

import ctypes
import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.attend import (
    ITEMS_PER_THREAD,
    NUM_COUNTERS,
    AttendArguments,
    attend_entry,
    attend_worker,
)
from kvlens.kernels.native.dense_rows import padded, read_rows, score_rows, sum_rows, write_rows
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.packed_rows import accumulate_rows
from kvlens.kernels.native.vectors import BF16, FP16, FP32
from kvlens.kernels.packed_attend import Attended, ExactTokens, PackedPast, PageLayout

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
TILE_TOKENS = 512  # scores of a tile stay in the first-level cache
MIN_PARALLEL_WORK = 2**18  # score products below which waking a team costs more than it saves
_CACHE_LINE = 64


@dataclass(frozen=True)
class _Shape:
    """What decides which kernels run and how large the workspace is."""

    layout: PageLayout
    head_dim: int
    heads_per_group: int
    num_sinks: int
    query_element: int
    exact_element: int
    has_lookups: bool

    @property
    def heads_at_once(self) -> int:
        """Query heads that share the unpacking of a page: as many as leave their sums in registers."""
        return min(2, self.heads_per_group)

    @property
    def tile_tokens(self) -> int:
        return self.layout.page_tokens * max(1, TILE_TOKENS // self.layout.page_tokens)


def packed_attend(
    query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float
) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`.

    Raises: ValueError for an element type that the kernels do not read.
    """
    num_kv_heads = exact.keys.shape[1]
    shape = _Shape(
        layout=past.layout,
        head_dim=query.shape[2],
        heads_per_group=query.shape[1] // num_kv_heads,
        num_sinks=exact.sink_keys.shape[2],
        query_element=_element(query),
        exact_element=_element(exact.keys),
        has_lookups=jit.has_lookups(),
    )
    output = torch.empty(query.shape, dtype=query.dtype)
    log_sum_exp = torch.empty(query.shape[:2], dtype=torch.float32)
    call = _call_of_this_thread(shape, query.shape[0], num_kv_heads, threads.num_threads())
    call.run(query, past, exact, output, log_sum_exp, scaling)
    return Attended(output, log_sum_exp)


def warm_up(
    layout: PageLayout, *, head_dim: int, heads_per_group: int, query_dtype: torch.dtype, exact_dtype: torch.dtype
) -> float:
    """Compile what attention over `layout` needs; gives the milliseconds spent. Safe on a background thread."""
    known = set(jit.compiled())
    _kernels(
        _Shape(layout, head_dim, heads_per_group, 0, ELEMENTS[query_dtype], ELEMENTS[exact_dtype], jit.has_lookups())
    )
    return sum(kernel.compile_ms for kernel in jit.compiled() if kernel not in known)


def _element(tensor: torch.Tensor) -> int:
    element = ELEMENTS.get(tensor.dtype)
    if element is None:
        raise ValueError(f"query and exact tokens must be fp32, fp16 or bf16; got {tensor.dtype}")
    return element


# ---------------------------------------------------------------------------------------------------------
# The kernels of a shape. Every factory gives a function of int64 parameters; its constants name the kernel.


def packed_rows_kernel(bits, row_values, group_size, num_heads, has_lookups, source):
    def accumulate(
        codes, codes_stride, scale, minimum, factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride
    ):  # fmt: skip
        depends_on(source)
        accumulate_rows(
            (codes, codes_stride, scale, minimum, factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride),
            bits, row_values, group_size, num_heads, has_lookups,
        )  # fmt: skip

    return accumulate


def read_kernel(element, head_dim, source):
    def read(rows, rows_stride, count, target, factor):
        depends_on(source)
        read_rows((rows, rows_stride, count, target, factor), element, head_dim, 1)

    return read


def write_kernel(element, head_dim, source):
    def write(rows, rows_stride, count, sums, factors):
        depends_on(source)
        write_rows((rows, rows_stride, count, sums, factors), element, head_dim, 1)

    return write


def score_kernel(element, head_dim, num_heads, source):
    def score(rows, rows_stride, count, queries, scores, scores_stride):
        depends_on(source)
        score_rows((rows, rows_stride, count, queries, scores, scores_stride), element, head_dim, num_heads)

    return score


def sum_kernel(element, head_dim, num_heads, source):
    def sum_up(rows, rows_stride, count, factors, factors_stride, sums):
        depends_on(source)
        sum_rows((rows, rows_stride, count, factors, factors_stride, sums), element, head_dim, num_heads)

    return sum_up


@lru_cache(maxsize=256)
def _kernels(shape: _Shape) -> dict[str, int]:
    """The address of every kernel, by its field in `AttendArguments`."""
    layout, dim, many, lookups = shape.layout, shape.head_dim, shape.heads_at_once, int(shape.has_lookups)
    keys = (layout.key_bits, layout.page_tokens, layout.key_group_size)
    values = (layout.value_bits, dim, layout.value_group_size)
    query, exact = shape.query_element, shape.exact_element
    chosen = {
        "worker": (attend_worker,),
        "read_query": (read_kernel, query, dim),
        "write_output": (write_kernel, query, dim),
        "score_packed_one": (packed_rows_kernel, *keys, 1, lookups),
        "score_packed_many": (packed_rows_kernel, *keys, many, lookups),
        "sum_packed_one": (packed_rows_kernel, *values, 1, lookups),
        "sum_packed_many": (packed_rows_kernel, *values, many, lookups),
        "score_exact_one": (score_kernel, exact, dim, 1),
        "score_exact_many": (score_kernel, exact, dim, many),
        "sum_exact_one": (sum_kernel, exact, dim, 1),
        "sum_exact_many": (sum_kernel, exact, dim, many),
    }
    return {field: jit.kernel(*kernel).address for field, kernel in chosen.items()}


# ---------------------------------------------------------------------------------------------------------
# One call: its argument block and its workspace, kept for the next call of the same shape on this thread


_of_this_thread = threading.local()


def _call_of_this_thread(shape: _Shape, batch: int, num_kv_heads: int, num_threads: int) -> "_Call":
    calls = _of_this_thread.__dict__.setdefault("calls", {})
    key = (shape, batch, num_kv_heads, num_threads)
    call = calls.get(key)
    if call is None:
        if len(calls) >= 32:
            calls.clear()
        call = calls[key] = _Call(shape, batch, num_kv_heads, num_threads)
    return call


class _Call:
    """The argument block of one shape, with everything that stays the same from call to call filled in."""

    def __init__(self, shape: _Shape, batch: int, num_kv_heads: int, num_threads: int):
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_int64)(jit.kernel(attend_entry).address)
        self._shape = shape
        self._arguments = arguments = AttendArguments(
            **_kernels(shape),
            parallel_address=threads.parallel_address(),
            num_threads=num_threads,
            min_parallel_work=MIN_PARALLEL_WORK,
            heads_at_once=shape.heads_at_once,
            batch=batch,
            num_kv_heads=num_kv_heads,
            heads_per_group=shape.heads_per_group,
            head_dim=shape.head_dim,
            row_bytes=4 * padded(shape.head_dim),
            page_tokens=shape.layout.page_tokens,
            tile_tokens=shape.tile_tokens,
            num_sinks=shape.num_sinks,
        )
        self._address = ctypes.addressof(arguments)
        self._lay_out_workspace(shape, batch * num_kv_heads, batch, num_threads)

    def _lay_out_workspace(self, shape: _Shape, num_groups: int, batch: int, num_threads: int) -> None:
        arguments, layout, heads = self._arguments, shape.layout, shape.heads_per_group
        max_items = num_groups + ITEMS_PER_THREAD * num_threads
        rows_and_groups = (
            (shape.head_dim, layout.page_tokens // layout.key_group_size),
            (layout.page_tokens, shape.head_dim // layout.value_group_size),
        )
        # One line more than whole vectors: heads whose scores lay 4 KiB apart would evict each other.
        arguments.scores_bytes = _lines(4 * (shape.num_sinks + shape.tile_tokens + 32)) + _CACHE_LINE
        arguments.factors_bytes = _lines(max(4 * (rows + 1) * groups for rows, groups in rows_and_groups))
        arguments.partial_bytes = _lines(2 * 4 * heads) + heads * arguments.row_bytes
        arguments.scratch_bytes = (
            heads * (arguments.row_bytes + arguments.scores_bytes)
            + shape.heads_at_once * arguments.factors_bytes
        )
        parts = {
            "counters": 8 * NUM_COUNTERS,
            "first_items": 8 * (batch + 1),
            "num_finished": 8 * num_groups,
            "partials": max_items * arguments.partial_bytes,
            "scratch": num_threads * arguments.scratch_bytes,
        }
        self._workspace = torch.empty(
            sum(map(_lines, parts.values())) + _CACHE_LINE, dtype=torch.uint8
        )
        address = _lines(self._workspace.data_ptr())
        for field, size in parts.items():
            setattr(arguments, field, address)
            address += _lines(size)

    def run(self, query, past: PackedPast, exact: ExactTokens, output, log_sum_exp, scaling: float) -> None:
        """Fill in the tensors and enter the kernel. Copies are kept alive until it returns."""
        block = self._arguments
        query = _with_contiguous_rows(query)
        size = query.element_size()
        block.query = query.data_ptr()
        block.query_batch_stride, block.query_head_stride, _ = (size * stride for stride in query.stride())
        block.output, block.log_sum_exp = output.data_ptr(), log_sum_exp.data_ptr()
        block.output_batch_stride, block.output_head_stride, _ = (size * stride for stride in output.stride())
        block.query_factor = scaling / math.log(2)

        table = _with_contiguous_rows(past.page_table.to(torch.int32))
        counts = [each.to(torch.int32).contiguous() for each in (past.num_keys, past.num_values, exact.length)]
        block.page_table, block.page_table_stride = table.data_ptr(), 4 * table.stride(0)
        block.num_keys, block.num_values, block.length = (each.data_ptr() for each in counts)

        key_parts = self._place_packed("key", past.keys)
        value_parts = self._place_packed("value", past.values)
        dtype = exact.keys.dtype
        rings = [self._place_exact("ring_keys", exact.keys, dtype), self._place_exact("ring_values", exact.values, dtype)]
        block.key_ring_slots, block.value_ring_slots = exact.keys.shape[2], exact.values.shape[2]
        if self._shape.num_sinks:
            rings.append(self._place_exact("sink_keys", exact.sink_keys, dtype))
            rings.append(self._place_exact("sink_values", exact.sink_values, dtype))
        self._enter(self._address)
        del key_parts, value_parts, rings, table, counts

    def _place_packed(self, side: str, packed) -> tuple[torch.Tensor, ...]:
        block = self._arguments
        codes = _with_contiguous_rows(packed.codes)
        scale, minimum = _with_contiguous_heads(packed.scale), _with_contiguous_heads(packed.minimum)
        if scale.stride() != minimum.stride():
            scale, minimum = scale.contiguous(), minimum.contiguous()
        page, head, row, _ = codes.stride()
        setattr(block, f"{side}_codes", codes.data_ptr())
        setattr(block, f"{side}_codes_page_stride", 2 * page)
        setattr(block, f"{side}_codes_head_stride", 2 * head)
        setattr(block, f"{side}_codes_row_stride", 2 * row)
        setattr(block, f"{side}_scale", scale.data_ptr())
        setattr(block, f"{side}_minimum", minimum.data_ptr())
        setattr(block, f"{side}_scale_page_stride", 2 * scale.stride(0))
        setattr(block, f"{side}_scale_head_stride", 2 * scale.stride(1))
        return codes, scale, minimum

    def _place_exact(self, name: str, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tokens = _with_contiguous_rows(tokens.to(dtype))
        batch, head, row, _ = tokens.stride()
        size = tokens.element_size()
        setattr(self._arguments, name, tokens.data_ptr())
        setattr(self._arguments, f"{name}_batch_stride", size * batch)
        setattr(self._arguments, f"{name}_head_stride", size * head)
        setattr(self._arguments, f"{name}_row_stride", size * row)
        return tokens


def _lines(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // _CACHE_LINE) * _CACHE_LINE


def _with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _with_contiguous_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Rows without gaps: `[pages, HK, rows, groups]` whose last two axes are one block."""
    is_block = tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1]
    return tensor if is_block else tensor.contiguous()

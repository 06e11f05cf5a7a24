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
from kvlens.kernels.native.attend import ITEMS_PER_THREAD, attend_entry, attend_worker
from kvlens.kernels.native.attend_arguments import AttendArguments, Side
from kvlens.kernels.native.dense_rows import padded, read_rows, score_rows, sum_rows, write_rows
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.packed_rows import MAX_HEADS, accumulate_rows
from kvlens.kernels.native.vectors import BF16, FP16, FP32
from kvlens.kernels.packed_attend import Attended, ExactTokens, PackedPast, PageLayout
from kvlens.kernels.quantize_pack import Packed

jit.require_half_floats()

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
TILE_TOKENS = 512  # scores of a tile stay in the first-level cache
MIN_PARALLEL_WORK = 2**17  # score products below which waking a team costs more than it saves
_MAX_KEPT_CALLS = 32
_CACHE_LINE = 64
_LOG_2 = math.log(2)


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
    def tile_tokens(self) -> int:
        return self.layout.page_tokens * max(1, TILE_TOKENS // self.layout.page_tokens)


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.packed_attend.packed_attend`.

    Raises: ValueError for an element type that the kernels do not read.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    log_sum_exp = torch.empty(query.shape[:2], dtype=torch.float32)
    _call_of_this_thread(query, past, exact).run(query, past, exact, output, log_sum_exp, scaling)
    return Attended(output, log_sum_exp)


def warm_up(
    layout: PageLayout,
    *,
    head_dim: int,
    heads_per_group: int,
    query_dtype: torch.dtype,
    exact_dtype: torch.dtype,
) -> float:
    """Compile what attention over `layout` needs; gives the milliseconds spent.

    Safe on a background thread: a call that needs a kernel meanwhile waits for it.
    """
    known = set(jit.compiled())
    elements = ELEMENTS[query_dtype], ELEMENTS[exact_dtype]
    _kernels(_Shape(layout, head_dim, heads_per_group, 0, *elements, jit.has_lookups()))
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
        codes, codes_stride, scale, minimum, next_codes, next_scale, next_minimum,
        factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride,
    ):  # fmt: skip
        depends_on(source)
        accumulate_rows(
            (codes, codes_stride, scale, minimum, next_codes, next_scale, next_minimum,
             factors, factors_stride, num_rows, sums, sums_stride, scratch, scratch_stride),
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
    def score(rows, rows_stride, count, queries, queries_stride, scores, scores_stride):
        depends_on(source)
        arguments = (rows, rows_stride, count, queries, queries_stride, scores, scores_stride)
        score_rows(arguments, element, head_dim, num_heads)

    return score


def sum_kernel(element, head_dim, num_heads, source):
    def sum_up(rows, rows_stride, count, factors, factors_stride, sums, sums_stride):
        depends_on(source)
        arguments = (rows, rows_stride, count, factors, factors_stride, sums, sums_stride)
        sum_rows(arguments, element, head_dim, num_heads)

    return sum_up


@dataclass(frozen=True)
class _Kernels:
    """The kernel to enter, and addresses by field: of `AttendArguments`, and of its two sides."""

    entry: int
    common: dict[str, int]
    keys: dict[str, int]
    values: dict[str, int]


@lru_cache(maxsize=256)
def _kernels(shape: _Shape) -> _Kernels:
    layout, dim = shape.layout, shape.head_dim
    return _Kernels(
        entry=jit.kernel(attend_entry).address,
        common={
            "worker": jit.kernel(attend_worker).address,
            "read_query": jit.kernel(read_kernel, shape.query_element, dim).address,
            "write_output": jit.kernel(write_kernel, shape.query_element, dim).address,
        },
        keys=_side_kernels(shape, score_kernel, (layout.key_bits, layout.page_tokens, layout.key_group_size)),
        values=_side_kernels(shape, sum_kernel, (layout.value_bits, dim, layout.value_group_size)),
    )


def _side_kernels(shape: _Shape, exact_kernel, rows: tuple[int, int, int]) -> dict[str, int]:
    """Kernels for one, two and four heads, as far as the heads of a group are made up of these."""
    chosen = {}
    for count in (1, 2, 4):
        if count == 4 <= shape.heads_per_group or count & shape.heads_per_group & 3:
            packed = jit.kernel(packed_rows_kernel, *rows, count, int(shape.has_lookups))
            exact = jit.kernel(exact_kernel, shape.exact_element, shape.head_dim, count)
            chosen[f"packed_by_{count}"] = packed.address
            chosen[f"exact_by_{count}"] = exact.address
    return chosen


# ---------------------------------------------------------------------------------------------------------
# One call: its argument block and its workspace, kept for the next call of the same shape on this thread


_of_this_thread = threading.local()


def _call_of_this_thread(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> "_Call":
    """The call kept for inputs of this kind, or a new one."""
    calls = _of_this_thread.__dict__.setdefault("calls", {})
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads, num_sinks = exact.sink_keys.shape[1:3]
    has_lookups, num_threads = jit.has_lookups(), threads.num_threads()
    key = (
        past.layout, query.shape, num_kv_heads, num_sinks, query.dtype, exact.keys.dtype, has_lookups, num_threads
    )  # fmt: skip
    call = calls.get(key)
    if call is None:
        if len(calls) >= _MAX_KEPT_CALLS:
            calls.clear()
        elements = _element(query), _element(exact.keys)
        shape = _Shape(past.layout, head_dim, num_query_heads // num_kv_heads, num_sinks, *elements, has_lookups)
        call = calls[key] = _Call(shape, batch, num_kv_heads, num_threads)
    return call


class _Call:
    """The argument block of one shape, with everything that stays the same from call to call filled in."""

    def __init__(self, shape: _Shape, batch: int, num_kv_heads: int, num_threads: int):
        kernels = _kernels(shape)
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernels.entry)
        self._arguments = arguments = AttendArguments(
            **kernels.common,
            keys=Side(**kernels.keys),
            values=Side(**kernels.values),
            parallel_address=threads.parallel_address(),
            num_threads=num_threads,
            min_parallel_work=MIN_PARALLEL_WORK,
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
        self._lay_out_workspace(shape, batch, num_kv_heads)

    def _lay_out_workspace(self, shape: _Shape, batch: int, num_kv_heads: int) -> None:
        arguments, layout, heads = self._arguments, shape.layout, shape.heads_per_group
        max_items = batch * num_kv_heads + ITEMS_PER_THREAD * arguments.num_threads
        key_factors = (shape.head_dim + 1) * (layout.page_tokens // layout.key_group_size)
        value_factors = (layout.page_tokens + 1) * (shape.head_dim // layout.value_group_size)
        # One line more than whole vectors: heads whose scores lay 4 KiB apart would evict each other.
        arguments.scores_bytes = _lines(4 * (shape.num_sinks + shape.tile_tokens + 32)) + _CACHE_LINE
        arguments.factors_bytes = _lines(4 * max(key_factors, value_factors)) + _CACHE_LINE
        arguments.partial_bytes = _lines(2 * 4 * heads) + heads * arguments.row_bytes
        arguments.scratch_bytes = (
            heads * (arguments.row_bytes + arguments.scores_bytes) + MAX_HEADS * arguments.factors_bytes
        )
        parts = {
            "first_items": 8 * (batch + 1),
            "num_finished": 8 * batch * num_kv_heads,
            "partials": max_items * arguments.partial_bytes,
            "scratch": arguments.num_threads * arguments.scratch_bytes,
        }
        self._workspace = torch.empty(sum(map(_lines, parts.values())) + _CACHE_LINE, dtype=torch.uint8)
        address = _lines(self._workspace.data_ptr())
        for field, size in parts.items():
            setattr(arguments, field, address)
            address += _lines(size)

    def run(self, query, past: PackedPast, exact: ExactTokens, output, log_sum_exp, scaling: float) -> None:
        """Fill in where the tensors lie and enter the kernel."""
        arguments, size = self._arguments, query.element_size()
        query, (batch, head, _) = _with_strides(query)
        arguments.query = query.data_ptr()
        arguments.query_batch_stride, arguments.query_head_stride = size * batch, size * head
        batch, head, _ = output.stride()
        arguments.output, arguments.log_sum_exp = output.data_ptr(), log_sum_exp.data_ptr()
        arguments.output_batch_stride, arguments.output_head_stride = size * batch, size * head
        arguments.query_factor = scaling / _LOG_2

        table, (row, _) = _with_strides(_as(torch.int32, past.page_table))
        length = _as(torch.int32, exact.length).contiguous()
        arguments.page_table, arguments.page_table_stride = table.data_ptr(), 4 * row
        arguments.length = length.data_ptr()
        dtype = exact.keys.dtype
        # Whatever had to be copied must live until the kernel returns.
        copies = (
            _place_packed(arguments.keys, past.keys, past.num_keys),
            _place_packed(arguments.values, past.values, past.num_values),
            _place_exact(arguments.keys, dtype, exact.keys, exact.sink_keys),
            _place_exact(arguments.values, dtype, exact.values, exact.sink_values),
        )
        self._enter(self._address)
        del copies


def _place_packed(side: Side, packed: Packed, num_packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    num_packed = _as(torch.int32, num_packed).contiguous()
    codes, (page, head, row, _) = _with_strides(packed.codes)
    side.codes_page_stride, side.codes_head_stride, side.codes_row_stride = 2 * page, 2 * head, 2 * row
    scale, minimum = packed.scale, packed.minimum
    page, head, row, group = scale.stride()
    if (row, group) != (scale.shape[3], 1) or minimum.stride() != (page, head, row, group):
        scale, minimum = scale.contiguous(), minimum.contiguous()
        page, head, _, _ = scale.stride()
    side.scale_page_stride, side.scale_head_stride = 2 * page, 2 * head
    side.codes, side.scale, side.minimum = codes.data_ptr(), scale.data_ptr(), minimum.data_ptr()
    side.num_packed = num_packed.data_ptr()
    return codes, scale, minimum, num_packed


def _place_exact(side: Side, dtype: torch.dtype, ring: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = dtype.itemsize
    ring, (batch, head, row, _) = _with_strides(_as(dtype, ring))
    side.ring, side.ring_slots = ring.data_ptr(), ring.shape[2]
    side.ring_batch_stride, side.ring_head_stride, side.ring_row_stride = size * batch, size * head, size * row
    sinks, (batch, head, row, _) = _with_strides(_as(dtype, sinks))
    side.sinks = sinks.data_ptr()
    side.sinks_batch_stride, side.sinks_head_stride, side.sinks_row_stride = size * batch, size * head, size * row
    return ring, sinks


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _with_strides(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The tensor, copied if its rows have gaps, and its strides."""
    strides = tensor.stride()
    if strides[-1] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, strides


def _lines(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // _CACHE_LINE) * _CACHE_LINE

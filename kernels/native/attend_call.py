"""A call of native attention: its argument block and its workspace, kept for the next call of the same shape.

Shared by everything that runs the course in `attend`: what concerns the query, the exact tokens and the page
table is filled in here, what concerns packed tokens by the caller.

Limits: rows of rings and sinks must be contiguous; others are copied first.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.attend import ITEMS_PER_THREAD, attend_entry, attend_worker
from kvlens.kernels.native.attend_arguments import AttendArguments, Side
from kvlens.kernels.native.dense_rows import padded, read_rows, score_rows, sum_rows, write_rows
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.vectors import BF16, FP16, FP32

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
TILE_TOKENS = 512  # scores of a tile stay in the first-level cache
MIN_PARALLEL_WORK = 2**17  # score products below which waking a team costs more than it saves
LOG_2 = math.log(2)
CACHE_LINE = 64
_MAX_KEPT_CALLS = 32

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class CallShape:
    """What decides which kernels run over exact tokens, and how large the workspace is."""

    head_dim: int
    heads_per_group: int
    page_tokens: int
    num_sinks: int
    query_element: int
    output_element: int
    exact_element: int
    has_lookups: bool

    @property
    def tile_tokens(self) -> int:
        """Whole pages, some 512 tokens."""
        return self.page_tokens * max(1, TILE_TOKENS // self.page_tokens)


def element_of(tensor: torch.Tensor) -> int:
    """Raises: ValueError for an element type that the kernels do not read."""
    element = ELEMENTS.get(tensor.dtype)
    if element is None:
        raise ValueError(f"query and exact tokens must be fp32, fp16 or bf16; got {tensor.dtype}")
    return element


# ---------------------------------------------------------------------------------------------------------
# The kernels of a shape. Every factory gives a function of int64 parameters; its constants name the kernel.


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
class AttendKernels:
    """The kernel to enter, and addresses by field: of `AttendArguments`, and of its two sides."""

    entry: int
    common: dict[str, int]
    keys: dict[str, int]
    values: dict[str, int]


def heads_together(heads_per_group: int) -> list[int]:
    """One, two and four heads, as far as the heads of a group are made up of these."""
    return [count for count in (1, 2, 4) if count == 4 <= heads_per_group or count & heads_per_group & 3]


@lru_cache(maxsize=256)
def exact_kernels(shape: CallShape) -> AttendKernels:
    """The kernels that any cache needs; its own are added to them."""

    def side(exact_kernel) -> dict[str, int]:
        return {
            f"exact_by_{count}": jit.kernel(exact_kernel, shape.exact_element, shape.head_dim, count).address
            for count in heads_together(shape.heads_per_group)
        }

    return AttendKernels(
        entry=jit.kernel(attend_entry).address,
        common={
            "worker": jit.kernel(attend_worker).address,
            "read_query": jit.kernel(read_kernel, shape.query_element, shape.head_dim).address,
            "write_output": jit.kernel(write_kernel, shape.output_element, shape.head_dim).address,
        },
        keys=side(score_kernel),
        values=side(sum_kernel),
    )


# ---------------------------------------------------------------------------------------------------------
# One call


_of_this_thread = threading.local()


def kept_call(key: Hashable, build: Callable[[], Kept]) -> Kept:
    """What `build` gave for this key on this thread, or what it gives now."""
    calls = _of_this_thread.__dict__.setdefault("calls", {})
    call = calls.get(key)
    if call is None:
        if len(calls) >= _MAX_KEPT_CALLS:
            calls.clear()
        call = calls[key] = build()
    return call


class AttendCall:
    """The argument block of one shape, with everything that stays the same from call to call filled in.

    `own_scratch_bytes` a thread are the kernels' own, `accumulator_bytes` a partial result's.
    """

    def __init__(
        self,
        shape: CallShape,
        kernels: AttendKernels,
        *,
        batch: int,
        num_kv_heads: int,
        num_threads: int,
        own_scratch_bytes: int,
        accumulator_bytes: int = 0,
        **fields: int,
    ):
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernels.entry)
        self.arguments = arguments = AttendArguments(
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
            page_tokens=shape.page_tokens,
            tile_tokens=shape.tile_tokens,
            num_sinks=shape.num_sinks,
            accumulator_bytes=accumulator_bytes,
            **fields,
        )
        self._address = ctypes.addressof(arguments)
        heads = shape.heads_per_group
        max_items = batch * num_kv_heads + ITEMS_PER_THREAD * num_threads
        # One line more than whole vectors: heads whose scores lay 4 KiB apart would evict each other.
        arguments.scores_bytes = lines(4 * (shape.num_sinks + shape.tile_tokens + 32)) + CACHE_LINE
        arguments.partial_bytes = lines(3 * 4 * heads) + heads * arguments.row_bytes + accumulator_bytes
        arguments.scratch_bytes = heads * (arguments.row_bytes + arguments.scores_bytes) + lines(own_scratch_bytes)
        parts = {
            "first_items": 8 * (batch + 1),
            "num_finished": 8 * batch * num_kv_heads,
            "partials": max_items * arguments.partial_bytes,
            "scratch": num_threads * arguments.scratch_bytes,
        }
        self._workspace = torch.empty(sum(map(lines, parts.values())) + CACHE_LINE, dtype=torch.uint8)
        address = lines(self._workspace.data_ptr())
        for field, size in parts.items():
            setattr(arguments, field, address)
            address += lines(size)

    def enter(
        self,
        query: torch.Tensor,
        page_table: torch.Tensor,
        exact: ExactTokens,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scaling: float,
    ) -> None:
        """Fill in where these tensors lie and run the kernel; the packed tokens have been placed before."""
        # Whatever had to be copied must live until the kernel returns.
        copies = self.place(query, page_table, exact, output, log_sum_exp, scaling)
        self._enter(self._address)
        del copies

    def place(
        self,
        query: torch.Tensor,
        page_table: torch.Tensor,
        exact: ExactTokens,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scaling: float,
    ) -> tuple:
        """Fill in where these tensors lie. Gives what must live as long as the addresses are used."""
        arguments = self.arguments
        size = query.element_size()
        query, (batch, head, _) = with_strides(query)
        arguments.query = query.data_ptr()
        arguments.query_batch_stride, arguments.query_head_stride = size * batch, size * head
        size = output.element_size()
        batch, head, _ = output.stride()
        arguments.output, arguments.log_sum_exp = output.data_ptr(), log_sum_exp.data_ptr()
        arguments.output_batch_stride, arguments.output_head_stride = size * batch, size * head
        arguments.query_factor = scaling / LOG_2

        table, (row, _) = with_strides(as_dtype(torch.int32, page_table))
        length = as_dtype(torch.int32, exact.length).contiguous()
        arguments.page_table, arguments.page_table_stride = table.data_ptr(), 4 * row
        arguments.length = length.data_ptr()
        dtype = exact.keys.dtype
        return (
            query, table, length,
            _place_exact(arguments.keys, dtype, exact.keys, exact.sink_keys),
            _place_exact(arguments.values, dtype, exact.values, exact.sink_values),
        )  # fmt: skip


def _place_exact(side: Side, dtype: torch.dtype, ring: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = dtype.itemsize
    ring, (batch, head, row, _) = with_strides(as_dtype(dtype, ring))
    side.ring, side.ring_slots = ring.data_ptr(), ring.shape[2]
    side.ring_batch_stride, side.ring_head_stride, side.ring_row_stride = size * batch, size * head, size * row
    sinks, (batch, head, row, _) = with_strides(as_dtype(dtype, sinks))
    side.sinks = sinks.data_ptr()
    side.sinks_batch_stride, side.sinks_head_stride, side.sinks_row_stride = size * batch, size * head, size * row
    return ring, sinks


def as_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def with_strides(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The tensor, copied if its rows have gaps, and its strides."""
    strides = tensor.stride()
    if strides[-1] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, strides


def lines(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // CACHE_LINE) * CACHE_LINE

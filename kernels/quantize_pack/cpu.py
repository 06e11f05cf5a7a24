"""Quantize-and-pack on the CPU, code for code what the reference gives.

Rows whose values are neighbours are taken one by one; rows that lie across storage (a transposed view, as
keys are handed over) sixteen at a time, without a copy. Large inputs are shared out over torch's threads.
"""

import ctypes
import threading
from functools import lru_cache

import torch

from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.quantize_rows import quantize_columns, quantize_rows
from kvlens.kernels.native.scalars import atomic_add, call, field_access
from kvlens.kernels.native.vectors import BF16, FP16, FP32, NUM_LANES
from kvlens.kernels.quantize_pack import Packed

jit.require_half_floats()

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
MIN_PARALLEL_VALUES = 2**16  # values below which waking a team costs more than it saves
_VALUES_PER_ITEM = 2**14


class QuantizeArguments(ctypes.Structure):
    """Addresses and counts of one call; `*_stride` in bytes. Rows are numbered through `[outer, inner, row]`."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "kernel",
        "values", "outer_stride", "inner_stride", "row_stride", "value_stride",
        "num_inner", "num_rows", "row_values", "rows_per_item", "items_per_block", "num_items",
        "codes", "codes_row_bytes", "scale", "minimum", "scale_row_bytes",
        "scratch", "scratch_bytes", "next_item", "next_thread",
    ))  # fmt: skip


field, field_address = field_access(QuantizeArguments)


def quantize_pack(values: torch.Tensor, *, bits: int, group_size: int) -> Packed:
    """See `kvlens.kernels.quantize_pack.quantize_pack`."""
    *leading, row_values = values.shape
    codes = torch.empty((*leading, row_values * bits // 16), dtype=torch.int16)
    scale = torch.empty((*leading, row_values // group_size), dtype=torch.float16)
    minimum = torch.empty((*leading, row_values // group_size), dtype=torch.float16)
    if values.numel():
        _run(values, codes, scale, minimum, bits, group_size)
    return Packed(codes, scale, minimum)


def warm_up(*, bits: int, group_size: int, dtype: torch.dtype) -> float:
    """Compile what these arguments need; gives the milliseconds spent. Safe on a background thread."""
    known = set(jit.compiled())
    for is_across in (False, True):
        _kernels(bits, group_size, ELEMENTS[dtype], is_across)
    return sum(kernel.compile_ms for kernel in jit.compiled() if kernel not in known)


# ---------------------------------------------------------------------------------------------------------
# Kernels: one worker that draws items, and one inner loop a format


def rows_kernel(bits, group_size, element, source):
    def quantize(values, row_stride, value_stride, num_rows, row_values, codes, scale, minimum, scratch):
        depends_on(source)
        quantize_rows(
            (values, row_stride, num_rows, row_values, codes, scale, minimum, scratch),
            bits, group_size, element,
        )  # fmt: skip

    return quantize


def columns_kernel(bits, group_size, element, source):
    def quantize(values, row_stride, value_stride, num_rows, row_values, codes, scale, minimum, scratch):
        depends_on(source)
        for row in range(0, num_rows, 16):
            group_offset = row * (row_values // group_size) * 2
            quantize_columns(
                (values + row * row_stride, value_stride, row_values, codes + row * (row_values * bits // 8),
                 scale + group_offset, minimum + group_offset, scratch),
                bits, group_size, element,
            )  # fmt: skip

    return quantize


def quantize_worker(source):
    """The kernel that every thread runs: draw items, which are runs of rows of one block, until none is left."""

    def worker(arguments):
        depends_on(source)
        thread = atomic_add(field_address(arguments, "next_thread"), 1)
        scratch = field(arguments, "scratch") + thread * field(arguments, "scratch_bytes")
        num_rows, rows_per_item = field(arguments, "num_rows"), field(arguments, "rows_per_item")
        items_per_block, num_inner = field(arguments, "items_per_block"), field(arguments, "num_inner")
        row_stride, value_stride = field(arguments, "row_stride"), field(arguments, "value_stride")
        item = atomic_add(field_address(arguments, "next_item"), 1)
        while item < field(arguments, "num_items"):
            block, first = item // items_per_block, item % items_per_block * rows_per_item
            row = block * num_rows + first
            call(field(arguments, "kernel"), (
                field(arguments, "values") + block // num_inner * field(arguments, "outer_stride")
                + block % num_inner * field(arguments, "inner_stride") + first * row_stride,
                row_stride, value_stride, min(rows_per_item, num_rows - first), field(arguments, "row_values"),
                field(arguments, "codes") + row * field(arguments, "codes_row_bytes"),
                field(arguments, "scale") + row * field(arguments, "scale_row_bytes"),
                field(arguments, "minimum") + row * field(arguments, "scale_row_bytes"),
                scratch,
            ))  # fmt: skip
            item = atomic_add(field_address(arguments, "next_item"), 1)

    return worker


def row_kernel(bits: int, group_size: int, dtype: torch.dtype) -> int:
    """The address of the inner loop over rows whose values are neighbours (see `rows_kernel`)."""
    return jit.kernel(rows_kernel, bits, group_size, ELEMENTS[dtype]).address


@lru_cache(maxsize=256)
def _kernels(bits: int, group_size: int, element: int, is_across: bool) -> tuple[int, int]:
    """Addresses of the worker and of the inner loop."""
    factory = columns_kernel if is_across else rows_kernel
    return jit.kernel(quantize_worker).address, jit.kernel(factory, bits, group_size, element).address


# ---------------------------------------------------------------------------------------------------------


_of_this_thread = threading.local()


def _run(values, codes, scale, minimum, bits: int, group_size: int) -> None:
    """Fill in the argument block of this thread and run the worker."""
    if values.dtype not in ELEMENTS:
        values = values.float()
    is_across = values.ndim > 1 and values.stride(-1) != 1 and _is_across(values)
    if not is_across and (values.stride(-1) != 1 or values.ndim > 4):
        values = values.contiguous()
    if values.is_contiguous():
        values = values.view(-1, values.shape[-1])
    blocks = values.view((1,) * (4 - values.ndim) + values.shape)

    outer, inner, num_rows, row_values = blocks.shape
    size = values.element_size()
    worker, kernel = _kernels(bits, group_size, ELEMENTS[values.dtype], is_across)
    rows_per_item = NUM_LANES if is_across else max(1, _VALUES_PER_ITEM // row_values)
    items_per_block = -(-num_rows // rows_per_item)
    num_items = outer * inner * items_per_block
    num_threads = min(threads.num_threads(), num_items) if values.numel() >= MIN_PARALLEL_VALUES else 1
    scratch_bytes = 4 * row_values * (NUM_LANES if is_across else 1) + 64

    scratch = _scratch(num_threads * scratch_bytes)
    block = QuantizeArguments(
        kernel=kernel,
        values=blocks.data_ptr(),
        outer_stride=size * blocks.stride(0),
        inner_stride=size * blocks.stride(1),
        row_stride=size * blocks.stride(2),
        value_stride=size * blocks.stride(3),
        num_inner=inner,
        num_rows=num_rows,
        row_values=row_values,
        rows_per_item=rows_per_item,
        items_per_block=items_per_block,
        num_items=num_items,
        codes=codes.data_ptr(),
        codes_row_bytes=2 * codes.shape[-1],
        scale=scale.data_ptr(),
        minimum=minimum.data_ptr(),
        scale_row_bytes=2 * scale.shape[-1],
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    threads.run(worker, ctypes.addressof(block), num_threads)


def _is_across(values: torch.Tensor) -> bool:
    """Whether sixteen rows at a time are neighbours in storage, value by value."""
    return values.ndim <= 4 and values.stride(-2) == 1 and values.shape[-2] % NUM_LANES == 0


def _scratch(num_bytes: int) -> torch.Tensor:
    """Memory of this thread, kept from call to call and grown when needed."""
    held = getattr(_of_this_thread, "scratch", None)
    if held is None or held.numel() < num_bytes:
        held = _of_this_thread.scratch = torch.empty(num_bytes, dtype=torch.uint8)
    return held

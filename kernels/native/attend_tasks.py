"""A cache's step as tasks of a native program: append a token, attend to everything, pack what is due.

The first task is short and runs alone: it writes the fresh keys and values into the rings and shares out the
attention. The last one quantizes values that have left the exact window, row by row, beside whatever comes next.
"""

import ctypes

import torch
from numba import int32, int64, njit

from kvlens.kernels.native import jit
from kvlens.kernels.native.attend import _attend_item, _plan
from kvlens.kernels.native.attend_arguments import AttendArguments, field, field_address, side
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.program import Task
from kvlens.kernels.native.project_rows import narrow
from kvlens.kernels.native.scalars import call, field_access, read_int32, read_int64, write_int32


class StepArguments(ctypes.Structure):
    """A fresh token of every sequence: fp32 rows at `keys` and `values`, strides in bytes.

    `due_values` is the address of int32 `[B]`: how many values are packed once the step is over, by the kernel
    `quantize` (0 where nothing is ever packed).
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "attend", "keys", "values", "batch_stride", "head_stride", "due_values", "quantize", "scale_row_bytes",
        "scratch",
    ))  # fmt: skip


step, _ = field_access(StepArguments)


def append_kernel(element, source):
    def append(arguments, item, thread):
        depends_on(source)
        attend = step(arguments, "attend")
        dim = field(attend, "head_dim")
        for row in range(field(attend, "batch")):
            length = int64(read_int32(field(attend, "length") + 4 * row))
            for head in range(field(attend, "num_kv_heads")):
                place = row * step(arguments, "batch_stride") + head * step(arguments, "head_stride")
                key = _slot(field_address(attend, "keys"), row, head, length)
                value = _slot(field_address(attend, "values"), row, head, length)
                narrow(step(arguments, "keys") + place, dim, key, element)
                narrow(step(arguments, "values") + place, dim, value, element)
            write_int32(field(attend, "length") + 4 * row, int32(length + 1))
        _plan(attend)

    return append


def attend_kernel(source):
    def attend(arguments, item, thread):
        depends_on(source)
        row = 0
        while item >= read_int64(field(arguments, "first_items") + 8 * (row + 1)):
            row += 1
        scratch = field(arguments, "scratch") + thread * field(arguments, "scratch_bytes")
        _attend_item(arguments, scratch, item, row)

    return attend


def pack_values_kernel(source):
    def pack_values(arguments, item, thread):
        depends_on(source)
        attend = step(arguments, "attend")
        values, dim = field_address(attend, "values"), field(attend, "head_dim")
        page_tokens, num_sinks = field(attend, "page_tokens"), field(attend, "num_sinks")
        for row in range(field(attend, "batch")):
            counter = side(values, "num_packed") + 4 * row
            due = int64(read_int32(step(arguments, "due_values") + 4 * row))
            for token in range(int64(read_int32(counter)), due):
                table = field(attend, "page_table") + row * field(attend, "page_table_stride")
                page, slot = int64(read_int32(table + 4 * (token // page_tokens))), token % page_tokens
                for head in range(field(attend, "num_kv_heads")):
                    exact = _slot(values, row, head, token + num_sinks)
                    codes = page * side(values, "codes_page_stride") + head * side(values, "codes_head_stride")
                    codes += slot * side(values, "codes_row_stride")
                    scale = page * side(values, "scale_page_stride") + head * side(values, "scale_head_stride")
                    scale += slot * step(arguments, "scale_row_bytes")
                    call(step(arguments, "quantize"), (
                        exact, int64(0), int64(0), int64(1), dim, side(values, "codes") + codes,
                        side(values, "scale") + scale, side(values, "minimum") + scale, step(arguments, "scratch"),
                    ))  # fmt: skip
            write_int32(counter, max(int32(due), read_int32(counter)))

    return pack_values


@njit(error_model="numpy")
def _slot(here, row, head, token):
    """The address of an exact token in the ring of a side."""
    place = row * side(here, "ring_batch_stride") + head * side(here, "ring_head_stride")
    return side(here, "ring") + place + token % side(here, "ring_slots") * side(here, "ring_row_stride")


def step_arguments(keys: torch.Tensor, values: torch.Tensor) -> StepArguments:
    """Where fresh tokens lie. Shapes: fp32 `[B, HK, D]`, of the same strides and with contiguous rows."""
    batch_stride, head_stride, _ = keys.stride()
    return StepArguments(
        keys=keys.data_ptr(), values=values.data_ptr(), batch_stride=4 * batch_stride, head_stride=4 * head_stride
    )


def step_tasks(attend: AttendArguments, arguments: StepArguments, *, element: int, kept) -> list[Task]:
    """`attend` and `arguments` are filled in; `element` is that of the rings. `kept` must live as long."""
    arguments.attend = ctypes.addressof(attend)
    num_items = ctypes.c_int64.from_address(attend.first_items + 8 * attend.batch)
    tasks = [
        Task(jit.kernel(append_kernel, element).address, arguments, kept=(attend, kept)),
        Task(jit.kernel(attend_kernel).address, attend, num_items, kept=kept),
    ]
    if arguments.due_values:
        tasks.append(Task(jit.kernel(pack_values_kernel).address, arguments, is_aside=True, kept=kept))
    return tasks

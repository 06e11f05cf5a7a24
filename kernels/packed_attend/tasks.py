"""A step over a packed cache as tasks of a native program, with every address filled in once.

Only where the native kernels run; the addresses hold as long as none of the tensors is replaced.
"""

from typing import TYPE_CHECKING

import torch

from kvlens.kernels.packed_attend import ExactTokens, PackedPast

if TYPE_CHECKING:
    from kvlens.kernels.native.program import Task


def step_tasks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    past: PackedPast,
    exact: ExactTokens,
    *,
    scaling: float,
    due_values: torch.Tensor | None = None,
) -> "list[Task]":
    """Append a token to every sequence, attend to all, then pack values until `due_values` are packed.

    Shapes: query and output `[B, HQ, D]`, keys and values `[B, HK, D]`, all fp32 with contiguous rows; due_values
    int32 `[B]`, None where values are never packed. `exact.length` and `past.num_values` are brought up to date.
    """
    from kvlens.kernels.native.attend_arguments import AttendArguments
    from kvlens.kernels.native.attend_call import element_of
    from kvlens.kernels.native.attend_tasks import step_arguments
    from kvlens.kernels.native.attend_tasks import step_tasks as native_tasks
    from kvlens.kernels.packed_attend import cpu
    from kvlens.kernels.quantize_pack.cpu import row_kernel

    log_sum_exp = torch.empty(query.shape[:2])
    call = cpu._call(query, past, exact)
    cpu._place_packed(call.arguments.keys, past.keys, past.num_keys)
    cpu._place_packed(call.arguments.values, past.values, past.num_values)
    copies = call.place(query, past.page_table, exact, output, log_sum_exp, scaling)
    attend = AttendArguments.from_buffer_copy(call.arguments)
    scratch = torch.empty(keys.shape[-1] + 16)
    arguments = step_arguments(keys, values)
    if due_values is not None:
        arguments.scratch = scratch.data_ptr()
        arguments.due_values = due_values.data_ptr()
        arguments.scale_row_bytes = 2 * past.values.scale.shape[-1]
        arguments.quantize = row_kernel(past.layout.value_bits, past.layout.value_group_size, exact.values.dtype)
    kept = (call, query, keys, values, output, past, exact, due_values, log_sum_exp, scratch, copies)
    return native_tasks(attend, arguments, element=element_of(exact.keys), kept=kept)

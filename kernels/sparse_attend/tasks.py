"""A step over a cache of sparse codes as tasks of a native program, with every address filled in once.

Only where the native kernels run; the addresses hold as long as none of the tensors is replaced.
"""

from typing import TYPE_CHECKING

import torch

from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.sparse_attend import SparsePast

if TYPE_CHECKING:
    from kvlens.kernels.native.program import Task

CHANNELS = 16
"""Parts of a value must be whole vectors of so many channels to be restored by a task."""


def step_tasks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    past: SparsePast,
    exact: ExactTokens,
    *,
    scaling: float,
) -> "list[Task]":
    """Append a token to every sequence and attend to all. Packing what is due then is the caller's.

    Shapes: query and output `[B, HQ, D]`, keys and values `[B, HK, D]`, all fp32 with contiguous rows.
    `exact.length` is brought up to date.
    """
    from kvlens.kernels.native.attend_arguments import AttendArguments
    from kvlens.kernels.native.attend_call import element_of
    from kvlens.kernels.native.attend_tasks import step_arguments
    from kvlens.kernels.native.attend_tasks import step_tasks as native_tasks
    from kvlens.kernels.native.coded_tasks import CodedArguments, with_products
    from kvlens.kernels.sparse_attend import cpu

    log_sum_exp = torch.empty(query.shape[:2])
    call = cpu._kept(query, past, exact)
    copies = (
        cpu._place_past(call.attend.arguments, past, exact, query.dtype),
        call.attend.place(query, past.page_table, exact, output, log_sum_exp, scaling),
    )
    attend = AttendArguments.from_buffer_copy(call.attend.arguments)
    kept = (call, query, keys, values, output, past, exact, log_sum_exp, copies)
    tasks = native_tasks(attend, step_arguments(keys, values), element=element_of(exact.keys), kept=kept)
    coded = CodedArguments(
        num_heads=query.shape[1],
        value_dictionary=past.values.dictionary.data_ptr(),
        num_value_atoms=len(past.values.dictionary),
        value_means=0 if past.values.means is None else past.values.means.data_ptr(),
    )
    if past.turn is None:
        coded.key_dictionary, coded.num_key_atoms = past.keys.dictionary.data_ptr(), len(past.keys.dictionary)
    return with_products(tasks, attend, coded, value_parts=past.layout.value_parts, kept=kept)

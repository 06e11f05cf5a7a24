"""What a step over sparse codes has to do beside attention, as tasks: both products with dictionaries, a head an item.

Before attention, for keys coded after RoPE: table = query · key dictionary^T. After it: output += accumulators · value
dictionary, and the probability of all coded tokens · the head's mean.
"""

import ctypes

from numba import float32

from kvlens.kernels.native import jit
from kvlens.kernels.native.attend_arguments import AttendArguments, field, field_address
from kvlens.kernels.native.dense_rows import scale_floats, sum_rows
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.program import Task
from kvlens.kernels.native.project_rows import multiply_rows
from kvlens.kernels.native.scalars import field_access, read_float
from kvlens.kernels.native.vectors import FP32


class CodedArguments(ctypes.Structure):
    """Dictionaries fp32 `[N, W]` and the means of values fp32 `[HK, D]`; 0 is no address."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "attend", "num_heads", "key_dictionary", "num_key_atoms", "value_dictionary", "num_value_atoms", "value_means",
    ))  # fmt: skip


coded, _ = field_access(CodedArguments)


def table_kernel(source):
    def look_up(arguments, item, thread):
        depends_on(source)
        attend = coded(arguments, "attend")
        row, head = item // coded(arguments, "num_heads"), item % coded(arguments, "num_heads")
        query = field(attend, "query") + row * field(attend, "query_batch_stride")
        query += head * field(attend, "query_head_stride")
        table, dim, count = (
            field(attend, "tables") + item * field(attend, "table_row_bytes"),
            field(attend, "head_dim"),
            coded(arguments, "num_key_atoms"),
        )
        multiply_rows(coded(arguments, "key_dictionary"), 4 * dim, count, dim, query, 0, table, 0, FP32, 1)
        scale_floats(table, count, float32(read_float(field_address(attend, "query_factor"))))

    return look_up


def restore_kernel(head_dim, parts, source):
    width = head_dim // parts

    def restore(arguments, item, thread):
        depends_on(source)
        attend, num_atoms = coded(arguments, "attend"), coded(arguments, "num_value_atoms")
        row, head = item // coded(arguments, "num_heads"), item % coded(arguments, "num_heads")
        output = field(attend, "output") + row * field(attend, "output_batch_stride")
        output += head * field(attend, "output_head_stride")
        sums = field(attend, "accumulators") + item * field(attend, "accumulator_row_bytes")
        for part in range(parts):
            factors = sums + part * (field(attend, "accumulator_row_bytes") // parts)
            target = output + 4 * width * part
            sum_rows(
                (coded(arguments, "value_dictionary"), 4 * width, num_atoms, factors, 0, target, 0), FP32, width, 1
            )
        if coded(arguments, "value_means") != 0:
            mean = coded(arguments, "value_means") + head // field(attend, "heads_per_group") * 4 * head_dim
            sum_rows((mean, 0, 1, sums + 4 * num_atoms, 0, output, 0), FP32, head_dim, 1)

    return restore


def with_products(
    tasks: list[Task], attend: AttendArguments, arguments: CodedArguments, *, value_parts: int, kept
) -> list[Task]:
    """`tasks` (append, attend) with the products around attention."""
    arguments.attend = ctypes.addressof(attend)
    num_items = attend.batch * arguments.num_heads
    append, attention = tasks
    before = []
    if arguments.key_dictionary:
        before = [Task(jit.kernel(table_kernel).address, arguments, num_items, kept=kept)]
    restore = jit.kernel(restore_kernel, attend.head_dim, value_parts).address
    return [append, *before, attention, Task(restore, arguments, num_items, kept=kept)]

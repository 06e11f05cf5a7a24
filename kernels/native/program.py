"""A list of loops that a team of threads goes through together, without Python in between.

A task is a kernel `(arguments, item, thread)` and a number of items. Threads draw items from the task's counter
and go on to the next one; a task that `waits` begins when everything before it is done. A thread that
comes late finds its items done by the others, so nothing depends on how many threads really run.

This module does not know what a task computes.
"""

import ctypes
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.scalars import atomic_add, call, enter_team, field_access, write_int64

SPINS_BEFORE_YIELDING = 4000
"""Some microseconds: longer than a task's last item takes, shorter than a slice of the scheduler."""

_CACHE_LINE = 64


class TaskArguments(ctypes.Structure):
    """One task. Its two counters lie on lines of their own: every thread writes to them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kernel", "arguments", "num_items", "first_awaited", *"abcd")),
        *((name, ctypes.c_int64) for name in ("next_item", *"efghijk")),
        *((name, ctypes.c_int64) for name in ("num_finished", *"lmnopqr")),
    )


class ProgramArguments(ctypes.Structure):
    """All tasks. `num_items` of a task is the address of the number, which an earlier task may set."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "tasks", "num_tasks", "next_thread", "num_threads", "parallel_address", "worker", "yield_address",
    ))  # fmt: skip


field, field_address = field_access(ProgramArguments)
task_field, task_field_address = field_access(TaskArguments)
_TASK_BYTES = ctypes.sizeof(TaskArguments)


@dataclass(frozen=True)
class Task:
    """`kernel(arguments, item, thread)` for every item.

    `arguments` is a ctypes structure and `kernel` an address. `num_items` is a number, or the ctypes number that
    an earlier task sets. What `is_aside` is not for the next task, which begins with it instead of after it. `kept` is
    what must live as long as the task.
    """

    kernel: int
    arguments: ctypes.Structure
    num_items: int | ctypes.c_int64 = 1
    waits: bool = True
    is_aside: bool = False
    kept: Any = None


@intrinsic
def _acquired_int64(typing, address):
    """Reads an int64 that another thread may have written, and what it wrote before."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typing):
    """Tells the processor that a thread is waiting, where it has a word for that."""

    def codegen(context, builder, signature, values):
        if platform.machine().lower() in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def program_entry(source):
    """The kernel that a caller enters: reset the counters, then run the worker on one thread or on the team."""

    def entry(program):
        depends_on(source)
        for index in range(field(program, "num_tasks")):
            task = field(program, "tasks") + index * _TASK_BYTES
            write_int64(task_field_address(task, "next_item"), 0)
            write_int64(task_field_address(task, "num_finished"), 0)
        write_int64(field_address(program, "next_thread"), 0)
        if field(program, "num_threads") > 1:
            enter_team(
                field(program, "parallel_address"), field(program, "worker"), program, field(program, "num_threads")
            )
        else:
            call(field(program, "worker"), (program,))

    return entry


def program_worker(source):
    """The kernel that every thread runs: every task in turn, drawing items until none is left."""

    def worker(program):
        depends_on(source)
        thread = atomic_add(field_address(program, "next_thread"), 1)
        tasks = field(program, "tasks")
        for index in range(field(program, "num_tasks")):
            task = tasks + index * _TASK_BYTES
            first = task_field(task, "first_awaited")
            awaited = tasks + first * _TASK_BYTES
            while first >= 0 and awaited < task:
                wanted = _acquired_int64(task_field(awaited, "num_items"))
                spins = 0
                while _acquired_int64(task_field_address(awaited, "num_finished")) < wanted:
                    spins += 1
                    if spins % SPINS_BEFORE_YIELDING == 0:
                        call(field(program, "yield_address"), ())
                    _pause()
                awaited += _TASK_BYTES
            num_items = _acquired_int64(task_field(task, "num_items"))
            kernel, arguments = task_field(task, "kernel"), task_field(task, "arguments")
            item = atomic_add(task_field_address(task, "next_item"), 1)
            while item < num_items:
                call(kernel, (arguments, item, thread))
                atomic_add(task_field_address(task, "num_finished"), 1)
                item = atomic_add(task_field_address(task, "next_item"), 1)

    return worker


class Program:
    """Tasks laid out for the kernel. `run` takes as long as they all take."""

    def __init__(self, tasks: Sequence[Task], num_threads: int | None = None) -> None:
        self._kept = list(tasks)
        block = (ctypes.c_char * (_TASK_BYTES * len(tasks) + _CACHE_LINE))()
        start = -(-ctypes.addressof(block) // _CACHE_LINE) * _CACHE_LINE
        first, is_beside = -1, True
        for index, task in enumerate(tasks):
            place = TaskArguments.from_address(start + index * _TASK_BYTES)
            counter = ctypes.c_int64(task.num_items) if isinstance(task.num_items, int) else task.num_items
            place.kernel, place.arguments = task.kernel, ctypes.addressof(task.arguments)
            place.num_items = ctypes.addressof(counter)
            place.first_awaited = -1
            if task.waits and not is_beside:
                place.first_awaited, first = max(first, 0), index
            is_beside = task.is_aside
            self._kept.append(counter)
        self._arguments = ProgramArguments(
            tasks=start,
            num_tasks=len(tasks),
            num_threads=num_threads or threads.num_threads(),
            parallel_address=threads.parallel_address(),
            worker=jit.kernel(program_worker).address,
            yield_address=_yield_address(),
        )
        self._kept.append(block)
        self._address = ctypes.addressof(self._arguments)
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_int64)(jit.kernel(program_entry).address)

    def run(self) -> None:
        self._enter(self._address)


@cache
def _yield_address() -> int:
    """The address of `sched_yield`, or of a function that does nothing."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
    except (OSError, AttributeError, TypeError):  # no such function in the C library of this system
        return jit.kernel(nothing).address


def nothing(source):
    def do_nothing():
        depends_on(source)

    return do_nothing

"""Work shared by processes of one thread each: on a CPU the fastest way to ask a small model many questions."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

Task, Result = TypeVar("Task"), TypeVar("Result")


def dealt(work: Callable[[Sequence[Task]], Result], tasks: Sequence[Task], processes: int) -> list[Result]:
    """What `work` makes of each process's part of the tasks: they are dealt out in turn, like cards."""
    parts = [tasks[first::processes] for first in range(processes)]
    # A fork would inherit the parent's threads; the processes start anew and load a model of their own.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, parts))

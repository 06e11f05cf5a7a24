"""How fast this machine reads memory: the ceiling of every decode step that is bound by bytes.

python -m benchmarks.bandwidth
"""

import statistics
import time
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks import report

GIBIBYTES, ROUNDS = 1, 7


@dataclass(frozen=True)
class Row:
    """Units: gigabytes (1e9 bytes) a second, read once and summed by all threads."""

    gigabytes_per_second: float
    num_threads: int


@cache
def read_gigabytes_per_second() -> float:
    """The best of several sums over more than the last-level cache is likely to keep; measured once a process."""
    numbers = torch.ones(GIBIBYTES * 2**28)
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / statistics.median(sorted(seconds)[: ROUNDS // 2 + 1]) / 1e9


def main() -> None:
    rows = [Row(read_gigabytes_per_second(), torch.get_num_threads())]
    report.show(rows)
    report.save("bandwidth_cpu", rows)


if __name__ == "__main__":
    main()

"""Milliseconds of one step on a GPU: launches in one CUDA graph, methods in turns, the median."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvlens.engine.graph import CudaCapture
from kvlens.engine.measure import Stopwatch, last_cache_bytes

Step = Callable[[], object]

MOST_LAUNCHES = 512
GRAPH_SECONDS = 2e-3
"""A graph lasts at least about this long, so that launching it is less than a percent."""

_EXPECTED_BYTES_PER_SECOND = 4e12
_WARM_UPS = 3
_MIN_ROUNDS = 5


def copies_beyond_cache(layer_bytes: int, device: torch.device) -> int:
    """How many layers together are four times the last cache, so that none is found there again."""
    if device.type == "cpu":
        return 2  # a dry run
    return max(1, min(MOST_LAUNCHES, -(-4 * last_cache_bytes(device) // layer_bytes)))


def timed(steps: Sequence[Step], layer_bytes: int, device: torch.device, *, in_graph: bool = True) -> Step:
    """What walks once through `steps` (a layer each) and gives the milliseconds of one.

    `in_graph` False launches them one by one, for code that no graph can hold. Raises: what a step raises.
    """
    for step in [*[steps[0]] * _WARM_UPS, *steps]:  # where a layer lies may ask for a kernel of its own
        step()
    long_enough = int(GRAPH_SECONDS * _EXPECTED_BYTES_PER_SECOND / layer_bytes) if device.type == "cuda" else 0
    num_launches = max(len(steps), min(MOST_LAUNCHES, long_enough))
    launches = [steps[number % len(steps)] for number in range(num_launches)]

    def walk() -> None:
        for step in launches:
            step()

    if in_graph and device.type == "cuda":
        walk, _ = CudaCapture(device)(walk)
    walk()

    def measured() -> float:
        watch = Stopwatch()
        with watch.measure(device):
            walk()
        return watch.milliseconds / num_launches

    return measured


def in_turns(walks: dict[str, Step], seconds: float) -> dict[str, float]:
    """Median of each; one walk each in every round, so that a change of clocks hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in walks}
    until, num_rounds = time.perf_counter() + seconds, 0
    while num_rounds < _MIN_ROUNDS or time.perf_counter() < until:
        for name, walk in walks.items():
            times[name].append(walk())
        num_rounds += 1
    return {name: statistics.median(found) for name, found in times.items()}


def copy_gigabytes_per_second(device: torch.device) -> float:
    """Bytes read and written by copying a tensor far larger than any cache."""
    size = 2**31 if device.type == "cuda" else 2**22
    source = torch.zeros(size, dtype=torch.int8, device=device)
    walk = timed([partial(torch.empty_like(source).copy_, source)], size, device)
    return 2 * size / in_turns({"copy": walk}, 0.1)["copy"] / 1e6

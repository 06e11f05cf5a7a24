"""Measures the dense paths on this machine, once for each shape."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from kvlens.kernels.dense_attend.cpu import as_packed
from kvlens.kernels.dense_attend.paths import PATHS

_ROUNDS = 5
"""Timed rounds; each runs every path once, so that a busy moment hits all alike."""


@dataclass(frozen=True)
class Problem:
    """A shape to measure: `num_tokens` tokens in the cache, one query token."""

    batch_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    dtype: torch.dtype
    device: str


@cache
def fastest(problem: Problem) -> str:
    """The name of the path with the least median time on random tensors of this shape."""
    query, keys, values, length = _tensors(problem)

    def run(path) -> Callable[[], object]:
        return lambda: path(
            query, keys, values, length, scaling=1.0, longest=problem.num_tokens, is_ragged=False
        )  # fmt: skip

    return _least({name: run(path) for name, path in PATHS.items()}, problem.device)


@cache
def is_fastest_in_a_program(problem: Problem) -> bool:
    """Whether our own kernel, as tasks of a native program, beats the fastest path called from Python."""
    from kvlens.kernels.native.program import Program
    from kvlens.kernels.packed_attend.tasks import step_tasks

    query, keys, values, length = _tensors(problem)
    fresh, output = keys[:, :, 0].float(), torch.empty_like(query)
    program = Program(step_tasks(query, fresh, fresh, output, *as_packed(keys, values, length), scaling=1.0))

    def run_program() -> None:
        length.fill_(problem.num_tokens - 1)  # every run appends a token
        program.run()

    path = PATHS[fastest(problem)]

    def call_path() -> None:
        path(query, keys, values, length, scaling=1.0, longest=problem.num_tokens, is_ragged=False)

    return _least({"program": run_program, "path": call_path}, problem.device) == "program"


def _tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random query, full buffers and their lengths."""
    shape = (problem.batch_size, problem.num_kv_heads, problem.num_tokens, problem.head_dim)
    options = {"device": problem.device, "dtype": problem.dtype}
    keys, values = torch.randn(shape, **options), torch.randn(shape, **options)
    # A model on a CPU computes in fp32; elsewhere in the dtype of its cache.
    query_dtype = torch.float32 if torch.device(problem.device).type == "cpu" else problem.dtype
    query = torch.randn(problem.batch_size, problem.num_query_heads, problem.head_dim, device=problem.device)
    length = torch.full((problem.batch_size,), problem.num_tokens, dtype=torch.int32, device=problem.device)
    return query.to(query_dtype), keys, values, length


def _least(candidates: dict[str, Callable[[], object]], device: str) -> str:
    """The name of the candidate with the least median time."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for measured in [False] + [True] * _ROUNDS:
        for name, run in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if measured:
                times[name].append(time.perf_counter() - start)
    return min(times, key=lambda name: sorted(times[name])[_ROUNDS // 2])


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

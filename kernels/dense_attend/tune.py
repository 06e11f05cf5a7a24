"""Measures the dense paths on this machine, once for each shape."""

import time
from dataclasses import dataclass
from functools import cache

import torch

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
    shape = (problem.batch_size, problem.num_kv_heads, problem.num_tokens, problem.head_dim)
    options = {"device": problem.device, "dtype": problem.dtype}
    keys, values = torch.randn(shape, **options), torch.randn(shape, **options)
    # A model on a CPU computes in fp32; elsewhere in the dtype of its cache.
    query_dtype = torch.float32 if torch.device(problem.device).type == "cpu" else problem.dtype
    query = torch.randn(problem.batch_size, problem.num_query_heads, problem.head_dim, device=problem.device).to(
        query_dtype
    )
    length = torch.full((problem.batch_size,), problem.num_tokens, dtype=torch.int32, device=problem.device)
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    for measured in [False] + [True] * _ROUNDS:
        for name, path in PATHS.items():
            _synchronize(problem.device)
            start = time.perf_counter()
            path(query, keys, values, length, scaling=1.0, longest=problem.num_tokens, is_ragged=False)
            _synchronize(problem.device)
            if measured:
                times[name].append(time.perf_counter() - start)
    return min(times, key=lambda name: sorted(times[name])[_ROUNDS // 2])


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

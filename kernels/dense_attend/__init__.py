"""Decode attention over exact buffers: one query token a sequence, the fastest dense path there is.

Which path is fastest depends on the processor, the dtype and the length (on one CPU torch's fused
attention wins for 32 heads and loses threefold for 8), so the candidates are measured once for each
shape and the winner is kept: an honest rival is the best one.
"""

import torch

from kvlens.kernels import dispatch
from kvlens.kernels.append_pack import FlushRule, append_pack
from kvlens.kernels.dense_attend import paths
from kvlens.kernels.dense_attend.tune import Problem, fastest, is_fastest_in_a_program
from kvlens.kernels.exact_tokens import ExactTokens

_LENGTHS = (512, 2048, 8192, 32768)
"""Lengths at which the candidates are measured; a problem takes the first that is long enough."""

_NEVER = FlushRule(num_sinks=0, key_window=0, key_flush=1, value_window=0, value_flush=1)
"""Of exact buffers nothing is ever packed; the rule is not asked."""

_chosen: dict[str, str] = {}


def dense_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    scaling: float,
    longest: int,
    is_ragged: bool = False,
) -> torch.Tensor:
    """softmax(scaling * q·K^T) V over the first `length` tokens of each sequence.

    Shapes: query `[B, HQ, D]`, keys and values `[B, HK, capacity, D]`, length int32 `[B]` on the device,
    output `[B, HQ, D]` in the query's dtype. `longest` is the greatest length and `is_ragged` whether they
    differ, both known on the host.
    Raises: ValueError for heads that do not group.
    """
    if query.shape[1] % keys.shape[1] != 0:
        raise ValueError(f"query heads must be a multiple of {keys.shape[1]}; got {query.shape[1]}")
    name = fastest(_problem(keys, query.shape[1], longest))
    _chosen[str(query.device)] = name
    return paths.PATHS[name](query, keys, values, length, scaling=scaling, longest=longest, is_ragged=is_ragged)


def takes_tasks(keys: torch.Tensor, *, num_query_heads: int, longest: int) -> bool:
    """Whether our own kernel as tasks of a program is the fastest here; then `step_tasks` stand in for `dense_attend`.

    Asked only where native kernels run. The answer is kept by `chosen_path`.
    """
    problem = _problem(keys, num_query_heads, longest)
    is_best = is_fastest_in_a_program(problem)
    if is_best:
        _chosen[str(keys.device)] = "native"
    return is_best


def step_tasks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor,
    buffers: tuple[torch.Tensor, torch.Tensor], length: torch.Tensor, *, scaling: float,
) -> list:  # fmt: skip
    """Append a token of each sequence to the buffers and attend to everything, as tasks of a native program.

    Shapes: query and output `[B, HQ, D]`, keys and values `[B, HK, D]`, all fp32; buffers and length as in
    `dense_attend`. `length` is brought up to date.
    """
    from kvlens.kernels.dense_attend.cpu import as_packed
    from kvlens.kernels.packed_attend.tasks import step_tasks

    past, exact = as_packed(*buffers, length)
    return step_tasks(query, keys, values, output, past, exact, scaling=scaling)


def step_on_device(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor],
    length: torch.Tensor, *, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """The same where Triton runs, by what lies on the device alone: it may be captured in a graph.

    Shapes: query `[B, HQ, D]`, keys and values `[B, HK, D]`, buffers as in `dense_attend`; `length` counts the new
    token already. Our own kernel takes it: torch's attention reads lengths on the host.
    """
    no_sinks = tuple(side[:, :, :0] for side in buffers)
    append_pack(keys, values, ExactTokens(*buffers, *no_sinks, length), _NEVER, None)
    _chosen[str(query.device)] = "native"
    module = dispatch.implementation("dense_attend", query.device)
    return module.dense_attend(query, *buffers, length, scaling=scaling)


def prepare(keys: torch.Tensor, *, num_query_heads: int) -> None:
    """Measure the paths for every length that buffers like `keys` can hold, so that no step has to.

    Shapes: keys `[B, HK, capacity, D]`.
    """
    for limit in _LENGTHS:
        fastest(_problem(keys, num_query_heads, limit))
        if limit >= keys.shape[2]:
            break


def chosen_path(device: torch.device) -> str:
    """The path last taken on `device`, in words; empty before the first step."""
    return paths.DESCRIPTIONS.get(_chosen.get(str(device), ""), "")


def _problem(keys: torch.Tensor, num_query_heads: int, longest: int) -> Problem:
    batch_size, num_kv_heads, _, head_dim = keys.shape
    limit = next((limit for limit in _LENGTHS if limit >= longest), _LENGTHS[-1])
    return Problem(batch_size, num_query_heads, num_kv_heads, head_dim, limit, keys.dtype, str(keys.device))

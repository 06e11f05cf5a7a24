"""The definition of decode attention over any storage: rebuild a sequence in fp32, then one softmax over it.

Every operation's reference hands over how it rebuilds its own tokens. Slow and memory-hungry on purpose.
"""

from collections.abc import Callable

import torch

from kvlens.kernels.exact_tokens import Attended

Rebuild = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""From the number of a sequence to all its keys and values in fp32, `[HK, length, D]` each."""


def attend_rebuilt(query: torch.Tensor, length: torch.Tensor, rebuild: Rebuild, *, scaling: float) -> Attended:
    """softmax(scaling * q·K^T) V over every rebuilt sequence. Shapes: query `[B, HQ, D]`, length `[B]`."""
    output = torch.zeros_like(query)
    log_sum_exp = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    for row in range(query.shape[0]):
        if length[row] == 0:
            continue
        keys, values = rebuild(row)
        queries = query[row].float().unflatten(0, (keys.shape[0], -1))
        scores = scaling * queries @ keys.transpose(-1, -2)
        log_sum_exp[row] = scores.logsumexp(dim=-1).flatten()
        output[row] = (scores.softmax(dim=-1) @ values).flatten(0, 1).to(query.dtype)
    return Attended(output, log_sum_exp)


def join(sinks: torch.Tensor, packed: torch.Tensor, ring: torch.Tensor, length: int) -> torch.Tensor:
    """A sequence in order. Shapes: sinks `[HK, S, D]`, packed `[HK, n, D]`, ring `[HK, C, D]` to `[HK, length, D]`."""
    num_sinks = min(sinks.shape[1], length)
    start = num_sinks + packed.shape[1]
    slots = torch.arange(start, length, device=ring.device) % ring.shape[1]
    return torch.cat([sinks[:, :num_sinks].float(), packed, ring[:, slots].float()], dim=1)

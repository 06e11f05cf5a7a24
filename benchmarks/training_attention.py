"""The attention of training on a CPU with AMX tiles: ours against torch's, forward and gradients.

    python -m benchmarks.training_attention

Rows of several lengths, of as many tokens in all as a training step of the embedded model has, in its shape. The two
take turns, and medians are compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn import functional

from benchmarks import report
from tools.embedded_model import attention
from tools.embedded_model.train import ModelShape, Recipe

LENGTHS, ROUNDS = (512, 1024, 2048, 4096), 9


@dataclass(frozen=True)
class Row:
    """One layer's attention of a step. Units: milliseconds; `tflops` counts the products below the diagonal alone."""

    row_tokens: int
    rows: int
    torch_forward_ms: float
    forward_ms: float
    torch_gradients_ms: float
    gradients_ms: float
    times_as_fast: float
    tflops: float


def torch_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """torch's fused attention, told that it is causal, and the layout that the model wants."""
    outputs = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return outputs.transpose(1, 2)


def tile_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Ours."""
    return attention.attend(queries, keys, values)[0]


def time_both(attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor], gradient: torch.Tensor) -> list[float]:
    """Milliseconds of the outputs and of the gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    started = time.perf_counter()
    outputs = attend(*tensors)
    between = time.perf_counter()
    outputs.backward(gradient)
    return [1e3 * (between - started), 1e3 * (time.perf_counter() - between)]


def measure(length: int, shape: ModelShape, num_tokens: int) -> Row:
    """Both at rows of that length."""
    batch, dim = num_tokens // length, attention.DIM
    heads = (shape.num_query_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    tensors = [torch.randn(batch, count, length, dim, dtype=torch.bfloat16) for count in heads]
    gradient = torch.randn(batch, length, shape.num_query_heads, dim, dtype=torch.bfloat16)
    times: dict[Callable, list[list[float]]] = {torch_attention: [], tile_attention: []}
    for _ in range(1 + ROUNDS):
        for attend, found in times.items():
            found.append(time_both(attend, tensors, gradient))
    torch_ms, own_ms = ([median(one[part] for one in found[1:]) for part in (0, 1)] for found in times.values())
    # Two products forward and five for the gradients, each over half of the square.
    operations = 7 * batch * shape.num_query_heads * length**2 * dim
    return Row(
        length, batch, torch_ms[0], own_ms[0], torch_ms[1], own_ms[1], sum(torch_ms) / sum(own_ms),
        operations / sum(own_ms) / 1e9,
    )  # fmt: skip


def main() -> None:
    if not attention.has_tiles():
        raise SystemExit("needs a processor with AMX tiles (amx_bf16 and avx512_bf16 in /proc/cpuinfo)")
    shape, num_tokens = ModelShape(), Recipe().tokens_per_step
    rows = [measure(length, shape, num_tokens) for length in LENGTHS]
    report.show(rows)
    report.save("training_attention", rows)


if __name__ == "__main__":
    main()

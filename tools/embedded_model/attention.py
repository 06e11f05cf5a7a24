"""Attention of training on a CPU: `attend` and its gradients in `attention.cpp`, for processors with AMX tiles.

    out[q] = sum_k softmax_k(query[q] . key[k] * DIM ** -0.5, k <= q) value[k]

torch's attention takes more than half of a training step on a CPU, the more the longer the rows; products of bfloat16
tiles take a part of that time (`python -m benchmarks.training_attention`). The compiler that `torch.compile` needs
builds it at the first use.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "amx_tiles"
DIM = BLOCK = 64
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILE = ("-O3", "-march=sapphirerapids", "-std=c++17", "-shared", "-fPIC", "-pthread")
Tensors = tuple[torch.Tensor, ...]


def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 tiles."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return {"amx_bf16", "avx512_bf16"} <= {*flags.split()}


@cache
def library() -> ctypes.CDLL:
    """The compiled source, kept in `~/.cache/kvlens` under a digest of what it is made from.

    Raises: RuntimeError if there is no compiler, it refuses the source, or the system grants no tiles.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMPILE).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "kvlens" / "attention"
    path = folder / f"{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), *COMPILE, str(SOURCE), "-o", str(part)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            raise RuntimeError(f"{' '.join(command)} failed: {said}; install g++ or train with --no-tiles") from error
        part.replace(path)
    loaded = ctypes.CDLL(str(path))
    if loaded.request_tiles():
        raise RuntimeError("the system does not let this process use AMX tiles; train with --no-tiles")
    return loaded


def _call(function: str, queries: torch.Tensor, keys: torch.Tensor, tensors: Tensors) -> None:
    batch, query_heads, tokens, _ = queries.shape
    sizes = (batch, query_heads, keys.shape[1], tokens, torch.get_num_threads())
    getattr(library(), function)(
        *map(ctypes.c_int64, sizes), ctypes.c_float(DIM**-0.5), *(ctypes.c_void_p(t.data_ptr()) for t in tensors)
    )


def attend_reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What `attend` computes, in float32 throughout; the same shapes, any T and DIM."""
    tokens, group = queries.shape[2], queries.shape[1] // keys.shape[1]
    keys, values = (tensor.float().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = queries.float() @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    is_later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (scores.masked_fill(is_later, float("-inf")).softmax(-1) @ values).transpose(1, 2)


@torch.library.custom_op("kvlens_training::attend", mutates_args=())
def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention. Shapes: queries `[B, HQ, T, 64]`, keys and values `[B, HK, T, 64]`, bfloat16, contiguous.

    Returns outputs `[B, T, HQ, 64]` and the logarithm to base 2 of each softmax's sum, `[B, HQ, T]` float32.
    Raises: ValueError if a shape or type is another.
    """
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.dtype != torch.bfloat16 or tensor.shape[-1] != DIM or not tensor.is_contiguous():
            got = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(f"{name} must be contiguous bfloat16 [B, H, T, {DIM}], got {got}")
    sizes_fit = keys.shape == values.shape and (queries.shape[0], queries.shape[2]) == (keys.shape[0], keys.shape[2])
    if not sizes_fit or queries.shape[2] % BLOCK or queries.shape[1] % keys.shape[1]:
        got = ", ".join(str(tuple(t.shape)) for t in (queries, keys, values))
        raise ValueError(f"B and T must be the same, T a multiple of {BLOCK}, HQ one of HK, got {got}")
    outputs, log_sums = attend_shapes(queries, keys, values)
    _call("attend", queries, keys, (queries, keys, values, outputs, log_sums))
    return outputs, log_sums


@attend.register_fake
def attend_shapes(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised results of `attend`."""
    batch, heads, tokens, dim = queries.shape
    return queries.new_empty(batch, tokens, heads, dim), queries.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("kvlens_training::attend_gradients", mutates_args=())
def attend_gradients(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    outputs: torch.Tensor,
    log_sums: torch.Tensor,
    output_gradients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, from what `attend` was given and gave, and its outputs' gradients."""
    gradients = gradient_shapes(queries, keys, values, outputs, log_sums, output_gradients)
    given = (queries, keys, values, outputs, log_sums, output_gradients.to(torch.bfloat16).contiguous())
    _call("attend_gradients", queries, keys, (*given, *gradients))
    return gradients


@attend_gradients.register_fake
def gradient_shapes(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: torch.Tensor) -> Tensors:
    """Uninitialised results of `attend_gradients`."""
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


def _keep(ctx: object, inputs: Tensors, output: Tensors) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: object, output_gradients: torch.Tensor, _: torch.Tensor | None) -> Tensors:
    return attend_gradients(*ctx.saved_tensors, output_gradients)


attend.register_autograd(_gradients, setup_context=_keep)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: `attend` where it fits (training rows under autocast), otherwise torch's attention."""
    fits = attention_mask is None and query.shape[2] == key.shape[2] and query.shape[2] % BLOCK == 0
    if not (fits and torch.is_autocast_enabled("cpu")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    halves = (tensor.to(torch.bfloat16).contiguous() for tensor in (query, key, value))
    return attend(*halves)[0], None


def mask_of(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **options: object
) -> torch.Tensor | None:
    """No mask for rows without padding. Traced by `torch.compile`, transformers would make one in case that a row holds
    several texts with positions of their own, which training rows do not.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)


def use_tiles(model: nn.Module) -> None:
    """Lets that model train with `attend`."""
    library()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_of)
    model.set_attn_implementation(NAME)

"""Runs a method's kernels once before they are timed: compiled code must not count as a slow first token."""

from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from kvlens.engine.config import MethodConfig
from kvlens.engine.facts import Facts
from kvlens.engine.registry import available, method
from kvlens.engine.shape import ModelShape

if TYPE_CHECKING:
    from kvlens.engine.model import LoadedModel

_NUM_TOKENS = 2304
"""Enough to fill the longest window that a method may be set to, twice, and a little more."""

_NUM_STEPS = 3


def warm_up(model: "LoadedModel", method_name: str, config: MethodConfig) -> None:
    """Store random tokens and take a few steps with a method, on one layer; once for each setting."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    _run_once(model.shape, str(model.device), model.dtype, model.cache_dtype, method_name, config, model.facts)


def warm_up_methods(model: "LoadedModel") -> None:
    """The same for every method as the page first shows it, where its settings fit the model."""
    for entry in available().values():
        with suppress(ValueError):
            warm_up(model, entry.name, next(iter(entry.presets.values())))


@lru_cache(maxsize=256)
def _run_once(
    shape: ModelShape, device: str, dtype: torch.dtype, cache_dtype: torch.dtype, method_name: str,
    config: MethodConfig, facts: Facts,
) -> None:  # fmt: skip
    layer = ModelShape(1, shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
    cache = method(method_name).cache(layer, config, device=device, dtype=cache_dtype, facts=facts)
    try:
        with torch.inference_mode():
            for num_tokens in [_NUM_TOKENS] + [1] * _NUM_STEPS:
                query, keys, values = (
                    torch.randn(1, heads, num_tokens, layer.head_dim, device=device, dtype=dtype)
                    for heads in (layer.num_query_heads, layer.num_kv_heads, layer.num_kv_heads)
                )
                cache.attend(0, query, keys, values, scaling=layer.head_dim**-0.5)
    finally:
        cache.free()

"""Runs a method's kernels once before they are timed: compiled code must not count as a slow first token."""

from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from kvlens.engine.config import MethodConfig
from kvlens.engine.facts import Facts
from kvlens.engine.registry import available, method
from kvlens.engine.shape import ModelShape

if TYPE_CHECKING:
    from kvlens.engine.model import LoadedModel

_done: "WeakKeyDictionary[Facts, set[tuple[str, MethodConfig]]]" = WeakKeyDictionary()
"""The settings that each model has run. Weak, so that a model that was left for another one goes."""

_NUM_TOKENS = 2304
"""Enough to fill the longest window that a method may be set to, twice, and a little more."""

_NUM_STEPS = 3


def warm_up(model: "LoadedModel", method_name: str, config: MethodConfig) -> None:
    """Store random tokens and take a few steps with a method, on one layer; once for each setting."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    done = _done.setdefault(model.facts, set())
    if (method_name, config) not in done:
        _run(model, method_name, config)
        done.add((method_name, config))


def warm_up_methods(model: "LoadedModel") -> None:
    """The same for every method as the page first shows it, where its settings fit the model."""
    for entry in available().values():
        with suppress(ValueError):
            warm_up(model, entry.name, next(iter(entry.presets.values())))


def _run(model: "LoadedModel", method_name: str, config: MethodConfig) -> None:
    shape, device = model.shape, model.device
    layer = ModelShape(1, shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
    cache = method(method_name).cache(layer, config, device=device, dtype=model.cache_dtype, facts=model.facts)
    try:
        with torch.inference_mode():
            for num_tokens in [_NUM_TOKENS] + [1] * _NUM_STEPS:
                query, keys, values = (
                    torch.randn(1, heads, num_tokens, layer.head_dim, device=device, dtype=model.dtype)
                    for heads in (layer.num_query_heads, layer.num_kv_heads, layer.num_kv_heads)
                )
                cache.attend(0, query, keys, values, scaling=layer.head_dim**-0.5)
    finally:
        cache.free()

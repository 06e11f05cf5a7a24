"""Hugging Face's own caches as rivals: the same model, tokens and steps, through its own forward pass and attention.

The quantized ones need their packages: `pip install hqq optimum-quanto`. Without one its rows are left out.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

from kvlens.engine.model import LoadedModel
from kvlens.engine.throughput import CELL_SECONDS, ROUND_STEPS, TIMED_STEPS, WARM_UP_STEPS

PACKAGES = {"hqq": "hqq", "quanto": "optimum.quanto"}
AXES = {"hqq": 1, "quanto": 0}
"""What a backend calls groups of neighbouring channels of a token, which fit every length."""

GROUP_SIZE, RESIDUAL_LENGTH = 32, 128


@dataclass(frozen=True)
class Rival:
    """One of Hugging Face's caches. `make` gives an empty one for a model."""

    name: str
    make: Callable[[LoadedModel], Any]


def measure(rival: Rival, model: LoadedModel, context: int) -> tuple[float, int]:
    """Median milliseconds of a step that ends at `context` tokens, and the bytes that the cache then holds.

    The steps are the last sixteenth of the context; a slow rival says what it has to say in fewer.
    """
    cache, times = rival.make(model), []
    num_steps = max(ROUND_STEPS, min(TIMED_STEPS, context // 16))
    with torch.inference_mode(), _own_attention(model):
        _run(model, cache, [40 + position % 50 for position in range(context - WARM_UP_STEPS - num_steps)])
        while len(times) < WARM_UP_STEPS + num_steps and (
            len(times) < WARM_UP_STEPS + ROUND_STEPS or sum(times) < 1000 * CELL_SECONDS
        ):
            begin = time.perf_counter()
            _run(model, cache, [40])
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(1000 * (time.perf_counter() - begin))
    held = (tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))
    return statistics.median(times[WARM_UP_STEPS:]), sum(held)


def _run(model: LoadedModel, cache: Any, tokens: list[int]) -> None:
    ids = torch.tensor([tokens], device=model.device)
    model.network(ids, past_key_values=cache, logits_to_keep=1)


def available(bits: tuple[int, ...] = (2, 4)) -> list[Rival]:
    """Its exact cache, then every quantized one whose package is installed, as near to KIVI as it can be set."""
    rivals = [Rival("Hugging Face DynamicCache, sdpa", lambda model: DynamicCache(config=model.network.config))]
    for backend, package in PACKAGES.items():
        if _is_installed(package):
            rivals += [
                Rival(f"Hugging Face QuantizedCache, {backend}, {count} bit", _quantized(backend, count))
                for count in bits
            ]
    return rivals


def _quantized(backend: str, bits: int) -> Callable[[LoadedModel], QuantizedCache]:
    def make(model: LoadedModel) -> QuantizedCache:
        axis = AXES[backend]
        return QuantizedCache(
            backend, model.network.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP_SIZE,
            residual_length=RESIDUAL_LENGTH,
        )  # fmt: skip

    return make


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def _own_attention(model: LoadedModel) -> Iterator[None]:
    """The model with the attention that Hugging Face gives it by default."""
    ours = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.network.set_attn_implementation(ours)


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor inside dictionaries, sequences and packed tensors."""
    if isinstance(held, torch.Tensor) and hasattr(held, "__tensor_flatten__"):
        names, _ = held.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(held, name))
    elif isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors(value)

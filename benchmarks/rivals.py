"""Hugging Face's own caches as rivals: the same model, tokens and steps, through its own forward pass and attention.

The quantized ones need their packages: `pip install hqq optimum-quanto`. Without one its rows are left out. A cache is
filled with the random keys and values that ours are filled with (`throughput.random_prompt`), by its own `update`.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from kvlens.engine.graph import CudaCapture
from kvlens.engine.measure import Stopwatch
from kvlens.engine.model import LoadedModel
from kvlens.engine.throughput import CELL_SECONDS, ROUND_STEPS, TIMED_STEPS, WARM_UP_STEPS, random_prompt

PACKAGES = {"hqq": "hqq", "quanto": "optimum.quanto"}
AXES = {"hqq": 1, "quanto": 0}
"""What a backend calls groups of neighbouring channels of a token, which fit every length."""

GROUP_SIZE, RESIDUAL_LENGTH = 32, 128

Step = Callable[[], Any]

_LEAST_STEPS = 3
_STEPS_BEFORE_GRAPH = 2


def plain_step(model: LoadedModel, cache: Any, ids: torch.Tensor) -> Step:
    """The network's forward, operation by operation. Shapes: ids `[B, 1]`."""
    return lambda: model.network(ids, past_key_values=cache, logits_to_keep=1)


@dataclass(frozen=True)
class Rival:
    """One of Hugging Face's caches: `make` gives an empty one for so many tokens, `stepper` what takes a step."""

    name: str
    make: Callable[[LoadedModel, int], Any]
    stepper: Callable[[LoadedModel, Any, torch.Tensor], Step] = plain_step


def measure(rival: Rival, model: LoadedModel, context: int, batch_size: int = 1) -> tuple[float, int]:
    """Median milliseconds of a step that ends at `context` tokens, and the bytes that the cache then holds.

    The steps are the last sixteenth of the context; a slow rival says what it has to say in fewer.
    """
    times: list[float] = []
    num_steps = WARM_UP_STEPS + max(ROUND_STEPS, min(TIMED_STEPS, context // 16))
    cache = rival.make(model, context + _STEPS_BEFORE_GRAPH)
    with torch.no_grad(), own_attention(model):
        fill(model, cache, context - num_steps, batch_size)
        step = rival.stepper(model, cache, torch.full((batch_size, 1), 40, device=model.device))
        while len(times) < num_steps and (
            len(times) < WARM_UP_STEPS + _LEAST_STEPS or sum(times) < 1000 * CELL_SECONDS
        ):
            watch = Stopwatch()
            with watch.measure(model.device):
                step()
            times.append(watch.milliseconds)
    return statistics.median(times[WARM_UP_STEPS:]), held_bytes(cache)


def fill(model: LoadedModel, cache: Any, num_tokens: int, batch_size: int) -> None:
    """Random keys and values of so many tokens, the same in every sequence, into every layer."""
    prompt = random_prompt(model.shape, num_tokens, dtype=model.dtype, device=model.device)
    keys, values = (side.expand(batch_size, -1, -1, -1) for side in prompt)
    for layer in range(model.shape.num_layers):
        cache.update(keys, values, layer)


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors that one of Hugging Face's caches holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


def available(bits: tuple[int, ...] = (2, 4)) -> list[Rival]:
    """Its exact cache, then every quantized one whose package is installed, as near to KIVI as it can be set."""
    rivals = [dynamic()]
    for backend, package in PACKAGES.items():
        if _is_installed(package):
            rivals += [
                Rival(f"Hugging Face QuantizedCache, {backend}, {count} bit", _quantized(backend, count))
                for count in bits
            ]
    return rivals


def dynamic() -> Rival:
    """Its exact cache, which grows by joining tensors."""
    return Rival("Hugging Face DynamicCache, sdpa", lambda model, _: DynamicCache(config=model.network.config))


def static(*, is_compiled: bool = False) -> Rival:
    """Its static cache as one CUDA graph: of the operations as they are, or of what torch.compile makes of them."""
    kind, stepper = ("torch.compile", _compiled_step) if is_compiled else ("CUDA graph", _captured_step)
    return Rival(
        f"Hugging Face StaticCache, sdpa, {kind}",
        lambda model, num_tokens: StaticCache(config=model.network.config, max_cache_len=num_tokens),
        stepper,
    )


def _captured_step(model: LoadedModel, cache: Any, ids: torch.Tensor) -> Step:
    """`plain_step` as a graph; where there is no GPU as it is."""
    step = plain_step(model, cache, ids)
    if model.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_STEPS_BEFORE_GRAPH):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    replay, _ = CudaCapture(model.device)(step)
    return replay


def _compiled_step(model: LoadedModel, cache: Any, ids: torch.Tensor) -> Step:
    torch.compiler.reset()
    forward = torch.compile(model.network.forward, mode="reduce-overhead", dynamic=False)
    return lambda: forward(input_ids=ids, past_key_values=cache, logits_to_keep=1)


def _quantized(backend: str, bits: int) -> Callable[[LoadedModel, int], QuantizedCache]:
    def make(model: LoadedModel, _: int) -> QuantizedCache:
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
def own_attention(model: LoadedModel) -> Iterator[None]:
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

"""Whole decode steps of a model, lane by lane: dense, packed, and Hugging Face's own cache.

    python -m benchmarks.decode [--model NAME] [--contexts 200 1000 4000] [--steps 60]

The methods take one step each in turn, so that a busy moment of the machine hits all alike; the median
counts. Bytes are live bytes of the cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from benchmarks import report
from kvlens.engine.generate import forward, prefill
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from kvlens.engine.warm_up import warm_up


@dataclass(frozen=True)
class Row:
    """Median step at a context. Units: milliseconds; `ratio` is dense time over this one's."""

    method: str
    context_tokens: int
    step_ms: float
    tokens_per_second: float
    ratio: float
    cache_mb: float


def lanes(model: LoadedModel, prompt: list[int]) -> dict[str, tuple[Callable[[int], float], Callable[[], int]]]:
    """For each method: a step that gives its milliseconds, and a reading of the cache's bytes."""
    found = {}
    for entry in available().values():
        for preset, config in entry.presets.items():
            warm_up(model, entry.name, config)
            cache = model.new_cache(entry.name, config)
            *_, _ = prefill(model, cache, prompt)
            found[preset] = (
                lambda token, cache=cache: forward(model, cache, [token]).milliseconds,
                lambda cache=cache: cache.footprint().live_bytes,
            )
    found["Hugging Face DynamicCache, sdpa"] = _hugging_face(model, prompt)
    return found


def _hugging_face(model: LoadedModel, prompt: list[int]):
    cache = DynamicCache()

    def run(tokens: list[int]) -> float:
        model.network.set_attn_implementation("sdpa")
        begin = time.perf_counter()
        with torch.inference_mode():
            model.network(torch.tensor([tokens], device=model.device), past_key_values=cache, logits_to_keep=1)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
        milliseconds = 1000 * (time.perf_counter() - begin)
        model.network.set_attn_implementation("kvlens")
        return milliseconds

    run(prompt)
    return (lambda token: run([token])), lambda: sum(l.keys.nbytes + l.values.nbytes for l in cache.layers)  # noqa: E741


def measure(model: LoadedModel, context: int, steps: int) -> list[Row]:
    """All methods at one context."""
    vocabulary = model.network.get_input_embeddings().num_embeddings
    prompt = [position * 7 % (vocabulary - 50) + 40 for position in range(context)]
    running = lanes(model, prompt)
    times: dict[str, list[float]] = {name: [] for name in running}
    for step in range(steps + 5):
        for name, (advance, _) in running.items():
            milliseconds = advance(40 + step)
            if step >= 5:
                times[name].append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    dense = next(iter(medians.values()))
    return [
        Row(name, context, median, 1000 / median, dense / median, running[name][1]() / 1e6)
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--contexts", type=int, nargs="+", default=[200, 1000, 4000])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    rows = [row for context in arguments.contexts for row in measure(model, context, arguments.steps)]
    print(f"{model.name} on {model.device_name}")
    report.show(rows)
    report.save("decode", rows, model.device)


if __name__ == "__main__":
    main()

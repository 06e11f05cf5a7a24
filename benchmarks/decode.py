"""Whole decode steps of a model, lane by lane: dense, packed, and Hugging Face's own cache.

    python -m benchmarks.decode [--model NAME] [--contexts 256 1024 4096]

Cells are filled, stepped and read as in the page's throughput lab (`engine/throughput.py`). All of them are
measured in several rounds, so that a busy moment of the machine hits none alone; the median counts. A context is
its length after the last step; bytes are live bytes of the cache.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from benchmarks import report
from kvlens.engine import bridge, throughput
from kvlens.engine.bench import Candidate, NetworkBench
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from kvlens.engine.throughput import TIMED_STEPS, WARM_UP_STEPS, plan_cells

ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """Median step at a context. Units: milliseconds; `ratio` is dense time over this one's."""

    method: str
    context_tokens: int
    step_ms: float
    tokens_per_second: float
    ratio: float
    cache_mb: float


def hugging_face(model: LoadedModel, context: int) -> tuple[float, int]:
    """Milliseconds of the same step with the model's own cache and torch's attention, and the cache's bytes."""
    cache = DynamicCache()

    def run(tokens: list[int]) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model.network(torch.tensor([tokens], device=model.device), past_key_values=cache, logits_to_keep=1)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
        return 1000 * (time.perf_counter() - begin)

    model.network.set_attn_implementation("sdpa")
    try:
        run([40 + position % 50 for position in range(context - WARM_UP_STEPS - TIMED_STEPS)])
        times = [run([40]) for _ in range(WARM_UP_STEPS + TIMED_STEPS)][WARM_UP_STEPS:]
    finally:
        model.network.set_attn_implementation(bridge.NAME)
    return statistics.median(times), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: LoadedModel, context: int) -> list[Row]:
    """All methods at one context."""
    candidates = [
        Candidate(preset, entry.name, config)
        for entry in available().values()
        for preset, config in entry.presets.items()
    ]
    cells = plan_cells(candidates, [context], [1])
    found: dict[str, list[tuple[float, int]]] = {}
    for number in range(ROUNDS):
        *_, progress = throughput.measure(NetworkBench(model), cells)
        for result in progress.results:
            if result.status == "measured":
                found.setdefault(result.label, []).append((result.step_ms, result.kv_bytes))
            elif number == 0:
                print(f"{result.label} is left out: {result.note}")
        found.setdefault("Hugging Face DynamicCache, sdpa", []).append(hugging_face(model, context))
    medians = {name: statistics.median(step_ms for step_ms, _ in rounds) for name, rounds in found.items()}
    dense = next(iter(medians.values()))
    return [
        Row(name, context, median, 1000 / median, dense / median, found[name][0][1] / 1e6)
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    rows = [row for context in arguments.contexts for row in measure(model, context)]
    print(f"{model.name} on {model.device_name}")
    report.show(rows)
    report.save("decode", rows, model.device)


if __name__ == "__main__":
    main()

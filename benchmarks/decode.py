"""Whole decode steps of a model, lane by lane: dense, packed, and Hugging Face's own cache.

    python -m benchmarks.decode [--model NAME] [--contexts 256 1024 4096]

Cells are filled, stepped and read as in the page's throughput lab (`engine/throughput.py`); only here the
methods take one step each in turn, so that a busy moment of the machine hits all alike. The median counts.
A context is its length after the last step; bytes are live bytes of the cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from benchmarks import report
from kvlens.engine.bench import Candidate, NetworkBench
from kvlens.engine.errors import EngineError
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from kvlens.engine.throughput import TIMED_STEPS, WARM_UP_STEPS, FilledCell, plan_cells


@dataclass(frozen=True)
class Row:
    """Median step at a context. Units: milliseconds; `ratio` is dense time over this one's."""

    method: str
    context_tokens: int
    step_ms: float
    tokens_per_second: float
    ratio: float
    cache_mb: float


def hugging_face(model: LoadedModel, context: int) -> tuple[Callable[[], float], Callable[[], int]]:
    """The same step with the model's own cache and torch's attention: its milliseconds, and the cache's bytes."""
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

    run([40 + position % 50 for position in range(context - WARM_UP_STEPS - TIMED_STEPS)])
    return (lambda: run([40])), lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: LoadedModel, context: int) -> list[Row]:
    """All methods at one context."""
    bench = NetworkBench(model)
    candidates = [
        Candidate(preset, entry.name, config)
        for entry in available().values()
        for preset, config in entry.presets.items()
    ]
    cells = []
    for cell in plan_cells(candidates, [context], [1]):
        try:
            cells.append(FilledCell(bench, cell))
            for _ in cells[-1].fill():
                pass
        except EngineError as error:
            print(f"{cell.candidate.label} is left out: {error}")
    step, held = hugging_face(model, context)
    times = []
    for number in range(WARM_UP_STEPS + TIMED_STEPS):
        for cell in cells:
            cell.step()
        milliseconds = step()
        if number >= WARM_UP_STEPS:
            times.append(milliseconds)
    found = [
        (cell.cell.candidate.label, result.step_ms, result.kv_bytes) for cell in cells for result in [cell.result()]
    ]
    found.append(("Hugging Face DynamicCache, sdpa", statistics.median(times), held()))
    for cell in cells:
        cell.close()
    dense = found[0][1]
    return [Row(name, context, median, 1000 / median, dense / median, size / 1e6) for name, median, size in found]


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

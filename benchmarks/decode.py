"""Whole decode steps of a model, lane by lane: ours, and Hugging Face's own caches (`rivals.py`).

    python -m benchmarks.decode [--model NAME] [--contexts 256 1024 4096]

Cells are filled, stepped and read as in the page's throughput lab (`engine/throughput.py`). All of them are
measured in several rounds, so that a busy moment of the machine hits none alone; the median counts. A context is
its length after the last step; bytes are live bytes of the cache.
"""

import argparse
import statistics
from dataclasses import dataclass

from benchmarks import report, rivals
from kvlens.engine import throughput
from kvlens.engine.bench import Candidate, NetworkBench
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from kvlens.engine.throughput import plan_cells

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
        for rival in rivals.available():
            found.setdefault(rival.name, []).append(rivals.measure(rival, model, context))
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

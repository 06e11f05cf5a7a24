"""Whole decode steps of a model, lane by lane: ours, and Hugging Face's own caches (`rivals.py`).

    python -m benchmarks.decode [--model NAME] [--contexts 256 1024 4096]

Cells are filled, stepped and read as in the page's throughput lab (`engine/throughput.py`). All of them are
measured in several rounds, each right after the dense lane, with which it is compared: a processor changes its pace
from minute to minute. Medians count. A context is its length after the last step; bytes are live bytes of the cache.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import report, rivals
from kvlens.engine import throughput
from kvlens.engine.bench import Candidate, NetworkBench
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from kvlens.engine.throughput import CellResult, plan_cells

ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """Median step at a context. Units: milliseconds; `ratio` is the median of dense time over this one's."""

    method: str
    context_tokens: int
    step_ms: float
    tokens_per_second: float
    ratio: float
    cache_mb: float


def measure(model: LoadedModel, context: int) -> list[Row]:
    """All methods at one context."""
    dense, *others = (
        Candidate(preset, entry.name, config)
        for entry in available().values()
        for preset, config in entry.presets.items()
    )
    bench, dense_steps, found = NetworkBench(model), [], defaultdict(list)

    def cell(candidate: Candidate) -> CellResult:
        *_, progress = throughput.measure(bench, plan_cells([candidate], [context], [1]))
        return progress.results[0]

    for number in range(ROUNDS):
        for other in [*others, *rivals.available()]:
            dense_cell = cell(dense)
            if isinstance(other, Candidate):
                result = cell(other)
                if result.status != "measured":
                    if number == 0:
                        print(f"{other.label} is left out: {result.note}")
                    continue
                name, step_ms, kv_bytes = other.label, result.step_ms, result.kv_bytes
            else:
                name, (step_ms, kv_bytes) = other.name, rivals.measure(other, model, context)
            dense_steps.append(dense_cell.step_ms)
            found[name].append((step_ms, dense_cell.step_ms / step_ms, kv_bytes))
    found = {dense.label: [(step_ms, 1.0, dense_cell.kv_bytes) for step_ms in dense_steps], **found}
    return [_row(name, context, *zip(*measured, strict=True)) for name, measured in found.items()]


def _row(name: str, context: int, steps: Sequence[float], ratios: Sequence[float], kv_bytes: Sequence[int]) -> Row:
    step_ms = statistics.median(steps)
    return Row(name, context, step_ms, 1000 / step_ms, statistics.median(ratios), kv_bytes[0] / 1e6)


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

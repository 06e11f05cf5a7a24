"""What the saved tables say to the bars that this project has set itself for an H200.

Read from the files alone, so that runs of single sections add up.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Saved = dict[str, str]


@dataclass(frozen=True)
class Bar:
    """What `column` must be at least (`is_most`: at most), in the row of `section` that has the values of `where`."""

    says: str
    section: str
    where: dict[str, str]
    column: str
    value: float
    is_most: bool = False


def _attention(model: str, batch: int, tokens: int, value: float) -> Bar:
    where = {"model": model, "batch": f"{batch}", "tokens": f"{tokens}", "method": "KIVI-2 G=32 R=128"}
    says = f"attention of a layer, {model}, batch {batch} x {tokens:,}: times the best dense"
    return Bar(says, "attention", where, "times_best_dense", value)


def _step(batch: int, context: int, value: float) -> Bar:
    where = {
        "model": "Llama-2-7B", "batch": f"{batch}", "context": f"{context}", "method": "KIVI-2 G=32 R=128",
        "how": "graph",
    }  # fmt: skip
    return Bar(f"whole step, batch {batch} x {context:,}: times dense", "steps", where, "times_dense", value)


def _headline(method: str, column: str, value: float) -> Bar:
    says = f"80 GB, {method}: {column.replace('_', ' ')} of Hugging Face fp16"
    return Bar(says, "headline", {"method": method, "budget_gb": "80.0"}, column, value)


def _memory(batch: int, context: int) -> Bar:
    where = {"phase": "decode", "batch": f"{batch}", "context": f"{context}", "method": "KIVI-2 G=32 R=128"}
    says = f"scratch in decode, batch {batch} x {context:,}, MiB"
    return Bar(says, "memory", where, "scratch_mib", 64, is_most=True)


BARS = (
    _attention("Llama-2-7B", 32, 4096, 3.0),
    _attention("Llama-2-7B", 1, 131072, 3.0),
    _attention("Llama-3.1-8B", 32, 4096, 2.2),
    _attention("Llama-3.1-8B", 1, 131072, 2.2),
    _step(32, 4096, 2.25),
    _step(1, 32768, 1.5),
    _step(1, 500, 0.97),
    _headline("KIVI-2 G=32 R=32", "times_batch", 4.0),
    _headline("KIVI-2 G=32 R=32", "times_throughput", 3.5),
    _memory(32, 4096),
    _memory(1, 32768),
)


def verdicts(folder: Path, sections: Sequence[str]) -> Iterator[str]:
    """A line for each bar of the sections: met, missed, or not measured."""
    tables = {section: _read(folder / f"gpu_{section}.csv") for section in sections}
    for bar in BARS:
        if bar.section not in tables:
            continue
        found = [row for row in tables[bar.section] if _has(row, bar.where)]
        if not found or not found[0][bar.column]:
            yield f"not measured  {bar.says} (bar {bar.value:g})"
            continue
        got = float(found[0][bar.column])
        is_met = got <= bar.value if bar.is_most else got >= bar.value
        yield f"{'met' if is_met else 'MISSED':12}  {bar.says}: {got:.3g} (bar {bar.value:g}), {found[0]['device']}"


def _has(row: Saved, where: dict[str, str]) -> bool:
    return all(row[name] == value for name, value in where.items())


def _read(path: Path) -> list[Saved]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

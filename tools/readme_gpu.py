"""The README's GPU tables, from what `python -m benchmarks.gpu` has saved; a sentence while nothing is."""

from collections.abc import Iterator
from pathlib import Path

from tools.tables import Saved, read, table, times

NOTHING = (
    "No GPU figure is claimed yet: "
    "[what remains to be measured](docs/benchmarks.md#on-a-gpu-what-remains-to-be-measured)."
)


def gpu(results: Path) -> str:
    """Attention of a layer, whole steps and the headline, each where its file is there."""
    parts = (("attention", _attention), ("steps", _steps), ("headline", _headline))
    found = [(make, read(results / f"gpu_{section}.csv")) for section, make in parts]
    tables = [make(rows) for make, rows in found if rows]
    return "\n\n".join(tables) or NOTHING


def _attention(rows: list[Saved]) -> str:
    """The packed methods against the fastest dense one, and how near that is to the ratio of the bytes."""
    packed = sorted({row["method"] for row in rows if row["method"].startswith(("KIVI", "CSR"))})
    lines = []
    for size, here in _by_size(rows, "tokens"):
        found = {row["method"]: row for row in here}
        best = min((row for row in here if row["method"] not in packed), key=lambda row: float(row["ms"]))
        cells = [
            f"{times(found[name]['times_best_dense'])} of {times(found[name]['limit'])}" if name in found else "–"
            for name in packed
        ]
        lines.append([*size, f"{float(best['ms']):.3g} ms ({best['method']})", *cells])
    return table(["shape", "batch × tokens", "best exact fp16", *packed], lines) + _caption(
        rows, "One layer's decode attention: × faster than the fastest exact fp16 kernel, of what the bytes allow"
    )


def _steps(rows: list[Saved]) -> str:
    lines = []
    for size, here in _by_size(rows, "context"):
        for row in here:
            way = "" if row["how"] == "transformers" else f", {row['how'].partition(' ')[0]}"
            step, kept = f"{float(row['step_ms']):.3g}", f"{float(row['kv_mb']) / 1000:.3g}"
            lines.append([*size, f"{row['method']}{way}", step, _against(row["times_dense"]), kept])
    columns = ["model", "batch × tokens", "method", "ms a step", "tokens/s against dense", "cache, GB"]
    return table(columns, lines) + _caption(rows, "Whole decode steps, random weights in fp16")


def _headline(rows: list[Saved]) -> str:
    lines = [
        [
            row["method"], row["batch"], _against(row["times_batch"]), f"{float(row['tokens_per_s']):,.0f}",
            _against(row["times_throughput"]), _against(row["times_dense_throughput"]),
        ]
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    columns = ["method", "sequences", "× baseline", "tokens/s", "× baseline", "× our dense"]
    return table(columns, lines) + _caption(
        rows,
        f"As many sequences as {float(first['budget_gb']):g} GB take with the weights of {first['model']}: "
        f"{first['prompt']} tokens of prompt, {first['output']} new ones, prompts counted",
    )


def _by_size(rows: list[Saved], tokens: str) -> Iterator[tuple[list[str], list[Saved]]]:
    """The rows of each model, batch and length, behind what a table says of these."""
    found: dict[tuple[str, str], list[Saved]] = {}
    for row in rows:
        found.setdefault((row["model"], f"{row['batch']} × {int(row[tokens]):,}"), []).append(row)
    return (([*size], here) for size, here in found.items())


def _against(value: str) -> str:
    """A ratio, where there is what it is against."""
    return times(value) if value else "–"


def _caption(rows: list[Saved], says: str) -> str:
    first = rows[0]
    return f"\n\n{says}; {first['device']}, torch {first['torch']}, {first['date'][:10]}. `python -m benchmarks.gpu`"

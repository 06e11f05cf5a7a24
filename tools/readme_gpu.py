"""The README's GPU tables, from what `python -m benchmarks.gpu` has saved; a sentence while nothing is."""

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
    packed = sorted({row["method"] for row in rows if row["method"].startswith(("KIVI-", "CSR"))})
    lines = []
    for key, here in _grouped(rows, "model", "batch", "tokens").items():
        best = min((row for name, row in here.items() if name not in packed), key=lambda row: float(row["ms"]))
        cells = [
            f"{times(here[name]['times_best_dense'])} of {times(here[name]['limit'])}" if name in here else "–"
            for name in packed
        ]
        lines.append([*_size(key), f"{float(best['ms']):.3g} ms ({best['method']})", *cells])
    return table(["shape", "batch × tokens", "best exact fp16", *packed], lines) + _caption(
        rows, "One layer's decode attention: × faster than the fastest exact fp16 kernel, of what the bytes allow"
    )


def _steps(rows: list[Saved]) -> str:
    lines = []
    for key, here in _grouped(rows, "model", "batch", "context", name=("method", "how")).items():
        for (method, how), row in here.items():
            way = "" if how == "transformers" else f", {how.partition(' ')[0]}"
            kept = f"{float(row['kv_mb']) / 1000:.3g}"
            lines.append(
                [*_size(key), f"{method}{way}", f"{float(row['step_ms']):.3g}", _against(row["times_dense"]), kept]
            )
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


def _grouped(rows: list[Saved], *by: str, name: str | tuple[str, ...] = "method") -> dict[tuple, dict]:
    found: dict[tuple, dict] = {}
    for row in rows:
        label = row[name] if isinstance(name, str) else tuple(row[part] for part in name)
        found.setdefault(tuple(row[part] for part in by), {})[label] = row
    return found


def _size(key: tuple[str, str, str]) -> list[str]:
    model, batch, tokens = key
    return [model, f"{batch} × {int(tokens):,}"]


def _against(value: str) -> str:
    """A ratio, where there is what it is against."""
    return times(value) if value else "–"


def _caption(rows: list[Saved], says: str) -> str:
    first = rows[0]
    return f"\n\n{says}; {first['device']}, torch {first['torch']}, {first['date'][:10]}. `python -m benchmarks.gpu`"

"""Fills the tables of the README: methods from `available()`, figures from the saved benchmark results.

    python -m tools.readme      # writes README.md; a test fails while it is out of date

Each table stands between `<!-- name -->` and `<!-- /name -->`. No figure of the README is typed by hand.
"""

import re
from collections.abc import Callable
from pathlib import Path

from kvlens.engine.estimate import bits_per_value, estimate
from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from tools.readme_gpu import gpu
from tools.tables import read, table, times

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

LLAMA_8B = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
CONTEXTS = {4096: "4k", 32768: "32k", 131072: "128k"}
SHAPES = {"mha": "32/32 heads × 128", "gqa": "32/8 heads × 128", "embedded": "4/2 heads × 64"}


def methods() -> str:
    """Each preset of each method with its bytes at Llama-3.1-8B's shape, by formula."""
    rows = []
    for entry in available().values():
        for preset, config in entry.presets.items():
            cells = []
            for num_tokens in CONTEXTS:
                found = estimate(LLAMA_8B, entry.name, config, num_tokens=num_tokens)
                smaller = LLAMA_8B.fp16_bytes(num_tokens) / found.live_bytes
                cells.append(f"{bits_per_value(found, LLAMA_8B):.2f} bits, {smaller:.2f}×")
            rows.append([preset, *cells, entry.source])
    return table(["method", *(f"at {label} tokens" for label in CONTEXTS.values()), "source"], rows) + (
        "\n\nReal bits a value and × smaller than fp16 at Llama-3.1-8B's shape, everything counted: codes, "
        "scales and zeros, exact window, tables. By the formula that the real bytes are checked against, to the byte."
    )


def attention() -> str:
    """One layer's decode attention on the CPU: the best dense path of torch and the packed ones."""
    saved = read(RESULTS / "packed_attend_cpu.csv")
    rows = []
    for shape, label in SHAPES.items():
        for tokens in sorted({int(row["tokens"]) for row in saved}):
            here = [row for row in saved if row["shape"] == shape and int(row["tokens"]) == tokens]
            packed = [row for row in here if row["method"].startswith(("KIVI", "CSR"))]
            dense = min((row for row in here if row not in packed), key=lambda row: float(row["median_ms"]))
            best = float(dense["median_ms"])
            cells = [f"{float(row['median_ms']):.3g} ms, {best / float(row['median_ms']):.2g}×" for row in packed]
            rows.append([label, f"{tokens:,}", f"{best:.3g} ms ({dense['method']}, {dense['dtype']})", *cells])
    names = [row["method"] for row in packed]
    first = saved[0]
    return table(["shape", "tokens", "best dense of torch", *names], rows) + (
        f"\n\nOne layer's decode attention, batch 1, medians; {first['processor']}, {first['threads']} threads, "
        f"torch {first['torch']}, {first['date'][:10]}. `python -m benchmarks.packed_attend_cpu`"
    )


def decode() -> str:
    """Whole decode steps of the embedded model: a row a method, a column a context."""
    saved = read(RESULTS / "decode.csv")
    contexts = sorted({int(row["context_tokens"]) for row in saved})
    found = {(row["method"], int(row["context_tokens"])): row for row in saved}
    rows = []
    for name in dict.fromkeys(row["method"] for row in saved):
        own = [found[name, context] for context in contexts]
        rows.append(
            [
                name,
                *(f"{_short(row['step_ms'])} ms, {times(row['ratio'])}" for row in own),
                _short(own[-1]["cache_mb"]),
            ]
        )
    columns = ["method", *(f"{context:,} tokens" for context in contexts), f"cache at {contexts[-1]:,}, MB"]
    first = saved[0]
    return table(columns, rows) + (
        "\n\nMilliseconds of a whole decode step of the embedded model, batch 1, medians, and tokens/s against our "
        "dense lane right beside it; "
        f"{first['device']}, torch {first['torch']}, {first['date']}. `python -m benchmarks.decode`"
    )


def agreement() -> str:
    """How far each method moves the embedded model's answers."""
    columns = {
        "method": ("method", str),
        "bits_per_value": ("bits a value", _short),
        "same_answers": ("same answer", _percent),
        "same_first_tokens": ("tokens before they part", _short),
        "same_top_token": ("same likeliest token", _percent),
        "kl_nats": ("KL, nats a token", _small),
    }
    caption = (
        "Embedded model, greedy, against the exact cache; in the last two columns every method reads the exact "
        "answer token by token"
    )
    return _plain("agreement", columns, caption)


def recall() -> str:
    """Which questions about a fact in a long text each method still answers: a column a length."""
    saved = read(RESULTS / "recall.csv")
    lengths = sorted({int(row["prompt_tokens"]) for row in saved if row["prompt_tokens"]})
    found = {(row["method"], row["prompt_tokens"]): row for row in saved}
    rows = []
    for name in dict.fromkeys(row["method"] for row in saved):
        own = [found[name, str(length)] for length in lengths]
        whole = found[name, ""]
        change = f"{float(whole['points']):+.1f} ± {float(whole['points_error']):.1f}"
        rows.append([name, _short(whole["bits_per_value"]), *(_percent(row["recall"]) for row in own), change])
    unasked = [title for entry in available().values() for title in entry.presets if (title, "") not in found]
    columns = ["method", "bits a value", *(f"{length:,} tokens" for length in lengths), "points against exact"]
    return table(columns, rows) + (
        f"\n\nEmbedded model: right answers about one fact in a book's text, at every depth, in words never seen in "
        f"training. Every method answers the same {int(whole['questions']):,} questions; the last column is the "
        "difference to the exact cache in percentage points, with its 95 % interval; "
        + (f"not asked with these weights: {' · '.join(unasked)}; " if unasked else "")
        + f"{whole['device']}, torch {whole['torch']}, {whole['date']}. `python -m benchmarks.recall --data DIR`"
    )


def _plain(name: str, columns: dict[str, tuple[str, Callable[[str], str]]], caption: str) -> str:
    saved = read(RESULTS / f"{name}.csv")
    rows = [[show(row[column]) for column, (_, show) in columns.items()] for row in saved]
    first = saved[0]
    return table([label for label, _ in columns.values()], rows) + (
        f"\n\n{caption}; {first['device']}, torch {first['torch']}, {first['date']}. `python -m benchmarks.{name}`"
    )


TABLES = {
    "methods": methods,
    "attention": attention,
    "decode": decode,
    "agreement": agreement,
    "recall": recall,
    "gpu": lambda: gpu(RESULTS),
}


def render(readme: str) -> str:
    """`readme` with every table made anew. Raises: ValueError if a table has no place."""
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(readme):
            raise ValueError(f"README.md must have <!-- {name} --> and <!-- /{name} -->")
        made = make()
        readme = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", readme)
    return readme


def _short(value: str) -> str:
    return f"{float(value):.3g}"


def _small(value: str) -> str:
    return f"{float(value):.4f}"


def _percent(value: str) -> str:
    return f"{100 * float(value):.0f} %"


if __name__ == "__main__":
    README.write_text(render(README.read_text("utf-8")), "utf-8")

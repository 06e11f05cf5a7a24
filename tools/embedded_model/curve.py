"""The training curve: rows of a run, runs that go on from one another, and its picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

CURVE_FIELDS = (
    "step",
    "tokens",
    "length",
    "learning_rate_share",
    "train_loss",
    "held_out_loss",
    "recall_accuracy",
    "tokens_per_second",
)
WIDTH, HEIGHT, MARGIN = 720, 300, 56
# Okabe and Ito's palette: told apart by colour-blind readers.
SERIES = (
    ("train_loss", "training loss (weighted nats)", "#0072B2", 0.0, 6.0),
    ("held_out_loss", "held-out loss (weighted nats)", "#D55E00", 0.0, 6.0),
    ("recall_accuracy", "values copied right, unseen wordings", "#009E73", 0.0, 1.0),
)


def append_row(path: Path, values: Sequence[object]) -> None:
    """One report, in the order of `CURVE_FIELDS`."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([CURVE_FIELDS, values] if is_new else [values])


def read_curve(path: Path) -> list[dict[str, str]]:
    """All reports of a curve; none if a run ended before its first."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def whole_curve(path: Path, before: Path | None) -> str:
    """The curve of a run as CSV, behind that of the run it went on from: steps and tokens are counted through."""
    rows = read_curve(before) if before is not None else []
    steps, tokens = (int(rows[-1]["step"]), int(rows[-1]["tokens"])) if rows else (0, 0)
    for row in read_curve(path):
        rows.append(row | {"step": int(row["step"]) + steps, "tokens": int(row["tokens"]) + tokens})
    return "\n".join(",".join(map(str, line)) for line in (CURVE_FIELDS, *(row.values() for row in rows))) + "\n"


def curve_svg(rows: list[dict[str, str]]) -> str:
    """The training curve as SVG: losses on the left axis (0 to 6), recall on the right (0 to 1)."""
    last = max(float(row["tokens"]) for row in rows)

    def point(row: dict[str, str], name: str, low: float, high: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * float(row["tokens"]) / last
        share = min(1.0, max(0.0, (float(row[name]) - low) / (high - low)))
        return f"{x:.1f},{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for mark in range(7):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * mark / 6
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#dddddd"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#333333">{mark}</text>')
        parts.append(f'<text x="{WIDTH - MARGIN + 8}" y="{y + 4:.1f}" fill="#333333">{mark / 6:.2f}</text>')
    for index, (name, label, colour, low, high) in enumerate(SERIES):
        line = " ".join(point(row, name, low, high) for row in rows)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 205 * index}" y="24" fill="{colour}">{label}</text>')
    caption = f"tokens read, 0 to {last / 1e6:.1f} million"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 18}" text-anchor="middle" fill="#333333">{caption}</text></svg>')
    return "\n".join(parts) + "\n"

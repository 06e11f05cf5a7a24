"""Saved figures read, and tables of the README made: what every table needs."""

import csv
from collections.abc import Sequence
from pathlib import Path

Saved = dict[str, str]


def read(path: Path) -> list[Saved]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: str) -> str:
    return f"{float(value):.2f}×"

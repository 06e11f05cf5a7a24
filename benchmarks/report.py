"""How every benchmark says what it found: a table for people, a CSV with its conditions for programs."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch

from kvlens.engine.measure import conditions

RESULTS = Path(__file__).resolve().parent / "results"


def show(rows: Sequence[object]) -> None:
    """Print dataclass rows as a table; floats with three digits that matter."""
    cells = [[*asdict(rows[0])], *([_text(value) for value in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(flush=True)


def save(name: str, rows: Sequence[object], device: torch.device | str = "cpu") -> Path:
    """Write rows with their conditions to `results/<name>.csv`; gives the path."""
    if not rows or not is_dataclass(rows[0]):
        raise ValueError(f"rows must be dataclasses, at least one; got {rows!r}")
    path, given = RESULTS / f"{name}.csv", conditions(device)
    write(path, [asdict(row) | given for row in rows])
    print(f"saved {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}\n")
    return path


def write(path: Path, rows: Sequence[dict]) -> None:
    """A CSV of rows that have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value}"

"""A throughput lab as the one JSON string that an update of its tab is, and as a CSV file. Pure: no gradio."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kvlens.engine.estimate import most_tokens
from kvlens.ui import lab_text
from kvlens.ui.lab_plan import LabRun

if TYPE_CHECKING:
    from kvlens.engine.throughput import CellResult, Progress

_sequence = itertools.count(1)

SHOWN = (
    "status", "context_tokens", "batch_size", "step_ms", "step_ms_low", "step_ms_high", "tokens_per_second",
    "kv_bytes", "allocated_bytes", "device_peak_bytes", "num_steps", "measured_layers", "note",
)  # fmt: skip
"""What the page shows of a cell."""


def build(
    run: LabRun | None, *, offer: dict[str, Any] | None = None, progress: "Progress | None" = None, notice: str = ""
) -> str:
    """The payload of one update: complete, so that one that is lost is made good by the next.

    Without a run it carries what is offered and a notice, and the picture stays.
    """
    payload: dict[str, Any] = {"sequence": next(_sequence), "notice": notice, "state": run.state if run else "idle"}
    if offer is not None:
        payload["offer"] = offer
    if run is not None:
        payload["run"] = _run(run)
        payload["progress"] = _progress(run, progress)
    return json.dumps(payload, separators=(",", ":"))


def _run(run: LabRun) -> dict[str, Any]:
    plan = run.plan
    return {
        "subject": run.subject,
        "scope": run.scope,
        "num_layers": run.shape.num_layers if run.shape else None,
        "limit_bytes": plan.limit_bytes,
        "contexts": plan.contexts,
        "batch_sizes": plan.batch_sizes,
        "methods": [
            {"method": one.method, "label": one.preset, "most_tokens": _capacity(run, index)}
            for index, one in enumerate(plan.choices)
        ],
        "cells": [[_index(run, cell), *(getattr(cell, name) for name in SHOWN)] for cell in run.results],
        "columns": ["method", *SHOWN],
        "conditions": run.conditions,
        "findings": findings(run.results, run.plan.limit_bytes) if run.is_over else [],
    }


def _index(run: LabRun, cell: "CellResult") -> int:
    return [(one.method, one.preset) for one in run.plan.choices].index((cell.method, cell.label))


def _capacity(run: LabRun, index: int) -> int | None:
    """Tokens of one sequence that the budget holds, by formula."""
    if run.shape is None:
        return None
    candidate = run.plan.candidates()[index]
    try:
        return most_tokens(run.shape, candidate.method, candidate.config, limit_bytes=run.plan.limit_bytes)
    except ValueError:
        return None


def _progress(run: LabRun, progress: "Progress | None") -> dict[str, Any]:
    cell = progress.cell if progress else None
    return {
        "done": len(run.results),
        "total": run.plan.num_cells,
        "cell": [cell.candidate.label, cell.context_tokens, cell.batch_size] if cell else None,
        "seconds_left": progress.seconds_left if progress else None,
    }


# ---------------------------------------------------------------------- what it means


def findings(results: "Sequence[CellResult]", limit_bytes: int) -> list[str]:
    """What the figures say, in sentences. Only of cells that were measured or did not fit."""
    measured = [cell for cell in results if cell.status == "measured"]
    said = []
    if measured:
        said.append(lab_text.fastest(max(measured, key=lambda cell: cell.tokens_per_second)))
    if pair := _largest_pair(results, "over budget"):
        said.append(lab_text.only_fits(*pair, limit_bytes))
    if pair := _largest_pair(results, "measured"):
        said.append(lab_text.compared(*pair))
    if any(cell.status == "skipped" for cell in results):
        said.append(lab_text.SKIPPED)
    return said


def _largest_pair(results: "Sequence[CellResult]", status: str) -> "tuple[CellResult, CellResult] | None":
    """The exact cell with `status` that holds the most tokens, and the fastest compressed one of its size."""
    by_size: dict[tuple[int, int], list[CellResult]] = {}
    for cell in results:
        by_size.setdefault((cell.context_tokens, cell.batch_size), []).append(cell)
    for _, cells in sorted(by_size.items(), key=lambda entry: entry[0][0] * entry[0][1], reverse=True):
        exact = next((cell for cell in cells if cell.method == "dense" and cell.status == status), None)
        others = [cell for cell in cells if cell.method != "dense" and cell.status == "measured"]
        if exact is not None and others:
            return exact, max(others, key=lambda cell: cell.tokens_per_second)
    return None


# ---------------------------------------------------------------------- the file


def to_csv(run: LabRun) -> str:
    """One row a cell, every row with its conditions. Raises: ValueError if nothing was measured."""
    from kvlens.engine.throughput import CellResult

    if not run.results:
        raise ValueError(lab_text.NOTHING_TO_SAVE)
    given = {
        "model": run.subject,
        "measured": lab_text.SCOPES[run.scope],
        "budget_bytes": run.plan.limit_bytes,
        **run.conditions,
    }
    file = io.StringIO()
    writer = csv.DictWriter(file, [*(entry.name for entry in fields(CellResult)), *given])
    writer.writeheader()
    writer.writerows(asdict(cell) | given for cell in run.results)
    return file.getvalue()

"""The error panel's pictures: which numbers, pooled to the screen, coded in one byte a cell.

A cell's byte is 0 to 254 over the range shared by all lanes; 255 says that the cell is still exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvlens.engine.trace import ErrorSnapshot, RunLog

MAX_COLUMNS = 256
EXACT_CELL = 255
KINDS = ("keys", "values")
FIGURES = ("tokens", "channels", "heads")
QUANTITIES = ("magnitude", "rebuilt", "error")


@dataclass(frozen=True)
class View:
    """What the error and the atoms panel look at.

    `layer` comes under the microscope with the next run; None leaves it as it is. `token` is the one taken apart into
    atoms; None follows the newest.
    """

    kind: str = "keys"
    figure: str = "tokens"
    quantity: str = "magnitude"
    layer: int | None = None
    head: int = 0
    token: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("figure", FIGURES), ("quantity", QUANTITIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if not (0 <= (self.layer or 0) < 1024 and 0 <= self.head < 1024):
            raise ValueError(f"layer and head must lie between 0 and 1023; got {self.layer}, {self.head}")
        if not 0 <= (self.token or 0) < 2**31:
            raise ValueError(f"token must not be negative; got {self.token}")


def nice_ceiling(value: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, ... so that a shared range moves in steps, not with every token."""
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{factor * power:.12g}") for factor in (1, 2, 5, 10) if value <= factor * power * 1.0001)


def pool_columns(grid: np.ndarray, reduce: Callable) -> tuple[np.ndarray, int]:
    """At most `MAX_COLUMNS` columns, each `reduce` over neighbouring tokens. NaN only where all are NaN."""
    width = math.ceil(grid.shape[1] / MAX_COLUMNS)
    if width <= 1:
        return grid, 1
    count = math.ceil(grid.shape[1] / width)
    padded = np.full((grid.shape[0], count * width), np.nan, dtype=np.float32)
    padded[:, : grid.shape[1]] = grid
    blocks = padded.reshape(grid.shape[0], count, width)
    filled = np.where(np.isnan(blocks), -np.inf if reduce is np.max else 0, blocks)
    numbers = np.isfinite(blocks).sum(2)
    pooled = filled.max(2) if reduce is np.max else filled.sum(2) / np.maximum(1, numbers)
    return np.where(numbers > 0, pooled, np.nan).astype(np.float32), width


def root_mean_square(values: np.ndarray, axis: int) -> np.ndarray:
    """Over the numbers that are there; NaN where there are none."""
    is_number = np.isfinite(values)
    squares = np.where(is_number, values, 0) ** 2
    counts = is_number.sum(axis)
    return np.where(counts > 0, np.sqrt(squares.sum(axis) / np.maximum(1, counts)), np.nan)


def grid_of(errors: ErrorSnapshot, view: View) -> np.ndarray | None:
    """The picture's cells before pooling: `[rows, columns]`, NaN where exact; None if not recorded."""
    kind = KINDS.index(view.kind)
    if view.figure == "tokens":
        return root_mean_square(errors.by_token[kind], axis=1)
    if view.figure == "heads":
        return errors.by_head[kind]
    if errors.exact is None or errors.rebuilt is None:
        return None
    head = min(view.head, errors.exact.shape[1] - 1)
    exact, rebuilt = errors.exact[kind, head].T, errors.rebuilt[kind, head].T
    if view.quantity == "magnitude":
        return np.abs(exact)
    is_exact = np.zeros(exact.shape[1], dtype=bool)
    packed = np.isnan(errors.by_token[kind, errors.probed_layer, head])
    is_exact[: len(packed)] = packed[: exact.shape[1]]
    if view.quantity == "rebuilt":
        return np.where(is_exact[None], np.nan, np.abs(rebuilt))
    return np.where(is_exact[None], np.nan, np.abs(exact - rebuilt))


def code_cells(grid: np.ndarray, top: float) -> np.ndarray:
    coded = np.clip(np.nan_to_num(grid, posinf=top) / top * (EXACT_CELL - 1), 0, EXACT_CELL - 1).round()
    return np.where(np.isnan(grid), EXACT_CELL, coded).astype(np.uint8)


def shared_top(log: RunLog, view: View) -> float:
    """One range for all lanes, and for keys and values of the relative errors, so that colours compare."""
    kinds = (view.kind,) if view.figure == "channels" else KINDS
    tops = []
    for lane in log.lanes:
        for kind in kinds:
            grid = grid_of(lane.errors, View(**{**vars(view), "kind": kind})) if lane.errors else None
            numbers = np.empty(0) if grid is None else grid[np.isfinite(grid)]
            if numbers.size:
                tops.append(float(np.percentile(numbers, 99.8)))
    return nice_ceiling(max(tops, default=0.0))


def mean_error(errors: ErrorSnapshot, kind: int) -> float | None:
    """Over the tokens that were packed; None if there are none. An infinite one would be no JSON."""
    values = errors.by_token[kind]
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if numbers.size else None


def errors_payload(log: RunLog, view: View, encode: Callable[[np.ndarray, str], dict]) -> dict:
    """Cells of each compressed lane under one shared range, with what the axes need."""
    lanes, top = [], shared_top(log, view)
    recorded = [lane for lane in log.lanes if lane.errors is not None and lane.method != "dense"]
    for lane in recorded:
        grid = grid_of(lane.errors, view)
        entry = {
            "id": lane.lane_id,
            "means": [mean_error(lane.errors, kind) for kind in range(2)],
            "num_tokens": int(lane.errors.by_token.shape[-1]),
        }
        if grid is not None:
            is_peak = view.figure == "channels"
            pooled, width = (grid, 1) if view.figure == "heads" else pool_columns(grid, np.max if is_peak else np.mean)
            entry |= {"cells": encode(code_cells(pooled, top), "u1"), "column_tokens": width}
        lanes.append(entry)
    shape = recorded[0].errors.by_token.shape if recorded else None
    return {
        "top": top,
        "lanes": lanes,
        "num_layers": int(shape[1]) if shape else None,
        "num_heads": int(shape[2]) if shape else None,
        "probed_layer": recorded[0].errors.probed_layer if recorded else None,
    }

"""Every sentence of the Throughput tab, as `text.py` has those of the rest of the page."""

from kvlens.ui.units import bytes_text, count_text

NOT_WHOLE = "What to measure did not arrive whole; reload the page."
NOTHING_CHOSEN = "Choose at least one method, one context and one batch size."
UNKNOWN_PRESET = "There is no {preset!r} of {method!r} on this page; reload it."
UNKNOWN_SUBJECT = "The model must be the one that is served or one of {names}."
NOT_OFFERED = "Contexts and batch sizes must be among those that the page offers; reload it."
NOTHING_TO_SAVE = "There is nothing measured to save yet. Press Measure first."
MODEL_LOADING = "The model is loading; the measurement starts by itself."
NO_MODEL = "No model is loaded. Choose one in the header, or measure a shape."
SKIPPED = "The time of one measurement was over before its last cells: choose fewer, or run KVLens yourself."
SCOPES = {
    "network": "whole decode step of the network",
    "attention": "attention only, per layer × all layers, random tensors",
}


def too_many(cells: int, limit: int) -> str:
    return f"These choices make {count_text(cells)} cells, and one measurement takes up to {limit}. Choose fewer."


def budget_out_of_range(limit_bytes: int) -> str:
    return f"The KV budget must lie between 1 MB and {bytes_text(limit_bytes)} on this page."


def size(cell) -> str:
    return f"{count_text(cell.context_tokens)} tokens × {cell.batch_size}"


def fastest(cell) -> str:
    return f"Most tokens/s: {cell.label} with {cell.tokens_per_second:,.0f}, at {size(cell)}."


def only_fits(exact, other, limit_bytes: int) -> str:
    return (
        f"At {size(exact)} {exact.label} would take {bytes_text(exact.kv_bytes)} and does not fit the "
        f"{bytes_text(limit_bytes)}; {other.label} takes {bytes_text(other.kv_bytes)} and makes "
        f"{other.tokens_per_second:,.0f} tokens/s."
    )


def compared(exact, other) -> str:
    ratio = other.tokens_per_second / exact.tokens_per_second
    return (
        f"The largest cell where both run is {size(exact)}: {other.label} makes {ratio:.2f}× the tokens/s of "
        f"{exact.label} with {exact.kv_bytes / other.kv_bytes:.1f}× fewer bytes."
    )


CLIENT = {
    "title": "Throughput",
    "subtitle": "decode steps of real batches, measured here and now",
    "intro": (
        "A server answers many people at once. Each of their sequences keeps its own cache, so memory runs out long "
        "before arithmetic does. Choose methods, context lengths and batch sizes: every cell is a real cache of the "
        "whole batch, filled, stepped and timed on this machine."
    ),
    "subject": "Model",
    "served": "{name} (served)",
    "shape": "{name} (shape)",
    "shape_hint": (
        "No weights, no download: random tensors in the shape of {name}. On a GPU with room the whole network runs "
        "with random weights; elsewhere attention and cache alone do, some layers standing for all {layers}."
    ),
    "methods": "Methods",
    "contexts": "Tokens of each sequence",
    "batch_sizes": "Sequences in a batch",
    "budget": "KV budget",
    "budget_auto": "half of what fp16 takes in the largest cell",
    "budget_whole": "what fp16 takes in this cell",
    "budget_own": "your own figure",
    "budget_reset": "back to automatic",
    "cells": "{n} cells",
    "too_many": "{n} cells; up to {limit} here",
    "measure": "Measure",
    "stop": "Stop",
    "waiting": "Waiting for the engine: another run goes first.",
    "starting": "Preparing …",
    "progress": "Cell {n} of {total}: {label}, {context} × {batch}",
    "left": "about {time} left",
    "done": "{n} cells measured",
    "stopped": "Stopped after {n} of {total} cells",
    "save": "Save as CSV",
    "empty": "Nothing is measured yet.",
    "empty_hint": "Press Measure: the default choice takes well under a minute on two cores.",
    "conditions": "{subject} · {device} · torch {torch} · {date} · budget {budget}",
    "attention_only": "Attention only: {measured} of {layers} layers measured, times and bytes × {layers} layers.",
    "quantities": {
        "tokens_per_second": "tokens/s",
        "step_ms": "ms a step",
        "kv_bytes": "KV bytes",
        "ratio": "× fp16",
    },
    "grid": "Every cell",
    "grid_subtitle": "rows: tokens of each sequence · columns: sequences",
    "over": "over budget",
    "over_cell": "needs {bytes}",
    "over_help": "{label} at {context} × {batch}: {bytes} by formula, over the budget of {limit}. Not measured.",
    "not_served": "cannot run",
    "skipped": "no time",
    "fits": "{n} tokens fit the budget",
    "fits_help": "By formula, all in one sequence.",
    "over_batch": "Tokens/s over the batch",
    "over_context": "One step over the context",
    "over_tokens": "KV bytes over tokens held",
    "at_context": "at",
    "at_batch": "batch",
    "batch_axis": "sequences in the batch",
    "context_axis": "tokens of each sequence",
    "tokens_axis": "tokens held by the whole batch",
    "speed_axis": "tokens/s of the batch",
    "step_axis": "ms a step",
    "attention_suffix": " (attention only)",
    "bytes_axis": "KV bytes",
    "budget_line": "budget",
    "out_of_budget": "× does not fit the budget",
    "formula": "open: by formula, not measured",
    "spread": "bars: quartiles",
    "table": "All figures as a table",
    "columns": {
        "label": "method",
        "context_tokens": "tokens",
        "batch_size": "batch",
        "tokens_per_second": "tokens/s",
        "step_ms": "ms a step",
        "spread": "quartiles",
        "kv_bytes": "KV bytes",
        "allocated_bytes": "allocated",
        "device_peak_bytes": "device peak",
        "num_steps": "steps",
        "note": "remark",
    },
    "how_title": "How this is measured",
    "how": [
        "A cell is one cache of the whole batch. A random prompt (keys with large channels, as models have them) is "
        "appended and packed by the method itself; every sequence has its own storage.",
        "Then {warm} steps are taken uncounted and up to {steps} counted, by the same step as the chat: the last "
        "{round} before the context is full, again and again. The figure is the median, the spread its quartiles. Slow "
        "cells take fewer rounds, at least one.",
        "Tokens/s count the whole batch: one step gives every sequence one token. Filling the cache and choosing "
        "tokens are not in the clock.",
        "KV bytes are summed from the real tensors at the end of the steps. A cell over the budget is not measured; "
        "its bytes are then by formula, which equals the real bytes to the byte.",
        "Attention-only figures leave out the weights, which every method reads alike. A real network is slower by "
        "the same amount for all, so differences shrink there. The processor's cache is emptied before each step.",
    ],
}

"""Peak memory: of steady decode above weights and stored keys and values, and of a prompt on its way in.

By torch's allocator: `scratch_mib` is its peak from the first step on, warm-up and capture of the graph included, less
what was allocated before the cache (the weights) and what the cache has reserved; `steady_scratch_mib` the same over
later steps, where a graph's own memory no longer counts as allocated. Both are empty without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.plan import LANES, Plan
from benchmarks.gpu.session import Deadline, Results, attempt, release
from benchmarks.gpu.steps import how, new_model
from kvlens.engine.bench import Candidate, Cell, NetworkBench
from kvlens.engine.cache import KVCache
from kvlens.engine.generate import prefill
from kvlens.engine.model import LoadedModel
from kvlens.engine.throughput import ROUND_STEPS, FilledCell

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """`stored_mib` is live, `reserved_mib` what the cache has allocated. `phase`: "decode" or "prompt"."""

    model: str
    phase: str
    batch: int
    context: int
    method: str
    how: str
    weights_mib: float
    stored_mib: float
    reserved_mib: float
    scratch_mib: float | None
    steady_scratch_mib: float | None


def run(plan: Plan, device: torch.device, results: Results, deadline: Deadline) -> None:
    model = new_model(plan.memory, device)
    for batch, context in plan.memory.sizes:
        for candidate in LANES:
            what = f"{candidate.label}, batch {batch}, {context:,} tokens"
            if deadline.allows(what):
                with attempt(what):
                    results.add([_of_decode(model, candidate, batch, context)])
                release(device)
    for candidate in LANES:
        what = f"{candidate.label}, a prompt of {plan.prefill_tokens:,} tokens"
        if deadline.allows(what):
            with attempt(what):
                results.add([_of_prompt(model, candidate, plan.prefill_tokens)])
            release(device)


def _of_decode(model: LoadedModel, candidate: Candidate, batch: int, context: int) -> Row:
    before = _allocated(model.device)
    cell = FilledCell(NetworkBench(model), Cell(candidate, context, batch))
    try:
        for _ in cell.fill():
            pass
        peaks = []
        for _ in range(2):
            _forget_peak(model.device)
            for _ in range(ROUND_STEPS):
                cell.step()
            peaks.append(_peak(model.device))
        return _row(model, "decode", candidate, cell.cache, batch, context, before, peaks)
    finally:
        cell.close()


def _of_prompt(model: LoadedModel, candidate: Candidate, num_tokens: int) -> Row:
    before = _allocated(model.device)
    cache = model.new_cache(candidate.method, candidate.config)
    try:
        _forget_peak(model.device)
        for _ in prefill(model, cache, [40] * num_tokens):
            pass
        return _row(model, "prompt", candidate, cache, 1, num_tokens, before, [_peak(model.device), None])
    finally:
        cache.free()


def _row(
    model: LoadedModel, phase: str, candidate: Candidate, cache: KVCache, batch: int, context: int, before: int | None,
    peaks: Sequence[int | None],
) -> Row:  # fmt: skip
    footprint = cache.footprint()
    held = footprint.reserved_bytes + footprint.checkpoint_bytes
    scratch = (None if peak is None else (peak - before - held) / MIB for peak in peaks)
    return Row(
        model.name, phase, batch, context, candidate.label, how(model, cache), model.weight_bytes / MIB,
        footprint.live_bytes / MIB, footprint.reserved_bytes / MIB, *scratch,
    )  # fmt: skip


def _allocated(device: torch.device) -> int | None:
    release(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _forget_peak(device: torch.device) -> None:
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

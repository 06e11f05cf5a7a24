"""Whole decode steps of networks with random weights: our lanes as CUDA graphs and without, Hugging Face's caches.

A cell is filled, stepped and read as in the page's throughput lab (`engine/throughput.py`). As many cells as the
memory holds take turns; the dense lane as a graph is what the others are compared with. A step must read the weights
and what is stored: `limit` is the ratio of these bytes.
"""

import copy
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import rivals
from benchmarks.gpu.plan import COMPACT, DENSE, KIVI_2, LANES, Network, Plan
from benchmarks.gpu.session import Deadline, Results, attempt, release
from benchmarks.gpu.timing import copy_gigabytes_per_second
from benchmarks.rivals import Rival
from kvlens.engine.architectures import random_model
from kvlens.engine.bench import Candidate, Cell, NetworkBench
from kvlens.engine.cache import KVCache
from kvlens.engine.graph import GraphStep
from kvlens.engine.model import LoadedModel
from kvlens.engine.throughput import ROUND_STEPS, FilledCell, needed_bytes

_SPARE_BYTES = 6 * 2**30
"""Kept free beside the cells that are held at once: logits, scratch, a layer in its exact form while it is packed."""

_MOST_CODED = 2**25
"""Vectors of a prompt that a pursuit codes in a benchmark's time; a cell with more is left out."""


@dataclass(frozen=True)
class Row:
    """`how`: "graph", or why not. `kv_mb` is live; `share_of_copy`: what a step reads a second, against copying."""

    model: str
    batch: int
    context: int
    method: str
    how: str
    step_ms: float
    step_ms_low: float | None
    step_ms_high: float | None
    tokens_per_s: float
    times_dense: float | None
    limit: float
    kv_mb: float
    share_of_copy: float


@dataclass(frozen=True)
class Lane:
    candidate: Candidate
    bench: NetworkBench

    @property
    def takes_graphs(self) -> bool:
        return self.bench.model.short_step is not None


@dataclass(frozen=True)
class Found:
    """Milliseconds and live bytes of a method's step."""

    method: str
    how: str
    times: list[float]
    kv_bytes: int


def run(plan: Plan, device: torch.device, results: Results, deadline: Deadline) -> None:
    measuring = _Measuring(device, plan.num_turns, results, deadline, copy_gigabytes_per_second(device))
    for network in plan.networks:
        with attempt(network.architecture.name):
            measuring.lanes_and_rivals(network)
        release(device)
    if device.type == "cuda":
        with attempt("torch.compile"):
            measuring.compiled(plan.networks[0])


def new_model(network: Network, device: torch.device) -> LoadedModel:
    """Its random weights on the device, and what its loading has to say."""
    model = random_model(network.architecture, device, torch.float16 if device.type == "cuda" else torch.float32)
    for notice in model.notices:
        print(f"  {notice}")
    return model


def without_graphs(model: LoadedModel) -> LoadedModel:
    """The same network, every step of which goes through transformers, operation by operation."""
    twin = copy.copy(model)
    twin.short_step = None
    return twin


def how(model: LoadedModel, cache: KVCache) -> str:
    """Whether steps of `cache` are a graph, and if not why."""
    if not isinstance(model.short_step, GraphStep):
        return "eager"
    if cache.step_key() is None:
        return "eager (this method has no step on the device)"
    reason = model.short_step.reason(cache)
    return "graph" if reason is None else f"eager ({reason})"


@dataclass
class _Measuring:
    """The networks one after the other. `dense` remembers the dense lane's step by model, batch and context."""

    device: torch.device
    num_turns: int
    results: Results
    deadline: Deadline
    copied: float
    dense: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def lanes_and_rivals(self, network: Network) -> None:
        if not self.deadline.allows(network.architecture.name):
            return
        model = new_model(network, self.device)
        for batch, context in network.sizes:
            lanes = _lanes(model, batch, context)
            self._add(model, batch, context, in_turns(lanes, batch, context, self.num_turns, self.deadline))
            others = [rivals.static(), *rivals.available()]
            self._add(model, batch, context, self._rivals(model, batch, context, others))

    def compiled(self, network: Network) -> None:
        """Takes a minute for each size, so it comes last."""
        if not self.deadline.allows("torch.compile"):
            return
        model = new_model(network, self.device)
        for batch, context in network.sizes:
            others = [rivals.static(is_compiled=True)]
            self._add(model, batch, context, self._rivals(model, batch, context, others))

    def _rivals(self, model: LoadedModel, batch: int, context: int, others: Sequence[Rival]) -> Iterator[Found]:
        for rival in others:
            if self.deadline.allows(f"{rival.name}, batch {batch}, {context:,} tokens"):
                with attempt(rival.name):
                    step_ms, kv_bytes = rivals.measure(rival, model, context, batch)
                    yield Found(rival.name, "transformers", [step_ms], kv_bytes)
                release(self.device)

    def _add(self, model: LoadedModel, batch: int, context: int, finding: Iterator[Found]) -> None:
        found: list[Found] = []
        try:
            found.extend(finding)
        finally:  # what was found counts, whatever ended it
            if found and found[0].method == DENSE.label:
                self.dense[model.name, batch, context] = statistics.median(found[0].times)
            dense_ms = self.dense.get((model.name, batch, context))
            self.results.add([_row(model, batch, context, entry, dense_ms, self.copied) for entry in found])
            release(self.device)


def _lanes(model: LoadedModel, batch: int, context: int) -> list[Lane]:
    graphs, eager = NetworkBench(model), NetworkBench(without_graphs(model))
    lanes = [Lane(candidate, graphs) for candidate in LANES]
    num_vectors = batch * context * model.shape.values_per_token // model.shape.head_dim
    if num_vectors <= _MOST_CODED:
        lanes.append(Lane(COMPACT, graphs))
    if model.short_step is not None:
        lanes += [Lane(candidate, eager) for candidate in (DENSE, KIVI_2)]
    return lanes


def in_turns(lanes: Sequence[Lane], batch: int, context: int, num_turns: int, deadline: Deadline) -> Iterator[Found]:
    """As many lanes as the memory holds are filled and take turns of a few steps; then the next ones."""
    waiting = deque(lanes)
    while waiting:
        held: list[tuple[Lane, FilledCell]] = []
        try:
            while waiting and (not held or _has_room(waiting[0], batch, context)):
                lane, others = waiting.popleft(), len(held)
                if deadline.allows(lane.candidate.label):
                    with attempt(lane.candidate.label):
                        held.append((lane, _filled(lane, batch, context)))
                    if others == len(held) > 0:  # it may lack the memory that the others hold
                        waiting.appendleft(lane)
                        break
            for turn in range(num_turns):
                for lane, cell in held:
                    if turn == 0 or (lane.takes_graphs and deadline.allows(f"turn {turn + 1}")):
                        with attempt(lane.candidate.label):
                            for _ in range(ROUND_STEPS):
                                cell.step()
            for lane, cell in held:
                if cell.times:
                    yield Found(
                        lane.candidate.label, how(lane.bench.model, cell.cache), cell.times,
                        cell.cache.footprint().live_bytes,
                    )  # fmt: skip
        finally:
            for lane, cell in held:
                cell.close()
                release(lane.bench.device)


def _filled(lane: Lane, batch: int, context: int) -> FilledCell:
    cell = FilledCell(lane.bench, Cell(lane.candidate, context, batch))
    try:
        for _ in cell.fill():
            pass
    except BaseException:
        cell.close()
        raise
    return cell


def _has_room(lane: Lane, batch: int, context: int) -> bool:
    if lane.bench.device.type != "cuda":
        return True
    release(lane.bench.device)
    free, _ = torch.cuda.mem_get_info(lane.bench.device)
    return needed_bytes(lane.bench.shape, Cell(lane.candidate, context, batch)) + _SPARE_BYTES < free


def _row(model: LoadedModel, batch: int, context: int, entry: Found, dense_ms: float | None, copied: float) -> Row:
    step_ms = statistics.median(entry.times)
    low, _, high = statistics.quantiles(entry.times, n=4) if len(entry.times) > 1 else (None, None, None)
    dense_bytes = model.weight_bytes + batch * model.shape.fp16_bytes(context)
    read_bytes = model.weight_bytes + entry.kv_bytes
    return Row(
        model.name, batch, context, entry.method, entry.how, step_ms, low, high, 1000 * batch / step_ms,
        dense_ms and dense_ms / step_ms, dense_bytes / read_bytes, entry.kv_bytes / 1e6,
        read_bytes / step_ms / 1e6 / copied,
    )  # fmt: skip

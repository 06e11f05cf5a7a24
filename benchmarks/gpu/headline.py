"""The paper's headline: the same memory for every side, and as many sequences as it takes.

Setting of the authors' `mem_spd_test.py`: a prompt of 160 tokens and 338 new ones; the baseline is Hugging Face's fp16
DynamicCache, operation by operation. Memory is bounded as a smaller card would bound it: the allocator may take the
budget and no more. The batch comes from a search whose every answer is an allocation with decode steps at full length.

Throughput counts new tokens over the time of all decode steps, and of the prompt besides. Prompts of every side are
timed apart, some sequences at a time: their forward pass and, for us, packing. What a cache holds is a function of its
length, so our caches are then filled by untimed steps, Hugging Face's by its `update`.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks import rivals
from benchmarks.gpu.plan import DENSE, KIVI_2, KIVI_2_SHORT, Headline, Network, Plan
from benchmarks.gpu.session import Deadline, Results, attempt, release
from benchmarks.gpu.steps import how, new_model
from kvlens.engine.bench import Candidate
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import OutOfMemory
from kvlens.engine.estimate import estimate
from kvlens.engine.generate import forward_batch
from kvlens.engine.measure import Stopwatch
from kvlens.engine.model import LoadedModel

BASELINE = "Hugging Face fp16, DynamicCache, sdpa"

PROMPT_ROWS = 16
"""Sequences whose prompts go through the network together."""

_PROBE_STEPS = 3
_TRIES = 10
_CLOSE_ENOUGH = 1.01


@dataclass(frozen=True)
class Row:
    """`decode_tokens_per_s` without the prompts; `steps` counts the timed ones, less than asked for if time ran out.

    `times_batch` and `times_throughput` are against the baseline, the last column against our dense lane.
    """

    model: str
    budget_gb: float
    prompt: int
    output: int
    method: str
    how: str
    batch: int
    peak_gb: float
    kv_gb: float
    steps: int
    step_ms: float
    prompt_ms_per_sequence: float
    decode_tokens_per_s: float
    tokens_per_s: float
    times_batch: float | None
    times_throughput: float | None
    times_dense_throughput: float | None


class Sequences(Protocol):
    """A batch of sequences of one side, in real memory."""

    how: str

    def fill(self, num_tokens: int) -> None:
        """So many tokens of each sequence, untimed."""

    def step(self) -> None:
        """One more token of each."""

    def held_bytes(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Side:
    """`open` gives an empty batch of sequences, which takes the most memory from `probe_tokens` tokens on."""

    name: str
    bytes_per_sequence: int
    probe_tokens: int
    open: Callable[[int], Sequences]
    read_prompts: Callable[[int, int], None]


def run(plan: Plan, device: torch.device, results: Results, deadline: Deadline) -> None:
    setting = plan.headline
    model = new_model(Network(setting.architecture, ()), device)
    weights = _held_now(device) or model.weight_bytes
    with _bounded(setting.budget_bytes, device):
        rows: list[Row] = []
        for side in sides(model, setting, setting.budget_bytes - weights):
            if deadline.allows(side.name):
                with attempt(side.name):
                    rows.append(measure(side, model, setting, weights, deadline, rows))
                    results.add(rows[-1:])
                release(device)


def sides(model: LoadedModel, setting: Headline, kv_budget: int) -> Iterator[Side]:
    total = setting.prompt + setting.output
    fp16 = model.shape.fp16_bytes(total)
    yield Side(
        BASELINE, fp16, total - _PROBE_STEPS,
        lambda batch: _TheirSequences(model, batch), lambda rows, tokens: _their_prompts(model, rows, tokens),
    )  # fmt: skip
    for candidate in (DENSE, KIVI_2_SHORT, KIVI_2):
        per_sequence = estimate(model.shape, candidate.method, candidate.config, num_tokens=total).live_bytes
        yield Side(
            candidate.label, per_sequence, 0,
            lambda batch, own=candidate: _OurSequences(model, own, batch, total, kv_budget),
            lambda rows, tokens, own=candidate: _our_prompts(model, own, rows, tokens),
        )  # fmt: skip


def measure(
    side: Side, model: LoadedModel, setting: Headline, weights: int, deadline: Deadline, others: Sequence[Row]
) -> Row:
    """Search, generate, and compare with the `others`. Raises: OutOfMemory where not even one sequence fits."""
    device, room = model.device, setting.budget_bytes - weights
    batch = largest_batch(
        lambda count: _probe(side, count, device, weights, setting.budget_bytes),
        first=int(0.9 * room / side.bytes_per_sequence), fixed=weights, limit=setting.budget_bytes,
        step=setting.batch_step,
    )  # fmt: skip
    prompt_ms = _prompt_milliseconds(side, setting.prompt, device)
    while batch > 0:
        try:
            made = _generate(side, batch, setting, device, weights, deadline)
            break
        except (
            torch.OutOfMemoryError,
            OutOfMemory,
        ):  # memory that has been cut into pieces on the way holds less than it seems
            batch = int(0.97 * batch) // setting.batch_step * setting.batch_step
    else:
        raise OutOfMemory(f"not even {setting.batch_step} sequences fit {setting.budget_bytes / 1e9:g} GB")
    decode_s, tokens = sum(made.times) / 1000, batch * len(made.times)
    # Prompts are read for all the steps asked for, so those of a run that was cut count in part.
    prompt_s = prompt_ms * batch / 1000 * len(made.times) / setting.output
    speed = tokens / (decode_s + prompt_s)
    baseline, dense = (next((row for row in others if row.method == name), None) for name in (BASELINE, DENSE.label))
    return Row(
        model.name, setting.budget_bytes / 1e9, setting.prompt, setting.output, side.name, made.how, batch,
        made.peak_bytes / 1e9, made.kv_bytes / 1e9, len(made.times), statistics.median(made.times), prompt_ms,
        tokens / decode_s, speed, baseline and batch / baseline.batch,
        baseline and speed / baseline.tokens_per_s, dense and speed / dense.tokens_per_s,
    )  # fmt: skip


@dataclass(frozen=True)
class _Generated:
    """Milliseconds of the timed steps, and what they took."""

    times: list[float]
    kv_bytes: int
    peak_bytes: int
    how: str


def _generate(
    side: Side, batch: int, setting: Headline, device: torch.device, weights: int, deadline: Deadline
) -> _Generated:
    times: list[float] = []
    with _opened(side, batch, device) as sequences:
        sequences.fill(setting.prompt)
        while len(times) < setting.output and (not times or deadline.allows(f"step {len(times)} of {side.name}")):
            watch = Stopwatch()
            with watch.measure(device):
                sequences.step()
            times.append(watch.milliseconds)
        return _Generated(times, sequences.held_bytes(), _peak_bytes(device, weights, sequences), sequences.how)


def largest_batch(peak_of: Callable[[int], int | None], *, first: int, fixed: int, limit: int, step: int) -> int:
    """The largest batch, a multiple of `step`, that was seen to fit; 0 if none was.

    `peak_of` gives the bytes that a batch really took at its peak, or None where it did not fit. What a sequence takes
    beyond the `fixed` bytes says which batch to try next.
    """
    fits, too_large = 0, None
    batch = max(step, first // step * step)
    for _ in range(_TRIES):
        peak = peak_of(batch)
        if peak is None:
            too_large = batch
            guess = batch * 0.85 if fits == 0 else (fits + batch) / 2
        else:
            fits = batch
            guess = (limit - fixed) * batch / max(1, peak - fixed) if too_large is None else (fits + too_large) / 2
        next_batch = int(guess) // step * step
        if too_large is not None:
            next_batch = min(next_batch, too_large - step)
        if next_batch < step or next_batch <= fits or (fits and next_batch < fits * _CLOSE_ENOUGH):
            break
        batch = next_batch
    return fits


def _probe(side: Side, batch: int, device: torch.device, weights: int, limit: int) -> int | None:
    """Peak bytes of some steps of the longest sequences, or None where they do not fit."""
    try:
        with _opened(side, batch, device) as sequences:
            sequences.fill(side.probe_tokens)
            for _ in range(_PROBE_STEPS):
                sequences.step()
            peak = _peak_bytes(device, weights, sequences)
    except (torch.OutOfMemoryError, OutOfMemory, MemoryError):
        return None
    return peak if peak <= limit else None


@contextmanager
def _opened(side: Side, batch: int, device: torch.device) -> Iterator[Sequences]:
    """Sequences that are closed and whose memory is given back, whatever happens; peaks are counted from here."""
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sequences = side.open(batch)
    try:
        yield sequences
    finally:
        sequences.close()
        del sequences
        release(device)


@contextmanager
def _bounded(budget_bytes: int, device: torch.device) -> Iterator[None]:
    """Within it the allocator takes no more than the budget."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if budget_bytes > total:
        print(f"  this device has {total / 1e9:.0f} GB, less than the budget of {budget_bytes / 1e9:g}")
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _held_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak_bytes(device: torch.device, weights: int, sequences: Sequences) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else weights + sequences.held_bytes()


def _prompt_milliseconds(side: Side, num_tokens: int, device: torch.device) -> float:
    """Of one sequence's prompt where `PROMPT_ROWS` go together: the median of three, after one that warms up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        side.read_prompts(PROMPT_ROWS, num_tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin) / PROMPT_ROWS)
    release(device)
    return statistics.median(times[1:])


# ---------------------------------------------------------------------- the two kinds of sequences


class _TheirSequences:
    """Its cache is a larger tensor at every step, so it gets the allocator's setting for tensors that grow."""

    how = "transformers"

    def __init__(self, model: LoadedModel, batch: int) -> None:
        self._attention = ExitStack()
        self._attention.enter_context(rivals.own_attention(model))
        _let_segments_grow(True, model.device)
        self._model = model
        self._cache = rivals.dynamic().make(model, 0)
        self._ids = torch.full((batch, 1), 40, device=model.device)

    def fill(self, num_tokens: int) -> None:
        with torch.no_grad():
            rivals.fill(self._model, self._cache, num_tokens, len(self._ids))

    def step(self) -> None:
        with torch.no_grad():
            rivals.plain_step(self._model, self._cache, self._ids)()

    def held_bytes(self) -> int:
        return rivals.held_bytes(self._cache)

    def close(self) -> None:
        self._cache = None
        self._attention.close()
        _let_segments_grow(False, self._model.device)


class _OurSequences:
    def __init__(self, model: LoadedModel, candidate: Candidate, batch: int, total: int, kv_budget: int) -> None:
        self._model = model
        self._tokens = [[40]] * batch
        self._cache = model.new_cache(
            candidate.method, candidate.config, batch_size=batch, budget=MemoryBudget(kv_budget)
        )
        try:
            self._cache.reserve(total)
        except BaseException:
            self._cache.free()
            raise

    @property
    def how(self) -> str:
        return how(self._model, self._cache)

    def fill(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self.step()

    def step(self) -> None:
        forward_batch(self._model, self._cache, self._tokens)

    def held_bytes(self) -> int:
        return self._cache.footprint().reserved_bytes

    def close(self) -> None:
        self._cache.free()


def _let_segments_grow(is_growing: bool, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{is_growing}")


def _their_prompts(model: LoadedModel, rows: int, num_tokens: int) -> None:
    cache: Any = rivals.dynamic().make(model, 0)
    ids = torch.full((rows, num_tokens), 40, device=model.device)
    with torch.no_grad(), rivals.own_attention(model):
        rivals.plain_step(model, cache, ids)()


def _our_prompts(model: LoadedModel, candidate: Candidate, rows: int, num_tokens: int) -> None:
    cache = model.new_cache(candidate.method, candidate.config, batch_size=rows)
    try:
        with torch.inference_mode(), cache.prefill():
            forward_batch(model, cache, [[40] * num_tokens] * rows)
    finally:
        cache.free()

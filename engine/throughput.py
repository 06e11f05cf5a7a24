"""Decode speed of whole batches, cell by cell: a method at a context length and a batch size.

A cell is a real cache of the whole batch, filled with random tensors through the cache's own `append`
(a prompt that the method packs itself, without a forward pass) and then stepped: the model's own decode
step where there is a model, attention and cache alone where there are only a shape and random tensors.
A cell that does not fit the budget is not measured and says what it would take. The page's throughput
lab and `benchmarks/decode.py` measure with this file.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from kvlens.engine.bench import Bench, Candidate, Cell
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.cache import Checkpoint
from kvlens.engine.errors import EngineError, OutOfMemory
from kvlens.engine.estimate import estimate
from kvlens.engine.shape import ModelShape

WARM_UP_STEPS = 4
ROUND_STEPS = 8
"""The steps before the context is reached, taken again and again: whatever the context, a cell is at it."""
TIMED_STEPS = 12 * ROUND_STEPS
CELL_SECONDS = 1.5
"""A slow cell takes fewer rounds: after this long one is enough."""

FILL_TOKENS = {"cpu": 8192, "cuda": 2**18}
"""Tokens of all sequences that one piece of a prompt has, by device: a stop takes effect between pieces."""

MIN_CONTEXT = 16 * ROUND_STEPS


@dataclass(frozen=True)
class CellResult:
    """A cell as it came out.

    `status`: "measured"; "over budget" (`kv_bytes` is then what it would take, by formula); "not served"
    (`note` says why); "skipped" (the time was over). Units: milliseconds of one step of the whole batch,
    median and quartiles; tokens/s of the whole batch. `kv_bytes` are live, `allocated_bytes` the peak that
    the cache held. Where `measured_layers` is less than `num_layers`, times and bytes are those of the
    measured layers, times `num_layers / measured_layers`.
    """

    label: str
    method: str
    context_tokens: int
    batch_size: int
    status: str
    note: str = ""
    num_steps: int = 0
    step_ms: float | None = None
    step_ms_low: float | None = None
    step_ms_high: float | None = None
    tokens_per_second: float | None = None
    kv_bytes: int | None = None
    allocated_bytes: int | None = None
    device_peak_bytes: int | None = None
    fill_ms: float | None = None
    measured_layers: int | None = None
    num_layers: int | None = None
    attention_path: str = ""


@dataclass
class Progress:
    """How far a lab has come; the same object grows. `cell` is the one under way."""

    num_cells: int
    results: list[CellResult] = field(default_factory=list)
    cell: Cell | None = None
    seconds_left: float | None = None


# ---------------------------------------------------------------------- one cell


class FilledCell:
    """A cell whose cache is filled in steps (`fill`) and ready to take decode steps.

    Its cache is freed by `close`. Raises: OutOfMemory where it does not fit; ValueError where the method
    does not serve the shape.
    """

    def __init__(
        self, bench: Bench, cell: Cell, *, limit_bytes: int | None = None, within: MemoryBudget | None = None
    ) -> None:
        self.bench, self.cell = bench, cell
        self.times: list[float] = []
        self._start: Checkpoint | None = None
        self._fill_ms = 0.0
        self._begin = time.perf_counter()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        if limit_bytes is not None:
            # Layers that stand for all may take their share of the budget.
            limit_bytes = limit_bytes * bench.num_layers(cell) // bench.shape.num_layers
        self.cache = bench.new_cache(cell, MemoryBudget(limit_bytes, within=within))

    def fill(self) -> Iterator[None]:
        """Append and pack a random prompt, piece by piece. Every row of the batch stores its own."""
        cell, cache = self.cell, self.cache
        cache.reserve(cell.context_tokens)
        num_tokens = cell.context_tokens - ROUND_STEPS
        keys, values = random_prompt(cache.shape, num_tokens, dtype=cache.dtype, device=cache.device)
        chunk = max(1, FILL_TOKENS[self.bench.device.type] // cell.batch_size)
        for layer in range(cache.shape.num_layers):
            for pieces in zip(keys.split(chunk, dim=2), values.split(chunk, dim=2), strict=True):
                cache.append(layer, *(piece.expand(cell.batch_size, -1, -1, -1) for piece in pieces))
                cache.end_prefill()
                yield
        self._fill_ms = 1000 * (time.perf_counter() - self._begin)

    @property
    def is_done(self) -> bool:
        if not self.times or len(self.times) % ROUND_STEPS:
            return False
        return len(self.times) >= TIMED_STEPS or time.perf_counter() - self._begin > CELL_SECONDS

    def step(self) -> None:
        """Take a decode step. The first ones are not counted; a round goes back to where the last one began."""
        if self._start is None:
            self._start = self.cache.checkpoint()
            for _ in range(WARM_UP_STEPS):
                self._time_step()
        if len(self.times) % ROUND_STEPS == 0:
            self.cache.rollback(self._start)
        self.times.append(self._time_step())

    def _time_step(self) -> float:
        self.bench.prepare()
        return self.bench.step(self.cache)

    def result(self) -> CellResult:
        cell, cache, bench = self.cell, self.cache, self.bench
        low, median, high = statistics.quantiles(self.times, n=4)
        footprint = cache.footprint()
        layers, measured = bench.shape.num_layers, cache.shape.num_layers
        is_cuda = bench.device.type == "cuda"
        return _result(
            cell,
            "measured",
            num_steps=len(self.times),
            step_ms=median,
            step_ms_low=low,
            step_ms_high=high,
            tokens_per_second=1000 * cell.batch_size / median,
            kv_bytes=footprint.live_bytes * layers // measured,
            allocated_bytes=footprint.reserved_bytes * layers // measured,
            device_peak_bytes=torch.cuda.max_memory_allocated(bench.device) if is_cuda else None,
            fill_ms=self._fill_ms,
            measured_layers=measured,
            num_layers=layers,
            attention_path=cache.attention_path,
        )

    def close(self) -> None:
        self.cache.free()


def random_prompt(
    shape: ModelShape, num_tokens: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence as they look in a model. Shapes: `[1, HK, T, D]` each.

    Keys have a steady offset in every channel and a few large channels, values have neither.
    Source: KIVI (arXiv 2402.02750), figure 2.
    """
    draw = torch.Generator(device).manual_seed(0)
    size = (2, shape.num_kv_heads, num_tokens, shape.head_dim)
    keys, values = torch.randn(size, generator=draw, device=device)
    offset = torch.randn(shape.num_kv_heads, 1, shape.head_dim, generator=draw, device=device)
    offset[:, :, ::32] *= 8
    return (keys + offset).to(dtype).unsqueeze(0), values.to(dtype).unsqueeze(0)


def needed_bytes(shape: ModelShape, cell: Cell) -> int:
    """Live bytes of a cell by formula. Raises: ValueError if the method does not serve the shape."""
    candidate = cell.candidate
    return estimate(
        shape, candidate.method, candidate.config, num_tokens=cell.context_tokens, batch_size=cell.batch_size
    ).live_bytes


def _result(cell: Cell, status: str, **found) -> CellResult:
    return CellResult(
        cell.candidate.label, cell.candidate.method, cell.context_tokens, cell.batch_size, status, **found
    )


# ---------------------------------------------------------------------- all cells


def plan_cells(candidates: Sequence[Candidate], contexts: Sequence[int], batch_sizes: Sequence[int]) -> list[Cell]:
    """Every combination; methods are next to each other in time, so that a busy machine hits all alike."""
    return [
        Cell(candidate, context, batch_size)
        for context in contexts
        for batch_size in batch_sizes
        for candidate in candidates
    ]


def measure(
    bench: Bench,
    cells: Sequence[Cell],
    *,
    limit_bytes: int | None = None,
    within: MemoryBudget | None = None,
    stop: threading.Event | None = None,
    max_seconds: float | None = None,
) -> Iterator[Progress]:
    """Measure the cells one after the other; yields the same growing record after every step.

    `limit_bytes` bounds the cache of a cell, `within` what this process may hold besides. `stop` ends the
    lab with the step under way, whose cell is dropped; after `max_seconds` the cells that are left are skipped.
    """
    stop = stop or threading.Event()
    progress, clock = Progress(len(cells)), _Clock(cells)
    for cell in cells:
        progress.cell = cell
        progress.seconds_left = clock.seconds_left(len(progress.results))
        yield progress
        if stop.is_set():
            break
        if max_seconds is not None and clock.seconds > max_seconds:
            progress.results.append(_result(cell, "skipped"))
            continue
        with closing(_measure_cell(bench, cell, limit_bytes, within)) as steps:
            for result in steps:
                if result is not None:
                    progress.results.append(result)
                    clock.tick(cell, is_measured=result.status == "measured")
                yield progress
                if stop.is_set():
                    break
        if stop.is_set():
            break
    progress.cell = progress.seconds_left = None
    yield progress


def _measure_cell(
    bench: Bench, cell: Cell, limit_bytes: int | None, within: MemoryBudget | None
) -> Iterator[CellResult | None]:
    """None after every step, the result at the end. Whatever happens, the cache is freed."""
    filled, needed = None, None
    try:
        if not MIN_CONTEXT <= cell.context_tokens <= bench.max_context:
            raise EngineError(
                f"A context must lie between {MIN_CONTEXT} and {bench.max_context:,} tokens here; "
                f"got {cell.context_tokens:,}."
            )
        needed = needed_bytes(bench.shape, cell)
        if limit_bytes is not None and needed > limit_bytes:
            yield _result(cell, "over budget", kv_bytes=needed)
            return
        filled = FilledCell(bench, cell, limit_bytes=limit_bytes, within=within)
        for _ in filled.fill():
            yield None
        while not filled.is_done:
            filled.step()
            yield None
        yield filled.result()
    except (OutOfMemory, torch.OutOfMemoryError, MemoryError) as error:
        yield _result(cell, "over budget", kv_bytes=needed, note=str(error).splitlines()[0] if str(error) else "")
    except ValueError as error:
        yield _result(cell, "not served", note=str(error))
    finally:
        if filled is not None:
            filled.close()


class _Clock:
    """Guesses how long is left: a cell costs something, and more the more tokens it holds."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._begin = time.perf_counter()
        self._weights = [self._weight(cell) for cell in cells]
        self._known = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def tick(self, cell: Cell, *, is_measured: bool) -> None:
        if is_measured:
            self._known += self._weight(cell)

    def seconds_left(self, num_done: int) -> float | None:
        return self.seconds / self._known * sum(self._weights[num_done:]) if self._known else None

    @staticmethod
    def _weight(cell: Cell) -> float:
        return 1 + cell.context_tokens * cell.batch_size / 16384

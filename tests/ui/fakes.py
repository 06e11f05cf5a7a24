"""A stand-in for the engine while the page is tested without a model: plausible RunLogs in real time."""

import threading
import time
from collections.abc import Iterator

import numpy as np

from kvlens.engine.trace import (
    AtomSnapshot,
    CodedSide,
    ErrorSnapshot,
    LaneLog,
    MachineMemory,
    MemorySample,
    RunLog,
    StepTrace,
)

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 8, 2, 64
VALUES_PER_TOKEN = 2 * NUM_LAYERS * NUM_HEADS * HEAD_DIM
WORDS = [
    "The",
    "heron",
    "stood",
    "at",
    "the",
    "edge",
    "of",
    "the",
    "water",
    "and",
    "waited",
    ".",
    "A",
    "small",
    "wind",
    "moved",
    "the",
    "reeds",
    ",",
    "and",
    "the",
    "light",
    "turned",
    "slowly",
    "from",
    "grey",
    "to",
    "gold",
    ".",
    "Nobody",
    "had",
    "seen",
    "the",
    "old",
    "keeper",
    "since",
    "the",
    "morning",
    ",",
    "but",
    "his",
    "boat",
    "lay",
    "where",
    "it",
    "always",
    "lay",
    ",",
    "and",
    "there",
    "was",
    "smoke",
    "above",
    "the",
    "hut",
    ".",
]


def part_bytes(method: str, num_tokens: int) -> dict[str, int]:
    """Bytes of a made-up 2-bit method with a window of 64 tokens."""
    if method == "dense":
        return {"window": 2 * VALUES_PER_TOKEN * num_tokens}
    packed = max(0, (num_tokens - 32) // 64 * 64)
    return {
        "codes": VALUES_PER_TOKEN * packed // 4,
        "scales": VALUES_PER_TOKEN * packed // 8,
        "window": 2 * VALUES_PER_TOKEN * (num_tokens - packed),
    }


def make_errors(num_tokens: int, packed: int, rng: np.random.Generator, probed_layer: int) -> ErrorSnapshot:
    shape = (2, NUM_LAYERS, NUM_HEADS)
    depth = np.linspace(0.7, 1.2, NUM_LAYERS)[None, :, None, None]
    by_token = (0.22 * depth * rng.lognormal(0, 0.25, (*shape, num_tokens))).astype(np.float32)
    by_token[1] *= 1.4
    by_token[..., packed:] = np.nan
    exact = rng.normal(size=(2, NUM_HEADS, num_tokens, HEAD_DIM)).astype(np.float32)
    exact[0, :, :, [5, 23, 40]] *= 7
    rebuilt = exact + rng.normal(size=exact.shape).astype(np.float32) * 0.2
    rebuilt[:, :, packed:] = exact[:, :, packed:]
    return ErrorSnapshot(
        by_token=by_token,
        by_head=(0.25 * rng.lognormal(0, 0.2, shape)).astype(np.float32),
        by_channel=(0.25 * rng.lognormal(0, 0.3, (*shape, HEAD_DIM))).astype(np.float32),
        peak_channel=np.abs(rng.normal(size=(*shape, HEAD_DIM))).astype(np.float32),
        probed_layer=probed_layer,
        exact=exact,
        rebuilt=rebuilt,
    )


def empty_log(methods: tuple[str, ...] = ("dense", "kivi"), prompt_tokens: int = 150) -> RunLog:
    titles = {"dense": "fp16, exact", "kivi": "KIVI"}
    lanes = [
        LaneLog(
            lane_id="ab"[index],
            method=name,
            title=titles[name],
            settings={} if name == "dense" else {"key_bits": 2, "group_size": 32, "residual_length": 64},
            attention_path="reference",
            prompt_tokens=prompt_tokens,
            prefill_ms=84.2 + 9 * index,
        )
        for index, name in enumerate(methods)
    ]
    return RunLog(
        run_id="fake",
        model="fake-llama",
        device="2 CPU cores",
        fp16_bytes_per_token=2 * VALUES_PER_TOKEN,
        values_per_token=VALUES_PER_TOKEN,
        weight_bytes=31_000_000,
        max_context=2048,
        lanes=lanes,
        machine=MachineMemory(process_bytes=612_000_000),
    )


def play(
    log: RunLog,
    num_steps: int,
    *,
    parting: int = 18,
    step_seconds: float = 0.0,
    stop: threading.Event | None = None,
    probed_layer: int = 0,
) -> Iterator[RunLog]:
    """Grow `log` by one token a lane and yield it, `num_steps` times."""
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        if stop is not None and stop.is_set():
            for lane in log.lanes:
                lane.finish = "stopped"
            yield log
            return
        time.sleep(step_seconds)
        for index, lane in enumerate(log.lanes):
            token = step if step < parting or index == 0 else 3 * step
            word = WORDS[token % len(WORDS)]
            lane.steps.append(
                StepTrace(
                    token_id=token,
                    text=word if word in ".,!?" or step == 0 else " " + word,
                    step_ms=float(rng.normal(21 - 2 * index, 1.2)),
                    log_prob=float(-rng.exponential(0.7)),
                    alternatives=((" " + word, 0.61), (" and", 0.12), (" <b>so</b>", 0.03)),
                )
            )
            total = lane.prompt_tokens + step
            parts = part_bytes(lane.method, total)
            lane.memory.append(MemorySample(total, parts))
            lane.reserved_bytes = int(sum(parts.values()) * 1.1)
            packed = max(0, (total - 32) // 64 * 64)
            grown = lane.errors is None or packed > np.isfinite(lane.errors.by_token[0, 0, 0]).sum()
            if lane.method != "dense" and grown:
                lane.errors = make_errors(total, packed, np.random.default_rng(7), probed_layer)
        yield log
    for lane in log.lanes:
        lane.finish = "length"
    yield log


def finished_log(num_steps: int = 60, **kwargs) -> RunLog:
    log = empty_log()
    for _ in play(log, num_steps, **kwargs):
        pass
    return log


def make_coded_side(num_tokens: int, first_token: int, num_atoms: int, parts: int, seed: int) -> CodedSide:
    """Codes of three atoms a part over random atoms; the third token is not known exactly any more."""
    rng = np.random.default_rng(seed)
    shape, width = (NUM_HEADS, num_tokens, 3, parts), HEAD_DIM // parts
    indices = rng.integers(0, num_atoms // 2, shape).astype(np.int32)
    coefficients = rng.normal(size=shape).astype(np.float16).astype(np.float32)
    atoms = rng.normal(size=(num_atoms, width)).astype(np.float32)
    start = rng.normal(size=(NUM_HEADS, 1, HEAD_DIM)).astype(np.float32)
    sums = [np.broadcast_to(start, (NUM_HEADS, num_tokens, HEAD_DIM)).copy()]
    for step in range(3):
        for part in range(parts):
            sums.append(sums[-1].copy())
            channels = slice(part * width, (part + 1) * width)
            sums[-1][..., channels] += coefficients[..., step, part, None] * atoms[indices[..., step, part]]
    exact = sums[-1] + 0.1 * rng.normal(size=sums[-1].shape).astype(np.float32)
    exact[:, 2:3] = np.nan
    missing = [np.linalg.norm(exact - each, axis=-1) / np.linalg.norm(exact, axis=-1) for each in sums]
    return CodedSide(first_token, indices, coefficients, exact, start, np.stack(missing, -1), atoms)


def make_atoms(num_tokens: int = 12, first_token: int = 4) -> AtomSnapshot:
    coverage = np.linspace(0.1, 0.9, 2 * NUM_LAYERS).reshape(2, NUM_LAYERS).astype(np.float32)
    keys, values = (make_coded_side(num_tokens, first_token, 32, parts, parts) for parts in (1, 2))
    return AtomSnapshot(3, coverage, keys, values)

"""A RunLog as the one JSON string that an update of the live panels is. Pure: no gradio, no engine.

Arrays travel as base64 (`d` dtype, `s` shape, `b` bytes), thinned to what a screen can show: at most
`MAX_COLUMNS` columns of a heatmap and `MAX_POINTS` points of a curve. Each payload is complete: one
that is lost or comes late is made good by the next.
"""

import base64
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.trace import LaneLog, RunLog
from kvlens.ui import text
from kvlens.ui.atoms_payload import atoms_payload
from kvlens.ui.heat import View, errors_payload

MAX_POINTS = 160
SPEED_POINTS = 48
CONTEXT_WARNING = 0.85

_sequence = itertools.count(1)


@dataclass(frozen=True)
class Scene:
    """What stands around a log: the state of the page and what the log itself does not know.

    `state` is one of "empty", "recorded", "replay", "waiting", "loading", "reading", "running", "done".
    `projection` holds (tokens, bytes by lane) pairs by formula, fp16 under the key "fp16".
    `is_cleared`: the conversation of the run on show was thrown away, its picture stays.
    """

    state: str = "done"
    view: View = field(default_factory=View)
    label: str = ""
    notice: str = ""
    projection: Sequence[tuple[int, Mapping[str, int]]] = ()
    is_cpu: bool = False
    budget: MemoryBudget | None = None
    is_cleared: bool = False


def encode(values, dtype: str) -> dict:
    """An array as the page's scripts read it: `dtype` one of u1, u4, f4."""
    array = np.ascontiguousarray(values, dtype="<" + dtype if dtype != "u1" else "u1")
    return {"d": dtype, "s": list(array.shape), "b": base64.b64encode(array.tobytes()).decode("ascii")}


def lane_figures(log: RunLog, lane: LaneLog) -> dict:
    """The numbers of a lane that are shown large. None where there is nothing to measure yet."""
    sample = lane.memory[-1] if lane.memory else None
    live_bytes = sum(sample.parts.values()) if sample else None
    num_tokens = sample.num_tokens if sample else None
    reference = next((other for other in log.lanes if other.method == "dense"), None)
    reference_speed = reference.tokens_per_second if reference else None
    speed = lane.tokens_per_second
    return {
        "tokens_per_second": speed,
        "speed_ratio": speed / reference_speed if speed and reference_speed else None,
        "is_reference": lane is reference,
        "num_tokens": num_tokens,
        "live_bytes": live_bytes,
        "fp16_bytes": log.fp16_bytes_per_token * num_tokens if num_tokens else None,
        "times_smaller": log.fp16_bytes_per_token * num_tokens / live_bytes if live_bytes else None,
        "bits_per_value": 8 * live_bytes / (log.values_per_token * num_tokens) if live_bytes else None,
        "reserved_bytes": lane.reserved_bytes,
        "probe_bytes": lane.probe_bytes,
        "shared_bytes": lane.shared_bytes,
        "prompt_tokens": lane.prompt_tokens,
        "reused_tokens": lane.reused_tokens,
        "new_tokens": len(lane.steps),
        "prefill_ms": lane.prefill_ms,
        "first_token_ms": lane.first_token_ms,
        "prefill_tokens_per_second": lane.prefill_tokens_per_second,
    }


def thin(count: int) -> np.ndarray:
    """Indices of at most `MAX_POINTS` points out of `count`, first and last among them."""
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, MAX_POINTS).round().astype(int))


def memory_series(lane: LaneLog) -> dict:
    """Bytes by part over tokens in the cache."""
    chosen = [lane.memory[index] for index in thin(len(lane.memory))]
    names = list(dict.fromkeys(name for sample in chosen for name, size in sample.parts.items() if size))
    last = lane.memory[-1].parts if lane.memory else {}
    return {
        "tokens": encode([sample.num_tokens for sample in chosen], "u4"),
        "parts": {name: encode([sample.parts.get(name, 0) for sample in chosen], "f4") for name in names},
        "last": {name: last.get(name, 0) for name in names},
    }


def speed_series(lane: LaneLog) -> dict:
    """Tokens/s over blocks of steps, the cold first one left out: a curve that can be read."""
    times = np.array(lane.decode_ms[1:], dtype=np.float64)
    block = max(1, math.ceil(len(times) / SPEED_POINTS))
    count = len(times) // block
    blocks = times[: count * block].reshape(count, block)
    ends = 2 + block * np.arange(1, count + 1)
    return {"tokens": encode(ends, "u4"), "speed": encode(1000 * block / blocks.sum(1), "f4")}


def text_units(piece: str) -> int:
    """Length in UTF-16 units, as the browser counts text."""
    return len(piece.encode("utf-16-le")) // 2


def lane_name(log: RunLog, lane: LaneLog) -> str:
    """The method's title and, where another lane has the same, the settings in which they differ."""
    title, *settings = lane.title.split(" · ")
    others = [other.title.split(" · ")[1:] for other in log.lanes if other is not lane and other.method == lane.method]
    differing = [one for one in settings if any(one not in other for other in others)]
    return " ".join([title, *differing])


def lane_payload(log: RunLog, lane: LaneLog, state: str) -> dict:
    is_over = state in ("done", "recorded")
    payload = {
        "id": lane.lane_id,
        "method": lane.method,
        "title": lane.title,
        "name": lane_name(log, lane),
        "is_simulated": lane.is_simulated,
        "path": lane.attention_path,
        "finish": lane.finish,
        "characters": text_units(lane.text),
        "figures": lane_figures(log, lane),
        "memory": memory_series(lane),
        "speed": speed_series(lane),
    }
    difference = log.first_difference
    if difference is not None:
        start = sum(text_units(step.text) for step in lane.steps[:difference])
        width = text_units(lane.steps[difference].text) if difference < len(lane.steps) else 0
        payload["parting"] = [start, start + width]
    if is_over:
        payload["tokens"] = [
            [text_units(step.text), round(math.exp(step.log_prob), 4), [[t, round(p, 4)] for t, p in step.alternatives]]
            for step in lane.steps
        ]
    return payload


def memory_sentence(log: RunLog) -> str:
    """The plain answer to `compressed, but memory did not fall`, about the most compressed lane."""
    lanes = [lane for lane in log.lanes if lane.memory and lane.method != "dense"]
    if not lanes:
        return ""
    lane = min(lanes, key=lambda one: sum(one.memory[-1].parts.values()))
    sample = lane.memory[-1]
    return text.why_memory(
        sum(sample.parts.values()),
        log.fp16_bytes_per_token * sample.num_tokens,
        log.weight_bytes,
        log.machine.process_bytes,
        lane_name(log, lane),
        sample.parts.get("dictionary", 0),
    )


def context_use(log: RunLog) -> dict:
    used = max((lane.memory[-1].num_tokens for lane in log.lanes if lane.memory), default=0)
    return {"used": used, "limit": log.max_context}


def budget_use(budget: MemoryBudget | None) -> dict | None:
    if budget is None or budget.limit_bytes is None:
        return None
    return {"used": budget.used_bytes, "limit": budget.limit_bytes}


def notices(log: RunLog, scene: Scene) -> list[str]:
    found = [scene.notice] if scene.notice else []
    found += log.notices
    # Nobody can go on with a recorded or a cleared conversation, so nobody need know how full its context was.
    if scene.is_cleared or scene.state in ("recorded", "replay"):
        return list(dict.fromkeys(found))
    context = context_use(log)
    if any(lane.finish == "context" for lane in log.lanes):
        found.append(text.context_full(context["limit"]))
    elif context["limit"] and context["used"] > CONTEXT_WARNING * context["limit"]:
        found.append(text.context_filling(context["used"], context["limit"]))
    return list(dict.fromkeys(found))


def written(payload: dict) -> str:
    """The payload as JSON. A number that JSON has no word for (a model may answer with NaN) is written as null."""
    try:
        return json.dumps(payload, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(payload), separators=(",", ":"))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build(log: RunLog | None, scene: Scene) -> str:
    """The payload of one update. Without a log it only carries the state and a notice: the picture stays."""
    payload: dict = {"sequence": next(_sequence), "state": scene.state}
    if log is None:
        payload["notices"] = [scene.notice] if scene.notice else []
        if scene.is_cleared:
            payload |= {"context": None, "budget": budget_use(scene.budget)}
        return written(payload)
    payload |= {
        "label": scene.label,
        "view": vars(scene.view),
        "is_cpu": scene.is_cpu,
        "run_id": log.run_id,
        "model": log.model,
        "device": log.device,
        "fp16_bytes_per_token": log.fp16_bytes_per_token,
        "weight_bytes": log.weight_bytes,
        "context": None if scene.is_cleared else context_use(log),
        "machine": vars(log.machine),
        "difference": log.first_difference,
        "lanes": [lane_payload(log, lane, scene.state) for lane in log.lanes],
        "projection": [[tokens, dict(sizes)] for tokens, sizes in scene.projection],
        "sentence": memory_sentence(log),
        "budget": budget_use(scene.budget),
        "errors": errors_payload(log, scene.view, encode),
        "atoms": atoms_payload(log, scene.view, encode),
        "notices": notices(log, scene),
    }
    return written(payload)

"""A run that can be kept, exported, imported and played again. Pure: no gradio, no engine beyond its data.

A recording holds the finished RunLog and, since error statistics grow while it runs, which token was
packed at which step and what the head and channel statistics were at a few moments. `at(step)` gives the
log back as it stood then. Files are gzipped JSON; arrays inside are base64. Nothing in a file is code.
"""

import base64
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

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

FORMAT = "kvlens-run-1"
MAX_FILE_BYTES = 32 * 2**20
SNAPSHOT_EVERY_STEPS = 16
NEVER = np.iinfo(np.int32).max

_LANE_PARTS = ("steps", "memory", "errors", "atoms")
"""What of a lane is written in a form of its own."""


class RecordingFault(ValueError):
    """A file that is not a recording, and why."""


@dataclass
class ErrorHistory:
    """When each token of a lane was packed, and its statistics at a few steps.

    Shapes: packed_at int32 `[2, T]`, the step from which on a token's key or value was packed; coverage `[2, L]`, of
    lanes with atoms.
    """

    packed_at: np.ndarray
    moments: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    coverage: list[tuple[int, np.ndarray]] = field(default_factory=list)


@dataclass
class Recording:
    """A finished run with everything that is needed to show it again."""

    log: RunLog
    prompts: list[str]
    earlier_answers: dict[str, list[str]]
    settings: dict
    projection: list[tuple[int, dict[str, int]]]
    date: str = ""
    history: dict[str, ErrorHistory] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        return max((len(lane.steps) for lane in self.log.lanes), default=0)

    def step_seconds(self, step: int) -> float:
        """How long the round of this step took: all lanes in turn."""
        times = [lane.steps[step].step_ms for lane in self.log.lanes if step < len(lane.steps)]
        return sum(times) / 1000

    def at(self, step: int) -> RunLog:
        """The log as it stood after `step` new tokens."""
        return replace(self.log, lanes=[self._lane_at(lane, step) for lane in self.log.lanes])

    def _lane_at(self, lane: LaneLog, step: int) -> LaneLog:
        if step >= len(lane.steps):
            return lane
        left_out = len(lane.steps) - step
        kept = max(1, len(lane.memory) - left_out)
        errors = self._errors_at(lane, step, lane.memory[kept - 1].num_tokens if lane.memory else 0)
        return replace(
            lane, steps=lane.steps[:step], memory=lane.memory[:kept], errors=errors, atoms=self._atoms_at(lane, step),
            finish=None,
        )  # fmt: skip

    def _errors_at(self, lane: LaneLog, step: int, num_tokens: int) -> ErrorSnapshot | None:
        final, history = lane.errors, self.history.get(lane.lane_id)
        if final is None or history is None:
            return final
        is_exact = history.packed_at[:, :num_tokens] > step
        by_token = np.where(is_exact[:, None, None], np.nan, final.by_token[..., :num_tokens])
        past = [moment for moment in history.moments if moment[0] <= step] or history.moments[:1]
        _, by_head, by_channel, peak_channel = (
            past[-1] if past else (0, final.by_head, final.by_channel, final.peak_channel)
        )
        exact = rebuilt = None
        if final.exact is not None and final.rebuilt is not None:
            exact = final.exact[:, :, :num_tokens]
            rebuilt = np.where(is_exact[:, None, :, None], exact, final.rebuilt[:, :, :num_tokens])
        return replace(
            final,
            by_token=by_token.astype(np.float32),
            by_head=by_head,
            by_channel=by_channel,
            peak_channel=peak_channel,
            exact=exact,
            rebuilt=rebuilt,
        )

    def _atoms_at(self, lane: LaneLog, step: int) -> AtomSnapshot | None:
        final, history = lane.atoms, self.history.get(lane.lane_id)
        if final is None or history is None:
            return final
        keys, values = (
            _first_tokens(side, int((packed_at <= step).sum()))
            for side, packed_at in zip((final.keys, final.values), history.packed_at, strict=True)
        )
        past = [coverage for at, coverage in history.coverage if at <= step]
        coverage = past[-1] if past else np.zeros_like(final.coverage)
        return AtomSnapshot(final.probed_layer, coverage, keys, values)


def _first_tokens(side: CodedSide, count: int) -> CodedSide:
    """The codes of the first `count` tokens. What is the same for all tokens stays."""
    cut = {name: getattr(side, name)[:, :count] for name in ("indices", "coefficients", "exact", "remaining")}
    start = side.start if side.start.shape[1] == 1 else side.start[:, :count]
    return replace(side, **cut, start=start)


class Recorder:
    """Watches a run grow. `see` is cheap: it looks at error statistics only when there are new ones."""

    def __init__(self) -> None:
        self._history: dict[str, ErrorHistory] = {}
        self._seen: dict[str, int] = {}

    def see(self, log: RunLog) -> None:
        for lane in log.lanes:
            if lane.errors is not None and id(lane.errors) != self._seen.get(lane.lane_id):
                self._seen[lane.lane_id] = id(lane.errors)
                self._note(lane.lane_id, lane.errors, lane.atoms, len(lane.steps))

    def _note(self, lane_id: str, errors: ErrorSnapshot, atoms: AtomSnapshot | None, step: int) -> None:
        is_packed = np.isfinite(errors.by_token[:, 0, 0])
        history = self._history.setdefault(lane_id, ErrorHistory(np.empty((2, 0), np.int32)))
        missing = is_packed.shape[1] - history.packed_at.shape[1]
        if missing > 0:
            history.packed_at = np.pad(history.packed_at, ((0, 0), (0, missing)), constant_values=NEVER)
        known = history.packed_at[:, : is_packed.shape[1]]
        known[is_packed & (known == NEVER)] = step
        if not history.moments or step >= history.moments[-1][0] + SNAPSHOT_EVERY_STEPS:
            history.moments.append((step, errors.by_head, errors.by_channel, errors.peak_channel))
            if atoms is not None:
                history.coverage.append((step, atoms.coverage))

    def finish(self, log: RunLog, **about) -> Recording:
        return Recording(log=log, history=self._history, **about)


# --- files ----------------------------------------------------------------------------------------------


def _pack(value):
    """Plain data that JSON can hold."""
    if isinstance(value, np.ndarray):
        dtype = "f2" if value.dtype.kind == "f" else "i4"
        packed = np.ascontiguousarray(value, dtype="<" + dtype)
        return {"dtype": dtype, "shape": list(value.shape), "data": base64.b64encode(packed.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {str(name): _pack(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(entry) for entry in value]
    return value


def _coarse(array: np.ndarray | None) -> np.ndarray | None:
    """For pictures only: six bits after the leading one, within 1 %, which halves the file."""
    if array is None:
        return None
    bits = array.astype(np.float16).view(np.uint16).astype(np.uint32)
    rounded = np.minimum(bits + 8, np.where(bits & 0x8000, 0xFBFF, 0x7BFF)) & 0xFFF0
    coarse = rounded.astype(np.uint16).view(np.float16).astype(np.float32)
    return np.where(np.isnan(array), np.nan, coarse)


def _errors(errors: ErrorSnapshot | None) -> dict | None:
    """None also for a lane that has packed nothing: it has no error to show."""
    if errors is None or not np.isfinite(errors.by_token).any():
        return None
    return vars(errors) | {name: _coarse(getattr(errors, name)) for name in ("exact", "rebuilt")}


def _atoms(atoms: AtomSnapshot | None) -> dict | None:
    return None if atoms is None else vars(atoms) | {"keys": _coded(atoms.keys), "values": _coded(atoms.values)}


def _coded(side: CodedSide) -> dict:
    """Atoms that no code names are zero in the file, where they take no room."""
    is_used = np.isin(np.arange(len(side.atoms)), side.indices)
    pictures = {"exact": side.exact, "start": side.start, "atoms": side.atoms * is_used[:, None]}
    return vars(side) | {name: _coarse(array) for name, array in pictures.items()}


def _array(packed: Mapping) -> np.ndarray:
    if packed["dtype"] not in ("f2", "i4"):
        raise RecordingFault(f"arrays must be f2 or i4; got {packed['dtype']!r}")
    flat = np.frombuffer(base64.b64decode(packed["data"]), dtype="<" + packed["dtype"])
    array = flat.reshape([int(size) for size in packed["shape"]])
    return array.astype(np.float32 if packed["dtype"] == "f2" else np.int32)


def to_bytes(recording: Recording) -> bytes:
    """The file of a recording: gzipped JSON. Errors are kept in half precision, what pictures show within 1 %."""
    log = recording.log
    lanes = [
        {entry.name: getattr(lane, entry.name) for entry in fields(lane) if entry.name not in _LANE_PARTS}
        | {
            "steps": [list(vars(step).values()) for step in lane.steps],
            "memory": [[sample.num_tokens, sample.parts] for sample in lane.memory],
            "errors": _errors(lane.errors),
            "atoms": _atoms(lane.atoms),
        }
        for lane in log.lanes
    ]
    content = {
        "format": FORMAT,
        "about": {
            name: getattr(recording, name) for name in ("prompts", "earlier_answers", "settings", "projection", "date")
        },
        "run": {
            entry.name: getattr(log, entry.name) for entry in fields(log) if entry.name not in ("lanes", "machine")
        },
        "machine": asdict(log.machine),
        "lanes": lanes,
        "history": {lane_id: vars(history) for lane_id, history in recording.history.items()},
    }
    return gzip.compress(json.dumps(_pack(content)).encode(), mtime=0)


def from_bytes(data: bytes) -> Recording:
    """Raises: RecordingFault with the reason for anything that is not a whole recording."""
    try:
        return _read(_unzip(data))
    except RecordingFault:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, OSError, zlib.error) as error:
        raise RecordingFault(f"it is damaged or of another kind ({type(error).__name__}).") from error


def _unzip(data: bytes) -> dict:
    if data[:2] == b"\x1f\x8b":
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise RecordingFault(f"it is larger than {MAX_FILE_BYTES // 2**20} MiB.")
    content = json.loads(data)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordingFault(f"its format is not {FORMAT}.")
    return content


def _read(content: dict) -> Recording:
    log = RunLog(
        **content["run"],
        machine=MachineMemory(**content["machine"]),
        lanes=[_read_lane(entry) for entry in content["lanes"]],
    )
    if not log.lanes or len(log.lanes) > 8:
        raise RecordingFault(f"it must hold 1 to 8 lanes; got {len(log.lanes)}.")
    history = {
        lane_id: ErrorHistory(
            _array(entry["packed_at"]),
            [(int(step), *(_array(part) for part in parts)) for step, *parts in entry["moments"]],
            [(int(step), _array(coverage)) for step, coverage in entry.get("coverage", [])],
        )
        for lane_id, entry in content["history"].items()
    }
    about = content["about"]
    projection = [(int(tokens), {str(k): int(v) for k, v in sizes.items()}) for tokens, sizes in about["projection"]]
    return Recording(
        log=log,
        prompts=[str(prompt) for prompt in about["prompts"]],
        earlier_answers={lane: [str(one) for one in answers] for lane, answers in about["earlier_answers"].items()},
        settings=dict(about["settings"]),
        projection=projection,
        date=str(about["date"]),
        history=history,
    )


def _read_lane(entry: dict) -> LaneLog:
    errors = entry["errors"]
    if errors is not None:
        arrays = {name: _array(value) for name, value in errors.items() if isinstance(value, dict)}
        errors = ErrorSnapshot(**{"exact": None, "rebuilt": None} | arrays, probed_layer=int(errors["probed_layer"]))
    plain = {name: value for name, value in entry.items() if name not in _LANE_PARTS}
    return LaneLog(
        **plain,
        errors=errors,
        atoms=_read_atoms(entry.get("atoms")),
        steps=[_read_step(values) for values in entry["steps"]],
        memory=[
            MemorySample(int(tokens), {str(part): int(size) for part, size in parts.items()})
            for tokens, parts in entry["memory"]
        ],
    )


def _read_atoms(entry: dict | None) -> AtomSnapshot | None:
    """None also for a run that was recorded before there were atoms to see."""
    if entry is None:
        return None
    sides = (
        CodedSide(int(side.pop("first_token")), **{name: _array(value) for name, value in side.items()})
        for side in (entry["keys"], entry["values"])
    )
    return AtomSnapshot(int(entry["probed_layer"]), _array(entry["coverage"]), *sides)


def _read_step(values: Sequence) -> StepTrace:
    token_id, piece, step_ms, log_prob, alternatives = values
    return StepTrace(
        int(token_id), str(piece), float(step_ms), float(log_prob),
        tuple((str(token), float(probability)) for token, probability in alternatives),
    )  # fmt: skip


def to_csv(recording: Recording) -> str:
    """One row a step and lane, with its conditions in the first lines."""
    log = recording.log
    lines = [
        f"# KVLens run {log.run_id}; model {log.model}; device {log.device}; {recording.date}",
        "# step_ms: the model's step alone, in milliseconds; bytes: live, when the step was done",
        "lane,method,step,token_id,text,step_ms,log_prob,num_tokens,live_bytes,fp16_bytes",
    ]
    for lane in log.lanes:
        offset = len(lane.memory) - len(lane.steps)
        for index, step in enumerate(lane.steps):
            sample = lane.memory[index + offset] if 0 <= index + offset < len(lane.memory) else None
            tokens = sample.num_tokens if sample else ""
            live = sum(sample.parts.values()) if sample else ""
            fp16 = log.fp16_bytes_per_token * sample.num_tokens if sample else ""
            piece = json.dumps(step.text).replace('"', '""')
            lines.append(
                f'{lane.lane_id},{lane.method},{index},{step.token_id},"{piece}",{step.step_ms:.4f},'
                f"{step.log_prob:.5f},{tokens},{live},{fp16}"
            )
    return "\n".join(lines) + "\n"

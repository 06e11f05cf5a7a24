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
from collections.abc import Collection, Mapping, Sequence
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
from kvlens.ui import text
from kvlens.ui.recording_check import (
    MAX_LANES,
    MAX_STEPS,
    MAX_TOKENS,
    RecordingFault,
    check,
    check_count,
    check_whole,
    parse,
    read_array,
)

FORMAT = "kvlens-run-1"
MAX_FILE_BYTES = 32 * 2**20
SNAPSHOT_EVERY_STEPS = 16
NEVER = np.iinfo(np.int32).max

_LANE_PARTS = ("steps", "memory", "errors", "atoms")
"""What of a lane is written in a form of its own."""

_OMISSIBLE = ("vectors", "atoms", "moments", "errors")
"""What a file that would be too large goes without, in this order: exact and rebuilt vectors first."""


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


@dataclass(frozen=True)
class _Picture:
    """An array for pictures only: six bits after the leading one, within 1 %, which halves the file."""

    array: np.ndarray

    def coarse(self) -> np.ndarray:
        bits = self.array.astype(np.float16).view(np.uint16).astype(np.uint32)
        rounded = np.minimum(bits + 8, np.where(bits & 0x8000, 0xFBFF, 0x7BFF)) & 0xFFF0
        coarse = rounded.astype(np.uint16).view(np.float16).astype(np.float32)
        return np.where(np.isnan(self.array), np.nan, coarse)


def _pack(value):
    """Plain data that JSON can hold."""
    if isinstance(value, _Picture):
        return _pack(value.coarse())
    if isinstance(value, np.ndarray):
        dtype = "f2" if value.dtype.kind == "f" else "i4"
        if dtype == "f2":
            # An infinite number would not be read again; the largest one is drawn the same.
            value = np.clip(value, np.finfo(np.float16).min, np.finfo(np.float16).max)
        packed = np.ascontiguousarray(value, dtype="<" + dtype)
        return {"dtype": dtype, "shape": list(value.shape), "data": base64.b64encode(packed.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {str(name): _pack(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(entry) for entry in value]
    return value


def _array_bytes(value) -> int:
    """What all arrays in it take in a file, without packing them: those of a long run would fill the memory."""
    if isinstance(value, _Picture):
        value = value.array
    if isinstance(value, np.ndarray):
        return (2 if value.dtype.kind == "f" else 4) * value.size * 4 // 3
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_array_bytes, value))


def _errors(errors: ErrorSnapshot | None, left_out: Collection[str]) -> dict | None:
    """None also for a lane that has packed nothing: it has no error to show."""
    if errors is None or "errors" in left_out or not np.isfinite(errors.by_token).any():
        return None
    is_drawn = errors.exact is not None and errors.rebuilt is not None and "vectors" not in left_out
    vectors = {name: _Picture(getattr(errors, name)) if is_drawn else None for name in ("exact", "rebuilt")}
    return vars(errors) | vectors


def _atoms(atoms: AtomSnapshot | None, left_out: Collection[str]) -> dict | None:
    if atoms is None or "atoms" in left_out:
        return None
    return vars(atoms) | {"keys": _coded(atoms.keys), "values": _coded(atoms.values)}


def _coded(side: CodedSide) -> dict:
    """Atoms that no code names are zero in the file, where they take no room."""
    is_used = np.isin(np.arange(len(side.atoms)), side.indices)
    pictures = {"exact": side.exact, "start": side.start, "atoms": side.atoms * is_used[:, None]}
    return vars(side) | {name: _Picture(array) for name, array in pictures.items()}


def _history(history: ErrorHistory, left_out: Collection[str]) -> dict:
    return vars(history) | ({"moments": [], "coverage": []} if "moments" in left_out else {})


def _content(recording: Recording, left_out: Collection[str]) -> dict:
    """What a file holds, its arrays not packed yet."""
    log = recording.log
    lanes = [
        {entry.name: getattr(lane, entry.name) for entry in fields(lane) if entry.name not in _LANE_PARTS}
        | {
            "steps": [list(vars(step).values()) for step in lane.steps],
            "memory": [[sample.num_tokens, sample.parts] for sample in lane.memory],
            "errors": _errors(lane.errors, left_out),
            "atoms": _atoms(lane.atoms, left_out),
        }
        for lane in log.lanes
    ]
    history = {} if "errors" in left_out else recording.history
    return {
        "format": FORMAT,
        "about": {
            name: getattr(recording, name) for name in ("prompts", "earlier_answers", "settings", "projection", "date")
        },
        "run": {
            entry.name: getattr(log, entry.name) for entry in fields(log) if entry.name not in ("lanes", "machine")
        },
        "machine": asdict(log.machine),
        "lanes": lanes,
        "history": {lane_id: _history(entry, left_out) for lane_id, entry in history.items()},
    }


def to_bytes(recording: Recording) -> bytes:
    """The file of a recording: gzipped JSON. Errors are kept in half precision, what pictures show within 1 %.

    Whatever is written can be read again: a run that would pass `MAX_FILE_BYTES` goes without the exact and rebuilt
    vectors of its lanes, then without their atoms, then without how the statistics grew, and then without errors.
    """
    errors = [lane.errors for lane in recording.log.lanes if lane.errors is not None]
    is_too_long = any(each.by_token.shape[-1] > MAX_TOKENS for each in errors)
    for count in range(len(_OMISSIBLE) if is_too_long else 0, len(_OMISSIBLE) + 1):
        content = _content(recording, _OMISSIBLE[:count])
        if _array_bytes(content) > MAX_FILE_BYTES:
            continue
        written = json.dumps(_pack(content)).encode()
        if len(written) <= MAX_FILE_BYTES:
            break
    return gzip.compress(written, mtime=0)


def from_bytes(data: bytes) -> Recording:
    """Raises: RecordingFault with the reason for anything that is not a whole recording."""
    try:
        return _read(_unzip(data))
    except RecordingFault:
        raise
    except (RecursionError, OverflowError, MemoryError) as error:
        raise RecordingFault("it is nested too deeply or too large to be read.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, OSError, zlib.error) as error:
        raise RecordingFault(f"it is damaged or of another kind ({type(error).__name__}).") from error


def _unzip(data: bytes) -> dict:
    if data[:2] == b"\x1f\x8b":
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise RecordingFault(text.RUN_TOO_LARGE.format(limit=MAX_FILE_BYTES // 2**20))
    content = parse(data)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordingFault(f"its format is not {FORMAT}.")
    return content


def _read(content: dict) -> Recording:
    """Nothing is converted on the way in: `check` sees the values as they stand in the file."""
    lanes, about = content["lanes"], content["about"]
    check_count(lanes, "the lanes", MAX_LANES)
    # Objects are larger than their text: they are counted before they are made.
    for name, most in (("steps", MAX_STEPS), ("memory", MAX_STEPS + MAX_LANES)):
        for lane in lanes:
            check_count(lane[name], f"the {name} of a lane", most)
        check_whole(sum(len(lane[name]) for lane in lanes), f"the number of {name} in all lanes", 0, most)
    recording = Recording(
        log=RunLog(
            **content["run"],
            machine=MachineMemory(**content["machine"]),
            lanes=[_read_lane(entry) for entry in lanes],
        ),
        **{name: about[name] for name in ("prompts", "earlier_answers", "settings", "date")},
        projection=[(tokens, sizes) for tokens, sizes in about["projection"]],
        history={lane_id: _read_history(entry) for lane_id, entry in content["history"].items()},
    )
    check(recording)
    return recording


def _read_lane(entry: dict) -> LaneLog:
    plain = {name: value for name, value in entry.items() if name not in _LANE_PARTS}
    return LaneLog(
        **plain,
        errors=_read_errors(entry["errors"]),
        atoms=_read_atoms(entry.get("atoms")),
        steps=[_read_step(values) for values in entry["steps"]],
        memory=[MemorySample(tokens, parts) for tokens, parts in entry["memory"]],
    )


def _read_errors(entry: dict | None) -> ErrorSnapshot | None:
    if entry is None:
        return None
    vectors = {name: entry.get(name) for name in ("exact", "rebuilt")}
    return ErrorSnapshot(
        *_read_statistics([entry[name] for name in ("by_token", "by_head", "by_channel", "peak_channel")]),
        probed_layer=entry["probed_layer"],
        **{name: None if one is None else read_array(one, name, has_gaps=True) for name, one in vectors.items()},
    )


def _read_statistics(entries: Sequence) -> list[np.ndarray]:
    """NaN stands where nothing was packed yet."""
    return [read_array(entry, "an error statistic", has_gaps=True) for entry in entries]


def _read_history(entry: dict) -> ErrorHistory:
    return ErrorHistory(
        read_array(entry["packed_at"], "packed_at", "i4"),
        [(step, *_read_statistics(parts)) for step, *parts in entry["moments"]],
        [(step, read_array(coverage, "coverage")) for step, coverage in entry.get("coverage", [])],
    )


def _read_atoms(entry: dict | None) -> AtomSnapshot | None:
    """None also for a run that was recorded before there were atoms to see."""
    if entry is None:
        return None
    sides = (_read_side(entry[kind]) for kind in ("keys", "values"))
    return AtomSnapshot(entry["probed_layer"], read_array(entry["coverage"], "coverage"), *sides)


def _read_side(entry: dict) -> CodedSide:
    """NaN stands where the exact token is not known."""
    names = ("coefficients", "exact", "start", "remaining", "atoms")
    arrays = {name: read_array(entry[name], name, has_gaps=name in ("exact", "remaining")) for name in names}
    return CodedSide(entry["first_token"], read_array(entry["indices"], "indices", "i4"), **arrays)


def _read_step(values: Sequence) -> StepTrace:
    token_id, piece, step_ms, log_prob, alternatives = values
    return StepTrace(token_id, piece, step_ms, log_prob, tuple((one, probability) for one, probability in alternatives))


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

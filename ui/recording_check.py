"""What a recording may hold: numbers, texts and shapes are checked here before anything is drawn with them.

Anyone may upload a file, so nothing in it is believed. Every fault is a sentence with the rule and what was found.
Knows neither files nor the page: `recording.py` reads.
"""

import base64
import json
import math
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvlens.engine.trace import AtomSnapshot, CodedSide, ErrorSnapshot, LaneLog, RunLog, StepTrace
from kvlens.ui import text
from kvlens.ui.prompts import MAX_PROMPT_CHARACTERS

if TYPE_CHECKING:
    from kvlens.ui.recording import ErrorHistory, Recording

MAX_LANES = 4
MAX_TOKENS = 131_072
MAX_STEPS = 16_384
"""Of all lanes together: four lanes of the most new tokens that the page gives."""
MAX_ENTRIES = 2**20
"""Values in the JSON. Each is far larger in memory than in the file; the most steps make about half of this."""
MAX_MOMENTS = 2_048
MAX_COUNT = 2**53 - 1
"""The largest number up to which the page's scripts count exactly."""
MAX_POSITION = 2**31 - 1
MAX_MS = 1e8
MIN_MS = 1e-6
"""What is divided by: a shorter time makes a speed that no number holds."""
MAX_LABEL = 1_024
MAX_PIECE = 4_096
MAX_TURNS = 4_096
MAX_TEXT = 2**23
MAX_PARTS = 32
MAX_ALTERNATIVES = 32
MAX_NOTICES = 64
MAX_SETTINGS = 1_024
MAX_PROJECTIONS = 16
MAX_ATOM_STEPS = 1_024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SCRIPT_NAMES = {"constructor", "hasOwnProperty", "isPrototypeOf", "propertyIsEnumerable", "toLocaleString", "toString",
                 "valueOf"}  # fmt: skip
"""What every object of a script has: looked up in the page's tables, such a name would find a function."""

_MOST = {"L": 1_024, "HK": 1_024, "D": 1_024, "s": MAX_ATOM_STEPS, "parts": MAX_ATOM_STEPS, "N": 2**20}


class RecordingFault(ValueError):
    """A file that is not a recording, and why."""


# --- single values --------------------------------------------------------------------------------------


def check_whole(value: object, what: str, low: int = 0, high: int = MAX_COUNT) -> int:
    """Raises: RecordingFault unless it is an integer in the range; True and False are none."""
    if type(value) is not int or not low <= value <= high:
        raise RecordingFault(f"{what} must be a whole number from {low:,} to {high:,}; got {reprlib.repr(value)}.")
    return value


def check_number(value: object, what: str, low: float, high: float) -> float:
    """Raises: RecordingFault unless it is a number in the range, which NaN is not."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise RecordingFault(f"{what} must be a number from {low:g} to {high:g}; got {reprlib.repr(value)}.")
    return float(value)


def check_text(value: object, what: str, most: int = MAX_LABEL) -> str:
    """Raises: RecordingFault unless it is a text of at most `most` characters that can be sent to a page."""
    if not isinstance(value, str) or len(value) > most:
        raise RecordingFault(f"{what} must be a text of at most {most:,} characters; got {reprlib.repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordingFault(f"{what} must be whole Unicode, without half of a pair.") from error
    return value


def check_name(value: object, what: str) -> str:
    """Raises: RecordingFault unless it can be looked up in the page's tables."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in _SCRIPT_NAMES:
        raise RecordingFault(f"{what} must be a name of 1 to 64 letters, digits and . _ -; got {reprlib.repr(value)}.")
    return value


def check_count(values: object, what: str, most: int, kind: type = list) -> None:
    """Raises: RecordingFault unless it is a list (or mapping) of at most `most` entries."""
    if not isinstance(values, kind) or len(values) > most:
        found = len(values) if isinstance(values, kind) else type(values).__name__
        noun = "mapping" if kind is dict else "list"
        raise RecordingFault(f"{what} must be a {noun} of at most {most:,} entries; got {found}.")


def check_plain(settings: object, what: str) -> None:
    """Settings are only kept and written again: bounded, whatever they are called."""
    waiting, seen = [settings], 0
    check_count(settings, what, MAX_SETTINGS, dict)
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen > MAX_SETTINGS:
            raise RecordingFault(f"{what} must have at most {MAX_SETTINGS:,} entries.")
        if isinstance(value, str):
            check_text(value, what, MAX_PROMPT_CHARACTERS)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(value, what, -MAX_COUNT, MAX_COUNT)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


# --- the file as a whole --------------------------------------------------------------------------------


def parse(data: bytes) -> object:
    """JSON of a bounded number of values. Raises: RecordingFault, or ValueError if it is no JSON."""
    if count_entries(data) > MAX_ENTRIES:
        raise RecordingFault(f"it must hold at most {MAX_ENTRIES:,} numbers, texts and lists.")
    return json.loads(data.decode(), parse_constant=_refuse_constant)


def count_entries(data: bytes) -> int:
    """How many values a JSON text has, about: its commas and opening brackets outside of strings."""
    plain = np.frombuffer(data.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    is_inside = np.bitwise_xor.accumulate(plain == ord('"'))
    is_mark = (plain == ord(",")) | (plain == ord("[")) | (plain == ord("{"))
    return int(np.count_nonzero(is_mark & ~is_inside))


def _refuse_constant(name: str) -> None:
    raise RecordingFault(f"numbers must be finite; got {name}.")


def read_array(packed: object, what: str, dtype: str = "f2", *, has_gaps: bool = False) -> np.ndarray:
    """The array of a file, fp32 or int32: as many bytes as its shape says, finite but for NaN where it `has_gaps`."""
    if not isinstance(packed, dict) or packed.get("dtype") != dtype:
        raise RecordingFault(f"{what} must be an array of {dtype}.")
    check_count(packed["shape"], f"the shape of {what}", 4)
    shape = [check_whole(size, f"a dimension of {what}", 0, MAX_POSITION) for size in packed["shape"]]
    raw = base64.b64decode(packed["data"], validate=True)
    if math.prod(shape) * np.dtype(dtype).itemsize != len(raw):
        raise RecordingFault(f"{what} must have as many bytes as its shape {shape} says; got {len(raw):,}.")
    stored = np.frombuffer(raw, dtype="<" + dtype).reshape(shape)
    if dtype == "f2" and not (np.isfinite(stored) | (np.isnan(stored) & has_gaps)).all():
        raise RecordingFault(f"{what} must hold finite numbers{', or NaN where nothing is known' * has_gaps}.")
    return stored.astype(np.float32 if dtype == "f2" else np.int32)


class Shapes:
    """The dimensions of a lane's arrays by name. The first array that has one sets it for all others.

    A name that begins with `T` counts tokens and may be 0; all others are at least 1.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def check(self, array: np.ndarray, what: str, *layout: str | int) -> None:
        """Raises: RecordingFault unless the array has this layout, of names and numbers."""
        if array.ndim != len(layout):
            raise RecordingFault(f"{what} must have {len(layout)} dimensions; got {array.ndim}.")
        for entry, size in zip(layout, array.shape, strict=True):
            if isinstance(entry, str) and entry not in self.sizes:
                is_tokens = entry.startswith("T")
                low, high = (0, MAX_TOKENS) if is_tokens else (1, _MOST[entry.partition(" ")[0]])
                self.sizes[entry] = check_whole(size, f"dimension {entry} of {what}", low, high)
            expected = self.sizes[entry] if isinstance(entry, str) else entry
            if size != expected:
                raise RecordingFault(f"dimension {entry} of {what} must be {expected:,} as elsewhere; got {size:,}.")


# --- a run and its lanes --------------------------------------------------------------------------------


def check(recording: "Recording") -> None:
    """Raises: RecordingFault for anything that a page could not show or a server not hold."""
    check_run(recording.log)
    lane_ids = [lane.lane_id for lane in recording.log.lanes]
    if not set(recording.history) <= set(lane_ids):
        raise RecordingFault(f"its history must be of its lanes, {', '.join(lane_ids)}.")
    for lane in recording.log.lanes:
        shapes = Shapes()
        if lane.errors is not None:
            check_errors(lane.errors, shapes)
        if lane.atoms is not None:
            check_atoms(lane.atoms, shapes)
        if lane.lane_id in recording.history:
            check_history(recording.history[lane.lane_id], shapes)
    _check_about(recording)


def _check_about(recording: "Recording") -> None:
    check_text(recording.date, "the date")
    check_plain(recording.settings, "the settings")
    check_count(recording.prompts, "the prompts", MAX_TURNS)
    check_count(recording.earlier_answers, "the earlier answers", MAX_LANES, dict)
    for lane_id, answers in recording.earlier_answers.items():
        check_name(lane_id, "a lane of the earlier answers")
        check_count(answers, "the answers of a lane", MAX_TURNS)
    texts = [*recording.prompts, *(answer for answers in recording.earlier_answers.values() for answer in answers)]
    if sum(len(check_text(one, "a prompt or an answer", MAX_PROMPT_CHARACTERS)) for one in texts) > MAX_TEXT:
        raise RecordingFault(f"its prompts and answers must have at most {MAX_TEXT:,} characters together.")
    check_count(recording.projection, "the projection", MAX_PROJECTIONS)
    for num_tokens, sizes in recording.projection:
        check_whole(num_tokens, "the tokens of a projection", 1, MAX_POSITION)
        _check_bytes(sizes, "the projection", MAX_LANES + 1)


def check_run(log: RunLog) -> None:
    """Raises: RecordingFault for what stands around the lanes, and for each lane without its arrays."""
    for name in ("run_id", "model", "device"):
        # A model may be called by the path of its folder.
        check_text(getattr(log, name), name, MAX_PIECE)
    for name in ("fp16_bytes_per_token", "values_per_token", "max_context"):
        check_whole(getattr(log, name), name, 1)
    check_whole(log.weight_bytes, "weight_bytes")
    check_whole(log.machine.process_bytes, "process_bytes")
    for name, size in vars(log.machine).items():
        if size is not None:
            check_whole(size, name)
    check_count(log.notices, "the notices", MAX_NOTICES)
    for notice in log.notices:
        check_text(notice, "a notice", MAX_PIECE)
    if not log.lanes or len({lane.lane_id for lane in log.lanes}) != len(log.lanes):
        raise RecordingFault("it must hold lanes, each with a name of its own.")
    for lane in log.lanes:
        check_lane(lane)


def check_lane(lane: LaneLog) -> None:
    for name in ("lane_id", "method"):
        check_name(getattr(lane, name), name)
    for name in ("title", "attention_path"):
        check_text(getattr(lane, name), name)
    for name in ("prompt_tokens", "reserved_bytes", "probe_bytes", "shared_bytes"):
        check_whole(getattr(lane, name), name)
    check_whole(lane.reused_tokens, "reused_tokens", 0, lane.prompt_tokens)
    if type(lane.is_simulated) is not bool:
        raise RecordingFault(f"is_simulated must be true or false; got {reprlib.repr(lane.is_simulated)}.")
    if lane.finish is not None and lane.finish not in list(text.FINISH):
        raise RecordingFault(f"finish must be one of {', '.join(text.FINISH)}; got {reprlib.repr(lane.finish)}.")
    if lane.prefill_ms is not None:
        _check_ms(lane.prefill_ms, "prefill_ms", can_be_zero=True)
    check_plain(lane.settings, "the settings of a lane")
    for index, step in enumerate(lane.steps):
        check_step(step, is_first=index == 0)
    for sample in lane.memory:
        check_whole(sample.num_tokens, "the tokens of a memory sample", 1, MAX_POSITION)
        _check_bytes(sample.parts, "a memory sample", MAX_PARTS)


def check_step(step: StepTrace, *, is_first: bool) -> None:
    """The first token comes out of prefill, which takes no time where all of it was kept."""
    check_whole(step.token_id, "token_id")
    check_text(step.text, "the text of a step", MAX_PIECE)
    _check_ms(step.step_ms, "step_ms", can_be_zero=is_first)
    check_number(step.log_prob, "log_prob", -1e30, 0.01)
    check_count(step.alternatives, "the alternatives of a step", MAX_ALTERNATIVES, tuple)
    for piece, probability in step.alternatives:
        check_text(piece, "the text of an alternative", MAX_PIECE)
        check_number(probability, "the probability of an alternative", 0, 1.01)


def _check_ms(value: object, what: str, *, can_be_zero: bool) -> None:
    if not (can_be_zero and type(value) in (int, float) and value == 0):
        check_number(value, what, MIN_MS, MAX_MS)


def _check_bytes(sizes: object, what: str, most: int) -> None:
    check_count(sizes, what, most, dict)
    for name, size in sizes.items():
        check_whole(size, f"{check_name(name, f'a part of {what}')} of {what}")


# --- arrays ---------------------------------------------------------------------------------------------


def check_errors(errors: ErrorSnapshot, shapes: Shapes) -> None:
    shapes.check(errors.by_token, "by_token", 2, "L", "HK", "T")
    _check_statistics((errors.by_head, errors.by_channel, errors.peak_channel), shapes)
    if (errors.exact is None) != (errors.rebuilt is None):
        raise RecordingFault("exact and rebuilt must be there both or not at all.")
    for name in ("exact", "rebuilt"):
        if getattr(errors, name) is not None:
            shapes.check(getattr(errors, name), name, 2, "HK", "T", "D")
    _check_layer(errors.probed_layer, shapes)


def _check_statistics(arrays: Iterable[np.ndarray], shapes: Shapes) -> None:
    by_head, by_channel, peak_channel = arrays
    shapes.check(by_head, "by_head", 2, "L", "HK")
    shapes.check(by_channel, "by_channel", 2, "L", "HK", "D")
    shapes.check(peak_channel, "peak_channel", 2, "L", "HK", "D")


def _check_layer(layer: int, shapes: Shapes) -> None:
    check_whole(layer, "probed_layer", 0, shapes.sizes["L"] - 1)


def check_atoms(atoms: AtomSnapshot, shapes: Shapes) -> None:
    shapes.check(atoms.coverage, "coverage", 2, "L")
    _check_layer(atoms.probed_layer, shapes)
    for kind in ("keys", "values"):
        check_side(getattr(atoms, kind), kind, shapes)


def check_side(side: CodedSide, kind: str, shapes: Shapes) -> None:
    """Keys and values are coded each in their own way; heads and channels are the same."""
    coded = ("HK", f"T of {kind}", f"s of {kind}", f"parts of {kind}")
    shapes.check(side.indices, f"indices of {kind}", *coded)
    shapes.check(side.coefficients, f"coefficients of {kind}", *coded)
    shapes.check(side.exact, f"exact of {kind}", "HK", coded[1], "D")
    steps, parts = (shapes.sizes[name] for name in coded[2:])
    num_tokens, width = shapes.sizes[coded[1]], shapes.sizes["D"]
    check_whole(steps * parts, f"atoms of a vector in {kind}", 1, MAX_ATOM_STEPS)
    shapes.check(side.remaining, f"remaining of {kind}", "HK", coded[1], steps * parts + 1)
    start_heads = 1 if side.start.shape[:1] == (1,) else "HK"
    is_shared = side.start.shape[1:2] == (1,)
    shapes.check(side.start, f"start of {kind}", start_heads, 1 if is_shared else coded[1], "D")
    if width % parts:
        raise RecordingFault(f"the parts of {kind} must divide its {width} channels; got {parts}.")
    shapes.check(side.atoms, f"atoms of {kind}", f"N of {kind}", width // parts)
    if side.indices.size and not 0 <= side.indices.min() <= side.indices.max() < len(side.atoms):
        raise RecordingFault(
            f"the indices of {kind} must name one of its {len(side.atoms):,} atoms; "
            f"got {side.indices.min():,} to {side.indices.max():,}."
        )
    check_whole(side.first_token, f"first_token of {kind}", 0, MAX_TOKENS - num_tokens)


def check_history(history: "ErrorHistory", shapes: Shapes) -> None:
    shapes.check(history.packed_at, "packed_at", 2, "T")
    check_count(history.moments, "the moments of a lane", MAX_MOMENTS)
    check_count(history.coverage, "the moments of a lane's coverage", MAX_MOMENTS)
    for step, *statistics in history.moments:
        check_whole(step, "the step of a moment", 0, MAX_POSITION)
        _check_statistics(statistics, shapes)
    for step, coverage in history.coverage:
        check_whole(step, "the step of a moment", 0, MAX_POSITION)
        shapes.check(coverage, "coverage of a moment", 2, "L")

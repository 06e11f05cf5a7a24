"""What a run records: steps, memory, errors. Plain data, from the decode loop to the screen.

Nothing here knows how it is measured (`measure.py`), made (`compare.py`) or drawn (`kvlens.ui`).
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class StepTrace:
    """One generated token of one lane.

    `log_prob` is the natural logarithm of its probability at temperature 1 in this lane;
    `alternatives` the likeliest tokens with their probabilities, best first.
    Units: `step_ms` is the model's step alone: no sampling, no probe, no screen, no other lane.
    """

    token_id: int
    text: str
    step_ms: float
    log_prob: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class MemorySample:
    """Live bytes by part when the cache held `num_tokens` tokens."""

    num_tokens: int
    parts: dict[str, int]


@dataclass(frozen=True)
class ErrorSnapshot:
    """Relative errors of a lane's packed cache against its own exact tensors, so far.

    An error is the norm of the difference over the norm of the exact part. Tokens that are still exact
    are NaN in `by_token`. All arrays fp32; index 0 of the first axis is keys, 1 values.

    Shapes: by_token `[2, L, HK, T]`; by_head `[2, L, HK]`; by_channel `[2, L, HK, D]`;
    peak_channel `[2, L, HK, D]`: the largest magnitude seen in each channel. The layer under the
    microscope adds exact and rebuilt `[2, HK, T, D]`, else they are None.
    """

    by_token: np.ndarray
    by_head: np.ndarray
    by_channel: np.ndarray
    peak_channel: np.ndarray
    probed_layer: int
    exact: np.ndarray | None = None
    rebuilt: np.ndarray | None = None


@dataclass(frozen=True)
class CodedSide:
    """Keys or values of a layer as sums of atoms: token `first_token + t` is `start + sum of coefficient * atom`.

    With several parts, each part of the channels has atoms of its own; they are added in turn: the first atom of every
    part, then the second. Keys may be coded before the position is turned into them: `exact` is then what they were
    before, too. It is NaN where the exact token is not known any more.

    Shapes: indices int32 and coefficients fp32 `[HK, T, s, parts]`; exact `[HK, T, D]`; start `[HK, 1 or T, D]`;
    remaining `[HK, T, s * parts + 1]`, the norm of what is missing after 0, 1, ... atoms over that of the exact
    vector; atoms `[N, D / parts]`.
    """

    first_token: int
    indices: np.ndarray
    coefficients: np.ndarray
    exact: np.ndarray
    start: np.ndarray
    remaining: np.ndarray
    atoms: np.ndarray


@dataclass(frozen=True)
class AtomSnapshot:
    """What a lane's sparse codes are made of, so far, in the layer under the microscope.

    Shapes: coverage fp32 `[2, L]`: of keys (0) and values (1), the share of a layer's atoms used at least once.
    """

    probed_layer: int
    coverage: np.ndarray
    keys: CodedSide
    values: CodedSide


@dataclass
class LaneLog:
    """Everything one lane has recorded in one run.

    `finish` is None while it runs, then one of "end" (the model ended its answer), "length" (the most
    new tokens were reached), "context" (the context is full), "stopped" (a person stopped it).
    `shared_bytes` are read by the lane and belong to all conversations: learned dictionaries.
    Units: `prefill_ms` and `first_token_ms` are this lane's own time, without the other lanes' turns.
    """

    lane_id: str
    method: str
    title: str
    is_simulated: bool = False
    settings: dict[str, object] = field(default_factory=dict)
    attention_path: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_ms: float | None = None
    steps: list[StepTrace] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    reserved_bytes: int = 0
    probe_bytes: int = 0
    shared_bytes: int = 0
    errors: ErrorSnapshot | None = None
    atoms: AtomSnapshot | None = None
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def token_ids(self) -> list[int]:
        return [step.token_id for step in self.steps]

    @property
    def first_token_ms(self) -> float | None:
        """Prefill, which gives the first token."""
        return self.prefill_ms

    @property
    def decode_ms(self) -> list[float]:
        """Times of the steps after the first token (the first one comes out of prefill)."""
        return [step.step_ms for step in self.steps[1:]]

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed over the run, without prefill and without the first, cold step."""
        warm = self.decode_ms[1:]
        return 1000 * len(warm) / sum(warm) if warm else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        if not self.prefill_ms:
            return None
        return 1000 * (self.prompt_tokens - self.reused_tokens) / self.prefill_ms


@dataclass(frozen=True)
class MachineMemory:
    """What the process and the device hold, in bytes; None where there is no such device or reading."""

    process_bytes: int
    device_allocated_bytes: int | None = None
    device_peak_bytes: int | None = None
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None


@dataclass
class RunLog:
    """One prompt, all lanes. `first_difference` is the index of the first new token at which the lanes part."""

    run_id: str
    model: str
    device: str
    fp16_bytes_per_token: int
    values_per_token: int
    weight_bytes: int
    max_context: int
    lanes: list[LaneLog]
    machine: MachineMemory
    notices: list[str] = field(default_factory=list)

    @property
    def first_difference(self) -> int | None:
        answers = [lane.token_ids for lane in self.lanes]
        for index, tokens in enumerate(zip(*answers, strict=False)):
            if len(set(tokens)) > 1:
                return index
        finished = [len(ids) for ids, lane in zip(answers, self.lanes, strict=True) if lane.finish == "end"]
        shortest = min((len(ids) for ids in answers), default=0)
        is_cut = any(length == shortest for length in finished) and max(map(len, answers)) > shortest
        return shortest if is_cut else None

"""What a visitor asks the throughput lab to measure: what is offered, what was chosen, what is allowed."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvlens.engine.errors import EngineError
from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from kvlens.ui import controls, lab_text
from kvlens.ui.models import ModelHub

if TYPE_CHECKING:
    from kvlens.engine.bench import Bench, Candidate
    from kvlens.engine.throughput import CellResult

SERVED = "served"
"""The subject that is the model of this page; the others are architectures by name."""

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
DEFAULT_CONTEXTS = (256, 1024, 2048, 4096)
DEFAULT_BATCH_SIZES = (1, 2, 4, 8)
DEFAULT_METHODS = 3


@dataclass(frozen=True)
class Bounds:
    """What one lab may take. Units: bytes of the budget a person may choose for the served model; seconds."""

    max_cells: int
    max_bytes: int
    max_seconds: float


OWN = Bounds(max_cells=240, max_bytes=10**12, max_seconds=30 * 60)
PUBLIC = Bounds(max_cells=48, max_bytes=256 * 10**6, max_seconds=90)


def bounds_of(hub: ModelHub) -> Bounds:
    """A page whose model is fixed is open to strangers: their labs are short."""
    return OWN if hub.offered is None else PUBLIC


@dataclass(frozen=True)
class Choice:
    """A preset of a method, by name."""

    method: str
    preset: str


@dataclass(frozen=True)
class Plan:
    """What to measure. `subject` is SERVED or the name of an architecture."""

    subject: str
    choices: tuple[Choice, ...]
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    limit_bytes: int

    @property
    def num_cells(self) -> int:
        return len(self.choices) * len(self.contexts) * len(self.batch_sizes)

    def candidates(self) -> "list[Candidate]":
        from kvlens.engine.bench import Candidate

        methods = available()
        return [Candidate(one.preset, one.method, methods[one.method].presets[one.preset]) for one in self.choices]


@dataclass
class LabRun:
    """One asked-for lab, from the click to its end, and what it has found."""

    plan: Plan
    stop: threading.Event = field(default_factory=threading.Event)
    state: str = "waiting"
    results: "Sequence[CellResult]" = ()
    scope: str = "network"
    subject: str = ""
    shape: ModelShape | None = None
    conditions: dict[str, str] = field(default_factory=dict)

    def start(self, bench: "Bench", conditions: dict[str, str]) -> None:
        self.state, self.conditions = "running", conditions
        self.scope, self.subject, self.shape = bench.scope, bench.name, bench.shape

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped")


def default_choices() -> list[Choice]:
    """The first preset of each method; with fewer methods than figures are made for, further presets."""
    entries = available().values()
    first = [Choice(entry.name, preset) for entry in entries for preset in list(entry.presets)[:1]]
    more = [Choice(entry.name, preset) for entry in entries for preset in list(entry.presets)[1:]]
    return [*first, *more][:DEFAULT_METHODS]


def subjects(hub: ModelHub) -> list[dict[str, Any]]:
    """The served model first, then the shapes; each with what its cells cost in fp16."""
    from kvlens.engine.architectures import ARCHITECTURES

    found, model = [], hub.model
    if model is not None:
        served = {"id": SERVED, "name": model.name, "max_context": model.max_context, "is_shape": False}
        found.append(served | {"fp16_token_bytes": model.shape.fp16_bytes(1)})
    found += [
        {"id": one.name, "name": one.name, "max_context": one.max_context, "is_shape": True}
        | {"fp16_token_bytes": one.shape.fp16_bytes(1), "num_layers": one.shape.num_layers}
        for one in ARCHITECTURES.values()
    ]
    return found


def offer(hub: ModelHub) -> dict[str, Any]:
    """What the page's controls offer and where they start."""
    from kvlens.engine.throughput import ROUND_STEPS, TIMED_STEPS, WARM_UP_STEPS

    return {
        "steps": {"warm": WARM_UP_STEPS, "steps": TIMED_STEPS, "round": ROUND_STEPS},
        "subjects": subjects(hub),
        "contexts": CONTEXTS,
        "batch_sizes": BATCH_SIZES,
        "bounds": asdict(bounds_of(hub)),
        "defaults": {
            "choices": [asdict(one) for one in default_choices()],
            "contexts": DEFAULT_CONTEXTS,
            "batch_sizes": DEFAULT_BATCH_SIZES,
        },
    }


def parse_plan(value: Any, hub: ModelHub) -> Plan:
    """The plan in what the page sent. Raises: EngineError with a sentence for what is missing or too much."""
    from kvlens.engine.architectures import ARCHITECTURES

    try:
        subject = str(value["subject"])
        choices = tuple(dict.fromkeys(Choice(str(one["method"]), str(one["preset"])) for one in value["choices"]))
        contexts, batch_sizes = (_numbers(value, name) for name in ("contexts", "batch_sizes"))
        limit_bytes = int(value["limit_bytes"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineError(lab_text.NOT_WHOLE) from error
    if not (choices and contexts and batch_sizes):
        raise EngineError(lab_text.NOTHING_CHOSEN)
    for one in choices:
        if one.preset not in controls.presets_of(one.method):
            raise EngineError(lab_text.UNKNOWN_PRESET.format(method=one.method, preset=one.preset))
    if subject != SERVED and subject not in ARCHITECTURES:
        raise EngineError(lab_text.UNKNOWN_SUBJECT.format(names=", ".join(ARCHITECTURES)))
    if not (set(contexts) <= set(CONTEXTS) and set(batch_sizes) <= set(BATCH_SIZES)):
        raise EngineError(lab_text.NOT_OFFERED)
    plan, bounds = Plan(subject, choices, contexts, batch_sizes, limit_bytes), bounds_of(hub)
    if plan.num_cells > bounds.max_cells:
        raise EngineError(lab_text.too_many(plan.num_cells, bounds.max_cells))
    if limit_bytes < 10**6 or (subject == SERVED and limit_bytes > bounds.max_bytes):
        raise EngineError(lab_text.budget_out_of_range(bounds.max_bytes))
    return plan


def _numbers(value: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(sorted({int(one) for one in value[name]}))

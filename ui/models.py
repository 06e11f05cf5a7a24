"""Which model the page serves: loaded in the background at start, changed on request, one at a time."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError
from kvlens.engine.measure import machine_memory
from kvlens.ui import text

if TYPE_CHECKING:
    from kvlens.engine.model import LoadedModel

SUGGESTED = ("HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen3-0.6B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")
"""Chat models in safetensors that need no account and run on a laptop; named where any model may be loaded."""

DEVICE_SHARE = 0.7
MACHINE_SHARE = 0.25


@dataclass(frozen=True)
class ModelRequest:
    """What was asked for at start. `name` None is the embedded model."""

    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_context: int | None = None
    budget_bytes: int | None = None


def budget_bytes(model: "LoadedModel") -> int:
    """What all caches together may take if nobody says: a share of what the device or the machine has."""
    total = machine_memory(model.device).device_total_bytes
    if total is not None:
        return int(DEVICE_SHARE * max(0, total - model.weight_bytes))
    return int(MACHINE_SHARE * psutil.virtual_memory().total)


def load_with_engine(name: str | None, **options) -> "LoadedModel":
    """The engine's `load_model`, imported only now: that takes seconds, and the page answers before."""
    from kvlens.engine.model import load_model

    return load_model(name, **options)


def parse_offer(offer: str | None) -> list[str] | None:
    """`a/b, c/d` as a list; None lets a person name any model; `none` fixes the model."""
    if offer is None or not offer.strip():
        return None
    names = [name.strip() for name in offer.split(",") if name.strip()]
    return [] if names == ["none"] else names


@dataclass
class ModelHub:
    """The model in service and how far the next one has come.

    `offered` None lets a person name any model; a list allows these alone; an empty list fixes the model.
    `can_learn`: visitors may have dictionaries learned.
    """

    request: ModelRequest
    offered: Sequence[str] | None = None
    can_learn: bool = True
    load: Callable[..., Any] = load_with_engine
    model: "LoadedModel | None" = None
    progress: str = ""
    problem: str = ""
    is_loading: bool = False
    budget: MemoryBudget | None = None
    version: int = 0
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self) -> None:
        """Load the first model in the background: the page answers meanwhile."""
        self.is_loading = True
        threading.Thread(target=self._first, daemon=True, name="kvlens-model").start()

    def _first(self) -> None:
        with suppress(EngineError):  # told on the page through `problem`
            self.change(self.request.name)

    def change(self, name: str | None) -> "LoadedModel":
        """Load `name` and serve it; on a fault the present model stays. Raises: EngineError.

        One load after the other, the first one among them: the last that was asked for stays.
        """
        with self._turn:
            return self._change(name)

    def _change(self, name: str | None) -> "LoadedModel":
        label = name or "the built-in model"
        self._tell(progress=text.MODEL_LOADING.format(name=label), problem="", is_loading=True)
        try:
            model = self.load(
                name,
                device=self.request.device,
                dtype=self.request.dtype,
                max_context=self.request.max_context,
                progress=lambda *said: self._tell(progress=" ".join(map(str, said))),
            )
        except EngineError as error:
            self._tell(progress="", problem=str(error), is_loading=False)
            raise
        except Exception as error:
            reason = text.MODEL_FAILED.format(reason=f"{type(error).__name__}: {error}")
            self._tell(progress="", problem=reason, is_loading=False)
            raise EngineError(reason) from error
        limit = self.request.budget_bytes or budget_bytes(model)
        self._tell(model=model, budget=MemoryBudget(limit), progress="", problem="", is_loading=False)
        return model

    def _tell(self, **changes: Any) -> None:
        with self._changed:
            for name, value in changes.items():
                setattr(self, name, value)
            self.version += 1
            self._changed.notify_all()

    def wait_change(self, version: int, timeout: float) -> int:
        """Blocks until something is newer than `version`, or the time is over; the version then."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, timeout)
            return self.version

    @property
    def choices(self) -> Sequence[str]:
        """Names to choose from: what is offered, or suggestions where a person may name any model."""
        return SUGGESTED if self.offered is None else self.offered

    def check_allowed(self, name: str) -> None:
        """Raises: EngineError if this page does not offer `name`."""
        if not name:
            raise EngineError(text.MODEL_NAME_EMPTY)
        if self.offered is None:
            return
        if not self.offered:
            raise EngineError(text.MODEL_CHANGE_OFF)
        if name not in self.offered:
            raise EngineError(text.MODEL_NOT_ALLOWED.format(names=", ".join(self.offered)))

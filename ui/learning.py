"""Learning dictionaries on the page: what a lane lacks, what may be learned from, how far it has come. No gradio."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvlens.engine.dictionaries.store import DictionaryKind, MissingDictionary
from kvlens.engine.errors import EngineError
from kvlens.ui import controls, text
from kvlens.ui.models import ModelHub

if TYPE_CHECKING:
    from kvlens.engine.dictionaries.learn import Progress
    from kvlens.engine.model import LoadedModel


@dataclass(frozen=True)
class Bounds:
    """What one learning may take. `num_tokens` of text are read, the engine's own number if None.

    `is_text_added`: a person's text is learned from together with ours, not in its place.
    """

    max_characters: int
    max_seconds: float
    num_tokens: int | None = None
    is_text_added: bool = False


OWN = Bounds(max_characters=4_000_000, max_seconds=60 * 60)
PUBLIC = Bounds(max_characters=40_000, max_seconds=4 * 60, num_tokens=30_000, is_text_added=True)


def bounds_of(hub: ModelHub) -> Bounds:
    """A page whose model is fixed is open to strangers, and what one of them has it learn serves all the others."""
    return OWN if hub.offered is None else PUBLIC


def lacking(hub: ModelHub, choice: controls.LaneChoice) -> MissingDictionary | None:
    """Why a lane cannot run with the model in service; None if it lacks no dictionary."""
    if hub.model is None or choice.config.kind is None:
        return None
    try:
        hub.model.facts.check(choice.config.kind)
    except MissingDictionary as error:
        return error
    return None


def remark(hub: ModelHub, value: str) -> dict[str, Any]:
    """What to say beside a lane's settings about the dictionary that it lacks; nothing if it lacks none."""
    try:
        error = lacking(hub, controls.parse_choice(value))
    except ValueError:
        return {}  # said as what is wrong with the settings, or when they are run
    if error is None:
        return {}
    sentence = text.lane_lacks(error.kind.name) if hub.can_learn else text.LEARNING_OFF.format(reason=error)
    bounds = bounds_of(hub)
    return {
        "lacks": {
            "kind": error.kind.name,
            "sentence": sentence,
            "can_learn": hub.can_learn,
            "max_characters": bounds.max_characters,
            "is_text_added": bounds.is_text_added,
        }
    }


@dataclass
class LearnRun:
    """One asked-for dictionary, from the click to its end.

    `state` is one of "waiting", "learning", "done", "stopped", "failed"; `sentence` says why it failed.
    """

    kind: DictionaryKind
    text: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    state: str = "waiting"
    progress: "Progress | None" = None
    sentence: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


def parse_request(value: Any, hub: ModelHub) -> LearnRun:
    """The request in what the page sent. Raises: EngineError with a sentence."""
    try:
        choice, written = controls.parse_choice(value["lane"]), str(value.get("text") or "").strip()
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(text.LEARN_NOT_WHOLE) from error
    if not hub.can_learn or choice.config.kind is None:
        raise EngineError(text.LEARN_REFUSED)
    limit = bounds_of(hub).max_characters
    if len(written) > limit:
        raise EngineError(text.learn_text_too_long(len(written), limit))
    return LearnRun(choice.config.kind, written)


def learn_steps(model: "LoadedModel", run: LearnRun, bounds: Bounds) -> "Iterator[Progress]":
    """Learn what `run` asks for and keep it in the model's store. Close the iterator to stop; nothing stays then."""
    from kvlens.engine.dictionaries import calibration
    from kvlens.engine.dictionaries.learn import LearnOptions, learn

    documents = [run.text] if run.text else []
    if bounds.is_text_added or not documents:
        documents += calibration.read_documents([calibration.SHIPPED_TEXT])
    sizes = {"row_tokens": min(LearnOptions.row_tokens, model.max_context)}
    if bounds.num_tokens is not None:
        sizes["num_tokens"] = bounds.num_tokens
    for progress in learn(model, documents, [run.kind], LearnOptions(**sizes)):
        if progress.dictionaries is not None:
            model.facts.dictionaries.save(progress.dictionaries)
        yield replace(progress, dictionaries=None)  # they are the store's now; a page keeps only how far it is


def describe(run: LearnRun | None, notice: str = "", *, is_awaited: bool = False) -> str:
    """The page's value. `is_awaited`: a prompt waits in its box for the dictionary and goes on by itself."""
    if run is None:
        return json.dumps({"state": "idle", "sentence": notice})
    told = {"state": run.state, "kind": run.kind.name, "sentence": notice or run.sentence, "is_awaited": is_awaited}
    if run.progress is not None:
        told |= {name: getattr(run.progress, name) for name in ("share", "stage", "side", "layer", "error")}
    return json.dumps(told)

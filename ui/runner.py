"""A run from ticket to recording: the engine's growing log as a stream of page updates.

The engine works between our updates, never beside them: a step's clock does not see the screen. It is
imported when the first run starts, not with this module: that takes seconds, and the page answers before.
"""

import datetime
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError
from kvlens.engine.trace import RunLog
from kvlens.ui import controls, frames, text
from kvlens.ui.address import Sampling
from kvlens.ui.payload import Scene, build
from kvlens.ui.recording import Recorder, Recording
from kvlens.ui.session import Session, Ticket, Turn

if TYPE_CHECKING:
    from kvlens.engine.compare import Comparison, LaneSpec, RunOptions
    from kvlens.engine.model import LoadedModel

log_book = logging.getLogger("kvlens.ui")

TEXT_SECONDS = 1 / 15
PANEL_SECONDS = 1 / 6


@dataclass
class Update:
    """One update of the page. None keeps what is shown; `prompt` goes back into the prompt box."""

    chats: list[frames.Messages] | None = None
    payload: str | None = None
    prompt: str | None = None


class Fruitless(Exception):
    """A run ended without an answer, and the page goes back to what it showed before. The text is for the page."""


class Pace:
    """Says when the next update is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = float("-inf")

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def comparison_of(session: Session, model: "LoadedModel", budget: MemoryBudget | None) -> "Comparison":
    """The visitor's lanes with their caches of earlier turns; new ones for a new model."""
    from kvlens.engine.compare import Comparison

    if session.comparison is None or session.comparison.model is not model:
        session.free()
        session.comparison = Comparison(model, budget=budget)
    return session.comparison


def options_for(sampling: Sampling, probed_layer: int) -> "RunOptions":
    from kvlens.engine.compare import RunOptions

    return RunOptions(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        probed_layer=probed_layer,
    )


def lane_specs(lanes: Mapping[str, controls.LaneChoice]) -> "list[LaneSpec]":
    from kvlens.engine.compare import LaneSpec

    return [LaneSpec(lane_id, choice.method, choice.config) for lane_id, choice in lanes.items()]


def probed_layer(session: Session, model: "LoadedModel") -> int:
    """The layer that the visitor chose for the microscope, or one in the middle."""
    chosen = session.view.layer
    return model.shape.num_layers // 2 if chosen is None else min(chosen, model.shape.num_layers - 1)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def run(session: Session, ticket: Ticket, model: "LoadedModel", budget: MemoryBudget | None = None) -> Iterator[Update]:
    """Answer a ticket's prompt in all lanes.

    Raises: Fruitless, with a sentence after a fault and without one after a stop before the first token.
    """
    scene = Scene(
        state="reading",
        projection=controls.project(model.shape, ticket.lanes),
        is_cpu=model.device.type == "cpu",
        budget=budget,
    )
    recorder = Recorder()
    try:
        yield Update(payload=build(None, scene))
        text_pace, panel_pace = Pace(TEXT_SECONDS), Pace(PANEL_SECONDS)
        for log in _steps(session, ticket, model, budget):
            recorder.see(log)
            if text_pace.is_due():
                yield _progress(session, ticket, log, scene, panel_pace.is_due())
    except EngineError as error:
        raise Fruitless(str(error)) from error
    except Exception as error:
        log_book.exception("a run broke")
        session.free()
        raise Fruitless(text.INTERNAL_FAULT.format(kind=type(error).__name__)) from error
    if ticket.is_dropped or not any(lane.steps for lane in log.lanes):
        raise Fruitless
    done = replace(scene, state="done", view=session.view)
    session.recording = _recording(session, ticket, log, recorder, scene)
    earlier = list(session.turns)
    session.turns.append(Turn(ticket.prompt, frames.answers_of(log)))
    yield Update(frames.running(earlier, ticket.prompt, frames.answers_of(log)), build(log, done))


def conversations(session: Session) -> list[frames.Messages]:
    return [frames.conversation(session.turns, lane_id) for lane_id in controls.LANES]


def _steps(session: Session, ticket: Ticket, model: "LoadedModel", budget: MemoryBudget | None) -> Iterator[RunLog]:
    lanes = lane_specs(ticket.lanes)
    messages = {
        lane_id: session.messages(lane_id, ticket.sampling.system_prompt, ticket.prompt) for lane_id in ticket.lanes
    }
    options = options_for(ticket.sampling, probed_layer(session, model))
    steps = comparison_of(session, model, budget).run(messages, lanes, options, ticket.stop)
    try:
        yield from steps
    finally:
        steps.close()


def _progress(session: Session, ticket: Ticket, log: RunLog, scene: Scene, has_panels: bool) -> Update:
    state = "running" if any(lane.steps for lane in log.lanes) else "reading"
    chats = frames.running(session.turns, ticket.prompt, frames.answers_of(log))
    return Update(chats, build(log, replace(scene, state=state, view=session.view)) if has_panels else None)


def _recording(session: Session, ticket: Ticket, log: RunLog, recorder: Recorder, scene: Scene) -> Recording:
    recorder.see(log)
    settings = {
        "lanes": {lane_id: {"method": c.method, "config": asdict(c.config)} for lane_id, c in ticket.lanes.items()},
        "sampling": asdict(ticket.sampling),
    }
    return recorder.finish(
        log,
        prompts=[*(turn.prompt for turn in session.turns), ticket.prompt],
        earlier_answers={
            lane_id: [turn.answers.get(lane_id, "") for turn in session.turns] for lane_id in ticket.lanes
        },
        settings=settings,
        projection=scene.projection,
        date=today(),
    )


def replay(
    session: Session, recording: Recording, ticket: Ticket, scene: Scene, rate: float | None
) -> Iterator[Update]:
    """Play a recording at its own speed, or at `rate` tokens/s a lane."""
    text_pace, panel_pace = Pace(TEXT_SECONDS), Pace(PANEL_SECONDS)
    due = time.monotonic()
    for step in range(1, recording.num_steps):
        due += 1 / rate if rate else recording.step_seconds(step)
        if ticket.stop.wait(max(0.0, due - time.monotonic())):
            break
        if not text_pace.is_due():
            continue
        log = recording.at(step)
        payload = build(log, replace(scene, state="replay", view=session.view)) if panel_pace.is_due() else None
        yield Update(frames.recorded(recording, log), payload)
    final = replace(scene, state="recorded", view=session.view)
    chats = conversations(session) if ticket.is_dropped else frames.recorded(recording)
    yield Update(chats, build(recording.log, final))

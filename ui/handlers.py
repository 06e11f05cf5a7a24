"""Events of the Chat tab: what a click, a key or an address becomes. Layout and drawing are elsewhere."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import gradio as gr

from kvlens.engine.dictionaries.store import MissingDictionary
from kvlens.engine.errors import EngineError
from kvlens.ui import address, controls, frames, learning, library, runner, text
from kvlens.ui.address import Sampling, Settings, make_sampling
from kvlens.ui.heat import View
from kvlens.ui.library import Library
from kvlens.ui.models import ModelHub
from kvlens.ui.payload import Scene, build
from kvlens.ui.prompts import check_prompt
from kvlens.ui.recording import Recording, RecordingFault
from kvlens.ui.session import Session, SessionStore, Ticket

MODEL_WAIT_SECONDS = 20 * 60


class ChatHandlers:
    """All events of the Chat tab, with what they share: the model, the visitors, the recorded runs."""

    def __init__(self, hub: ModelHub, store: SessionStore, runs: Library) -> None:
        self.hub, self.store, self.runs = hub, store, runs

    # --- what the page starts with ------------------------------------------------------------------

    def first_frame(self) -> runner.Update:
        """The recorded run that is painted before anything is computed; an empty page without one."""
        recording = self.runs.first()
        if recording is None:
            return runner.Update([[] for _ in controls.LANES], build(None, Scene(state="empty")))
        return runner.Update(frames.recorded(recording), build(recording.log, self._recorded_scene(recording)))

    def header(self) -> str:
        """The header's value: which model, what is offered, which recorded runs."""
        hub, model = self.hub, self.hub.model
        state = {
            "name": model.name if model else None,
            "is_loading": hub.is_loading,
            "progress": hub.progress,
            "problem": hub.problem,
            "can_change": bool(hub.choices),
            "can_type": hub.offered is None,
            "offered": list(hub.choices),
            "recorded": self.runs.entries(),
        }
        if model is not None:
            state |= {
                "is_embedded": model.is_embedded,
                "weight_bytes": model.weight_bytes,
                "max_context": model.max_context,
                "device": model.device_name,
                "is_cpu": model.device.type == "cpu",
            }
        return json.dumps(state)

    def _session(self, request: gr.Request) -> Session:
        return self.store.get(request.session_hash or "")

    # --- asking -------------------------------------------------------------------------------------

    def send(self, prompt, lane_a, lane_b, system, max_new, temperature, top_p, seed, request: gr.Request):
        """Take a prompt: show it at once and leave a ticket for the engine."""
        session = self._session(request)
        if session.ticket is not None:
            return self._keep()
        session.is_prompt_held = False
        if self._is_lost(session):
            return self._say(session, text.CONVERSATION_LOST)
        try:
            check_prompt(prompt, system)
            session.ticket = self._ticket(prompt, lane_a, lane_b, (system, max_new, temperature, top_p, seed))
        except MissingDictionary as error:
            session.is_prompt_held = True
            return self._say(session, text.prompt_held(error.kind.name))
        except ValueError as error:
            return self._say(session, str(error))
        return self._asked(session)

    def regenerate(self, lane_a, lane_b, system, max_new, temperature, top_p, seed, request: gr.Request):
        session = self._session(request)
        if session.ticket is not None:
            return self._keep()
        if not session.turns:
            return self._say(session, text.CONVERSATION_LOST if self._is_lost(session) else text.NOTHING_TO_REGENERATE)
        try:
            sampling = (system, max_new, temperature, top_p, seed)
            session.ticket = self._ticket(session.turns[-1].prompt, lane_a, lane_b, sampling)
        except MissingDictionary as error:
            return self._say(session, text.prompt_held(error.kind.name))
        except ValueError as error:
            return self._say(session, str(error))
        session.ticket.replaced = session.turns.pop()
        return self._asked(session, keep_prompt=True)

    def edit_last(self, request: gr.Request):
        """The last prompt goes back into its box and its answers go."""
        session = self._session(request)
        if session.ticket is not None:
            return self._keep()
        if not session.turns:
            return self._say(session, text.CONVERSATION_LOST if self._is_lost(session) else text.NOTHING_TO_EDIT)
        prompt = session.turns.pop().prompt
        return (prompt, *runner.conversations(session), self._taken_back(session))

    def clear(self, request: gr.Request):
        session = self._session(request)
        ticket = session.ticket
        if ticket is not None:
            ticket.is_dropped = True
            session.is_own_run = ticket.was_own_run
            session.stop()
            if not ticket.is_started:
                session.ticket = None
        session.turns.clear()
        if session.ticket is None:
            session.free()
        return (gr.skip(), *runner.conversations(session), self._taken_back(session))

    def stop(self, request: gr.Request):
        """A running answer ends with its next step; one that still waits is taken back at once."""
        session = self._session(request)
        session.stop()
        ticket = session.ticket
        if ticket is None or ticket.is_started:
            return self._keep()
        session.ticket = None
        return self._outputs(self._as_before(session, ticket))

    def answer(self, request: gr.Request) -> Iterator[tuple]:
        """Stream the answer to the ticket that `send` or `regenerate` left."""
        session = self._session(request)
        ticket = session.ticket
        if ticket is None or ticket.is_started:
            yield self._keep()
            return
        ticket.is_started = True
        try:
            for update in self._answer(session, ticket):
                yield self._outputs(update)
        finally:
            self._end(session, ticket, request)

    def _end(self, session: Session, ticket: Ticket, request: gr.Request) -> None:
        """A run is over. Nobody comes back for the caches of a chat that was cleared or a page that was closed."""
        session.ticket = None
        if ticket.is_dropped or not self.store.is_known(request.session_hash or "", session):
            session.free()

    def _answer(self, session: Session, ticket: Ticket) -> Iterator[runner.Update]:
        hub, deadline = self.hub, time.monotonic() + MODEL_WAIT_SECONDS
        while hub.model is None and hub.is_loading and not ticket.stop.is_set() and time.monotonic() < deadline:
            yield runner.Update(payload=self._state("loading"))
            hub.wait_change(hub.version, 1.0)
        if ticket.stop.is_set() or hub.model is None:
            problem = hub.problem or text.STILL_LOADING
            yield self._as_before(session, ticket, "" if ticket.stop.is_set() else problem)
            return
        budget = hub.budget
        if budget is not None and budget.limit_bytes and budget.used_bytes > budget.limit_bytes / 2:
            self.store.free_others(session)
        try:
            yield from runner.run(session, ticket, hub.model, budget)
        except runner.Fruitless as end:
            yield self._as_before(session, ticket, str(end))

    def _as_before(self, session: Session, ticket: Ticket, notice: str = "") -> runner.Update:
        """The page as it was before a run that came to nothing: the last run on show, and what was said with it."""
        prompt = session.give_up(ticket)
        recording = session.recording or self.runs.first()
        chats = runner.conversations(session)
        if recording is None:
            return runner.Update(chats, self._state("done", notice), prompt)
        if not (session.is_own_run or ticket.is_dropped):
            chats = frames.recorded(recording)
        scene = replace(self._scene_of(session, recording), view=session.view, notice=notice)
        return runner.Update(chats, build(recording.log, scene), prompt)

    def _ticket(self, prompt: str, lane_a: str, lane_b: str, sampling) -> Ticket:
        lanes = {
            lane: controls.parse_choice(value) for lane, value in zip(controls.LANES, (lane_a, lane_b), strict=True)
        }
        if self.hub.model is not None:
            for choice in lanes.values():
                choice.config.check(self.hub.model.shape)
                missing = learning.lacking(self.hub, choice)
                if missing is not None:
                    raise missing
        return Ticket(prompt, lanes, sampling_of(sampling))

    # --- the error panel's view, recorded runs, files ------------------------------------------------

    def select(self, event: gr.EventData, request: gr.Request):
        """Another picture in the error panel; a running answer draws it with its next update."""
        session = self._session(request)
        try:
            asked = {name: event._data[name] for name in ("kind", "figure", "quantity", "layer", "head", "token")}
            session.view = View(**asked)
        except (KeyError, TypeError, ValueError):
            return gr.skip()
        if session.ticket is not None:
            return gr.skip()
        recording = session.recording or self.runs.first()
        if self._is_lost(session):
            return self._state("done", text.CONVERSATION_LOST)
        if recording is None:
            return gr.skip()
        return build(recording.log, replace(self._scene_of(session, recording), view=session.view))

    def show_recorded(self, event: gr.EventData, request: gr.Request):
        session = self._session(request)
        if session.ticket is not None:
            return self._keep()
        try:
            recording = self.runs.get(str(event._data.get("id")))
        except RecordingFault as fault:
            return self._say(session, str(fault))
        return self._show(session, recording)

    def upload(self, event: gr.EventData, request: gr.Request):
        """Import = look at it and replay it."""
        session = self._session(request)
        if session.ticket is not None:
            return self._keep()
        try:
            recording = library.import_upload(event._data.get("data"))
            return self._show(session, recording)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as fault:
            return self._say(session, text.IMPORT_FAILED.format(reason=fault))

    def replay(self, event: gr.EventData, request: gr.Request) -> Iterator[tuple]:
        session = self._session(request)
        recording = session.recording or self.runs.first()
        if session.ticket is not None or recording is None:
            yield self._keep()
            return
        rate = event._data.get("rate") if isinstance(event._data, dict) else None
        ticket = session.ticket = Ticket("", {}, Sampling(), is_started=True)
        try:
            scene = self._recorded_scene(recording)
            speed = min(1000.0, max(1.0, float(rate))) if rate else None
            for update in runner.replay(session, recording, ticket, scene, speed):
                yield self._outputs(update)
        finally:
            self._end(session, ticket, request)

    def export(self, event: gr.EventData, request: gr.Request):
        session = self._session(request)
        recording = session.recording or self.runs.first()
        if recording is None:
            return gr.skip(), build(None, Scene(notice=text.NOTHING_TO_EXPORT))
        return library.export(recording, str(event._data.get("kind"))), gr.skip()

    def _show(self, session: Session, recording: Recording):
        payload = build(recording.log, replace(self._recorded_scene(recording), view=session.view))
        chats = frames.recorded(recording)
        session.recording, session.is_own_run = recording, False
        return (gr.skip(), *chats, payload)

    def _recorded_scene(self, recording: Recording) -> Scene:
        return Scene(
            state="recorded",
            label=library.label(recording),
            projection=recording.projection,
            is_cpu=recording.log.machine.device_allocated_bytes is None,
        )

    def _scene_of(self, session: Session, recording: Recording) -> Scene:
        scene = self._recorded_scene(recording)
        if not session.is_own_run:
            return scene
        return replace(scene, state="done", label="", is_cleared=not session.turns)

    # --- the address ----------------------------------------------------------------------------------

    def restore(self, request: gr.Request):
        """The settings that the address asks for, into the page's controls."""
        settings, faults = address.read(dict(request.query_params))
        sampling = settings.sampling
        notice = (
            build(None, Scene(state="recorded" if self.runs.names() else "empty", notice=faults[0]))
            if faults
            else gr.skip()
        )
        return (
            settings.prompt,
            *(settings.lanes[lane_id].to_json() for lane_id in controls.LANES),
            *vars(sampling).values(),
            self._address(settings),
            notice,
        )

    def note_address(self, prompt, lane_a, lane_b, system, max_new, temperature, top_p, seed, request: gr.Request):
        """The address of the present settings and the last prompt, and remarks on the lanes."""
        lanes = {}
        for lane_id, value in zip(controls.LANES, (lane_a, lane_b), strict=True):
            try:
                lanes[lane_id] = controls.parse_choice(value)
            except ValueError:
                lanes[lane_id] = controls.default_choice(lane_id)
        sampling = sampling_of((system, max_new, temperature, top_p, seed))
        settings = Settings(lanes, sampling, prompt or self._session(request).last_prompt())
        return self._address(settings, {"a": lane_a, "b": lane_b})

    def _address(self, settings: Settings, values: dict[str, str] | None = None) -> str:
        shape = self.hub.model.shape if self.hub.model else None
        values = values or {lane_id: choice.to_json() for lane_id, choice in settings.lanes.items()}
        remarks = {
            lane_id: controls.remarks(value, shape) | learning.remark(self.hub, value)
            for lane_id, value in values.items()
        }
        return json.dumps({"query": address.write(settings), "remarks": remarks})

    # --- the model ------------------------------------------------------------------------------------

    def watch_model(self) -> Iterator[str]:
        """The header while the first model loads."""
        version = self.hub.version
        yield self.header()
        deadline = time.monotonic() + MODEL_WAIT_SECONDS
        while self.hub.is_loading and time.monotonic() < deadline:
            version = self.hub.wait_change(version, 2.0)
            yield self.header()
        yield self.header()

    def change_model(self, event: gr.EventData, request: gr.Request) -> Iterator[tuple]:
        """Load another model while the header tells how far it is. Runs in the engine's queue: nothing else runs."""
        name = str(event._data.get("name") or "").strip()
        try:
            self.hub.check_allowed(name)
        except EngineError as error:
            yield json.dumps(json.loads(self.header()) | {"problem": str(error)}), *self._keep()
            return
        worker = threading.Thread(target=self._change_quietly, args=(name,), daemon=True)
        version = self.hub.version
        worker.start()
        while worker.is_alive():
            version = self.hub.wait_change(version, 0.5)
            yield self.header(), *self._keep()
        if self.hub.problem:
            yield self.header(), *self._keep()
            return
        self.store.free_all()
        session = self._session(request)
        session.is_lost = False
        notice = self._state(self._rest(session), text.MODEL_CHANGED.format(name=name))
        yield self.header(), gr.skip(), *runner.conversations(session), notice

    def _change_quietly(self, name: str) -> None:
        with suppress(EngineError):  # told on the page through `problem`
            self.hub.change(name)

    def leave(self, request: gr.Request) -> None:
        """The page was closed: the run ends, its caches go."""
        self.store.drop(request.session_hash or "")

    # --- small parts ----------------------------------------------------------------------------------

    def _state(self, state: str, notice: str = "") -> str:
        return build(None, Scene(state=state, notice=notice))

    def _taken_back(self, session: Session) -> str:
        """The picture stays when turns go; where none is left, nothing of the context is in use."""
        return build(None, Scene(state=self._rest(session), budget=self.hub.budget, is_cleared=not session.turns))

    def _asked(self, session: Session, keep_prompt: bool = False):
        session.ticket.was_own_run, session.is_own_run = session.is_own_run, True
        chats = frames.running(session.turns, session.ticket.prompt, {})
        return (gr.skip() if keep_prompt else "", *chats, self._state("waiting"))

    def _say(self, session: Session, sentence: str):
        return (gr.skip(), *(gr.skip() for _ in controls.LANES), self._state(self._rest(session), sentence))

    @staticmethod
    def _is_lost(session: Session) -> bool:
        """Whether the page still shows a conversation that was let go; told once."""
        was_lost, session.is_lost = session.is_lost, False
        return was_lost

    def _rest(self, session: Session) -> str:
        """The state of a page on which nothing runs."""
        return "done" if session.is_own_run or not self.runs.names() else "recorded"

    @staticmethod
    def _keep() -> tuple:
        return (gr.skip(),) * (2 + len(controls.LANES))

    @staticmethod
    def _outputs(update: runner.Update) -> tuple:
        chats = update.chats or [gr.skip() for _ in controls.LANES]
        prompt = gr.skip() if update.prompt is None else update.prompt
        return (prompt, *chats, update.payload or gr.skip())


def sampling_of(values) -> Sampling:
    """Sampling settings in the order of the page's controls."""
    return make_sampling(dict(zip(vars(Sampling()), values, strict=True)))

"""Events of learning a dictionary on the page: from the click to its end, in the queue of everything that computes."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing

import gradio as gr

from kvlens.engine.errors import EngineError
from kvlens.ui import text
from kvlens.ui.learning import LearnRun, bounds_of, describe, learn_steps, parse_request
from kvlens.ui.models import ModelHub
from kvlens.ui.runner import Pace
from kvlens.ui.session import Session, SessionStore

log_book = logging.getLogger("kvlens.ui")

UPDATE_SECONDS = 0.25


class LearnHandlers:
    """All events of learning. A page learns one dictionary at a time, and so does the engine."""

    def __init__(self, hub: ModelHub, store: SessionStore) -> None:
        self.hub, self.store = hub, store

    def ask(self, event: gr.EventData, request: gr.Request):
        """Take a request: say at once that it waits, and leave it for the engine."""
        session = self._session(request)
        if session.learning is not None and not session.learning.is_over:
            return gr.skip()
        try:
            session.learning = parse_request(event._data, self.hub)
        except ValueError as error:
            return describe(None, str(error))
        return describe(session.learning)

    def stop(self, request: gr.Request):
        """Learning that runs ends with its step; what still waits is taken back at once."""
        run = self._session(request).learning
        if run is None or run.is_over:
            return gr.skip()
        run.stop.set()
        if run.state == "learning":
            return gr.skip()
        run.state = "stopped"
        return describe(run)

    def learn(self, request: gr.Request) -> Iterator[str]:
        """Learn what `ask` left, and tell how far it is. Closed early, it gives everything back."""
        session = self._session(request)
        run = session.learning
        if run is None or run.state != "waiting":
            yield gr.skip()
            return
        run.state = "learning"
        try:
            yield from self._learn(run)
            run.state = "stopped" if run.stop.is_set() else "done"
        except EngineError as error:
            run.state, run.sentence = "failed", str(error)
        except Exception as error:
            log_book.exception("learning broke")
            run.state, run.sentence = "failed", text.INTERNAL_FAULT.format(kind=type(error).__name__)
        finally:
            # The page was closed in the middle.
            run.state = run.state if run.is_over else "stopped"
        yield describe(run, is_awaited=run.state == "done" and session.is_prompt_held)

    def _learn(self, run: LearnRun) -> Iterator[str]:
        if self.hub.model is None:
            raise EngineError(self.hub.problem or text.MODEL_FAILED.format(reason="unknown"))
        bounds, pace = bounds_of(self.hub), Pace(UPDATE_SECONDS)
        deadline = time.monotonic() + bounds.max_seconds
        yield describe(run)
        with closing(learn_steps(self.hub.model, run, bounds)) as steps:
            for run.progress in steps:
                if run.stop.is_set():
                    break
                if time.monotonic() > deadline:
                    raise EngineError(text.learn_too_slow(bounds.max_seconds, run.kind.name))
                if pace.is_due():
                    yield describe(run)

    def _session(self, request: gr.Request) -> Session:
        return self.store.get(request.session_hash or "")

"""Events of the Throughput tab: a lab from the click to its end, in the queue of everything that computes."""

import base64
import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import gradio as gr

from kvlens.engine.errors import EngineError
from kvlens.ui import lab_text, text
from kvlens.ui.handlers import MODEL_WAIT_SECONDS
from kvlens.ui.lab_payload import build, to_csv
from kvlens.ui.lab_plan import OWN, SERVED, LabRun, bounds_of, offer, parse_plan
from kvlens.ui.models import ModelHub
from kvlens.ui.runner import Pace
from kvlens.ui.session import Session, SessionStore

if TYPE_CHECKING:
    from kvlens.engine.bench import Bench

log_book = logging.getLogger("kvlens.ui")

UPDATE_SECONDS = 0.25


class LabHandlers:
    """All events of the Throughput tab. A page has one lab; the last one stays on show until the next."""

    def __init__(self, hub: ModelHub, store: SessionStore) -> None:
        self.hub, self.store = hub, store

    def refresh(self, request: gr.Request) -> str:
        """What is offered now, for the served model may have changed; and the page's last lab."""
        return build(self._session(request).lab, offer=offer(self.hub))

    def ask(self, event: gr.EventData, request: gr.Request):
        """Take a plan: say at once that it waits, and leave it for the engine."""
        session = self._session(request)
        if session.lab is not None and not session.lab.is_over:
            return gr.skip()
        try:
            session.lab = LabRun(parse_plan(event._data, self.hub))
        except EngineError as error:
            return build(session.lab, notice=str(error))
        return build(session.lab)

    def stop(self, request: gr.Request):
        """A lab that runs ends with its step; one that still waits is taken back at once."""
        run = self._session(request).lab
        if run is None or run.is_over:
            return gr.skip()
        run.stop.set()
        if run.state == "running":
            return gr.skip()
        run.state = "stopped"
        return build(run)

    def measure(self, request: gr.Request) -> Iterator[str]:
        """Measure what `ask` left, and show it as it grows. Closed early, it gives everything back."""
        session = self._session(request)
        run = session.lab
        if run is None or run.state != "waiting":
            yield gr.skip()
            return
        notice = ""
        try:
            yield from self._wait_for_model(run)
            if not run.stop.is_set():
                yield from self._measure(run, session)
        except EngineError as error:
            notice = str(error)
        except Exception as error:
            log_book.exception("a lab broke")
            notice = text.INTERNAL_FAULT.format(kind=type(error).__name__)
        finally:
            run.state = "stopped" if run.stop.is_set() else "done"
        yield build(run, notice=notice)

    def save(self, request: gr.Request):
        """The last lab as a CSV download."""
        run = self._session(request).lab
        try:
            if run is None:
                raise ValueError(lab_text.NOTHING_TO_SAVE)
            data = base64.b64encode(to_csv(run).encode()).decode()
        except ValueError as error:
            return gr.skip(), build(run, notice=str(error))
        content = {"name": "kvlens-throughput.csv", "mime": "text/csv", "data": data, "nonce": uuid.uuid4().hex}
        return json.dumps(content), gr.skip()

    # --- inside ---------------------------------------------------------------------------------------

    def _session(self, request: gr.Request) -> Session:
        return self.store.get(request.session_hash or "")

    def _wait_for_model(self, run: LabRun) -> Iterator[str]:
        deadline = time.monotonic() + MODEL_WAIT_SECONDS
        while self.hub.is_loading and not run.stop.is_set() and time.monotonic() < deadline:
            yield build(run, notice=lab_text.MODEL_LOADING)
            self.hub.wait_change(self.hub.version, 1.0)

    def _measure(self, run: LabRun, session: Session) -> Iterator[str]:
        from kvlens.engine.measure import conditions
        from kvlens.engine.throughput import measure, plan_cells

        plan, budget = run.plan, self.hub.budget
        if budget is not None and budget.limit_bytes and budget.used_bytes > budget.limit_bytes / 2:
            self.store.free_others(session)
        bench = self._bench(run)
        run.start(bench, conditions(bench.device))
        cells = plan_cells(plan.candidates(), plan.contexts, plan.batch_sizes)
        steps = measure(
            bench, cells, limit_bytes=plan.limit_bytes, within=budget, stop=run.stop,
            max_seconds=bounds_of(self.hub).max_seconds,
        )  # fmt: skip
        pace = Pace(UPDATE_SECONDS)
        with closing(steps):
            for progress in steps:
                run.results = progress.results
                if pace.is_due():
                    yield build(run, progress=progress)

    def _bench(self, run: LabRun) -> "Bench":
        """The served model, or a shape: its whole network with random weights where a GPU has room, else attention."""
        import torch

        from kvlens.engine.architectures import ARCHITECTURES, has_room, random_model
        from kvlens.engine.bench import AttentionBench, NetworkBench

        model, plan = self.hub.model, run.plan
        if plan.subject == SERVED:
            if model is None:
                raise EngineError(self.hub.problem or lab_text.NO_MODEL)
            return NetworkBench(model)
        architecture = ARCHITECTURES[plan.subject]
        device = model.device if model is not None else torch.device("cpu")
        if bounds_of(self.hub) is OWN and has_room(architecture, device, plan.limit_bytes):
            model = random_model(architecture, device, torch.bfloat16)
            return NetworkBench(model)
        return AttentionBench(architecture, device)

"""What the server keeps of each visitor: the conversation, the running ticket, the run on show.

A session is found by the hash that Gradio gives each open page. The store is bounded: the visitor who
was idle longest gives way, and caches of idle visitors are freed long before their texts.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvlens.ui.address import Sampling
from kvlens.ui.controls import LaneChoice
from kvlens.ui.heat import View
from kvlens.ui.recording import Recording

if TYPE_CHECKING:
    from kvlens.engine.compare import Comparison
    from kvlens.ui.lab_plan import LabRun
    from kvlens.ui.learning import LearnRun

MAX_SESSIONS = 64
MAX_LOST = 1024
CACHE_IDLE_SECONDS = 10 * 60
SESSION_IDLE_SECONDS = 2 * 60 * 60


@dataclass
class Turn:
    """A prompt and each lane's answer to it."""

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)


@dataclass
class Ticket:
    """One asked-for run, from the click to its end. `stop` ends it wherever it is.

    `replaced` is the turn that it makes again, `was_own_run` whether the panels showed a run of the visitor's own
    before: both come back if the run comes to nothing. `is_dropped` says that the chat was cleared meanwhile: the
    answer is not kept.
    """

    prompt: str
    lanes: dict[str, LaneChoice]
    sampling: Sampling
    stop: threading.Event = field(default_factory=threading.Event)
    replaced: Turn | None = None
    was_own_run: bool = False
    is_started: bool = False
    is_dropped: bool = False


@dataclass
class Session:
    """One open page.

    `is_prompt_held`: the last prompt stays in its box until a lane has its dictionary. `is_lost`: the page shows a
    conversation that was let go, which nobody told it yet.
    """

    turns: list[Turn] = field(default_factory=list)
    ticket: Ticket | None = None
    view: View = field(default_factory=View)
    recording: Recording | None = None
    is_own_run: bool = False
    comparison: "Comparison | None" = None
    lab: "LabRun | None" = None
    learning: "LearnRun | None" = None
    is_prompt_held: bool = False
    is_lost: bool = False
    last_seen: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        if self.ticket is not None:
            self.ticket.stop.set()

    def give_up(self, ticket: Ticket) -> str | None:
        """A run came to nothing: the page is as before. Gives the prompt that goes back into its box."""
        self.is_own_run = ticket.was_own_run
        if ticket.is_dropped:
            return None
        if ticket.replaced is not None:
            self.turns.append(ticket.replaced)
            return None
        return ticket.prompt

    def last_prompt(self) -> str:
        if self.ticket is not None and self.ticket.prompt:
            return self.ticket.prompt
        return self.turns[-1].prompt if self.turns else ""

    def free(self) -> None:
        """Give the caches back; the texts stay."""
        comparison, self.comparison = self.comparison, None
        if comparison is not None:
            comparison.free()

    def messages(self, lane_id: str, system_prompt: str, prompt: str) -> list[dict[str, str]]:
        """The conversation as this lane had it, with its own earlier answers."""
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.answers.get(lane_id, "")})
        return [*messages, {"role": "user", "content": prompt}]


class SessionStore:
    """Sessions by hash, least recently seen first. Safe from several threads."""

    def __init__(self, max_sessions: int = MAX_SESSIONS, now: Callable[[], float] = time.monotonic) -> None:
        self.max_sessions = max_sessions
        self._now = now
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lost: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """The session of a page, made if it is new. Frees what has been idle for too long."""
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                session = self._sessions[key] = Session(is_lost=key in self._lost)
                self._lost.pop(key, None)
            session.last_seen = self._now()
            self._sessions.move_to_end(key)
            gone, idle = self._expired()
        self._let_go(gone, idle)
        return session

    def _expired(self) -> tuple[list[Session], list[Session]]:
        now, gone, idle = self._now(), [], []
        for key, session in list(self._sessions.items()):
            age = now - session.last_seen
            is_over_bound = len(self._sessions) > self.max_sessions
            if session.ticket is None and (is_over_bound or age > SESSION_IDLE_SECONDS):
                gone.append(self._let_go_of(key))
            elif session.ticket is None and age > CACHE_IDLE_SECONDS:
                idle.append(session)
        return gone, idle

    def _let_go_of(self, key: str) -> Session | None:
        """Takes a session out; its page, should it come back, is told of the conversation that it had."""
        session = self._sessions.pop(key, None)
        if session is not None and session.turns:
            self._lost[key] = None
            if len(self._lost) > MAX_LOST:
                self._lost.popitem(last=False)
        return session

    @staticmethod
    def _let_go(gone: list[Session], idle: list[Session]) -> None:
        for session in gone:
            session.stop()
        for session in (*gone, *idle):
            session.free()

    def drop(self, key: str) -> None:
        """A page was closed: its run ends and its caches go. A run in progress frees them as it ends."""
        with self._lock:
            session = self._let_go_of(key)
        if session is not None:
            session.stop()
            for run in (session.lab, session.learning):
                if run is not None:
                    run.stop.set()
            if session.ticket is None or not session.ticket.is_started:
                session.free()

    def all(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def is_known(self, key: str, session: Session) -> bool:
        return self._sessions.get(key) is session

    def free_others(self, kept: Session) -> None:
        """The budget runs short: idle visitors give their caches back and read their texts again later."""
        for session in self.all():
            if session is not kept and session.ticket is None:
                session.free()

    def free_all(self) -> None:
        """Another model comes: every conversation starts anew."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.stop()
            session.free()
            session.is_lost = bool(session.turns)
            session.turns.clear()

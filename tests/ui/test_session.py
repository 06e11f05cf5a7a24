"""Visitors are kept apart, bounded, and let go."""

from kvlens.ui.session import CACHE_IDLE_SECONDS, SESSION_IDLE_SECONDS, SessionStore, Ticket, Turn


class Caches:
    def __init__(self):
        self.is_freed = False

    def free(self):
        self.is_freed = True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_each_visitor_has_a_session_of_their_own():
    store = SessionStore()
    store.get("one").turns.append(Turn("hello"))
    assert store.get("two").turns == []
    assert store.get("one").turns == [Turn("hello")]


def test_the_longest_idle_gives_way():
    clock = Clock()
    store = SessionStore(max_sessions=2, now=clock)
    first = store.get("one")
    first.comparison = caches = Caches()
    for name in ("two", "three"):
        clock.now += 1
        store.get(name)
    assert len(store) == 2
    assert caches.is_freed
    assert not store.is_known("one", first)


def test_a_running_visitor_never_gives_way():
    store = SessionStore(max_sessions=1)
    running = store.get("one")
    running.ticket = Ticket("prompt", {}, None)
    store.get("two")
    assert store.is_known("one", running)


def test_caches_go_long_before_texts():
    clock = Clock()
    store = SessionStore(now=clock)
    session = store.get("one")
    session.turns.append(Turn("hello"))
    session.comparison = caches = Caches()
    clock.now = CACHE_IDLE_SECONDS + 1
    store.get("two")
    assert caches.is_freed
    assert store.get("one").turns == [Turn("hello")]
    clock.now += SESSION_IDLE_SECONDS + 1
    store.get("two")
    assert store.get("one").turns == []


def test_closing_the_page_stops_its_run_and_leaves_freeing_to_it():
    store = SessionStore()
    session = store.get("one")
    session.ticket = ticket = Ticket("prompt", {}, None, is_started=True)
    session.comparison = caches = Caches()
    store.drop("one")
    assert ticket.stop.is_set()
    assert not caches.is_freed


def test_closing_the_page_frees_the_caches_where_no_run_will():
    store = SessionStore()
    session = store.get("one")
    session.ticket = Ticket("waits in the queue", {}, None)
    session.comparison = caches = Caches()
    store.drop("one")
    assert caches.is_freed


def test_each_lane_goes_on_with_its_own_answers():
    session = SessionStore().get("one")
    session.turns.append(Turn("hi", {"a": "hello", "b": "good day"}))
    messages = session.messages("b", "Be kind.", "and now?")
    assert [entry["content"] for entry in messages] == ["Be kind.", "hi", "good day", "and now?"]

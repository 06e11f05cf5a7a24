"""What a click becomes, without a browser and without a model: nothing is lost, nothing stays behind."""

import json
from types import SimpleNamespace

import pytest

from kvlens.ui import handlers, text
from kvlens.ui.address import Sampling
from kvlens.ui.controls import default_choice
from kvlens.ui.handlers import ChatHandlers
from kvlens.ui.library import Library
from kvlens.ui.session import SESSION_IDLE_SECONDS, SessionStore, Turn

PAGE = SimpleNamespace(session_hash="page", query_params={})
SETTINGS = (default_choice("a").to_json(), default_choice("b").to_json(), *vars(Sampling()).values())


class Hub:
    """A model hub with no model: loading for ever, or with a problem."""

    model, budget, version, offered, progress, choices = None, None, 0, None, "", ()

    def __init__(self, *, is_loading: bool = False, problem: str = "") -> None:
        self.is_loading, self.problem = is_loading, problem

    def wait_change(self, version: int, timeout: float) -> int:
        return version

    def check_allowed(self, name: str) -> None:
        """Every name is fine."""

    def change(self, name: str) -> None:
        self.problem = ""


class Caches:
    """A comparison of which only the end counts."""

    is_freed = False

    def free(self) -> None:
        self.is_freed = True


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0)


@pytest.fixture
def store(clock):
    return SessionStore(now=lambda: clock.now)


@pytest.fixture
def page(store):
    return ChatHandlers(Hub(), store, Library())


def event(**data):
    return SimpleNamespace(_data=data)


def payload(outputs) -> dict:
    return json.loads(outputs[-1])


def test_a_prompt_can_be_sent_after_clear_took_the_waiting_one_back(page, store):
    page.send("one", *SETTINGS, PAGE)
    caches = store.get("page").comparison = Caches()
    cleared = payload(page.clear(PAGE))
    assert cleared["state"] == "recorded"
    assert cleared["context"] is None
    assert caches.is_freed
    assert payload(page.send("two", *SETTINGS, PAGE))["state"] == "waiting"
    assert store.get("page").ticket.prompt == "two"


def test_a_recorded_run_keeps_its_label_when_the_last_prompt_is_edited(page, store):
    store.get("page").turns.append(Turn("hello", {"a": "hi", "b": "hi"}))
    page.show_recorded(event(id=Library().names()[0]), PAGE)
    prompt, *_, shown = page.edit_last(PAGE)
    assert prompt == "hello"
    assert json.loads(shown)["state"] == "recorded"


def test_the_context_is_free_again_only_when_no_turn_is_left(page, store):
    session = store.get("page")
    session.turns += [Turn("one", {"a": "hi", "b": "hi"}), Turn("two", {"a": "ho", "b": "ho"})]
    assert "context" not in payload(page.edit_last(PAGE))
    assert payload(page.edit_last(PAGE))["context"] is None


@pytest.mark.parametrize("again", ["send", "regenerate", "edit_last", "select"])
def test_a_page_that_comes_back_is_told_once_that_its_conversation_is_gone(page, store, clock, again):
    store.get("page").turns.append(Turn("hello", {"a": "hi", "b": "hi"}))
    clock.now += SESSION_IDLE_SECONDS + 1
    store.get("another")
    view = event(kind="keys", figure="tokens", quantity="magnitude", layer=None, head=0, token=None)
    first = {
        "send": lambda: payload(page.send("two", *SETTINGS, PAGE)),
        "regenerate": lambda: payload(page.regenerate(*SETTINGS, PAGE)),
        "edit_last": lambda: payload(page.edit_last(PAGE)),
        "select": lambda: json.loads(page.select(view, PAGE)),
    }[again]()
    assert first["notices"] == [text.CONVERSATION_LOST]
    assert payload(page.send("two", *SETTINGS, PAGE))["state"] == "waiting"


def test_a_page_without_a_conversation_loses_nothing(page, store, clock):
    store.get("page")
    clock.now += SESSION_IDLE_SECONDS + 1
    store.get("another")
    assert payload(page.send("one", *SETTINGS, PAGE))["state"] == "waiting"


def test_clear_ends_a_replay_with_an_empty_chat(page, store):
    caches = store.get("page").comparison = Caches()
    playing = page.replay(event(rate=1000), PAGE)
    next(playing)
    page.clear(PAGE)
    *_, (_, chat_a, chat_b, shown) = playing
    assert chat_a == chat_b == []
    assert json.loads(shown)["state"] == "recorded"
    assert caches.is_freed


def test_a_page_that_is_closed_while_it_replays_leaves_no_cache(page, store):
    store.get("page").comparison = caches = Caches()
    playing = page.replay(event(rate=1000), PAGE)
    next(playing)
    store.drop("page")
    assert not caches.is_freed
    for _ in playing:
        pass
    assert caches.is_freed


def test_a_prompt_does_not_wait_for_a_model_for_ever(store, monkeypatch):
    monkeypatch.setattr(handlers, "MODEL_WAIT_SECONDS", -1)
    page = ChatHandlers(Hub(is_loading=True), store, Library())
    page.send("one", *SETTINGS, PAGE)
    *_, last = page.answer(PAGE)
    assert last[0] == "one"
    assert payload(last)["notices"] == [text.STILL_LOADING]
    assert payload(last)["state"] == "recorded"


def test_another_model_begins_every_conversation_anew_and_says_so(page, store):
    for name in ("page", "other"):
        store.get(name).turns.append(Turn("hello", {"a": "hi", "b": "hi"}))
    *_, (_, _, chat_a, chat_b, shown) = page.change_model(event(name="some/model"), PAGE)
    assert chat_a == chat_b == []
    assert json.loads(shown)["notices"] == [text.MODEL_CHANGED.format(name="some/model")]
    assert payload(page.send("next", *SETTINGS, PAGE))["state"] == "waiting"
    other = SimpleNamespace(session_hash="other", query_params={})
    assert payload(page.send("next", *SETTINGS, other))["notices"] == [text.CONVERSATION_LOST]


@pytest.mark.parametrize(("prompt", "system"), [("x" * 400_001, ""), ("x", "y" * 400_000)])
def test_a_prompt_that_no_context_holds_never_reaches_the_queue(page, store, prompt, system):
    settings = (*SETTINGS[:2], system, *SETTINGS[3:])
    assert "characters; the page takes up to 400,000" in payload(page.send(prompt, *settings, PAGE))["notices"][0]
    assert store.get("page").ticket is None

"""Learning on the page, with a stand-in for the model: what is said, what is refused, how it ends."""

import json
import threading
from types import SimpleNamespace

import pytest

from kvlens.engine.dictionaries.store import DictionaryKind, MissingDictionary
from kvlens.engine.errors import EngineError
from kvlens.ui import controls, learning
from kvlens.ui.learn_handlers import LearnHandlers
from kvlens.ui.models import ModelHub, ModelRequest
from kvlens.ui.session import SessionStore

CSR = controls.make_choice("csr")
REQUEST = SimpleNamespace(session_hash="page")


class Facts:
    def __init__(self):
        self.known = set()

    def check(self, kind):
        if kind not in self.known:
            raise MissingDictionary(kind, f"none of {kind.name}. Learn it with: python -m somewhere")


@pytest.fixture
def hub():
    model = SimpleNamespace(name="a model", facts=Facts(), shape=None)
    return ModelHub(ModelRequest(), model=model)


@pytest.fixture
def handlers(hub):
    return LearnHandlers(hub, SessionStore())


def told(value):
    return json.loads(value)


def asked(lane=CSR, text=""):
    return SimpleNamespace(_data={"lane": lane.to_json(), "text": text})


def steps(*shares, stop_at=None, fault=None):
    """A stand-in for learning that yields `shares`, and does something at one of them."""

    def learn(model, run, bounds):
        for share in shares:
            if share == stop_at:
                run.stop.set()
            if share == fault:
                raise EngineError("the text is too short")
            yield SimpleNamespace(share=share, stage="learning", side="keys", layer=2, error=0.25)
        model.facts.known.add(run.kind)

    return learn


def test_a_lane_says_what_it_lacks_and_that_it_can_be_learned(hub):
    lacks = learning.remark(hub, CSR.to_json())["lacks"]
    assert lacks["kind"] == CSR.config.kind.name
    assert CSR.config.kind.name in lacks["sentence"]
    assert lacks["can_learn"]
    assert "python -m" not in lacks["sentence"]


def test_a_lane_that_lacks_nothing_says_nothing(hub):
    assert learning.remark(hub, controls.make_choice("kivi").to_json()) == {}
    hub.model.facts.known.add(CSR.config.kind)
    assert learning.remark(hub, CSR.to_json()) == {}
    hub.model = None
    assert learning.remark(hub, CSR.to_json()) == {}


def test_every_setting_of_a_dictionary_is_another_kind(hub):
    hub.model.facts.known.add(CSR.config.kind)
    for settings in ({"num_atoms": 512}, {"value_parts": 2}, {"is_centred": not CSR.config.is_centred}):
        lacks = learning.remark(hub, controls.make_choice("csr", settings).to_json())["lacks"]
        assert lacks["kind"] != CSR.config.kind.name


def test_where_learning_is_off_the_command_is_said_and_the_request_refused(hub, handlers):
    hub.can_learn = False
    lacks = learning.remark(hub, CSR.to_json())["lacks"]
    assert not lacks["can_learn"]
    assert "python -m somewhere" in lacks["sentence"]
    assert "does not learn" in told(handlers.ask(asked(), REQUEST))["sentence"]
    assert handlers.store.get("page").learning is None


def test_a_public_page_takes_less_and_keeps_its_own_text(hub):
    own = learning.bounds_of(hub)
    hub.offered = []
    public = learning.bounds_of(hub)
    assert public.max_characters < own.max_characters
    assert public.max_seconds < own.max_seconds
    assert public.num_tokens is not None
    assert public.is_text_added
    with pytest.raises(EngineError, match="characters; learning takes up to"):
        learning.parse_request(asked(text="x" * (public.max_characters + 1))._data, hub)


@pytest.mark.parametrize(
    "data", [None, {}, {"lane": "nonsense"}, {"lane": controls.make_choice("kivi").to_json()}, {"text": "alone"}]
)
def test_what_is_no_request_is_a_sentence(hub, data):
    with pytest.raises(EngineError):
        learning.parse_request(data, hub)


def test_learning_tells_how_far_it_is_and_ends(hub, handlers, monkeypatch):
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2, 0.9))
    monkeypatch.setattr("kvlens.ui.learn_handlers.UPDATE_SECONDS", 0.0)
    assert told(handlers.ask(asked(), REQUEST))["state"] == "waiting"
    states = [told(value) for value in handlers.learn(REQUEST)]
    assert [one["state"] for one in states] == ["learning", "learning", "learning", "done"]
    assert [one.get("share") for one in states] == [None, 0.2, 0.9, 0.9]
    assert (states[1]["layer"], states[1]["side"], states[1]["error"]) == (2, "keys", 0.25)
    assert learning.remark(hub, CSR.to_json()) == {}


def test_stop_ends_it_with_the_step(hub, handlers, monkeypatch):
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2, 0.4, 0.9, stop_at=0.4))
    handlers.ask(asked(), REQUEST)
    last = told(list(handlers.learn(REQUEST))[-1])
    assert (last["state"], last["share"]) == ("stopped", 0.4)
    assert hub.model.facts.known == set()


def test_what_still_waits_is_taken_back_at_once(handlers):
    handlers.ask(asked(), REQUEST)
    assert told(handlers.stop(REQUEST))["state"] == "stopped"
    assert not any(isinstance(value, str) for value in handlers.learn(REQUEST))


def test_a_fault_is_a_sentence_and_it_may_be_asked_again(handlers, monkeypatch):
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2, 0.4, fault=0.4))
    handlers.ask(asked(), REQUEST)
    last = told(list(handlers.learn(REQUEST))[-1])
    assert (last["state"], last["sentence"]) == ("failed", "the text is too short")
    assert told(handlers.ask(asked(), REQUEST))["state"] == "waiting"


def test_a_page_learns_one_at_a_time(handlers):
    handlers.ask(asked(), REQUEST)
    assert not isinstance(handlers.ask(asked(), REQUEST), str)


def test_it_ends_when_it_takes_too_long(hub, handlers, monkeypatch):
    hub.offered = []
    monkeypatch.setattr("kvlens.ui.learning.PUBLIC", learning.Bounds(max_characters=10, max_seconds=-1.0))
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2))
    handlers.ask(asked(), REQUEST)
    last = told(list(handlers.learn(REQUEST))[-1])
    assert last["state"] == "failed"
    assert "longer than" in last["sentence"]


def test_a_closed_page_ends_its_learning(handlers, monkeypatch):
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2, 0.4))
    handlers.ask(asked(), REQUEST)
    session = handlers.store.get("page")
    running = handlers.learn(REQUEST)
    next(running)
    handlers.store.drop("page")
    assert session.learning.stop.is_set()
    running.close()
    assert session.learning.state == "stopped"


def test_a_prompt_that_waited_goes_on_when_it_is_done(handlers, monkeypatch):
    monkeypatch.setattr("kvlens.ui.learn_handlers.learn_steps", steps(0.2))
    handlers.store.get("page").is_prompt_held = True
    handlers.ask(asked(), REQUEST)
    *before, last = (told(value)["is_awaited"] for value in handlers.learn(REQUEST))
    assert not any(before)
    assert last


def test_what_is_learned_goes_into_the_models_store(tiny_model, tmp_path, monkeypatch):
    from kvlens.engine.facts import ModelFacts

    monkeypatch.setenv("KVLENS_DICTIONARIES", str(tmp_path))
    facts = ModelFacts(tiny_model.network, name="tiny")
    model = SimpleNamespace(**{**vars(tiny_model), "facts": facts, "encode": tiny_model.encode})
    kind = DictionaryKind("pre_rope", 32, 1)
    run = learning.LearnRun(kind, "The boat lay under the bridge all night. " * 60, threading.Event())
    *_, last = learning.learn_steps(model, run, learning.OWN)
    assert last.share == pytest.approx(1.0)
    facts.check(kind)
    assert facts.dictionary(kind).keys[0].shape == (32, tiny_model.shape.head_dim)

"""The model in service changes only when its successor is there, and only to what is offered."""

import threading
from types import SimpleNamespace

import pytest
import torch

from kvlens.engine.errors import EngineError, ModelError
from kvlens.ui.models import SUGGESTED, ModelHub, ModelRequest, parse_offer


def fake_load(name, *, progress, **options):
    progress("reading")
    if name == "gated":
        raise ModelError("gated is gated: accept its terms.")
    if name == "broken":
        raise RuntimeError("a bug")
    return SimpleNamespace(name=name or "embedded", device=torch.device("cpu"), weight_bytes=10)


@pytest.fixture
def hub():
    made = ModelHub(ModelRequest(budget_bytes=1000), load=fake_load)
    made.change(None)
    return made


def test_the_model_and_its_budget_are_served(hub):
    assert hub.model.name == "embedded"
    assert hub.budget.limit_bytes == 1000
    assert not hub.is_loading


@pytest.mark.parametrize(("name", "word"), [("gated", "accept its terms"), ("broken", "a bug")])
def test_a_fault_is_a_sentence_and_the_present_model_stays(hub, name, word):
    with pytest.raises(EngineError, match=word):
        hub.change(name)
    assert word in hub.problem
    assert hub.model.name == "embedded"
    hub.change("other")
    assert (hub.model.name, hub.problem) == ("other", "")


def test_a_first_model_that_is_slow_does_not_replace_the_one_asked_for_later():
    may_end, began, loading = threading.Event(), threading.Event(), []

    def load(name, *, progress, **options):
        loading.append(name)
        assert len(loading) == 1
        began.set()
        if name is None:
            assert may_end.wait(10)
        loading.clear()
        return fake_load(name, progress=progress)

    hub = ModelHub(ModelRequest(budget_bytes=1000), load=load)
    hub.start()
    assert began.wait(10)
    later = threading.Thread(target=hub.change, args=("other",))
    later.start()
    may_end.set()
    later.join(10)
    assert hub.model.name == "other"


def test_every_change_wakes_who_waits(hub):
    version = hub.version
    hub.change("other")
    assert hub.wait_change(version, timeout=0) > version


@pytest.mark.parametrize(("offer", "parsed"), [(None, None), ("", None), ("none", []), ("a/b, c/d", ["a/b", "c/d"])])
def test_offers(offer, parsed):
    assert parse_offer(offer) == parsed


def test_names_to_choose_from_are_those_that_may_be_loaded():
    for offered, shown in ((None, SUGGESTED), ([], []), (["a/b"], ["a/b"])):
        hub = ModelHub(ModelRequest(), offered=offered, load=fake_load)
        assert hub.choices == shown
        for name in shown:
            hub.check_allowed(name)


@pytest.mark.parametrize(
    ("offered", "name", "is_allowed"),
    [
        (None, "any/thing", True),
        (None, "", False),
        ([], "any/thing", False),
        (["a/b"], "a/b", True),
        (["a/b"], "c/d", False),
    ],
)
def test_only_what_is_offered(offered, name, is_allowed):
    hub = ModelHub(ModelRequest(), offered=offered, load=fake_load)
    if is_allowed:
        hub.check_allowed(name)
    else:
        with pytest.raises(EngineError):
            hub.check_allowed(name)

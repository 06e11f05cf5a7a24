"""What the throughput lab takes from a page, what it sends back, and its file."""

import csv
import io
import json
from types import SimpleNamespace

import pytest

from kvlens.engine.errors import EngineError
from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from kvlens.engine.throughput import CellResult, Progress
from kvlens.ui import lab_plan
from kvlens.ui.lab_handlers import LabHandlers
from kvlens.ui.lab_payload import build, findings, to_csv
from kvlens.ui.lab_plan import OWN, PUBLIC, Choice, LabRun, Plan, bounds_of, default_choices, offer, parse_plan
from kvlens.ui.models import ModelHub, ModelRequest
from kvlens.ui.session import SessionStore

SHAPE = ModelShape(6, 4, 2, 64)
FP16, KIVI = (next(iter(available()[name].presets)) for name in ("dense", "kivi"))
ASKED = {
    "subject": "served",
    "choices": [{"method": "dense", "preset": FP16}, {"method": "kivi", "preset": KIVI}],
    "contexts": [1024, 256],
    "batch_sizes": [1, 8],
    "limit_bytes": 20_000_000,
}


@pytest.fixture
def hub():
    return ModelHub(ModelRequest())


@pytest.fixture
def public():
    return ModelHub(ModelRequest(), offered=[])


@pytest.fixture
def run():
    """A finished lab: fp16 runs out of the budget at 1k × 8, KIVI does not."""
    cells = [
        measured(FP16, "dense", 256, 8, 4.0, 6_000_000),
        measured(KIVI, "kivi", 256, 8, 5.0, 2_000_000),
        CellResult(FP16, "dense", 1024, 8, "over budget", kv_bytes=25_000_000),
        measured(KIVI, "kivi", 1024, 8, 6.0, 6_000_000),
    ]
    plan = Plan("served", (Choice("dense", FP16), Choice("kivi", KIVI)), (256, 1024), (8,), 20_000_000)
    done = LabRun(plan, state="done", results=cells, subject="tiny")
    done.shape, done.conditions = SHAPE, {"device": "a processor", "date": "2026-01-01"}
    return done


def measured(label, method, context, batch, step_ms, kv_bytes):
    return CellResult(
        label, method, context, batch, "measured", num_steps=60, step_ms=step_ms, step_ms_low=step_ms - 1,
        step_ms_high=step_ms + 1, tokens_per_second=1000 * batch / step_ms, kv_bytes=kv_bytes, allocated_bytes=kv_bytes,
        measured_layers=6, num_layers=6,
    )  # fmt: skip


def test_a_plan_is_read_in_order_and_once(hub):
    twice = ASKED | {"choices": ASKED["choices"] * 2, "contexts": [1024, 256, 1024]}
    plan = parse_plan(twice, hub)
    assert plan.contexts == (256, 1024)
    assert [one.method for one in plan.choices] == ["dense", "kivi"]
    assert plan.num_cells == 8
    assert [one.label for one in plan.candidates()] == [FP16, KIVI]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": []}, "at least one method"),
        ({"contexts": []}, "at least one method"),
        ({"choices": [{"method": "dense", "preset": "?"}]}, "'?' of 'dense'"),
        ({"choices": [{"method": "?", "preset": FP16}]}, "of '?'"),
        ({"subject": "GPT-7"}, "Llama-3.1-8B"),
        ({"contexts": [300]}, "those that the page offers"),
        ({"batch_sizes": [10**9]}, "those that the page offers"),
        ({"contexts": ["many"]}, "did not arrive whole"),
        ({"limit_bytes": None}, "did not arrive whole"),
        ({"limit_bytes": float("inf")}, "did not arrive whole"),
        ({"limit_bytes": 5}, "between 1 MB"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(hub, change, said):
    with pytest.raises(EngineError, match=said.replace("?", r"\?")):
        parse_plan(ASKED | change, hub)


@pytest.mark.parametrize("value", [None, [], "text", {"subject": "served"}])
def test_a_message_that_is_no_plan_is_a_sentence(hub, value):
    with pytest.raises(EngineError, match="reload the page"):
        parse_plan(value, hub)


def test_a_public_page_is_bounded(hub, public):
    assert (bounds_of(hub), bounds_of(public)) == (OWN, PUBLIC)
    many = ASKED | {"contexts": lab_plan.CONTEXTS, "batch_sizes": lab_plan.BATCH_SIZES}
    assert parse_plan(many, hub).num_cells == 96
    with pytest.raises(EngineError, match="96 cells"):
        parse_plan(many, public)
    large = ASKED | {"limit_bytes": 10**9}
    assert parse_plan(large, hub).limit_bytes == 10**9
    with pytest.raises(EngineError, match="256 MB"):
        parse_plan(large, public)


def test_the_default_fits_the_bounds_of_a_public_page(public):
    offered = offer(public)
    defaults = offered["defaults"]
    num_cells = len(defaults["choices"]) * len(defaults["contexts"]) * len(defaults["batch_sizes"])
    assert num_cells == 48 <= offered["bounds"]["max_cells"]
    assert default_choices()[0].method == "dense"
    # No model is served yet: only shapes are offered.
    assert all(one["is_shape"] for one in offered["subjects"])


def test_a_payload_holds_every_cell_and_what_the_budget_holds(run):
    payload = json.loads(build(run, progress=Progress(4)))
    shown = payload["run"]
    cells = [dict(zip(shown["columns"], cell, strict=True)) for cell in shown["cells"]]
    assert [cell["status"] for cell in cells] == ["measured", "measured", "over budget", "measured"]
    assert [cell["method"] for cell in cells] == [0, 1, 0, 1]
    assert cells[2]["kv_bytes"] == 25_000_000
    assert cells[2]["step_ms"] is None
    fp16, kivi = (one["most_tokens"] for one in shown["methods"])
    assert fp16 == (20_000_000 - 24) // SHAPE.fp16_bytes(1)
    assert kivi > 4 * fp16
    assert payload["progress"] == {"done": 4, "total": 4, "cell": None, "seconds_left": None}


def test_a_payload_without_a_run_carries_a_notice_alone():
    payload = json.loads(build(None, notice="something"))
    assert payload["state"] == "idle"
    assert payload["notice"] == "something"
    assert "run" not in payload


def test_findings_say_what_fits_and_what_is_faster(run):
    fastest, only, compared = findings(run.results, run.plan.limit_bytes)
    assert fastest == f"Most tokens/s: {FP16} with 2,000, at 256 tokens × 8."
    assert "25.0 MB" in only
    assert f"{KIVI} takes 6.00 MB" in only
    assert "0.80× the tokens/s" in compared
    assert "3.0× fewer bytes" in compared
    assert findings([], 1) == []


def test_the_file_has_a_row_a_cell_with_its_conditions(run):
    rows = list(csv.DictReader(io.StringIO(to_csv(run))))
    assert len(rows) == 4
    assert {row["device"] for row in rows} == {"a processor"}
    assert {row["measured"] for row in rows} == {"whole decode step of the network"}
    assert rows[2]["status"] == "over budget"
    assert rows[2]["step_ms"] == ""
    assert float(rows[3]["tokens_per_second"]) == run.results[3].tokens_per_second
    run.scope = "attention"
    assert "attention only" in to_csv(run)
    run.results = []
    with pytest.raises(ValueError, match="Press Measure"):
        to_csv(run)


# --- events -------------------------------------------------------------------------------------------


@pytest.fixture
def labs(hub, tiny_folder, monkeypatch):
    from kvlens.engine.model import load_model
    from kvlens.ui import lab_handlers

    monkeypatch.setattr(lab_handlers, "UPDATE_SECONDS", 0.0)
    hub.model = load_model(tiny_folder, device="cpu")
    return LabHandlers(hub, SessionStore())


@pytest.fixture
def page():
    return SimpleNamespace(session_hash="one")


def asked(**change):
    return SimpleNamespace(_data=ASKED | {"contexts": [256], "batch_sizes": [1]} | change)


def test_a_lab_from_the_click_to_its_file(labs, page):
    assert json.loads(labs.ask(asked(), page))["state"] == "waiting"
    *_, last = labs.measure(page)
    payload = json.loads(last)
    assert payload["state"] == "done"
    assert [cell[1] for cell in payload["run"]["cells"]] == ["measured", "measured"]
    download, _ = labs.save(page)
    assert json.loads(download)["name"].endswith(".csv")
    assert json.loads(labs.refresh(page))["run"]["cells"] == payload["run"]["cells"]


def test_a_second_click_changes_nothing_while_a_lab_waits(labs, page):
    labs.ask(asked(), page)
    first = labs.store.get("one").lab
    labs.ask(asked(batch_sizes=[2]), page)
    assert labs.store.get("one").lab is first


def test_a_lab_that_waits_is_taken_back_at_once(labs, page):
    labs.ask(asked(), page)
    assert json.loads(labs.stop(page))["state"] == "stopped"
    assert [update for update in labs.measure(page) if isinstance(update, str)] == []


def test_a_stopped_lab_keeps_what_it_has(labs, page):
    labs.ask(asked(batch_sizes=[1, 2, 4]), page)
    run = labs.store.get("one").lab
    running = labs.measure(page)
    while not run.results:
        next(running)
    labs.stop(page)
    *_, last = running
    payload = json.loads(last)
    assert payload["state"] == "stopped"
    assert 1 <= payload["progress"]["done"] < payload["progress"]["total"]
    assert payload["run"]["findings"]


def test_a_closed_page_stops_its_lab_and_gives_memory_back(labs, page):
    from kvlens.engine.budget import MemoryBudget

    labs.hub.budget = MemoryBudget()
    labs.ask(asked(batch_sizes=[8]), page)
    running = labs.measure(page)
    while not labs.hub.budget.used_bytes:
        next(running)
    run = labs.store.get("one").lab
    labs.store.drop("one")
    assert run.stop.is_set()
    running.close()
    assert labs.hub.budget.used_bytes == 0
    assert run.is_over


def test_a_bad_plan_and_an_early_save_are_sentences(labs, page):
    assert "at least one" in json.loads(labs.ask(asked(choices=[]), page))["notice"]
    _, told = labs.save(page)
    assert "Press Measure" in json.loads(told)["notice"]


def test_without_a_model_the_reason_is_told(labs, page):
    labs.hub.model, labs.hub.problem = None, "It is gated."
    labs.ask(asked(), page)
    *_, last = labs.measure(page)
    assert json.loads(last)["notice"] == "It is gated."

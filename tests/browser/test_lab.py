"""A person's way through the Throughput tab, with the real engine behind it."""

import csv

import pytest

from kvlens.engine.throughput import TIMED_STEPS

STATE = "KVLens.lab.latest && KVLens.lab.latest.state"
WHITE_BLOCKS = """() => [...document.querySelectorAll('.kv-lab *')].filter((node) => {
    const box = node.getBoundingClientRect(), colour = getComputedStyle(node).backgroundColor;
    return box.width * box.height > 6000 && /^rgb\\((2[3-5]\\d), (2[3-5]\\d), (2[2-5]\\d)\\)$/.test(colour);
}).map((node) => node.className)"""


def open_lab(visitor, query=""):
    visitor.open(query)
    visitor.page.get_by_role("tab", name="Throughput").click()
    visitor.page.wait_for_selector(".kv-pill")


def choose(visitor, *, contexts, batches, methods=("fp16, exact", "KIVI-2 (paper)")):
    """Press exactly these buttons."""
    wanted = {*contexts, *(str(batch) for batch in batches), *methods}
    for pill in visitor.page.locator(".kv-pill:not([disabled])").all():
        if (pill.get_attribute("aria-pressed") == "true") != (pill.inner_text() in wanted):
            pill.click()


def measure(visitor):
    visitor.page.click(".kv-lab-go")
    visitor.wait(f"{STATE} === 'done'")
    visitor.page.wait_for_selector(".kv-lab-plot .main-svg")
    return visitor.page.evaluate("KVLens.lab.latest")


def cells(payload):
    return [dict(zip(payload["run"]["columns"], cell, strict=True)) for cell in payload["run"]["cells"]]


@pytest.fixture
def lab(visitor):
    open_lab(visitor)
    choose(visitor, contexts=["256", "1k"], batches=[1, 4])
    visitor.page.fill(".kv-lab-budget input", "8")
    visitor.page.press(".kv-lab-budget input", "Enter")
    return visitor


def test_a_small_lab_shows_its_cells_and_what_does_not_fit(lab):
    payload = measure(lab)
    found = cells(payload)
    assert [cell["status"] for cell in found].count("measured") == 7
    over = next(cell for cell in found if cell["status"] == "over budget")
    assert (over["method"], over["context_tokens"], over["batch_size"]) == (0, 1024, 4)
    # Exact bytes: keys and values of 4 × 1024 tokens, and the table of lengths.
    assert over["kv_bytes"] == lab.site.hub.model.shape.fp16_bytes(4096) + 4 * 6 * 4
    page = lab.page
    shown = page.locator(".kv-lab-one").first.locator("td").all_inner_texts()
    assert len(shown) == 4
    assert "12.6 MB" in shown[3]
    speeds = [round(cell["tokens_per_second"]) for cell in found if cell["method"] == 0 and cell["tokens_per_second"]]
    assert [int(text.replace(",", "").split(".")[0]) for text in shown[:3]] == pytest.approx(speeds, abs=1)
    assert "does not fit the 8.00 MB" in page.locator(".kv-lab-findings").inner_text()
    crosses = page.evaluate("document.querySelector('.kv-lab-over-batch .kv-lab-plot').data[2]")
    assert crosses["x"] == [4]


def test_quantities_contexts_and_the_table_follow_the_buttons(lab):
    found = cells(measure(lab))
    page = lab.page
    page.click(".kv-lab-grid >> text=KV bytes")
    first = page.locator(".kv-lab-one").first.locator("td").first
    assert first.inner_text() == page.evaluate("bytes => KVLens.units.bytes(bytes)", found[0]["kv_bytes"])
    page.click(".kv-lab-grid >> text=× fp16")
    assert first.inner_text() == "1.00×"
    page.click(".kv-lab-over-batch .kv-segments >> text=256")
    lab.wait("document.querySelector('.kv-lab-over-batch .kv-lab-plot').data[0].x.length === 2")
    page.click("text=All figures as a table")
    page.wait_for_selector(".kv-lab-table td")
    rows = page.locator(".kv-lab-table tr").all_inner_texts()
    assert len(rows) == 1 + len(found)
    page.click("text=How this is measured")
    assert f"up to {TIMED_STEPS} counted" in page.locator(".kv-lab-details").last.inner_text()


def test_the_file_says_what_was_measured(lab, tmp_path):
    found = cells(measure(lab))
    with lab.page.expect_download() as download:
        lab.page.click(".kv-lab-save")
    kept = tmp_path / "lab.csv"
    download.value.save_as(kept)
    rows = list(csv.DictReader(kept.open()))
    assert [row["status"] for row in rows] == [cell["status"] for cell in found]
    assert {row["measured"] for row in rows} == {"whole decode step of the network"}
    assert all(row["torch"] and row["device"] for row in rows)


def test_stop_keeps_what_is_measured(visitor):
    open_lab(visitor)
    choose(visitor, contexts=["256", "512", "1k"], batches=[1, 2, 4, 8])
    visitor.page.click(".kv-lab-go")
    visitor.wait("KVLens.lab.latest.progress && KVLens.lab.latest.progress.done >= 2")
    visitor.page.keyboard.press("Escape")
    visitor.wait(f"{STATE} === 'stopped'")
    progress = visitor.page.evaluate("KVLens.lab.latest.progress")
    assert 2 <= progress["done"] < progress["total"] == 24
    assert "Stopped after" in visitor.page.locator(".kv-lab-told").inner_text()
    assert visitor.page.locator(".kv-lab-go").is_visible()


def test_a_chat_waits_while_a_lab_runs_and_then_answers(visit):
    first, second = visit(), visit()
    open_lab(first)
    choose(first, contexts=["256", "512"], batches=[1, 2])
    second.open("?max_new_tokens=4")
    first.page.click(".kv-lab-go")
    first.wait(f"{STATE} === 'running'")
    second.page.fill("#kv-prompt textarea", "Tell me a story.")
    second.page.press("#kv-prompt textarea", "Enter")
    second.wait("document.body.dataset.kvState === 'waiting'")
    first.wait(f"{STATE} === 'done'")
    second.wait("document.body.dataset.kvState === 'done'")


def test_a_shape_without_weights_says_that_it_is_attention_only(visitor, monkeypatch):
    from kvlens.engine import bench

    monkeypatch.setattr(bench, "last_cache_bytes", lambda device: 2**20)
    open_lab(visitor)
    visitor.page.select_option(".kv-lab-plan select", "Qwen3-0.6B")
    assert "no download" in visitor.page.locator(".kv-lab-plan").inner_text()
    choose(visitor, contexts=["256"], batches=[1])
    payload = measure(visitor)
    assert payload["run"]["scope"] == "attention"
    assert all(cell["measured_layers"] == 8 for cell in cells(payload))
    page = visitor.page
    assert "8 of 28 layers" in page.locator(".kv-lab-scope").inner_text()
    title = page.evaluate("document.querySelector('.kv-lab-over-context .kv-lab-plot').layout.yaxis.title.text")
    assert "attention only" in title


def test_a_closed_page_leaves_the_engine_free(visit):
    first, second = visit(), visit()
    open_lab(first)
    first.page.click(".kv-lab-go")
    first.wait(f"{STATE} === 'running'")
    first.page.close()
    second.open("?max_new_tokens=4")
    second.ask("Tell me a story.")
    assert all(session.lab is None or session.lab.is_over for session in second.site.sessions.all())


@pytest.mark.parametrize("theme", ["", "?__theme=dark"])
def test_no_horizontal_scroll_on_a_phone_and_no_white_in_the_dark(visit, theme):
    phone = visit(viewport={"width": 390, "height": 844})
    open_lab(phone, theme)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    choose(phone, contexts=["256", "1k"], batches=[1, 2])
    measure(phone)
    phone.page.click("text=All figures as a table")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    if theme:
        assert phone.page.evaluate(WHITE_BLOCKS) == []

"""CSR on the page: its atoms taken apart, its dictionaries beside the cache, and learning one that is missing."""

import pytest

LONG = (
    "I keep a notebook of our village. Mira is the baker and her oven is blue. Tom mends boats and his dog is called "
    "Pip. Old Anna keeps bees behind the school. The mill belongs to Jonas, who plays the drum. Lena drives the bus to "
    "the town every morning. The small shop near the bridge is run by Sara. Tell me a story."
)
CSR = "?method_b=csr&b.window=16&b.flush=8&max_new_tokens=48"
MISSING = "?method_b=csr&b.num_atoms=256&b.window=16&b.flush=8&max_new_tokens=24"
LEARN = "#kv-lane-b .kv-learn"


@pytest.fixture
def learned(site, tmp_path, monkeypatch):
    """Dictionaries that this test learns go into a folder of their own, and are forgotten with it."""
    from kvlens.engine.dictionaries import DictionaryStore, fingerprint
    from kvlens.engine.dictionaries.store import folders
    from kvlens.ui import learning

    model = site.hub.model
    monkeypatch.setenv("KVLENS_DICTIONARIES", str(tmp_path))
    monkeypatch.setattr(model.facts, "dictionaries", DictionaryStore(folders(), fingerprint(model.network)))
    monkeypatch.setattr(learning, "PUBLIC", learning.Bounds(40_000, 120, num_tokens=1500, is_text_added=True))
    return tmp_path


@pytest.fixture
def asked(visitor, learned):
    visitor.open(CSR)
    lacks = visitor.page.evaluate(
        "new Promise((tell) => KVLens.onRemarks((one) => one.b && tell(one.b.lacks || null)))"
    )
    if lacks is not None:
        visitor.page.click(f"{LEARN} .kv-strong")
        visitor.wait(f"document.querySelector('{LEARN}').hidden")
    visitor.ask(LONG)
    return visitor


def atoms(visitor) -> dict:
    (lane,) = visitor.payload()["atoms"]["lanes"]
    return lane


def test_the_panel_shows_the_codes_of_the_cache(asked):
    page, lane = asked.page, atoms(asked)
    cache = asked.session().comparison.lane("b").cache
    layer = asked.payload()["atoms"]["probed_layer"]
    codes = cache.coded_vectors(layer, 0)
    assert lane["num_coded"] == codes.num_tokens > 40
    assert lane["usage"]["used_by_any"] == len(codes.codes.indices.unique())
    assert lane["coverage"][1][2] == pytest.approx(cache.coded_vectors(2, 1).coverage, abs=1e-4)
    assert all(0.5 < shares[-1] <= 1 for shares in lane["energy"])
    assert page.locator(".kv-panel-atoms").is_visible()
    told = page.locator(".kv-atom-usage .kv-sentence").inner_text()
    assert f"{lane['usage']['used']} of 1,024 atoms used by this head" in told
    steps = page.locator(".kv-atom-steps li")
    assert steps.count() == len(lane["vector"]["remaining"])
    shown = page.evaluate("share => KVLens.units.percent(share)", lane["vector"]["remaining"][-1])
    assert steps.last.inner_text().endswith(shown)
    assert page.evaluate("document.querySelector('.kv-atom-vector .kv-plot').data.length") == 2


def test_dictionaries_are_said_beside_the_cache(asked):
    cache = asked.session().comparison.lane("b").cache
    figures = asked.payload()["lanes"][1]["figures"]
    assert figures["shared_bytes"] == cache.shared_bytes > 0
    assert figures["live_bytes"] == cache.footprint().live_bytes
    pairs = asked.page.locator(".kv-panel-memory .kv-pairs").inner_text()
    assert "shared by all conversations" in pairs
    assert asked.page.evaluate("bytes => KVLens.units.bytes(bytes)", cache.shared_bytes) in pairs


def test_a_vector_is_chosen_by_slider_step_and_click(asked):
    page, vector = asked.page, atoms(asked)["vector"]
    page.locator(".kv-atom-pick input").fill(str(vector["first"] + 3))
    asked.wait("token => KVLens.feed.latest.atoms.lanes[0].vector.token === token", vector["first"] + 3)
    page.locator(".kv-atom-steps li button").nth(2).click()
    drawn = page.evaluate("[...document.querySelector('.kv-atom-vector .kv-plot').data[1].y]")
    chosen = atoms(asked)["vector"]
    sums = page.evaluate("packed => [...KVLens.decode(packed)]", chosen["sums"])
    width = chosen["sums"]["s"][1]
    assert drawn == sums[2 * width : 3 * width]
    page.click(".kv-panel-atoms .kv-segments >> text=/^V$/")
    asked.wait("KVLens.feed.latest.view.kind === 'values'")
    assert atoms(asked)["vector"]["token"] == vector["first"] + 3
    page.click(".kv-atom-pick >> text=newest")
    asked.wait("KVLens.feed.latest.view.token === null")
    heat = page.locator(".kv-heatmap .nsewdrag").first
    heat.hover(position={"x": 50, "y": 30})
    page.wait_for_selector(".kv-heatmap .hoverlayer .hovertext")
    heat.click(position={"x": 50, "y": 30})
    asked.wait("KVLens.feed.latest.view.token !== null")


def test_without_sparse_codes_there_is_no_panel_and_no_gap(visitor):
    visitor.open("?b.residual_length=32&max_new_tokens=8")
    visitor.ask("Hello there.")
    assert visitor.payload()["atoms"] is None
    assert not visitor.page.locator("#kv-atoms").is_visible()
    assert visitor.page.evaluate("document.querySelector('#kv-atoms').getBoundingClientRect().height") == 0


def test_export_and_import_show_the_same_atoms(asked, tmp_path):
    page, shown = asked.page, atoms(asked)
    page.click("text=Export")
    with page.expect_download() as download:
        page.click("text=This run (JSON")
    kept = tmp_path / "run.json.gz"
    download.value.save_as(kept)
    run = asked.payload()["run_id"]
    page.reload()
    page.wait_for_selector("#kv-send")
    page.locator(".kv-header input[type=file]").set_input_files(kept)
    asked.wait("run => KVLens.feed.latest?.run_id === run", run)
    again = atoms(asked)
    assert again["usage"] == shown["usage"]
    assert again["vector"]["indices"] == shown["vector"]["indices"]
    assert again["energy"][0] == pytest.approx(shown["energy"][0], abs=0.01)


def test_a_missing_dictionary_is_learned_and_the_prompt_goes_on(visitor, learned):
    visitor.open(MISSING)
    page = visitor.page
    page.wait_for_selector(f"{LEARN}:visible")
    assert "-rope-256-" in page.locator(f"{LEARN} .kv-learn-sentence").inner_text()
    before = visitor.payload()["run_id"]
    page.fill("#kv-prompt textarea", LONG)
    page.press("#kv-prompt textarea", "Enter")
    visitor.wait("document.querySelector('.kv-notice').textContent.includes('has not been learned')")
    assert page.input_value("#kv-prompt textarea") == LONG
    page.click(f"{LEARN} summary")
    page.fill(f"{LEARN} textarea", "The boat lay under the bridge. " * 40)
    page.click(f"{LEARN} .kv-strong")
    visitor.wait(f"document.querySelector('{LEARN} .kv-learn-run > span').textContent.includes('%')")
    visitor.wait("run => KVLens.feed.latest.run_id !== run && document.body.dataset.kvState === 'done'", before)
    visitor.wait(f"document.querySelector('{LEARN}').hidden")
    assert len(list(learned.glob("*-256-*.safetensors"))) == 1
    assert visitor.answer("b")
    assert atoms(visitor)["usage"]["num_atoms"] == 256
    assert page.locator(".kv-notice").inner_text() == ""


def test_learning_is_stopped_at_once_and_keeps_nothing(visitor, learned, monkeypatch):
    from kvlens.ui import learning

    monkeypatch.setattr(learning, "PUBLIC", learning.Bounds(40_000, 120, num_tokens=60_000, is_text_added=True))
    visitor.open(MISSING)
    visitor.page.click(f"{LEARN} .kv-strong")
    visitor.wait(f"document.querySelector('{LEARN} .kv-learn-run > span').textContent.includes('%')")
    visitor.page.click(f"{LEARN} .kv-learn-stop")
    visitor.wait(f"document.querySelector('{LEARN} .kv-learn-run > span').textContent.startsWith('Stopped')")
    assert list(learned.iterdir()) == []
    assert visitor.page.locator(f"{LEARN} .kv-strong").is_enabled()


def test_the_panel_and_the_offer_fit_a_phone(visit, learned):
    phone = visit(viewport={"width": 390, "height": 844})
    phone.open(MISSING)
    phone.page.click(f"{LEARN} .kv-strong")
    phone.wait(f"document.querySelector('{LEARN}').hidden")
    phone.ask(LONG)
    assert phone.page.locator(".kv-panel-atoms").is_visible()
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390

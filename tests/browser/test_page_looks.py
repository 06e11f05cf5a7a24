"""How the page stands: first paint, narrow, dark, files in and out."""

import gzip
import json

import pytest

from kvlens.ui.library import Library

SHORT = "?b.residual_length=32&max_new_tokens=24"
has_runs = pytest.mark.skipif(not Library().names(), reason="no recorded runs in assets/runs")

WHITE_BLOCKS = """() => [...document.querySelectorAll('*')].filter((node) => {
    const box = node.getBoundingClientRect(), colour = getComputedStyle(node).backgroundColor;
    return box.width * box.height > 6000 && /^rgb\\((2[3-5]\\d), (2[3-5]\\d), (2[2-5]\\d)\\)$/.test(colour);
}).map((node) => `${node.tagName}#${node.id}.${node.className}`).filter((name) => !name.includes('kv-send'))"""

# Sends two payloads, `apart` frames between them, and says what the panels show when no frame is waiting any more.
SEND_TWO = """async (apart) => {
    const native = window.requestAnimationFrame.bind(window), waiting = [];
    const frames = async (count) => { while (count-- > 0) await new Promise(native); };
    const turn = () => { for (const step of waiting.splice(0)) step(performance.now()); };
    window.requestAnimationFrame = (step) => waiting.push(step);
    await frames(2);
    while (waiting.length) turn();
    const marked = (number) => {
        const payload = structuredClone(KVLens.feed.latest);
        for (const lane of payload.lanes) {
            lane.figures.live_bytes = number * 2 ** 20;
            lane.path = `path ${number}`;
        }
        for (const entry of payload.errors.lanes) entry.means = [number / 100, number / 100];
        return JSON.stringify(payload);
    };
    KVLens.feed.receive(marked(31));
    for (let frame = 0; frame < apart; frame += 1) turn();
    KVLens.feed.receive(marked(47));
    while (waiting.length) turn();
    window.requestAnimationFrame = native;
    const text = (panel) => document.querySelector(`.kv-panel-${panel}`).textContent;
    const shows = (panel, number) => text(panel).includes({
        memory: KVLens.units.bytes(number * 2 ** 20),
        errors: KVLens.units.percent(number / 100),
        speed: `path ${number}`,
    }[panel]);
    return ["memory", "errors", "speed"].map((panel) => [panel, shows(panel, 31), shows(panel, 47)]);
}"""


@has_runs
def test_a_recorded_run_is_painted_at_once_and_says_so(visitor):
    visitor.open()
    payload = visitor.payload()
    assert payload["state"] == "recorded"
    assert visitor.page.locator(".kv-status-label").inner_text().startswith("Recorded run: ")
    assert visitor.answer("a")
    assert payload["lanes"][1]["figures"]["live_bytes"] > 0
    painted_ms = visitor.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert painted_ms < 2000


@has_runs
def test_a_recorded_run_is_replayed(visitor):
    visitor.open()
    final = visitor.payload()["lanes"][0]["figures"]["new_tokens"]
    visitor.page.click("text=Replay")
    visitor.wait("document.body.dataset.kvState === 'replay'")
    assert visitor.payload()["lanes"][0]["figures"]["new_tokens"] <= final
    visitor.page.keyboard.press("Escape")
    visitor.wait("document.body.dataset.kvState === 'recorded'")
    assert visitor.payload()["lanes"][0]["figures"]["new_tokens"] == final


@has_runs
def test_all_panels_end_with_the_last_payload_whenever_it_comes(visitor):
    visitor.open()
    visitor.page.locator(".kv-heatmap .js-plotly-plot").first.wait_for()
    for apart in range(6):
        shown = visitor.page.evaluate(SEND_TWO, apart)
        assert shown == [[panel, False, True] for panel in ("memory", "errors", "speed")], apart


@pytest.mark.parametrize("query", ["", SHORT])
def test_no_horizontal_scroll_on_a_phone(visit, query):
    phone = visit(viewport={"width": 390, "height": 844})
    phone.open(query)
    if query:
        phone.ask("Tell me a story about a heron by the water, and about her friend the boat.")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    phone.page.click("#kv-lane-b .kv-summary")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390


def test_dark_has_no_white_cards(visitor):
    visitor.open(SHORT + "&__theme=dark")
    visitor.ask("Tell me a story about a heron.")
    visitor.page.click("#kv-settings > button")
    assert visitor.page.evaluate(WHITE_BLOCKS) == []
    visitor.page.get_by_role("tab", name="About").click()
    visitor.page.wait_for_selector("#kv-about table")
    assert visitor.page.evaluate(WHITE_BLOCKS) == []


def test_nothing_jumps_while_it_streams(visitor, endless):
    visitor.open("?b.residual_length=32&max_new_tokens=1500")
    parts = "['#kv-prompt', '.kv-panel-memory', '.kv-panel-speed']"
    places = f"{parts}.map((one) => document.querySelector(one).getBoundingClientRect().top)"
    visitor.send("Tell me a story about a heron.")
    new_tokens = "KVLens.feed.latest.state === 'running' && KVLens.feed.latest.lanes[1].figures.new_tokens"
    visitor.wait(f"{new_tokens} > 2")
    early = visitor.page.evaluate(places)
    visitor.wait(f"{new_tokens} > 100")
    assert visitor.page.evaluate(places) == early
    visitor.page.click("#kv-stop")
    visitor.finish()
    assert visitor.page.evaluate(places) == early


def test_export_and_import_show_the_same_run(visitor, tmp_path):
    visitor.open(SHORT)
    visitor.ask("Tell me a story about a heron.")
    shown, page = visitor.payload(), visitor.page
    page.click("text=Export")
    with page.expect_download() as download:
        page.click("text=This run (JSON")
    kept = tmp_path / "run.json.gz"
    download.value.save_as(kept)
    assert json.loads(gzip.decompress(kept.read_bytes()))["format"] == "kvlens-run-1"
    page.click("text=Export")
    with page.expect_download() as download:
        page.click("text=Its steps (CSV)")
    assert download.value.suggested_filename.endswith(".csv")
    page.reload()
    page.wait_for_function("window.KVLens && KVLens.feed.latest && KVLens.feed.latest.state !== 'running'")
    page.wait_for_selector("#kv-send")
    page.locator(".kv-header input[type=file]").set_input_files(kept)
    visitor.wait("run => KVLens.feed.latest.run_id === run", shown["run_id"])
    assert [lane["figures"] for lane in visitor.payload()["lanes"]] == [lane["figures"] for lane in shown["lanes"]]


def test_a_file_that_is_no_run_is_a_sentence(visitor, tmp_path):
    visitor.open()
    other = tmp_path / "other.json"
    other.write_text("{}")
    visitor.page.locator(".kv-header input[type=file]").set_input_files(other)
    visitor.wait("document.querySelector('.kv-notice').textContent.includes('not a run exported from KVLens')")


def test_hovering_a_finished_answer_shows_its_probabilities(visitor):
    visitor.open(SHORT)
    visitor.ask("Tell me a story about a heron.")
    box = visitor.page.evaluate(
        """() => { const range = KVLens.answers.range(KVLens.answers.answerNode('a'), 1, 3).getBoundingClientRect();
                   return [range.left + range.width / 2, range.top + range.height / 2]; }"""
    )
    visitor.page.mouse.move(*box)
    visitor.wait("[...document.querySelectorAll('.kv-tip')].some((tip) => !tip.hidden)")
    text = visitor.page.locator(".kv-tip:not([hidden])").inner_text()
    assert "probability" in text
    assert "%" in text


def test_the_api_answers_through_its_client(site):
    client_module = pytest.importorskip("gradio_client")
    client = client_module.Client(site.address, verbose=False)
    assert {entry["name"] for entry in client.predict(api_name="/methods")} >= {"dense", "kivi"}
    shape = {"num_layers": 32, "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    found = client.predict("kivi", shape, 32768, api_name="/estimate")
    assert found["times_smaller"] > 4
    job = client.submit("Tell me a story.", max_new_tokens=12, api_name="/compare")
    last = job.result(timeout=60)
    assert set(last["lanes"]) == {"a", "b"}
    assert all(lane["live_bytes"] > 0 and lane["text"] for lane in last["lanes"].values())
    assert len(job.outputs()) >= 1
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/methods", "/estimate", "/compare"}


def test_health_is_told_and_strange_hosts_are_refused(site):
    import httpx

    health = httpx.get(site.address + "healthz").json()
    assert health["status"] == "ok"
    assert health["state"] == "ready"
    assert httpx.get(site.address + "healthz", headers={"Host": "evil.example"}).status_code == 400


def test_the_page_may_load_nothing_from_elsewhere(visitor):
    visitor.open()
    blocked = visitor.page.evaluate(
        """() => new Promise((resolve) => {
            document.addEventListener('securitypolicyviolation', (event) => resolve(event.blockedURI));
            const image = new Image();
            image.src = 'http://elsewhere.invalid/pixel.png';
        })"""
    )
    assert blocked.startswith("http://elsewhere.invalid")
    visitor.faults.clear()  # the browser complains about what it blocked, and so it should

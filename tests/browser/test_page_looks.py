"""How the page stands: first paint, narrow, dark, files in and out."""

import gzip
import json

import pytest

from kvlens.ui import palette
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


@has_runs
def test_the_theme_button_recolours_the_plots_at_once_and_is_remembered(visitor):
    visitor.open()
    page = visitor.page
    plots = ("memory", "speed")
    colours = [f"document.querySelector('.kv-plot-{plot}')?.layout?.font.color" for plot in plots]
    light, dark = palette.SURFACES["muted"].light, palette.SURFACES["muted"].dark
    for colour in colours:
        visitor.wait(f"{colour} === '{light}'")
    before = page.evaluate("document.querySelector('.kv-plot-memory').data.map((trace) => trace.fillcolor)")
    page.get_by_label("Light or dark").click()
    for colour in colours:
        visitor.wait(f"{colour} === '{dark}'")
    assert page.evaluate("document.querySelector('.kv-plot-memory').data.map((trace) => trace.fillcolor)") != before
    page.reload()
    for colour in colours:
        visitor.wait(f"{colour} === '{dark}'")
    assert page.evaluate("KVLens.colours.isDark()")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_small_print_stands_out_from_all_it_stands_on(theme):
    def luminance(shade):
        parts = [int(getattr(shade, theme)[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("muted", "faint"):
        for ground in ("paper", "card", "sunken"):
            low, high = sorted(luminance(palette.SURFACES[one]) for one in (name, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


@has_runs
def test_a_notice_leaves_whose_figures_these_are_and_the_way_to_replay_them(visitor):
    visitor.open()
    page = visitor.page
    page.locator(".kv-status-hint").get_by_text("Nothing is computed yet.").wait_for()
    page.evaluate("KVLens.feed.receive(JSON.stringify({ state: 'recorded', notices: ['A sentence.'] }))")
    page.locator(".kv-notice").get_by_text("A sentence.").wait_for()
    assert page.locator(".kv-status-label").is_visible()
    assert page.locator(".kv-status").get_by_role("button", name="Replay").is_visible()
    assert not page.locator(".kv-status-hint").is_visible()
    assert not page.locator(".kv-status-machine").is_visible()


@has_runs
def test_a_payload_that_cannot_be_drawn_or_read_stops_nothing(visitor):
    visitor.open()
    visitor.page.locator(".kv-heatmap .js-plotly-plot").first.wait_for()
    visitor.page.evaluate(
        """() => {
            window.whole = JSON.stringify(KVLens.feed.latest);
            const broken = JSON.parse(window.whole);
            for (const lane of broken.lanes) Object.assign(lane, { memory: null, path: "broken" });
            KVLens.feed.receive(JSON.stringify(broken));
        }"""
    )
    visitor.wait("document.querySelector('.kv-panel-speed').textContent.includes('broken')")
    visitor.page.evaluate("KVLens.feed.receive('{\"state\": NaN}')")
    visitor.page.evaluate('KVLens.feed.receive(window.whole.replace(/"path":"[^"]*"/g, \'"path":"mended"\'))')
    visitor.wait("document.querySelector('.kv-panel-speed').textContent.includes('mended')")
    assert len(visitor.faults) >= 2
    visitor.faults.clear()  # each fault is told in the console, and so it should


@has_runs
def test_a_cache_larger_than_fp16_stays_on_the_axis_and_says_so(visitor):
    visitor.open()
    visitor.page.evaluate(
        """() => {
            const payload = JSON.parse(JSON.stringify(KVLens.feed.latest));
            payload.fp16_bytes_per_token /= 16;
            const lane = payload.lanes.find((one) => one.method !== 'dense');
            lane.figures.times_smaller = 0.5;
            for (const [, sizes] of payload.projection) sizes[lane.id] = 4 * sizes.fp16;
            KVLens.feed.receive(JSON.stringify(payload));
        }"""
    )
    visitor.wait(
        "[...document.querySelectorAll('.kv-figure-bytes small')].some((one) => one.textContent === '2.00× larger')"
    )
    visitor.wait("document.querySelector('.kv-projection').textContent.includes('4.00× larger')")
    shares = visitor.page.evaluate(
        """() => {
            const { data, layout } = document.querySelector('.kv-plot-memory'), highest = new Map();
            for (const { stackgroup, y } of data.filter((trace) => trace.stackgroup)) {
                const sums = highest.get(stackgroup) || y.map(() => 0);
                highest.set(stackgroup, sums.map((sum, index) => sum + y[index]));
            }
            return [...highest.values()].map((sums) => Math.max(...sums) / layout.yaxis.range[1]);
        }"""
    )
    assert 0.8 < max(shares) < 1.0


def test_the_context_gauge_is_that_of_the_model_in_service(visitor):
    visitor.open(SHORT)
    visitor.ask("Tell me a story about a heron.")
    gauge = "document.querySelector('.kv-gauge > span:last-child').textContent"
    visitor.wait(f"/^[1-9].* of 2,048/.test({gauge})")
    visitor.page.click("#kv-clear")
    visitor.wait(f"{gauge} === '0 of 2,048 tokens'")
    visitor.ask("Tell me a story about a heron.")
    visitor.wait(f"/^[1-9].* of 2,048/.test({gauge})")
    visitor.page.evaluate(
        """() => {
            const other = { model: 'another', context: { used: 9, limit: 99 } };
            KVLens.feed.receive(JSON.stringify({ ...KVLens.feed.latest, ...other }));
        }"""
    )
    visitor.wait(f"{gauge} === '0 of 2,048 tokens'")


def test_a_fixed_model_shows_its_facts_and_why_a_load_failed(visitor, monkeypatch):
    monkeypatch.setattr(visitor.site.hub, "offered", [])
    monkeypatch.setattr(visitor.site.hub, "problem", "The folder holds no model.")
    visitor.open()
    page = visitor.page
    page.click(".kv-chip")
    told = page.locator(".kv-chip + .kv-menu-list")
    assert told.get_by_text("The folder holds no model.").is_visible()
    assert told.get_by_text(f"{visitor.site.hub.model.name} · ").is_visible()
    for part in ("h4", ".kv-row", ".kv-offered"):
        assert not told.locator(part).is_visible()


def test_a_number_and_the_button_pressed_right_after_it_both_count(visitor):
    visitor.open()
    page, lane = visitor.page, visitor.page.locator("#kv-lane-b")
    page.click("#kv-lane-b .kv-summary")
    number = lane.locator(".kv-popover input[type=number]").first
    number.fill("96")
    bits = lane.locator(".kv-field", has_text="Key bits").get_by_role("button", name="4", exact=True)
    bits.click()
    assert bits.get_attribute("aria-pressed") == "true"
    assert number.input_value() == "96"
    assert lane.get_by_label("Preset").input_value() == ""
    page.wait_for_function("location.search.includes('b.key_bits=4') && location.search.includes('=96')")
    # The keyboard keeps its place: on a button after it is pressed, in a number after Enter.
    bits.press("Enter")
    assert bits.evaluate("node => node === document.activeElement")
    number.fill("64")
    number.press("Enter")
    assert number.evaluate("node => node === document.activeElement")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('#kv-lane-b .kv-popover').contains(document.activeElement)")
    # A row of buttons clips what stands out of it: its ring lies inside, and is light on the dark of what is pressed.
    bits.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    ring = (
        "node => ['outlineStyle', 'outlineOffset', 'outlineColor', 'color'].map((name) => getComputedStyle(node)[name])"
    )
    style, offset, colour, ink = bits.evaluate(ring)
    assert (style, offset, colour) == ("solid", "-3px", ink)


def test_the_buttons_of_the_lab_charts_stay_the_same_while_it_measures(visitor):
    visitor.open()
    visitor.page.evaluate(
        """() => {
            const columns = ['method', 'context_tokens', 'batch_size', 'status', 'tokens_per_second', 'step_ms',
                'step_ms_low', 'step_ms_high', 'kv_bytes', 'measured_layers', 'note'];
            const run = (contexts) => ({ run: {
                scope: 'network', num_layers: 2, limit_bytes: 1e6, findings: [], conditions: {}, columns, contexts,
                methods: [{ method: 'dense', label: 'fp16', most_tokens: null }], batch_sizes: [1, 2],
                cells: contexts.map((tokens) => [0, tokens, 1, 'measured', 100, 10, 9, 11, 1e5, 2, '']),
            } });
            window.figures = KVLens.labFigures({ onSave() {} });
            window.send = (contexts) => figures.receive(run(contexts));
            window.picked = () => figures.root.querySelector('.kv-lab-over-batch .kv-segments button:last-child');
            document.querySelector('.kv-panels').append(figures.root);
            send([256, 512]);
        }"""
    )
    visitor.wait("picked()?.textContent === '512'")
    visitor.page.evaluate("window.first = picked(); send([256, 512]); first.click()")
    visitor.wait("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert visitor.page.evaluate("picked() === first && first.getAttribute('aria-pressed')") == "true"
    visitor.page.evaluate("send([256, 512, 1024])")
    visitor.wait("picked().textContent === '1k'")


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

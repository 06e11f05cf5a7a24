"""A person's way through the Chat tab, with the real engine behind it."""

import pytest

from kvlens.engine.errors import EngineError
from kvlens.ui import runner
from kvlens.ui.library import Library

SHORT = "?b.residual_length=32&max_new_tokens=24"
NOTES = (
    "I keep a notebook of our village. Mira is the baker and her oven is blue. Tom mends boats and his dog is called "
    "Pip. Old Anna keeps bees behind the school. The mill belongs to Jonas, who plays the drum. Tell me a story."
)
NASTY = "<img src=x onerror=window.hacked=1><b>bold</b> & tell me a story"


@pytest.fixture
def asked(visitor):
    visitor.open(SHORT)
    visitor.ask(NOTES)
    return visitor


def test_both_lanes_finish_and_panels_show_the_footprint(asked):
    payload, session = asked.payload(), asked.session()
    assert all(lane["finish"] in ("end", "length") for lane in payload["lanes"])
    for lane in payload["lanes"]:
        footprint = session.comparison.lane(lane["id"]).cache.footprint()
        assert lane["figures"]["live_bytes"] == footprint.live_bytes > 0
        assert lane["memory"]["last"] == {part: size for part, size in footprint.parts.items() if size}
        assert lane["figures"]["tokens_per_second"] > 0
        shown = asked.page.locator(f"#kv-lane-{lane['id']} .kv-figure-bytes b").inner_text()
        assert shown == asked.page.evaluate("bytes => KVLens.units.bytes(bytes).split(' ')[0]", footprint.live_bytes)
    assert payload["lanes"][1]["figures"]["times_smaller"] > 1.5
    table = asked.page.locator(".kv-panel-memory table").first.inner_text()
    assert "scales and zeros" in table
    means = payload["errors"]["lanes"][0]["means"]
    assert all(0.0 < mean < 2.0 for mean in means)


def test_the_answers_are_what_the_engine_said_and_their_parting_is_marked(asked):
    payload, session = asked.payload(), asked.session()
    for lane in session.recording.log.lanes:
        assert asked.answer(lane.lane_id) == lane.text
    difference = payload["difference"]
    marked = asked.page.evaluate("[...CSS.highlights.get('kv-parting-token')].map(range => range.toString())")
    if difference is None:
        assert marked == []
    else:
        assert marked == [lane.steps[difference].text for lane in session.recording.log.lanes]
        assert f"at token {difference + 1}" in asked.page.locator("#kv-lane-b .kv-parting").inner_text()


def test_a_second_turn_reads_only_its_own_tokens(asked):
    first = asked.payload()
    second = asked.ask("And what did the baker say?")
    for before, now in zip(first["lanes"], second["lanes"], strict=True):
        figures = now["figures"]
        assert figures["reused_tokens"] >= before["figures"]["prompt_tokens"]
        assert figures["prompt_tokens"] - figures["reused_tokens"] < before["figures"]["prompt_tokens"]
        shown = asked.page.locator(f"#kv-lane-{now['id']} .kv-lane-status").inner_text()
        assert f"{figures['reused_tokens']} kept" in shown
    assert NOTES[:40] in asked.chat("a")
    assert "And what did the baker say?" in asked.chat("b")


def test_the_error_panel_shows_the_layer_under_the_microscope(asked):
    page = asked.page
    page.click(".kv-panel-errors >> text=channel × token")
    asked.wait("KVLens.feed.latest.view.figure === 'channels'")
    errors = asked.payload()["errors"]
    head_dim = asked.site.hub.model.shape.head_dim
    assert errors["lanes"][0]["cells"]["s"][0] == head_dim
    drawn = page.evaluate("document.querySelector('.kv-heatmap .js-plotly-plot').data[0].z.length")
    assert drawn == head_dim
    page.click(".kv-panel-errors .kv-segments >> text=/^V$/")
    asked.wait("KVLens.feed.latest.view.kind === 'values'")
    page.click(".kv-panel-errors >> text=layer × head")
    asked.wait("KVLens.feed.latest.view.figure === 'heads'")


def test_an_example_fills_the_prompt_and_offers_what_may_follow(visitor):
    visitor.open(SHORT)
    page, typed = visitor.page, "document.querySelector('#kv-prompt textarea').value"
    page.click("#kv-chips >> text=A whole chapter")
    visitor.wait(f"{typed}.includes('cyclone cellar')")
    page.click(".kv-then.kv-is-open >> text=Where does Mira live?")
    visitor.wait(f"{typed} === 'Where does Mira live?'")
    page.click("#kv-chips >> text=A code to remember")
    visitor.wait(f"{typed}.startsWith('My locker code')")
    assert page.locator(".kv-then.kv-is-open").count() == 0
    page.click("#kv-chips >> text=A whole chapter")
    page.locator(".kv-then.kv-is-open").wait_for()
    page.click("#kv-clear")
    visitor.wait("!document.querySelector('.kv-then.kv-is-open')")


def test_stop_ends_the_answer_in_under_half_a_second(visitor, endless):
    visitor.open("?max_new_tokens=1500")
    visitor.send("Tell me a very long story about a heron.")
    visitor.wait("KVLens.feed.latest.state === 'running' && KVLens.feed.latest.lanes[1].figures.new_tokens > 2")
    assert visitor.page.locator("#kv-stop").is_visible()
    assert not visitor.page.locator("#kv-send").is_visible()
    waited_ms = visitor.page.evaluate(
        """() => new Promise((resolve) => {
            const start = performance.now();
            document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }));
            const look = () => document.body.dataset.kvState === 'done'
                ? resolve(performance.now() - start) : requestAnimationFrame(look);
            look();
        })"""
    )
    payload = visitor.payload()
    assert [lane["finish"] for lane in payload["lanes"]] == ["stopped", "stopped"]
    assert waited_ms < 500
    assert visitor.page.locator("#kv-send").is_visible()


def test_parts_that_are_there_before_the_script_wait_for_it(visitor):
    held = []
    visitor.page.route("**/kvlens/app.js*", lambda route: held.append(route))
    visitor.page.goto(visitor.site.address)
    visitor.page.wait_for_selector("#kv-header .kv-header", state="attached")
    assert visitor.page.evaluate("window.KVLens === undefined")
    held[0].continue_()
    visitor.wait("window.KVLens && KVLens.feed.latest")
    visitor.page.wait_for_selector("#kv-header .kv-word")
    visitor.page.wait_for_selector("#kv-lane-b .kv-summary")


def test_settings_survive_a_reload(visitor):
    visitor.open()
    page = visitor.page
    page.click("#kv-lane-b .kv-summary")
    page.locator("#kv-lane-b .kv-field", has_text="Key bits").get_by_role("button", name="4", exact=True).click()
    page.wait_for_function("location.search.includes('b.key_bits=4')")
    page.locator("#kv-lane-a .kv-method").select_option("kivi")
    page.wait_for_function("location.search.includes('method_a=kivi')")
    page.click("#kv-settings > button")
    page.locator("#kv-settings").get_by_label("System prompt").fill("Be brief & kind.")
    page.keyboard.press("Tab")
    page.wait_for_function("location.search.includes('system_prompt=')")
    page.reload()
    page.wait_for_selector("#kv-send")
    page.wait_for_function("document.querySelector('#kv-lane-b .kv-summary')?.textContent.includes('K4')")
    assert page.locator("#kv-lane-a .kv-method").input_value() == "kivi"
    page.click("#kv-settings > button")
    page.wait_for_function("document.querySelector('#kv-settings textarea')?.value === 'Be brief & kind.'")


def test_regenerate_edit_and_clear(asked):
    page, first = asked.page, asked.payload()["run_id"]
    page.click("#kv-regenerate")
    asked.wait("first => KVLens.feed.latest.run_id !== first && document.body.dataset.kvState === 'done'", first)
    assert len(asked.session().turns) == 1
    page.click("#kv-edit")
    page.wait_for_function("text => document.querySelector('#kv-prompt textarea').value === text", arg=NOTES)
    assert asked.session().turns == []
    second = asked.ask("Hello there.")
    assert second["lanes"][0]["figures"]["prompt_tokens"] < 60
    page.click("#kv-clear")
    page.wait_for_function("!document.querySelector('#kv-chat-a [data-testid=\"bot\"]')")


def test_clearing_while_it_answers_leaves_an_empty_chat(visitor, endless):
    visitor.open("?max_new_tokens=1500")
    visitor.send("Tell me a very long story.")
    visitor.wait("KVLens.feed.latest.state === 'running'")
    visitor.page.click("#kv-clear")
    visitor.wait("!document.querySelector('#kv-chat-a [data-testid=\"user\"]')")
    expect_recorded_run(visitor)
    assert visitor.page.locator("#kv-chat-a [data-testid=user]").count() == 0


def test_stopping_while_another_run_goes_first_gives_the_prompt_back(visit, endless):
    one, two = visit(), visit()
    for visitor in (one, two):
        visitor.open("?max_new_tokens=1500")
    one.send("Tell me a very long story.")
    one.wait("KVLens.feed.latest.state === 'running'")
    two.send("Hello from the queue.")
    two.wait("document.body.dataset.kvState === 'waiting'")
    assert two.page.locator(".kv-status-label").inner_text() == ""
    two.page.click("#kv-stop")
    two.wait("document.querySelector('#kv-prompt textarea').value === 'Hello from the queue.'")
    expect_recorded_run(two)
    two.wait("!document.querySelector('#kv-chat-a').textContent.includes('Hello from the queue.')")
    one.page.click("#kv-stop")
    one.wait("document.body.dataset.kvState === 'done'")


def test_a_fault_in_the_first_run_brings_the_recorded_run_back(visitor, monkeypatch):
    steps = runner._steps

    def broken(*arguments):
        for index, log in enumerate(steps(*arguments)):
            if index == 12:
                raise EngineError("The cache has no room left.")
            yield log

    monkeypatch.setattr(runner, "_steps", broken)
    visitor.open()
    shown = visitor.payload()["run_id"]
    visitor.page.fill("#kv-prompt textarea", "Tell me a story about a heron.")
    visitor.page.press("#kv-prompt textarea", "Enter")
    visitor.wait("document.querySelector('.kv-notice').textContent === 'The cache has no room left.'")
    expect_recorded_run(visitor)
    assert visitor.payload()["run_id"] == shown
    assert visitor.page.locator("#kv-prompt textarea").input_value() == "Tell me a story about a heron."
    assert visitor.answer("a") == Library().first().log.lanes[0].text


def test_a_stop_while_the_prompt_is_read_gives_it_back(visitor, monkeypatch):
    steps = runner._steps

    def stopped(session, ticket, *others):
        for log in steps(session, ticket, *others):
            ticket.stop.set()
            yield log

    monkeypatch.setattr(runner, "_steps", stopped)
    visitor.open()
    before = visitor.payload()["sequence"]
    visitor.page.fill("#kv-prompt textarea", NOTES)
    visitor.page.press("#kv-prompt textarea", "Enter")
    visitor.wait(
        "before => KVLens.feed.latest.sequence > before && document.body.dataset.kvState === 'recorded'", before
    )
    expect_recorded_run(visitor)
    visitor.wait("text => document.querySelector('#kv-prompt textarea').value === text", NOTES)


def test_no_mark_stands_on_an_answer_of_another_run(asked):
    first = asked.payload()
    asked.ask("And what did the baker say to Tom about the boat?")
    asked.page.click("#kv-edit")
    asked.wait("document.querySelectorAll('#kv-chat-b [data-testid=\"bot\"]').length === 1")
    shown = asked.payload()
    assert shown["run_id"] != first["run_id"]
    for lane, earlier in zip(shown["lanes"], first["lanes"], strict=True):
        assert len(asked.answer(lane["id"])) == earlier["characters"]
        if lane["characters"] != earlier["characters"]:
            taken = asked.page.evaluate("id => KVLens.answers.answerNode(id)", lane["id"])
            assert taken is None


def expect_recorded_run(visitor):
    """Whose figures these are is told again."""
    visitor.wait("document.querySelector('.kv-status-label').textContent.startsWith('Recorded run: ')")
    assert visitor.payload()["state"] == "recorded"


def test_the_link_carries_the_last_prompt(visitor):
    visitor.open("?max_new_tokens=4")
    visitor.ask("What is in the link?")
    visitor.wait("new URLSearchParams(location.search).get('prompt') === 'What is in the link?'")
    visitor.page.reload()
    visitor.page.wait_for_function("document.querySelector('#kv-prompt textarea')?.value === 'What is in the link?'")


def test_two_visitors_at_once_never_mix(visit):
    one, two = visit(), visit()
    prompts = {"one": "Tell me about the red boat.", "two": "Tell me about the green bird."}
    for visitor in (one, two):
        visitor.open(SHORT)
    one.page.fill("#kv-prompt textarea", prompts["one"])
    two.page.fill("#kv-prompt textarea", prompts["two"])
    one.page.press("#kv-prompt textarea", "Enter")
    two.page.press("#kv-prompt textarea", "Enter")
    for visitor in (one, two):
        visitor.wait("['one', 'done'].includes(document.body.dataset.kvState) && KVLens.feed.latest.state === 'done'")
    assert one.payload()["run_id"] != two.payload()["run_id"]
    for own, other, visitor in (("one", "two", one), ("two", "one", two)):
        assert visitor.prompt("a") == visitor.prompt("b") == prompts[own]
        assert prompts[other] not in visitor.chat("a") + visitor.chat("b")
        session = visitor.session()
        assert [turn.prompt for turn in session.turns] == [prompts[own]]
        assert {lane: visitor.answer(lane) for lane in "ab"} == session.turns[0].answers


def test_what_was_written_never_acts_as_html(visitor):
    visitor.open(SHORT)
    visitor.ask(NASTY)
    for lane in "ab":
        assert visitor.prompt(lane) == NASTY
        assert visitor.page.locator(f"#kv-chat-{lane} img, #kv-chat-{lane} b").count() == 0
    assert visitor.page.evaluate("window.hacked") is None


def test_bad_input_is_a_sentence_and_the_page_goes_on(visitor):
    visitor.open(SHORT)
    notice = visitor.page.locator(".kv-notice")
    visitor.page.press("#kv-prompt textarea", "Enter")
    visitor.wait("document.querySelector('.kv-notice').textContent.includes('Type something first')")
    visitor.page.fill("#kv-prompt textarea", "word " * 4000)
    visitor.page.press("#kv-prompt textarea", "Enter")
    visitor.wait("document.querySelector('.kv-notice').textContent.includes('context holds')")
    visitor.wait("document.querySelector('#kv-prompt textarea').value.startsWith('word word')")
    visitor.ask("Hello.")
    assert notice.inner_text() == ""


def test_model_change_is_held_to_what_is_offered(visitor):
    visitor.open()
    visitor.page.click(".kv-chip")
    visitor.page.click(".kv-offered >> text=offered/nowhere")
    visitor.wait("document.querySelector('.kv-menu-list .kv-bad')?.textContent.length > 20")
    assert visitor.site.hub.model is not None
    assert not visitor.page.locator(".kv-model-name").is_visible()

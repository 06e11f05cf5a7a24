"""The Chat tab: two lanes under one prompt, and the live panels. Draws and wires; decides nothing."""

from dataclasses import dataclass

import gradio as gr

from kvlens.ui import controls, text
from kvlens.ui.address import LIMITS, Sampling
from kvlens.ui.handlers import ChatHandlers
from kvlens.ui.learn_handlers import LearnHandlers
from kvlens.ui.tabs import examples

ENGINE_QUEUE = "engine"
"""Everything that computes shares this queue, one at a time: a run must not spoil another's clock."""

CHAT_HEIGHT = "var(--kv-chat-height)"


@dataclass
class ChatElements:
    """What the events of the tab read and write."""

    status: gr.HTML
    lanes: list[gr.HTML]
    chats: list[gr.Chatbot]
    prompt: gr.Textbox
    send: gr.Button
    stop: gr.Button
    regenerate: gr.Button
    edit: gr.Button
    clear: gr.Button
    sampling: list[gr.components.Component]
    panels: gr.HTML
    atoms: gr.HTML
    learning: gr.HTML
    address: gr.HTML
    download: gr.HTML


def mounted(name: str, script: str, value: str | None = None, **options) -> gr.HTML:
    """A component drawn by our own script into a fixed box; its value is one JSON string.

    Gradio adds the page's head from its own script, so a component may be there before ours is.
    """
    return gr.HTML(
        value,
        html_template=f'<div class="{name}"></div>',
        js_on_load=(
            f"const mount = () => ({script})({{element, props, trigger, watch}});\n"
            'if (window.KVLens) mount(); else addEventListener("kvlens", mount, { once: true });'
        ),
        apply_default_css=False,
        padding=False,
        **options,
    )


def draw(handlers: ChatHandlers) -> ChatElements:
    first = handlers.first_frame()
    # The script names its custom events: gr.HTML only knows events that stand in its script.
    status = mounted("kv-status", "/* 'replay' */ KVLens.statusLine", elem_id="kv-status")
    lanes, chats = [], []
    with gr.Row(elem_id="kv-lanes", equal_height=True):
        for lane_id, messages in zip(controls.LANES, first.chats, strict=True):
            with gr.Column(elem_classes="kv-lane-card", min_width=300):
                value = controls.default_choice(lane_id).to_json()
                script = f"/* 'change' */ ((part) => KVLens.lane(part, '{lane_id}'))"
                lanes.append(mounted("kv-lane", script, value, elem_id=f"kv-lane-{lane_id}"))
                chats.append(_chat(lane_id, messages))
    prompt, send, stop, regenerate, edit, clear, sampling = _asking()
    panels = mounted("kv-panels", "/* 'select' */ KVLens.panels", first.payload, elem_id="kv-panels")
    # It draws from the same stream as the panels, and is below them, as wide as the page.
    atoms = mounted("kv-atoms", "/* 'select' */ KVLens.atomsPanel", elem_id="kv-atoms")
    learning = mounted("kv-silent", "/* 'learn' 'stop' */ KVLens.learning", elem_classes="kv-silent-block")
    address = mounted("kv-silent", "KVLens.address", elem_classes="kv-silent-block")
    download = mounted("kv-silent", "KVLens.download", elem_classes="kv-silent-block")
    return ChatElements(
        status, lanes, chats, prompt, send, stop, regenerate, edit, clear, sampling, panels, atoms, learning, address,
        download,
    )  # fmt: skip


def _chat(lane_id: str, messages) -> gr.Chatbot:
    return gr.Chatbot(
        messages,
        elem_id=f"kv-chat-{lane_id}",
        elem_classes="kv-chat",
        height=CHAT_HEIGHT,
        layout="panel",
        render_markdown=False,
        show_label=False,
        container=False,
        buttons=[],
        feedback_options=None,
        placeholder=text.LANE_EMPTY,
        autoscroll=True,
    )


def _asking():
    """The prompt box with its buttons, the example chips and the settings of a run."""
    usual, offered = Sampling(), examples.read_examples()
    with gr.Column(elem_id="kv-ask"):
        with gr.Row(elem_id="kv-ask-row"):
            prompt = gr.Textbox(
                lines=1, max_lines=5, placeholder=text.PROMPT_PLACEHOLDER, show_label=False, container=False,
                elem_id="kv-prompt", scale=1, autofocus=True,
            )  # fmt: skip
            send = gr.Button(text.SEND, variant="primary", elem_id="kv-send", scale=0, min_width=96)
            stop = gr.Button(text.STOP, variant="stop", elem_id="kv-stop", scale=0, min_width=96)
        with gr.Row(elem_id="kv-actions"):
            with gr.Row(elem_id="kv-chips"):
                chips = examples.draw_chips(offered)
            gr.HTML("", elem_classes="kv-spring")
            buttons = [
                gr.Button(label, size="sm", elem_id=f"kv-{name}", elem_classes="kv-quiet-button", min_width=0, scale=0)
                for name, label in (("regenerate", text.REGENERATE), ("edit", text.EDIT_LAST), ("clear", text.CLEAR))
            ]
        follow_ups = examples.draw_follow_ups(offered)
        with gr.Accordion(text.SETTINGS, open=False, elem_id="kv-settings"):
            system = gr.Textbox(
                usual.system_prompt, label=text.SYSTEM_PROMPT, placeholder=text.SYSTEM_PROMPT_HINT, lines=2
            )
            with gr.Row():
                max_new = gr.Slider(
                    *LIMITS["max_new_tokens"], usual.max_new_tokens, step=1,
                    label=text.MAX_NEW_TOKENS, info=text.MAX_NEW_TOKENS_HELP, min_width=290,
                )  # fmt: skip
                temperature = gr.Slider(
                    *LIMITS["temperature"], usual.temperature, step=0.05,
                    label=text.TEMPERATURE, info=text.TEMPERATURE_HELP, min_width=290,
                )  # fmt: skip
                top_p = gr.Slider(
                    *LIMITS["top_p"], usual.top_p, step=0.01, label=text.TOP_P, info=text.TOP_P_HELP, min_width=290
                )
                seed = gr.Number(usual.seed, label=text.SEED, info=text.SEED_HELP, precision=0, min_width=290)
    examples.wire(offered, chips, follow_ups, prompt, clear=buttons[-1])
    return prompt, send, stop, *buttons, [system, max_new, temperature, top_p, seed]


def wire(elements: ChatElements, header: gr.HTML, handlers: ChatHandlers, demo: gr.Blocks) -> None:
    """Connect events. Everything here is private: the public API stands in `api.py`."""
    quick = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    slow = {"api_visibility": "private", "show_progress": "hidden", "concurrency_id": ENGINE_QUEUE}
    settings = [*elements.lanes, *elements.sampling]
    shown = [elements.prompt, *elements.chats, elements.panels]
    asked = gr.on(
        [elements.send.click, elements.prompt.submit], handlers.send, [elements.prompt, *settings], shown, **quick
    )
    again = elements.regenerate.click(handlers.regenerate, settings, shown, **quick)
    for event in (asked, again):
        answered = event.then(handlers.answer, None, shown, concurrency_limit=1, **slow)
        # Another page may have changed the model meanwhile.
        answered.then(handlers.header, None, header, **quick)
    elements.stop.click(handlers.stop, None, shown, **quick)
    elements.edit.click(handlers.edit_last, None, shown, **quick)
    elements.clear.click(handlers.clear, None, shown, **quick)
    gr.on(
        [elements.panels.select, elements.atoms.select], handlers.select, None, elements.panels,
        trigger_mode="always_last", **quick,
    )  # fmt: skip
    elements.status.replay(
        handlers.replay, None, shown, api_visibility="private", show_progress="hidden",
        concurrency_id="replay", concurrency_limit=8,
    )  # fmt: skip
    header.recorded(handlers.show_recorded, None, shown, **quick)
    header.upload(handlers.upload, None, shown, **quick)
    header.export(handlers.export, None, [elements.download, elements.panels], **quick)
    header.model(handlers.change_model, None, [header, *shown], concurrency_limit=1, **slow)
    gr.on(
        [*(entry.change for entry in settings), *(one.blur for one in (elements.sampling[0], elements.prompt)),
         elements.address.apply],
        handlers.note_address, [elements.prompt, *settings], elements.address, trigger_mode="always_last", **quick,
    )  # fmt: skip
    restored = demo.load(
        handlers.restore, None, [elements.prompt, *settings, elements.address, elements.panels], **quick
    )  # fmt: skip
    restored.then(
        handlers.watch_model, None, header, api_visibility="private", show_progress="hidden",
        concurrency_id="watch", concurrency_limit=64,
    )  # fmt: skip
    demo.unload(handlers.leave)


def wire_learning(elements: ChatElements, handlers: LearnHandlers) -> None:
    """Connect the learning of dictionaries, in the queue of everything that computes."""
    quick = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    slow = {"api_visibility": "private", "show_progress": "hidden", "concurrency_id": ENGINE_QUEUE}
    learning = elements.learning
    asked = learning.learn(handlers.ask, None, learning, **quick)
    asked.then(handlers.learn, None, learning, concurrency_limit=1, **slow)
    learning.stop(handlers.stop, None, learning, **quick)
